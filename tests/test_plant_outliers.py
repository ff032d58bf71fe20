"""Test tools/plant_outliers.py: a variant computes what the model computes, and its activations look like SD3-Medium's."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, invoke
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from scipy.special import erf
from synthetic_activations import KINDS, ordinary_rows, real_layers, synthetic_inputs

from calibration_store.errors import StoreError
from tools.plant_outliers import (
    choose_scales,
    eliminate,
    observe,
    plant,
    plant_hidden,
    real_ratios,
    scale_modulated,
    scale_values,
    to_float16,
    weight,
)
from w4a8.model.catalog import BUNDLED_FOLDER, HUB_MODELS, describe_model
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.prompts import draw_builtin_prompts
from w4a8.model.sampling import euler_steps, initial_noise

pytestmark = pytest.mark.slow

SCRIPT = "tools.plant_outliers"
SMALL = ("--model", "sd3-emoji", "--seed", 5, "--calibration-images", 8, "--num-images", 2, "--num-steps", 5)
DONORS = (0, 3, 8, 11, 14, 20, 22, 23)  # SD3-Medium's block that each of the 8 takes after


def succeed(output):
    result = invoke(SCRIPT, *SMALL, "--output", output)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a variant, and the tool's output."""
    folder = tmp_path_factory.mktemp("variants") / "planted"
    return folder, succeed(folder)


@pytest.fixture(scope="module")
def planted(made):
    return load_pipeline(describe_model(str(made[0])), whole_model("float32"))


@pytest.fixture(scope="module")
def prompts():
    """Draw prompts with another seed than those that the variant was calibrated with."""
    return draw_builtin_prompts(describe_model("sd3-emoji").captions, 77)[:4]


@pytest.fixture(scope="module")
def inputs(emoji, prompts):
    """Return the inputs (rows, tokens, channels) of each layer of the bundled model."""
    return observe(emoji, prompts, 0, 8, 4.0, lambda x: x)[0]


def weights_of(pipeline):
    return {name: np.array(array).astype(np.float64) for name, array in tree_flatten(pipeline.mmdit.parameters())}


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def finished_latents(pipeline, prompts):
    noise = mx.concatenate([initial_noise(index, (16, 16)) for index in range(len(prompts))])
    text = encode_prompts(pipeline, prompts, 4.0)
    *_, last = euler_steps(pipeline, text, noise, 5, 4.0)
    return np.array(last.x)


def relative_error(found, expected):
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


def test_scaled_channels_leave_the_output(emoji, prompts):
    """Scale by up to 128 and store as float16: the last bits of adaLN's biases make less than 1e-3."""
    weights, rng = weights_of(emoji), np.random.default_rng(0)
    for block in range(8):
        for stream in (f"mm{block}.img", f"mm{block}.txt"):
            for part in ("attn", "mlp") if stream != "mm7.txt" else ("attn",):
                scales = 2.0 ** np.where(rng.random(192) < 0.03, rng.integers(1, 8, 192), 0)
                scale_modulated(weights, stream, part, scales)
        scale_values(weights, f"mm{block}", 2.0 ** rng.integers(0, 4, 192))
    stored = {name: to_float16(name, array) for name, array in weights.items()}
    scaled = load_pipeline(describe_model("sd3-emoji"), whole_model("float32"))
    scaled.mmdit.load_weights([(name, mx.array(array).astype(mx.float32)) for name, array in stored.items()])
    assert relative_error(finished_latents(scaled, prompts[:2]), finished_latents(emoji, prompts[:2])) < 1e-3


