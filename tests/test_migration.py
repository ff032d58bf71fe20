"""`--migrate` of stage 3W: the model stays the same, wide channels become narrow, later stages read the result."""

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, invoke
from finished_run import one_line
from mlx.utils import tree_flatten, tree_map
from test_rest import ends  # noqa: F401  (a fixture)

from calibration_store.layout import WeightPaths
from calibration_store.rest_weights import read_migration, read_rest
from w4a8.evaluation.variants import make_variant
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.model.dual_attention import empty_transformer
from w4a8.model.families import family_of
from w4a8.model.folder import load_folder_transformer
from w4a8.model.layers import model_blocks, model_layers, note_latent_size, run_final_layer
from w4a8.model.migration import migrate, migrated_together
from w4a8.quantized.activation_rules import StaticByStep
from w4a8.quantized.dynamic_rules import DynamicPerToken
from w4a8.rounding.migration import least_costly

OPTIMIZE = ("--iters", 10, "--batch-size", 2, "--migrate", "--bits", "mm[123456].*=16", "--no-alpha")
LAYERS = {
    "mm0": 10,  # q, k, v of two streams, two fc1, two o_proj; no fc2
    "mm7": 8,  # the last block has no text o_proj and mlp
}


def velocity(mmdit):
    """Return what the model gives for random tokens (rows, tokens, 1, hidden)."""
    keys = mx.random.split(mx.random.key(1), 3)
    tokens = [mx.random.normal((2, count, 1, 192), key=key) for count, key in zip((64, 32), keys, strict=False)]
    modulation = mx.random.normal((2, 1, 1, 192), key=keys[2])
    for block in model_blocks(mmdit).values():
        tokens = block.run(tokens, modulation)
    return np.array(run_final_layer(mmdit, tokens[0], modulation))


def test_a_migrated_model_computes_the_same():
    """Multipliers from 1/30 to 30 on every input but fc2's: the velocity moves by what adaLN's rounding to float16 takes."""
    mmdit = load_folder_transformer(BUNDLED_FOLDER, mx.float32)
    before, layers = velocity(mmdit), model_layers(mmdit)
    weights = {name: np.array(layer.weight) for name, layer in layers.items()}
    generator, multipliers = np.random.default_rng(0), {}
    for block in model_blocks(mmdit).values():
        for names in migrated_together(block):
            width = layers[names[0]].shape[1]
            multipliers |= dict.fromkeys(names, np.exp(generator.uniform(-3.4, 3.4, width)).astype(np.float32))
    assert multipliers.keys() == {name for name in layers if not name.endswith("fc2")}
    migrate(mmdit, multipliers)
    after = velocity(mmdit)
    assert np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2)) < 2e-3
    for name, m in multipliers.items():
        if not name.endswith("v_proj"):  # whose rows are divided, too
            np.testing.assert_allclose(np.array(layers[name].weight), weights[name] * m, rtol=1e-6)


@pytest.mark.parametrize(
    "hub_id, largest",
    [
        ("argmaxinc/mlx-stable-diffusion-3.5-large", 1e-3),
        ("stabilityai/stable-diffusion-3.5-medium", 1e-3),
        ("argmaxinc/mlx-FLUX.1-schnell", 4e-3),
    ],  # FLUX: bfloat16
)
def test_other_families_compute_the_same(hub_id, largest):
    """Normalized q and k, and FLUX's joined tokens, with few blocks and heads; unified blocks are left alone."""
    config = family_of(hub_id).config
    sizes = {"depth_multimodal": 2, "depth_unified": min(1, config.depth_unified), "num_heads": 2}
    width = 2 * (config.hidden_size // config.num_heads)
    sizes["dual_attention_blocks"] = min(1, config.dual_attention_blocks)
    mmdit = empty_transformer(dataclasses.replace(config, **sizes, hidden_size_override=width))
    mx.random.seed(3)
    mmdit.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.05, mmdit.parameters()))
    note_latent_size(mmdit, (8, 8))
    tokens = [mx.random.normal((2, count, 1, width)) for count in (16, 7)]
    modulation = mx.random.normal((2, 1, 1, width))

    def output():
        given = tokens
        for block in model_blocks(mmdit).values():
            given = block.run(given, modulation)
        return np.array(given[0])

    before, layers, generator = output(), model_layers(mmdit), np.random.default_rng(0)
    groups = [names for block in model_blocks(mmdit).values() for names in migrated_together(block)]
    assert not any(name.startswith("uni") for names in groups for name in names)
    multipliers = {}
    for names in groups:
        m = np.exp(generator.uniform(-2, 2, layers[names[0]].shape[1])).astype(np.float32)
        multipliers |= dict.fromkeys(names, m)
    migrate(mmdit, multipliers)
    assert np.sqrt(np.mean((output() - before) ** 2) / np.mean(before**2)) < largest


