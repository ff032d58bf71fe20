"""The last phase of stage 3W trains what stays in 16 bits: its slopes, its file, its way into stages 4 and 5."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke
from finished_run import one_line
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from test_ends import BLOCKS, SETTINGS, rounding_of

from calibration_store.layout import WeightPaths
from calibration_store.rest_weights import read_rest
from calibration_store.weights import read_quantized_block
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.model.folder import load_folder_transformer
from w4a8.model.layers import model_blocks, model_layers
from w4a8.options import RoundingOptions
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.final_phase import FinalPhase, before_phase
from w4a8.rounding.finished_latents import FinishedLatents
from w4a8.rounding.rest import (
    EVERYTHING,
    VECTORS,
    bytes_of_rest,
    deployed_rest,
    narrow_untrained,
    nearest_dense,
    rest_places,
    size_of,
    untrained_matrices,
)
from w4a8.rounding.run import choose_end_to_end
from w4a8.rounding.units import UnitSpec
from w4a8.rounding.whole_model import WholeModel

pytestmark = pytest.mark.slow

OPTIMIZE = ("--iters", 10, "--batch-size", 2, "--seed", 2, "--bits", "mm[23456].*=16", "--end-to-end", 12)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Return a calibration run of 4 images × 4 steps with the ends cached."""
    folder = tmp_path_factory.mktemp("rest") / "run"
    assert generate("--num-images", 4, "--num-steps", 4, "--no-images", "--calib-dir", folder).exit_code == 0
    assert invoke("cache_adaround_data", "--calib-dir", folder, "--num-images", 4, "--stride", 2).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def transformer():
    return load_folder_transformer(BUNDLED_FOLDER, mx.float32)


def test_matrices_that_no_phase_trains_take_16_bits():
    """They are stored so, and a block gives the same float32 tokens with them."""
    mmdit = load_folder_transformer(BUNDLED_FOLDER, mx.float32)
    block, hidden = model_blocks(mmdit)["mm1"], mmdit.config.hidden_size
    *tokens, modulation = (mx.random.normal((2, count, 1, hidden), key=mx.random.key(count)) for count in (12, 5, 1))
    before = block.run(tokens, modulation)
    assert untrained_matrices(mmdit, EVERYTHING) == []
    narrow_untrained(mmdit, VECTORS, mx.float16)
    found = [place.owner[place.key] for place in untrained_matrices(mmdit, VECTORS)]
    assert len(found) == 2 * len(model_blocks(mmdit)) and all(array.dtype == mx.float16 for array in found)
    for one, other in zip(block.run(tokens, modulation), before, strict=True):
        assert one.dtype == mx.float32 and mx.array_equal(one, other)


