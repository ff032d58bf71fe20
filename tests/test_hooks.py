"""hooks.py on DiffusionKit's own blocks: the bundled model, and a tiny FLUX with unified blocks."""

import copy

import mlx.core as mx
import pytest
from diffusionkit.mlx.config import FLUX_SCHNELL
from mlx.utils import tree_flatten, tree_unflatten

from w4a8.model.diffusionkit import MMDiT
from w4a8.model.hooks import BlockHook, LiveHooksError, _HookedLayer, hooked_blocks, hooked_layers
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import TextConditioning, encode_prompts
from w4a8.model.replay import Replay
from w4a8.model.sampling import initial_noise, sigma_schedule
from w4a8.statistics.kernels import INPUTS_PER_KERNEL
from w4a8.statistics.recorders import LazyRecorder, StreamingRecorder

STREAM = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2"]


@pytest.fixture
def pass_of_emoji(emoji):
    """forward(): one pass of the bundled model, unevaluated."""
    text = encode_prompts(emoji, ["rocket"], 4.0)
    timestep = sigma_schedule(emoji, 10)[1][3:4]
    with modulation_cache(emoji, [text.pooled], timestep):
        replay = Replay(emoji, text)
        yield lambda: replay.forward(initial_noise(0, (16, 16)), timestep[0])


def tiny_flux():
    config = copy.copy(FLUX_SCHNELL)
    config.num_heads, config.depth_multimodal, config.depth_unified = 2, 2, 3
    config.hidden_size_override, config.rope_axes_dim = 256, (16, 56, 56)
    config.token_level_text_embed_dim, config.low_memory_mode, config.dtype = 32, False, mx.float32
    return MMDiT(config)


def test_names_of_the_bundled_model(emoji):
    names = list(model_layers(emoji.mmdit))
    expected = [f"mm{i}.{stream}.{layer}" for i in range(8) for stream in ("img", "txt") for layer in STREAM]
    missing = {f"mm7.txt.{layer}" for layer in STREAM[3:]}  # an Identity, and no mlp
    assert names == [name for name in expected if name not in missing] and len(names) == 93
    assert list(model_blocks(emoji.mmdit)) == [f"mm{i}" for i in range(8)]


def test_layers_are_reported_with_their_inputs_and_the_output_stays(emoji, pass_of_emoji):
    plain, seen = pass_of_emoji(), {}
    with hooked_layers(emoji.mmdit, lambda name, x: seen.update({name: x})) as names:
        hooked = pass_of_emoji()
    assert mx.array_equal(plain, hooked)
    assert sorted(seen) == sorted(names)
    for i in range(8):
        for stream in ("img", "txt"):
            q, k, v = (seen[f"mm{i}.{stream}.attn.{key}_proj"] for key in "qkv")
            assert q is k and k is v
    assert seen["mm0.img.mlp.fc2"].shape == (2, 64, 1, 768) and seen["mm0.txt.mlp.fc1"].shape == (2, 32, 1, 192)


def test_blocks_are_reported_with_arguments_and_outputs(emoji, pass_of_emoji):
    seen = {}
    with hooked_blocks(
        emoji.mmdit, lambda name, args, outputs: seen.update({name: (args, outputs)}), ["mm2", "mm3", "mm7"]
    ):
        pass_of_emoji()
    assert list(seen) == ["mm2", "mm3", "mm7"]
    assert seen["mm3"][0][0] is seen["mm2"][1][0] and seen["mm3"][0][1] is seen["mm2"][1][1]
    assert seen["mm7"][1][1] is None


def tree(mmdit):
    return [(name, id(array)) for name, array in tree_flatten(mmdit.parameters())]


def test_everything_is_restored_also_after_an_exception(emoji, pass_of_emoji):
    before, blocks = tree(emoji.mmdit), list(emoji.mmdit.multimodal_transformer_blocks)
    for install in (hooked_layers, hooked_blocks):
        with install(emoji.mmdit, None):
            pass_of_emoji()
        assert tree(emoji.mmdit) == before
        with pytest.raises(ZeroDivisionError), install(emoji.mmdit, None):
            raise ZeroDivisionError
        assert tree(emoji.mmdit) == before
        assert all(a is b for a, b in zip(emoji.mmdit.multimodal_transformer_blocks, blocks, strict=True))
    emoji.mmdit.load_weights([], strict=False)