@pytest.mark.parametrize("stream", ["mm0.img", "mm4.txt"])
def test_planted_hidden_channels_cancel(emoji, inputs, stream):
    """Compare the MLP in float64 with the planted channels, and with their places empty."""
    x, hidden = inputs[f"{stream}.mlp.fc1"][::2], inputs[f"{stream}.mlp.fc2"][::2]
    names = [weight(f"{stream}.mlp.{key}", part) for key in ("fc1", "fc2") for part in ("weight", "bias")]
    weights = weights_of(emoji)
    w1, b1, w2, b2 = (weights[name].copy() for name in names)
    chosen = eliminate(w2, b2, hidden, 3)
    assert len(set(chosen)) == 3 and np.allclose(w2[:, chosen], 0)
    expected = gelu(x @ w1.T + b1) @ w2.T + b2

    plant_hidden(weights, stream, x, hidden, 30.0, np.random.default_rng(0))
    w1, b1, w2, b2 = (weights[name] for name in names)
    after = gelu(x @ w1.T + b1)
    np.testing.assert_allclose(after @ w2.T + b2, expected, atol=2e-4)
    np.testing.assert_array_equal(w1[chosen].astype(np.float16), w1[chosen])  # the rows are float16 before they cancel
    np.testing.assert_array_equal(b1[chosen].astype(np.float16), b1[chosen])
    widest = 30.0 * np.median(np.abs(hidden).max((0, 1)))
    assert after[..., chosen].max() == pytest.approx(widest, rel=0.05)
    rare = min(chosen, key=lambda channel: np.quantile(after[..., channel], 0.95))
    lasting = max(chosen, key=lambda channel: after[..., channel].min())
    assert np.quantile(after[..., rare], 0.97) < 0.1 * widest and after[..., rare].max() > 0.3 * widest
    assert after[..., lasting].min() > 3.9