@pytest.fixture(scope="module")
def trained(ends, tmp_path_factory):
    """Return the same run after stage 3W, whose last phase has gained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(ends, folder)
    done = invoke("optimize_adaround", "--calib-dir", folder, *OPTIMIZE)
    assert done.exit_code == 0, done.output
    assert "then 12 end to end with adaLN and the final layer" in done.stdout
    return folder


def test_the_rest_is_adaln_and_the_final_layer(transformer):
    """Every parameter of the blocks and the final layer is either in a quantized layer or in the rest."""
    places = rest_places(transformer, EVERYTHING)
    paths = {path for group in places.values() for path in group}
    assert list(places) == [*BLOCKS, "final_layer"] and len(paths) == 36
    assert all("adaLN_modulation.layers.1." in path or path.startswith("final_layer.linear.") for path in paths)
    vectors = {path for group in rest_places(transformer, VECTORS).values() for path in group}
    assert vectors < paths and {path for path in vectors if path.endswith("weight")} == {
        "final_layer.linear.weight", "final_layer.adaLN_modulation.layers.1.weight",
    }  # fmt: skip
    own = dict(tree_flatten(transformer.parameters()))
    assert bytes_of_rest(transformer, EVERYTHING) == 16 * sum(own[path].size for path in paths)
    assert not any(rest_places(transformer, "none").values())


def test_the_default_iterations_of_the_last_phase(transformer):
    assert choose_end_to_end(None, "model", True, transformer, 40, "all") == 40
    assert choose_end_to_end(None, "block", True, transformer, 40, "vectors") == 40
    assert (
        choose_end_to_end(None, "model", True, transformer, 80)
        == 0
        == choose_end_to_end(None, "block", True, transformer, 80)
    )
    assert choose_end_to_end(None, "block", False, transformer, 80, "none") == 0
    assert RoundingOptions(calib_dir=None).tune_rest


def first_phase_of(folder, settings):
    """Return the transformer, the samples, the layers as the first phase left them, and the job of the last phase."""
    rounding = rounding_of(folder, settings, "model")
    mmdit, job = rounding.open(), FinalPhase(rounding, UnitSpec("end to end", BLOCKS, list(rounding.layers)))
    metadata = json.loads((folder / "adaround_weights/metadata.json").read_bytes())
    layers = {}
    for block in metadata["block_names"]:
        layers |= read_quantized_block(WeightPaths(folder), block, metadata)
    return mmdit, job.samples(mmdit), {name: before_phase(fields) for name, fields in layers.items()}, job


@pytest.mark.parametrize("bits", [16, 8])
def test_the_loss_sees_the_rest_as_it_is_deployed(bits):
    """8 bits are the codes that stage 5 writes; slopes pass the rounding as if it were not there."""
    weight = mx.random.normal((96, 192), key=mx.random.key(bits)) * 0.05
    path = "multimodal_transformer_blocks.0.image_transformer_block.adaLN_modulation.layers.1.weight"
    found = np.array(deployed_rest(path, weight, mx.float16, bits))
    half = np.array(weight).astype(np.float16).astype(np.float32)
    expected = half if bits == 16 else np.array(QuantizedLayer.nearest(half, 8, 64).packed(8).dense(mx.float32))
    assert (found != expected).mean() < 1e-3 and np.abs(found - expected).max() < 2e-3  # a tie may round otherwise
    slope = mx.grad(lambda one: (deployed_rest(path, one, mx.float16, bits) * 3).sum())(weight)
    assert mx.array_equal(slope, mx.full(weight.shape, 3.0))
    assert np.array_equal(np.array(deployed_rest("final_layer.linear.weight", weight, mx.float16, bits)), half)
    flat = mx.zeros((2, 64))
    assert mx.array_equal(nearest_dense(flat, 8, 64), flat)


def test_slopes_of_the_rest_are_those_of_the_loss(trained):
    """A step along a parameter changes the loss, which is computed without gradients, as its slope says."""
    settings = replace(SETTINGS, activation_bits=0, rest=EVERYTHING, micro_batch=2)
    mmdit, samples, layers, _ = first_phase_of(trained, settings)
    whole = WholeModel.build(mmdit, BLOCKS, samples, settings, layers, at_once=True)
    indices = np.array(samples.training[:2])
    loss, slopes = whole.slopes(whole.start, indices, 0)
    assert loss.item() == pytest.approx(whole.loss(indices, whole.start), rel=1e-4)
    rest = whole.start["rest"]
    assert slopes["rest"].keys() == rest.keys()
    for path in [path for path in rest if path.endswith("weight") and ("final_layer" in path or ".6.image" in path)]:
        slope = slopes["rest"][path]
        step = mx.sign(slope) * size_of(rest[path], 8) * 0.02
        moved = [
            whole.loss(indices, {**whole.start, "rest": rest | {path: rest[path] + way * step}}) for way in (1, -1)
        ]
        assert (moved[0] - moved[1]) / 2 == pytest.approx(float((slope * step).sum()), rel=0.1), path


def test_unrolled_steps_end_where_sampling_ended(trained):
    """With the original's weights in place of the codes the last steps give the latents that stage 1 stored.

    Slopes are those of the loss, which is computed without gradients.
    """
    settings = replace(SETTINGS, activation_bits=0, rest=EVERYTHING, micro_batch=2, unrolled=4)
    mmdit, samples, layers, job = first_phase_of(trained, settings)

    class Original(WholeModel):
        def _parameters(self, block, state, source):
            own = {name: model_layers(mmdit)[name] for name in self._of_block[block]}
            biases = {name: layer.bias for name, layer in own.items() if layer.bias is not None}
            return {
                "weights": {n: layer.weight for n, layer in own.items()},
                "biases": biases,
                "ranges": {},
                "rest": {},
            }

    last = job.last_steps(samples)
    assert len(last.sigmas) == 5 and last.sigmas[-1] == 0 and last.begin.shape == last.end.shape == (4, 16, 16, 16)
    assert sorted([*last.training, *last.held_out]) == list(range(4)) and last.steps == [0, 0, 1, 1]
    original = FinishedLatents(Original(mmdit, BLOCKS, samples, settings, layers), last)
    assert original.loss(range(4), None) < 1e-5 * float(np.square(last.end).mean())  # text tokens are cached in float16
    whole = WholeModel.build(mmdit, BLOCKS, samples, settings, layers)
    finished = FinishedLatents(whole, last)
    images = np.array([1, 3])
    loss, slopes = finished.slopes(whole.start, images)
    error = finished.loss(images, whole.start)
    assert error > 1e-4 and np.exp(loss.item()) == pytest.approx(error, rel=1e-3)
    moved = [("rest", "final_layer.adaLN_modulation.layers.1.bias", 0.01), ("zero_point", "mm1.img.attn.v_proj", 0.05),
             ("rest", "multimodal_transformer_blocks.6.image_transformer_block.adaLN_modulation.layers.1.bias", 0.003)]  # fmt: skip
    for kind, name, size in moved:
        slope, array = slopes[kind][name], whole.start[kind][name]
        step = mx.sign(slope) * size * (size_of(array, 8) if kind == "rest" else 1)
        ways = [{**whole.start, kind: whole.start[kind] | {name: array + way * step}} for way in (1, -1)]
        up, down = (np.log(finished.loss(images, state)) for state in ways)
        assert (up - down) / 2 == pytest.approx(float((slope * step).sum()), rel=0.1), name


def test_latents_that_are_not_there_are_told_before_any_work(ends, tmp_path):
    shutil.copytree(ends, tmp_path / "run")
    (tmp_path / "run/samples/0002_004.npz").unlink()
    done = invoke("optimize_adaround", "--calib-dir", tmp_path / "run", *OPTIMIZE, "--unrolled", 2)
    one_line(done, "0002_004.npz")
    assert not list((tmp_path / "run/adaround_weights").glob("*.npz"))


def test_the_trained_rest_is_measured_and_exported(trained, tmp_path):
    """rest.npz has float16 values under their paths; stage 5 writes them, and stage 4's native model draws the same."""
    metadata = json.loads((trained / "adaround_weights/metadata.json").read_bytes())
    last = metadata["end_to_end_losses"]["stages"][0]
    assert last["end_activations"] < last["start"] and last["rest"] == 36 and metadata["rest"] == "all"
    rest = read_rest(WeightPaths(trained), metadata)
    assert list(rest) == metadata["rest_parameters"] and all(array.dtype == np.float16 for array in rest.values())
    with np.load(trained / "adaround_weights/rest.npz") as found:
        assert json.loads(found["index"].item()) == {path: list(array.shape) for path, array in rest.items()}
    original = dict(tree_flatten(load_folder_transformer(BUNDLED_FOLDER, mx.float32).parameters()))
    moved = [not np.array_equal(np.array(original[path]), array) for path, array in rest.items()]
    assert sum(moved) > 30

    done = invoke("export_quantized_model", "--calib-dir", trained, "--activations", "none", "--output", tmp_path / "q")
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "q/mmdit.safetensors")
    assert all(np.array_equal(written[path], array) for path, array in rest.items())
    shutil.copytree(tmp_path / "q", trained / "quantized_model")
    draw = ("--num-images", 1, "--num-steps", 2, "--variants", "w4-rtn,w4-adaround,w4-adaround-r8,native")
    done = invoke("evaluate_quantization", "--calib-dir", trained, *draw)
    assert done.exit_code == 0, done.output
    variants = json.loads((trained / "evaluation/metrics.json").read_bytes())["variants"]
    assert variants["native"]["psnr"]["mean"] == pytest.approx(variants["w4-adaround"]["psnr"]["mean"], abs=0.1)
    assert variants["w4-adaround"]["max_step_error"] != variants["w4-adaround-r8"]["max_step_error"]
    assert variants["native"]["gain"]["over"] == "w4-rtn"


