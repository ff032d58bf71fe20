"""Numbers that other programs computed, stored by the scripts in tests/references/: T5's ids, PyTorch's velocity and image."""

import gzip
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from calibration_store.model_folder import BOS, EOS
from w4a8.model import t5
from w4a8.model.clip_tokenizer import STAND_INS, ClipTokenizer
from w4a8.model.diffusionkit import T5Tokenizer
from w4a8.model.families import FOLDER_FAMILY
from w4a8.model.location import Lora
from w4a8.model.lora import with_loras
from w4a8.model.modulation import modulation_cache

REFERENCES = ROOT / "tests/references"
STAND_INS_IN_ORDER = sorted(STAND_INS)  # printable bytes first, as CLIP numbers them


PEFT = np.load(REFERENCES / "peft_adapters.npz")


@pytest.mark.parametrize("kind", json.loads(str(PEFT["notes"])))
def test_adapters_merge_as_in_peft_and_lycoris(tmp_path, kind):
    """LoRA, rsLoRA, alpha_pattern, DoRA, LoHa and LoKr, in the files that these libraries write."""
    start, layer = f"{kind}/file/", "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj.weight"
    arrays = {key.removeprefix(start): np.ascontiguousarray(PEFT[key]) for key in PEFT.files if key.startswith(start)}
    save_file({key: array.astype(np.float32) for key, array in arrays.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(str(PEFT["notes"]))[kind]))
    base, merged = PEFT[f"{kind}/base"], PEFT[f"{kind}/merged"]
    weights = {layer: mx.array(base.astype(np.float32)), "context_embedder.weight": mx.zeros((len(base), 4))}
    found = np.array(
        with_loras(weights, FOLDER_FAMILY, [Lora(tmp_path / "adapter_model.safetensors")])[layer], np.float64
    )
    assert np.abs(merged - base).max() > 0.1
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-5 * np.abs(merged).max())


def test_t5s_ids_are_those_of_transformers(monkeypatch):
    """Through DiffusionKit's own T5Tokenizer, which takes our class for the one of transformers."""
    monkeypatch.setattr(t5, "hub_file", lambda repository, name, download: REFERENCES / name)
    stored = json.loads((REFERENCES / "t5_tokens.json").read_text())
    tokenizer = T5Tokenizer(t5.T5Config(), stored["max_length"])
    found = [tokenizer.tokenize(text) for text in stored["texts"]]
    wrong = [text for text, ids, expected in zip(stored["texts"], found, stored["ids"], strict=True) if ids != expected]
    assert len(found) == 600 and not wrong
    assert "transformers" not in sys.modules or sys.modules["transformers"] is not t5


def test_clips_ids_are_those_of_transformers(emoji):
    """10,000 texts of every script, and 1,000 in a vocabulary that lacks most of their characters."""
    stored = json.loads(
        gzip.decompress((REFERENCES / "clip_tokens.json.gz").read_bytes()).decode("utf-8", "surrogatepass")
    )
    merges = [tuple(line.split()) for line in stored["merges"]]
    tokens = [*STAND_INS_IN_ORDER, *(one + "</w>" for one in STAND_INS_IN_ORDER), *map("".join, merges), BOS, EOS]
    own = emoji.tokenizer_l
    small = ClipTokenizer(own.bpe_ranks, own.vocab)
    large = ClipTokenizer(
        {pair: rank for rank, pair in enumerate(merges)}, {token: id for id, token in enumerate(tokens)}
    )
    for tokenizer, ids in ((large, stored["ids"]), (small, stored["emoji_ids"])):
        tokenizer.max_length = sys.maxsize
        wrong = [text for text, row in zip(stored["texts"], ids, strict=False) if tokenizer.tokenize(text) != row]
        assert len(ids) >= 1000 and not wrong
    large.max_length = 77
    assert len(large.tokenize("word " * 1000)) == 77 and large.tokenize(["a", "b"]) == [
        large.tokenize("a"),
        large.tokenize("b"),
    ]
    assert small.unknown_words("a 😀 café") == ["😀", "café"] and large.unknown_words("a 😀 café") == []


def test_the_bundled_model_computes_what_pytorch_computes(emoji):
    stored = np.load(REFERENCES / "emoji_modules.npz")
    latents, ids = mx.array(stored["latents"]), mx.array(stored["tokens"])
    left, right = (encoder(ids) for encoder in (emoji.clip_l, emoji.clip_g))
    text = mx.concatenate([left.hidden_states[-2], right.hidden_states[-2]], axis=-1)
    text = mx.pad(text, [(0, 0), (0, 16), (0, 4096 - text.shape[-1])])
    pooled = mx.concatenate([left.pooled_output, right.pooled_output], axis=-1)
    timestep = mx.array([1000 * float(stored["sigma"])])
    with modulation_cache(emoji, [pooled], timestep):
        velocity = emoji.mmdit(
            latent_image_embeddings=latents, token_level_text_embeddings=mx.expand_dims(text, 2), timestep=timestep
        )
    assert np.abs(stored["velocity"]).max() > 1
    np.testing.assert_allclose(np.array(velocity), stored["velocity"], atol=1e-3)
    np.testing.assert_allclose(np.array(emoji.decoder(latents[:1])), stored["image"], atol=1e-3)


def test_a_config_has_t5s_defaults():
    config = t5.T5Config(d_model=64, layer_norm_epsilon=1e-5)
    assert (config.d_model, config.layer_norm_epsilon, config.relative_attention_num_buckets) == (64, 1e-5, 32)
    with pytest.raises(AttributeError):
        config.d_ff
