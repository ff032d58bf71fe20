"""Bits where they count: sensitivity, allocation, patterns, and what stages 4 and 5 and GGUF make of them."""

import itertools
import json
import re
import shutil

import gguf
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke
from finished_run import note_digests, one_line

from calibration_store.block_cache import read_cache_metadata
from calibration_store.errors import OptionError
from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from calibration_store.model_folder import packed_fault
from calibration_store.sensitivity import read_sensitivity, write_sensitivity
from calibration_store.weights import read_quantized_block
from w4a8 import __version__
from w4a8.analysis.bit_allocation import allocate
from w4a8.evaluation.metrics import FLIP_INSTALLED, describe_variant, flip_map, image_metrics
from w4a8.evaluation.perceptual import installed, measures_lpips
from w4a8.model.layers import model_layers
from w4a8.model.runs import run_schedule, run_transformer
from w4a8.quantized.gguf_file import packed_blocks
from w4a8.quantized.layer import QuantizedLayer
from w4a8.report.evaluation_figures import grid_rows
from w4a8.rounding.bit_widths import average_bits_of, bits_by_hand
from w4a8.rounding.phases import jobs_of
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.sensitivity import measure_sensitivity
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import Samples

pytestmark = pytest.mark.slow

QUICK = ("--iters", 10, "--batch-size", 2, "--no-tune-rest")


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Return a calibration run of one image × 3 steps with the ends cached."""
    folder = tmp_path_factory.mktemp("bits") / "run"
    assert generate("--num-images", 1, "--num-steps", 3, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("cache_adaround_data", "--calib-dir", folder, "--num-images", 1, "--stride", 2)
    assert done.exit_code == 0, done.output
    return folder


def rounding_of(folder):
    manifest = read_manifest(folder)
    opened, schedule = run_transformer(manifest), run_schedule(manifest)[0]
    settings = Settings(
        iters=10,
        batch_size=2,
        group_size=32,
        qdrop=0.0,
        lr_activation_scale=5e-3,
        seed=0,
        micro_batch=2,
        activation_rule="token",
    )
    blocks = [f"mm{index}" for index in range(8)]
    return RoundingRun(
        opened, opened(), WeightPaths(folder), read_cache_metadata(folder), schedule, settings, "model", blocks
    )


@pytest.fixture(scope="module")
def measured(cached):
    """Return the same, with its sensitivity at the widths that the tests ask for."""
    write_sensitivity(cached, measure_sensitivity(rounding_of(cached), [4, 5, 8]))
    return cached


@pytest.fixture(scope="module")
def mixed(measured, tmp_path_factory):
    """Trained at 4.5 bits on average, with a layer set by hand and one left out, in groups of 32."""
    folder = shutil.copytree(measured, tmp_path_factory.mktemp("mixed") / "run")
    done = optimize(
        folder, "--average-bits", "4.5:4,5,8", "--bits", "mm1.txt.*=5", "--bits", "mm1.txt.attn.k_proj=3",
        "--bits", "mm6.img.mlp.fc?=16", "--group-size", 32,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def optimize(folder, *arguments):
    return invoke("optimize_adaround", "--calib-dir", folder, *QUICK, *arguments)


# --- allocation ---------------------------------------------------------------------------------------------


def test_the_allocation_is_near_the_best_there_is():
    generator = np.random.default_rng(0)
    for _ in range(30):
        widths = sorted(generator.choice([2, 3, 4, 5, 6, 8], 3, replace=False).tolist())
        sizes = generator.choice([1, 4], 6).tolist()
        costs = [dict(zip(widths, np.sort(generator.exponential(1, 3))[::-1].tolist(), strict=True)) for _ in range(6)]
        average = generator.uniform(widths[0], widths[-1])
        chosen, gap = allocate(costs, sizes, average)
        total = sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))
        budget = average * sum(sizes) + 1e-9
        assert sum(bits * size for bits, size in zip(chosen, sizes, strict=True)) <= budget
        best = min(
            sum(cost[bits] for cost, bits in zip(costs, option, strict=True))
            for option in itertools.product(widths, repeat=6)
            if sum(bits * size for bits, size in zip(option, sizes, strict=True)) <= budget
        )
        assert best <= total + 1e-12 and total - best <= gap * total + 1e-9  # the proven gap holds


def test_what_is_set_by_hand_counts_and_stays():
    costs = [{8: 0.0}, {4: 1.0, 8: 0.1}, {4: 5.0, 8: 0.1}]
    assert allocate(costs, [1, 1, 1], 20 / 3)[0] == [8, 4, 8]
    assert allocate(costs, [1, 1, 1], 4.0)[0] == [8, 4, 4]  # more than the budget: nothing else goes up


# --- sensitivity --------------------------------------------------------------------------------------------


def test_sensitivity_against_the_model_itself(measured):
    """One layer rounded, the whole model run: the same error."""
    found, rounding = read_sensitivity(measured), rounding_of(measured)
    assert found["w4a8_version"] == __version__
    mmdit, settings = rounding.open(), rounding.settings
    samples = Samples.of_cache(measured, rounding.cache, mmdit, rounding.blocks)
    unit = rounding.unit_class.build(mmdit, jobs_of(rounding)[0].spec, samples, settings)
    layers = model_layers(mmdit)
    assert found["layers"].keys() == layers.keys() and len(found["inputs"]) == 61
    for name in ("mm0.img.attn.v_proj", "mm4.txt.mlp.fc2", "mm7.img.mlp.fc1"):
        weight = np.array(layers[name].weight)
        stand_in = {other: one.weight for other, one in layers.items()}
        stand_in[name] = QuantizedLayer.nearest(weight, 4, 32).as_mlx().weight

        def velocity(weights):
            given = unit.outputs(samples.batch(samples.training), QuantizedForward(weights, unit.biases))
            return np.array(given[0], np.float64)

        reference = velocity({other: one.weight for other, one in layers.items()})
        error = np.square(velocity(stand_in) - reference).mean() / np.square(reference).mean()
        measured = found["layers"][name]["weights"]
        assert measured["4"] == pytest.approx(error, rel=0.02) and measured["8"] < measured["4"] / 50
    assert all(gain > 0 for gains in found["inputs"].values() for gain in gains)


def test_it_is_measured_once(measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "run")
    path, groups = folder / "adaround_cache/sensitivity.json", ("--group-size", 32)
    before = path.read_bytes()
    assert optimize(folder, "--average-bits", 4.5, *groups, "--dry-run").exit_code == 0
    done = optimize(folder, "--average-bits", 4.5, *groups)
    assert done.exit_code == 0 and path.read_bytes() == before
    assert re.search(r"\(\d\d at 4 bits, \d\d at 8 bits\)", done.stdout)
    done = optimize(folder, "--average-bits", 4.6, *groups, "--resume")
    assert done.exit_code == 2 and "--average-bits 4.5, not 4.6" in done.stderr
    one_line(optimize(folder, "--average-bits", 4.6, *groups), "holds a run already")
    content = json.loads(before)
    content["sigmas"] = content["sigmas"][:1]
    path.write_text(json.dumps(content))
    done = invoke("collect_layer_activations", "--calib-dir", folder, "--num-images", 1, "--stride", 2)
    assert done.exit_code == 0, done.output
    arguments = ("--calib-dir", folder, "--policy", "sensitivity", "--average-bits", 6)
    one_line(invoke("analyze_activations_multitier", *arguments), "sensitivity.json: 1 sigmas for 2 key_timesteps")
    path.write_bytes(before)
    done = invoke("analyze_activations_multitier", *arguments)
    assert done.exit_code == 0, done.output
    config = json.loads((folder / "activations/quant_config_multitier.json").read_bytes())
    assert config["thresholds"]["policy"] == "sensitivity" and config["summary"]["average_bits"] <= 6.001
    for arguments, message in (
        ((), "needs --average-bits"),
        (("--average-bits", 6, "--min-sqnr", 20), "and no --min-sqnr"),
    ):
        done = invoke("analyze_activations_multitier", "--calib-dir", folder, "--policy", "sensitivity", *arguments)
        one_line(done, message)
    path.unlink()
    done = invoke(
        "analyze_activations_multitier", "--calib-dir", folder, "--policy", "sensitivity", "--average-bits", 6
    )
    one_line(done, "sensitivity.json: not found; run optimize_adaround.py --sensitivity-only")


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--average-bits", "4.5:4,7"), "--average-bits 4.5:4,7: widths are of 2, 3, 4, 5, 6 and 8"),
        (("--average-bits", 3.5), "--average-bits 3.5 is not between the widths 4 and 8"),
        (("--average-bits", 9), "--average-bits 9: an average from 2 to 8"),
        (("--bits", "mm9.*=4"), "--bits mm9.*: no layer has such a name"),
        (("--bits", "mm0.*=7"), "--bits mm0.*=7: PATTERN=BITS"),
        (("--bits", "mm0.*"), "--bits mm0.*: PATTERN=BITS"),
        (("--bits", "nothing=16"), "--bits nothing: no layer has such a name"),
        (("--bits", "*=16"), "--bits leaves no layer to train"),
        (("--average-bits", 4.5, "--blocks", "mm0"), "--average-bits is of the whole model"),
    ],
)
def test_bits_that_cannot_be(cached, arguments, message):
    before = folder_bytes(cached)
    done = optimize(cached, *arguments)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert folder_bytes(cached) == before


def test_patterns():
    layers = ["mm0.img.mlp.fc1", "mm0.img.mlp.fc2", "mm1.txt.mlp.fc2"]
    assert bits_by_hand(layers, ["*.fc2=8", "mm1.*=6"]) == {layers[1]: 8, layers[2]: 6}
    assert average_bits_of("4.5:8, 3,4,4") == (4.5, [3, 4, 8])
    with pytest.raises(OptionError):
        bits_by_hand(layers, ["=4"])


# --- what follows -------------------------------------------------------------------------------------------


def test_every_layer_has_its_bits(mixed):
    metadata = json.loads((mixed / "adaround_weights/metadata.json").read_bytes())
    bits = metadata["layer_bits"]
    assert bits["mm1.txt.attn.k_proj"] == 3 and bits["mm1.txt.attn.q_proj"] == 5
    assert metadata["excluded"] == ["mm6.img.mlp.fc1", "mm6.img.mlp.fc2"] and metadata["average_bits"] == 4.5
    total = weights = 0
    for block in metadata["block_names"]:
        for name, fields in read_quantized_block(WeightPaths(mixed), block).items():
            assert fields["q"].max() < 2 ** bits.get(name, 4) and fields["q"].max() >= 2 ** bits.get(name, 4) - 2
            total, weights = total + bits.get(name, 4) * fields["q"].size, weights + fields["q"].size
    assert 4.2 < total / weights <= 4.5001


def test_a_code_above_its_own_layers_bits_is_refused(mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "run")
    path = folder / "adaround_weights/mm1.npz"
    arrays = dict(np.load(path))
    arrays["mm1_txt_attn_k_proj__q"] = arrays["mm1_txt_attn_k_proj__q"] | 8
    np.savez(path, **arrays)
    note_digests(folder / "adaround_weights")
    done = invoke("evaluate_quantization", "--calib-dir", folder, "--num-images", 1, "--variants", "w4-adaround")
    one_line(done, "mm1.txt.attn.k_proj: q holds codes above 7")


def test_the_export_draws_what_was_measured(mixed, tmp_path):
    output = mixed / "quantized_model"
    done = invoke("export_quantized_model", "--calib-dir", mixed)
    assert done.exit_code == 0, done.output
    quantization = json.loads((output / "config.json").read_bytes())["quantization"]
    stream = "multimodal_transformer_blocks.1.text_transformer_block.attn"
    assert quantization[f"{stream}.k_proj"]["bits"] == 3 and quantization[f"{stream}.q_proj"]["bits"] == 5
    assert quantization["multimodal_transformer_blocks.6.image_transformer_block.mlp.fc1"] is False
    done = invoke(
        "evaluate_quantization", "--calib-dir", mixed, "--num-images", 1, "--num-steps", 2, "--variants",
        "w4-adaround,native,w4-adaround+a8-token,w4-adaround+a8-learned",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    figures = json.loads((mixed / "evaluation/metrics.json").read_bytes())["variants"]
    assert figures["native"]["images"] == figures["w4-adaround"]["images"]
    done = invoke("export_quantized_model", "--calib-dir", mixed, "--all-linears", "--output", tmp_path / "all")
    one_line(done, "--all-linears: DiffusionKit's layout has 4 bits")


def test_gguf_holds_4_and_5_bits_as_they_are(mixed, tmp_path):
    done = invoke("export_quantized_model", "--calib-dir", mixed, "--format", "gguf", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    reader = gguf.GGUFReader(next(tmp_path.glob("*.gguf")))
    kinds = {tensor.name: tensor for tensor in reader.tensors}
    metadata = json.loads((mixed / "adaround_weights/metadata.json").read_bytes())
    seen = set()
    for name, fields in read_quantized_block(WeightPaths(mixed), "mm1").items():
        if ".mlp." not in name:
            continue
        stream = "context_block" if ".txt." in name else "x_block"
        tensor = kinds[f"joint_blocks.1.{stream}.mlp.{name[-3:]}.weight"]
        bits = metadata["layer_bits"].get(name, 4)
        expected = {4: "Q4_1", 5: "Q5_1"}.get(bits, "F16")
        assert tensor.tensor_type.name == expected
        dense = QuantizedLayer.of_fields(fields).weight
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(dense.shape)
        tolerance = 2.0**-10 * abs(dense).max() if bits == 8 else 1e-6
        np.testing.assert_allclose(found, dense, atol=tolerance)
        seen.add(expected)
    assert "Q5_1" in seen
    assert kinds["joint_blocks.6.x_block.mlp.fc1.weight"].tensor_type.name == "F16"
    assert (
        kinds["joint_blocks.1.context_block.attn.qkv.weight"].tensor_type.name == "Q5_1"
    )  # q 5, k 3, v 5 bits: one tensor


def test_blocks_of_q5_1():
    generator = np.random.default_rng(0)
    layer = QuantizedLayer.nearest(generator.normal(0, 0.1, (4, 64)).astype(np.float32), 5, 32)
    found = gguf.quants.dequantize(packed_blocks(layer, 5), gguf.GGMLQuantizationType.Q5_1)
    np.testing.assert_allclose(found, layer.weight, atol=1e-6)


def test_a_block_that_is_left_out(cached, tmp_path):
    folder, root = shutil.copytree(cached, tmp_path / "run"), tmp_path / "run/adaround_weights"
    arguments = ("--unit", "block", "--bits", "mm[24567].*=16", "--bits", "mm3.*.attn.*=16", "--end-to-end", 10)
    done = optimize(folder, *arguments)
    assert done.exit_code == 0, done.output
    assert not (root / "mm2.npz").exists() and "mm3 " in done.stdout
    before = folder_bytes(root)
    assert optimize(folder, *arguments, "--resume").exit_code == 0
    assert folder_bytes(root) == before
    done = invoke("export_quantized_model", "--calib-dir", folder)
    assert done.exit_code == 0, done.output


# --- the judge ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FLIP_INSTALLED, reason="flip-evaluator has no wheel here")
def test_flip():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    other = image.copy()
    other[20:30, 20:30] = 255 - other[20:30, 20:30]
    assert flip_map(image, image).max() == 0
    found = flip_map(image, other)
    assert found.shape == (64, 64) and 0.2 < found[22:28, 22:28].mean() <= 1 and found[50:, 50:].max() < 1e-3
    assert image_metrics(image[None], other[None])["flip"][0] == pytest.approx(found.mean(), rel=1e-5)
    black, white = np.zeros_like(image), np.full_like(image, 255)
    assert flip_map(black, white).mean() == pytest.approx(1, abs=0.05)


def test_the_worst_image_is_named_and_drawn():
    images = np.zeros((20, 64, 64, 3), np.uint8)
    found = images.copy()
    found[:, 0, 0] = 1
    found[13] = 40
    latents = np.ones((20, 2, 4, 4, 16), np.float32)
    row = describe_variant(
        [f"p{i}" for i in range(20)], 0, {"images": images, "latents": latents}, {"images": found, "latents": latents}
    )
    assert row["worst_image"] == 13 and row["worst_prompts"][0]["prompt"] == "p13" and row["share_above_40_db"] == 0.95
    assert row["share_below_30_db"] == 0.05 and len(row["images"]) == 20
    assert not FLIP_INSTALLED or row["flip"]["worst"] == max(image["flip"] for image in row["images"])
    assert grid_rows(20, [13, 17, 13]) == [0, 1, 2, 3, 4, 5, 13, 17] and grid_rows(3, [2]) == [0, 1, 2]


def test_bits_by_layer_need_not_hold_the_usual_ones():
    """Accept an export in which every layer has bits of its own (--bits '*=8'), and none has --weight-bits."""
    config = {
        "quantization": {"bits": 8, "group_size": 64},
        "export": {"weights": "w4-adaround", "weight_bits": 4, "layer_bits": {"a": 8}},
    }
    shapes = {"a.weight": (64, 16), "a.scales": (64, 1)}
    assert packed_fault(config, shapes) is None
    config["export"]["layer_bits"] = {}
    assert "weight_bits 4 over layers of 8 bits" in packed_fault(config, shapes)


def test_lpips_needs_its_package_and_its_weights():
    """Without them nothing is imported, downloaded or noted."""
    images = np.zeros((2, 64, 64, 3), np.uint8)
    assert measures_lpips(images) == installed() and not measures_lpips(images[:, :16])
    assert ("lpips" in image_metrics(images, images)) == installed()