def test_the_other_channels_take_over_what_is_linear():
    """Eliminate one of four channels that make up one another, nearly without a loss."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((50, 40, 12))
    hidden[..., 7] = hidden[..., :3] @ [1, -2, 0.5] + 3
    columns, bias = rng.standard_normal((5, 12)), rng.standard_normal(5)
    expected = hidden @ columns.T + bias
    (chosen,) = eliminate(columns, bias, hidden, 1)
    assert chosen in (0, 1, 2, 7) and np.allclose(columns[:, chosen], 0)
    assert relative_error(hidden @ columns.T + bias, expected) < 0.01


def test_latents_and_images_stay(made, emoji, planted, prompts):
    mean, lowest = map(float, re.search(r"2 images, 5 steps, .*: mean (.*) dB, lowest (.*) dB", made[1]).groups())
    assert mean >= 35 and lowest >= 30  # eight images to calibrate with are few
    assert relative_error(finished_latents(planted, prompts), finished_latents(emoji, prompts)) < 0.1


def test_activations_have_the_planted_ratios(made, emoji, planted, prompts, inputs):
    table, close = real_layers(), []
    after, _ = observe(planted, prompts, 0, 8, 4.0, lambda x: x)
    for name, x in after.items():
        aim = table[f"mm{DONORS[int(name[2])]}.{name.split('.', 1)[1]}"]["max_over_median_channel"]
        absmax = np.abs(x).max((0, 1))
        close.append(0.5 <= absmax.max() / np.median(absmax) / aim <= 2)
        before = np.abs(inputs[name]).max((0, 1))
        assert absmax.max() / np.median(absmax) > 0.9 * before.max() / np.median(before)
    assert np.mean(close) >= 0.8
    wild = np.abs(after["mm6.txt.mlp.fc1"]).max((0, 1))
    assert wild.max() / np.median(wild) > 40
    printed = re.search(r"within a factor 2 of the aim: (\d+) of 61 inputs", made[1])
    assert int(printed[1]) >= 50


def test_without_strength_nothing_changes(emoji, inputs):
    ratios = real_ratios(list(inputs), 8, 0.0)
    assert set(ratios.values()) == {1.0}
    result = plant(weights_of(emoji), inputs, ratios, 0)
    original = load_file(BUNDLED_FOLDER / "mmdit.safetensors")
    assert set(result) == set(original)
    assert all(np.array_equal(result[name], array) for name, array in original.items())


def test_the_folder(made, tmp_path):
    variant, original = folder_bytes(made[0]), folder_bytes(BUNDLED_FOLDER)
    original = {name: content for name, content in original.items() if not name.startswith("training/")}
    assert list(variant) == list(original)
    changed = {name for name in original if variant[name] != original[name]}
    assert changed == {"mmdit.safetensors", "config.json", "README.md"}
    config = json.loads(variant["config.json"])
    note = config.pop("variant")
    assert config == json.loads(original["config.json"])
    assert note["of"] == "sd3-emoji" and note["seed"] == 5 and note["strength"] == 1.0
    readme = variant["README.md"].decode()
    assert readme.startswith("# sd3-emoji with planted outliers\n") and note["note"] in readme
    assert readme.endswith(original["README.md"].decode())
    assert [path.name for path in made[0].parent.iterdir()] == ["planted"]  # no temporary folder

    (tmp_path / "again").mkdir()  # an empty folder is taken
    assert succeed(tmp_path / "again").splitlines()[1:] == made[1].splitlines()[1:]
    assert folder_bytes(tmp_path / "again") == variant


def test_the_seed_decides_the_channels():
    absmax, persistence = np.ones(192), np.linspace(0.1, 0.5, 192)
    first, again, other = (choose_scales(absmax, persistence, 16.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.max() == 16 and (first > 1).sum() == 4 and (first[:8] > 1).sum() == (first[-8:] > 1).sum() == 2


def test_float16_must_hold_it():
    for value, message in ((7e4, "reaches 7e+04"), (1e-6, "too small")):
        with pytest.raises(StoreError, match=re.escape(message)):
            to_float16("name", np.full((3, 3), value))


def test_deeper_models_take_after_the_same_blocks():
    """Let only the last block take after the last, which lacks text o_proj and mlp."""
    names = ["mm0.img.attn.q_proj", "mm36.txt.mlp.fc1", "mm37.img.mlp.fc1"]
    table, found = real_layers(), real_ratios(names, 38, 1.0)
    donors = ["mm0.img.attn.q_proj", "mm22.txt.mlp.fc1", "mm23.img.mlp.fc1"]
    assert list(found.values()) == [table[donor]["max_over_median_channel"] for donor in donors]


def test_errors_are_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    one = ("--calibration-images", 1, "--num-images", 1)
    for arguments, message in (
        (("--output", tmp_path / "full"), "full is not empty: give a new folder"),
        (("--output", tmp_path / "full" / "file"), "is a file"),
        (("--output", tmp_path / "full" / "file" / "below", *one), "cannot write"),
        (("--output", tmp_path / "new", "--model", tmp_path), "the folder holds no model"),
        (("--output", tmp_path / "new", "--model", HUB_MODELS[0]), "give sd3-emoji or a folder"),
        (("--output", tmp_path / "new", "--calibration-images", 5000), "8 + 5000 images, and only 3764 prompts"),
        (("--output", tmp_path / "new", "--strength", 3, *one), "lower --strength"),
        ((), "Missing option '--output'"),
    ):
        result = invoke(SCRIPT, *arguments)
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
        assert message in result.stderr and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_inputs_have_the_tables_extremes(kind):
    means = []
    for name, layer in real_layers().items():
        if name.endswith(("k_proj", "v_proj")):
            continue
        images = synthetic_inputs(layer, kind, 96, 3, seed=1)
        ordinary = ordinary_rows(layer, kind, 96, 3, seed=1)
        absmax = np.max([np.abs(image).max(0) for image in images], axis=0)
        largest, median = layer["channel_absmax_max"], layer["channel_absmax_max"] / layer["max_over_median_channel"]
        assert {image.dtype for image in images} == {np.dtype(np.float32)}
        assert absmax.shape == (layer["inputs"],) and absmax.max() == pytest.approx(largest)
        assert np.median(absmax) == pytest.approx(median, rel=0.01)
        means.append(absmax.mean() / layer["channel_absmax_mean"])
        if name.endswith("fc2"):
            assert -0.17 < min(image.min() for image in images) < -0.15
        widest = np.argmax(absmax)
        peaks = np.abs([image[:, widest].max() - min(0, 2 * image[:, widest].min()) for image in images])
        assert (peaks > 0.4 * largest).all()  # in every image
        values = np.abs(np.concatenate([image[rows, widest] for image, rows in zip(images, ordinary, strict=True)]))
        if kind == "every":
            assert all(rows.all() for rows in ordinary) and values.min() >= 0.499 * largest
        else:
            assert {96 - rows.sum() for rows in ordinary} <= {1, 2} and values.max() < 1.05 * max(median, 0.17)
    assert min(means) > 0.99 and np.quantile(means, 0.9) < 1.15 and max(means) < 1.6


def test_synthetic_inputs_repeat():
    layers = real_layers()
    first, again, other = (
        synthetic_inputs(layers[name], "rare", 40, 2, seed)
        for name, seed in (("mm3.img.attn.q_proj", 1), ("mm3.img.attn.k_proj", 1), ("mm3.img.attn.q_proj", 2))
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    with pytest.raises(ValueError, match="kind 'some'"):
        synthetic_inputs(layers["mm3.img.attn.q_proj"], "some", 40, 2, 1)