def test_a_missing_or_damaged_rest_is_told_and_made_anew(trained, tmp_path):
    """--resume makes the same bytes again; stage 5 believes no other file, and no other run's."""
    shutil.copytree(trained / "adaround_weights", tmp_path / "before")
    root = trained / "adaround_weights"
    rest = root / "rest.npz"
    whole = rest.read_bytes()
    export = ("--calib-dir", trained, "--activations", "none", "--output", tmp_path / "out")
    other = dict(np.load(rest))
    other[next(key for key in other if key.endswith("weight"))][0, 0] += np.float16(1)
    for change, message in (
        (lambda: rest.write_bytes(whole[: len(whole) // 2]), "truncated or damaged"),
        (rest.unlink, "missing"),
        (lambda: np.savez(rest, **other), "not the file that metadata.json was written for"),
        (lambda: np.savez(rest, **{k: v for k, v in other.items() if k != "index"}), "not the file that metadata.json"),
    ):
        change()
        one_line(invoke("export_quantized_model", *export), message)
        rest.write_bytes(whole)
    metadata = json.loads((root / "metadata.json").read_bytes())
    del metadata["rest_digest"]
    for arrays, message in (
        ({k: v for k, v in other.items() if k != "index"}, "no index that lists its arrays"),
        ({**other, "more": other["index"]}, "index lists other arrays than there are"),
        ({**other, "training_run": np.array("0" * 64)}, "of another training run"),
        ({**other, "final_layer.linear.bias": np.full(64, np.nan, np.float16)}, "holds no finite float16 values"),
    ):
        np.savez(rest, **arrays)
        with pytest.raises(Exception, match=message):
            read_rest(WeightPaths(trained), metadata)
    rest.unlink()
    done = invoke("optimize_adaround", "--calib-dir", trained, *OPTIMIZE, "--resume")
    assert done.exit_code == 0 and folder_bytes(root) == folder_bytes(tmp_path / "before")
    one_line(
        invoke("optimize_adaround", "--calib-dir", trained, *OPTIMIZE, "--rest-bits", 8, "--resume"),
        "has --rest-bits 16, not 8",
    )