def test_layers_that_keep_their_weights_keep_others_from_migrating():
    """The input of a kept layer is not migrated, nor the output of a kept value projection."""
    mmdit = load_folder_transformer(BUNDLED_FOLDER, mx.float32)
    for block, count in LAYERS.items():
        assert sum(map(len, migrated_together(model_blocks(mmdit)[block]))) == count
    found = migrated_together(model_blocks(mmdit)["mm0"], ["mm0.txt.attn.v_proj", "mm0.img.mlp.fc1"])
    assert found == [[f"mm0.img.attn.{key}_proj" for key in "qkv"], ["mm0.txt.mlp.fc1"]]


def test_a_wide_channel_becomes_narrow():
    """The product's error falls; where no channel is wide and weights stay, nothing is migrated."""
    x, weight = (mx.random.normal(shape, key=mx.random.key(7)) for shape in ((256, 64), (96, 64)))
    wide = mx.array(np.where(np.arange(64) == 5, 50.0, 1.0).astype(np.float32))
    rule = DynamicPerToken(8).at(0.0, 1)

    def error(m):
        inputs = rule("mm0.img.mlp.fc1", (x * wide / m)[None, :, None])[0, :, 0]
        return float(mx.mean(mx.square(inputs @ (weight * m).T - (x * wide) @ weight.T)))

    m = least_costly([("mm0.img.mlp.fc1", weight, x * wide, 8)], 64, rule)
    assert np.argmax(np.array(m)) == 5 and m[5] > 5 and error(m) < error(mx.ones(64)) / 4
    ones = mx.ones((256, 64))
    assert least_costly([("mm0.img.mlp.fc1", mx.ones((96, 64)), ones, 8)], 64, None) is None