def test_a_second_install_and_a_reload_name_issue_11(emoji):
    one = [("multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj.bias", mx.zeros((192,)))]
    for install in (hooked_layers, hooked_blocks):
        with install(emoji.mmdit, None):
            for again in (hooked_layers, hooked_blocks):
                with pytest.raises(LiveHooksError, match="second time.*Issue 11"), again(emoji.mmdit, None):
                    pass
            for strict in (True, False):
                with pytest.raises(LiveHooksError, match="reloaded.*Issue 11"):
                    emoji.mmdit.load_weights(one, strict=strict)
            with pytest.raises(LiveHooksError, match="updated.*Issue 11"):
                emoji.mmdit.update(tree_unflatten(one))
            timesteps = sigma_schedule(emoji, 2)[1]
            with pytest.raises(LiveHooksError), modulation_cache(emoji, [mx.zeros((2, 320))], timesteps):
                pass


def test_proxies_are_plain(emoji):
    layer = emoji.mmdit.multimodal_transformer_blocks[0].image_transformer_block.attn.q_proj
    for proxy in (_HookedLayer(layer, "a", None), BlockHook(layer, "a", None)):
        twin = copy.copy(proxy)
        assert twin._wrapped is layer and twin.weight is layer.weight
        with pytest.raises(AttributeError):
            proxy._no_such_thing
        x = mx.random.normal((2, 192))
        assert mx.array_equal(proxy(x), layer(x))


def test_flux_with_unified_blocks():
    mmdit = tiny_flux()
    names = list(model_layers(mmdit))
    assert [name for name in names if name.startswith("uni2")] == [f"uni2.{layer}" for layer in STREAM]
    assert list(model_blocks(mmdit)) == ["mm0", "mm1", "uni0", "uni1", "uni2"]
    assert len(names) == 2 * 12 + 3 * 6  # the last multimodal block of FLUX keeps its text mlp
    text = TextConditioning(mx.random.normal((1, 8, 32)), mx.random.normal((1, 768)))
    timestep = mx.array([500.0])
    pipeline = type("Pipeline", (), {"mmdit": mmdit})
    with modulation_cache(pipeline, [text.pooled], timestep):
        replay = Replay(pipeline, text)
        latent = mx.random.normal((1, 8, 8, 16))
        plain, seen = replay.forward(latent, timestep[0]), {}
        before = tree(mmdit)
        with hooked_layers(mmdit, lambda name, x: seen.update({name: x})):
            hooked = replay.forward(latent, timestep[0])
        assert mx.array_equal(plain, hooked) and sorted(seen) == sorted(names)
        assert seen["uni0.attn.q_proj"] is seen["uni0.mlp.fc1"]  # parallel attention and mlp
        blocks = {}
        with hooked_blocks(mmdit, lambda name, args, outputs: blocks.update({name: (args[0], outputs)})):
            assert mx.array_equal(replay.forward(latent, timestep[0]), plain)
        assert blocks["uni1"][0] is blocks["uni0"][1]
        assert [name for name, _ in tree(mmdit)] == [name for name, _ in before]


@pytest.mark.parametrize("kind", ["lazy", "streaming"])
def test_hooked_activations_do_not_live_to_the_end_of_the_pass(emoji, pass_of_emoji, kind):
    def peak(run):
        mx.synchronize()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        return mx.get_peak_memory() - active

    sizes = []
    with hooked_layers(
        emoji.mmdit, lambda name, x: sizes.append(x.nbytes) if name.split(".")[-1] not in ("k_proj", "v_proj") else None
    ):
        pass_of_emoji()

    def collect():
        maxima = LazyRecorder(lambda inputs: [mx.concatenate([x.max(axis=0) for x in inputs])])
        recorder = maxima if kind == "lazy" else StreamingRecorder()
        with hooked_layers(emoji.mmdit, recorder.record):
            recorder.finish(pass_of_emoji())

    plain = peak(lambda: mx.eval(pass_of_emoji()))
    assert len(sizes) == 61 and INPUTS_PER_KERNEL == 8
    assert peak(collect) - plain < 0.25 * sum(sizes)