def test_static_ranges_beside_migrated_weights_are_those_of_the_original():
    """An input x / m is quantized as x would be: x̂ / m."""
    x = mx.random.normal((1, 32, 1, 64), key=mx.random.key(2)) * 3
    m = np.exp(np.random.default_rng(3).uniform(-2, 2, 64)).astype(np.float32)
    entries = {
        0.5: {
            "a": {"bits": 8, "clipping_range": 4.0},
            "b": {"bits": 6, "clipping_range": 3.0, "shift": np.linspace(-1, 1, 64, dtype=np.float32)},
        }
    }
    rule = StaticByStep(entries, BUNDLED_FOLDER, {})
    after = rule.after_migration("w4", lambda: {"a": m, "b": m})
    assert rule.after_migration("w4", dict) is rule and after.exported() is None
    for name in "ab":
        expected = np.array(rule.at(0.5, 1)(name, x)) / m
        np.testing.assert_allclose(np.array(after.at(0.5, 1)(name, x / m)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_migrated_weights_go_through_the_stages(ends, tmp_path):  # noqa: F811
    """The quantized model is measured as it was trained, exported, and drawn; a lost file is told in one line."""
    folder = tmp_path / "run"
    shutil.copytree(ends, folder)
    done = invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE, "--no-tune-rest")
    assert done.exit_code == 0 and "wide inputs migrated" in done.stdout, done.output
    root, paths = folder / "adaround_weights", WeightPaths(folder)
    metadata = json.loads((root / "metadata.json").read_bytes())
    multipliers, rest = read_migration(paths, metadata), read_rest(paths, metadata)
    assert {name.split(".")[0] for name in multipliers} <= {"mm0", "mm7"} and len(multipliers) > 10

    mmdit = load_folder_transformer(BUNDLED_FOLDER, mx.float32)
    original = dict(tree_flatten(mmdit.parameters()))
    migrate(mmdit, multipliers)
    for path, array in tree_flatten(mmdit.parameters()):
        if "adaLN" in path and path.startswith("multimodal"):
            assert np.array_equal(np.array(array).astype(np.float16), rest.pop(path)), path
    assert not rest
    for name, fields in make_variant("w4-adaround", folder).weights.fields():
        weight, dense = np.array(model_layers(mmdit)[name].weight), fields["scale"][..., None]
        dense = dense * (fields["q"].reshape(*fields["scale"].shape, -1) - fields["zero_point"][..., None])
        error = np.sqrt(np.mean((dense.reshape(weight.shape) - weight) ** 2) / np.mean(weight**2))
        assert error < 0.15, name  # 4 bits of the migrated weights, which may be far from the original's
    assert any(
        not np.allclose(np.array(model_layers(mmdit)[name].weight), np.array(original[path]), rtol=0.2)
        for path in original if path.endswith("0.image_transformer_block.mlp.fc1.weight") for name in ["mm0.img.mlp.fc1"]
    )  # fmt: skip

    before = folder_bytes(root)
    done = invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE, "--no-tune-rest", "--resume")
    assert done.exit_code == 0 and folder_bytes(root) == before
    one_line(
        invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE[:4], *OPTIMIZE[5:], "--no-tune-rest", "--resume"),
        "--migrate",
    )
    for script, *arguments in (
        ("collect_layer_activations", "--num-images", 2),
        ("analyze_activations",),
        ("export_quantized_model",),
        ("evaluate_quantization", "--num-images", 1, "--num-steps", 2, "--variants", "w4-adaround,native,native+a8-token"),
    ):  # fmt: skip
        done = invoke(script, "--calib-dir", folder, *arguments)
        assert done.exit_code == 0, done.output
    variants = json.loads((folder / "evaluation/metrics.json").read_bytes())["variants"]
    assert variants["native"]["psnr"]["mean"] == pytest.approx(variants["w4-adaround"]["psnr"]["mean"], abs=0.2)
    assert json.loads((folder / "quantized_model/config.json").read_bytes())["export"]["activations"] == "a8-token"
    again = (*OPTIMIZE, "--no-tune-rest", "--iters", 12, "--force", "--dry-run")
    assert invoke("optimize_adaround", "--calib-dir", folder, *again).exit_code == 0
    export = ("export_quantized_model", "--calib-dir", folder, "--force", "--activations")
    one_line(invoke(*export, "a8"), "--activations a8: its ranges are of inputs that these weights have divided")

    whole = (root / "migration.npz").read_bytes()
    (root / "migration.npz").write_bytes(whole[:-9])
    one_line(invoke(*export, "a8-token"), "migration.npz")
    (root / "migration.npz").unlink()
    done = invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE, "--no-tune-rest", "--resume")
    one_line(done, "migration.npz: missing; run optimize_adaround.py with --force")


def test_a_migration_of_some_blocks_is_refused(ends, tmp_path):  # noqa: F811
    done = invoke("optimize_adaround", "--calib-dir", ends, "--migrate", "--blocks", "mm0")
    one_line(done, "--migrate needs every block: leave --blocks out")


@pytest.mark.slow
def test_learned_ranges_go_with_the_migrated_weights_alone(ends, tmp_path):  # noqa: F811
    """Also stage 5's folder needs the multipliers for a static rule; without them it says so."""
    folder = tmp_path / "run"
    shutil.copytree(ends, folder)
    static = ("--activation-rule", "static", "--no-tune-rest")
    assert invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE, *static).exit_code == 0
    evaluate = (
        "evaluate_quantization",
        "--calib-dir",
        folder,
        "--num-images",
        1,
        "--num-steps",
        1,
        "--force",
        "--variants",
    )
    assert invoke(*evaluate, "w4-adaround+a8-learned").exit_code == 0
    for variant in ("a8-learned", "w4-rtn+a8-learned"):
        one_line(invoke(*evaluate, variant), f"{variant}: the learned ranges are of inputs that --migrate divided")
    for script, *arguments in (
        ("collect_layer_activations", "--num-images", 1, "--stride", 4),
        ("analyze_activations",),
        ("export_quantized_model",),
    ):
        done = invoke(script, "--calib-dir", folder, *arguments)
        assert done.exit_code == 0, done.output
    export = json.loads((folder / "quantized_model/config.json").read_bytes())["export"]
    assert export["migrated"] is True and export["activations"] == "a8-learned"
    shutil.rmtree(folder / "adaround_weights")
    assert invoke(*evaluate, "native+a8-token").exit_code == 0
    one_line(invoke(*evaluate, "native+a8"), "stage 3W migrated its inputs, and migration.npz is not there")
