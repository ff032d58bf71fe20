"""collect_layer_activations.py against an independent float64 computation, its contract, and bad input."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke

from calibration_store.errors import StoreError
from calibration_store.layout import ActivationPaths
from calibration_store.manifest import read_manifest
from calibration_store.names import layer_key
from calibration_store.partials import COLLECTION, read_partial
from w4a8.model.hooks import hooked_layers
from w4a8.model.modulation import modulation_cache
from w4a8.model.parts import whole_model
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.replay import replaying
from w4a8.model.runs import load_run_pipeline
from w4a8.statistics.kernel_source import KERNEL_FUNCTIONS, KERNEL_HEADER, MERGE_KERNEL, TILE_KERNEL
from w4a8.statistics.kernels import cpu_statistics, gpu_statistics, kernel_self_check, mlx_statistics
from w4a8.statistics.merge import merge_partials
from w4a8.statistics.recorders import PassStatistics, new_recorder, partial_arrays

IMAGES, STEPS = 3, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a calibration run of 3 images × 4 steps with its statistics."""
    folder = tmp_path_factory.mktemp("collect") / "run"
    assert generate("--num-images", IMAGES, "--num-steps", STEPS, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("collect_layer_activations", "--calib-dir", folder, "--num-images", IMAGES, "--stride", 1)
    assert done.exit_code == 0, done.output
    return folder


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def pipeline_of(run):
    manifest = read_manifest(run)
    return load_run_pipeline(manifest, whole_model(manifest["activation_dtype"]))


@pytest.fixture(scope="module")
def raw(run):
    """Every input of every hooked linear, {(image, step): {layer: (rows, channels) float64}}, caught at nn.Linear itself."""
    pipeline = pipeline_of(run)
    layer_of = {}
    for path, module in pipeline.mmdit.named_modules():
        match = re.match(
            r"multimodal_transformer_blocks\.(\d+)\.(image|text)_transformer_block\.(attn|mlp)\.(\w+)$", path
        )
        if match and isinstance(module, nn.Linear):
            stream = {"image": "img", "text": "txt"}[match[2]]
            layer_of[id(module)] = f"mm{match[1]}.{stream}.{match[3]}.{match[4]}"
    original, caught = nn.Linear.__call__, {}

    def catching(self, x):
        if id(self) in layer_of:
            caught[layer_of[id(self)]] = x
        return original(self, x)

    everything = {}
    nn.Linear.__call__ = catching
    try:
        for image in read_manifest(run)["images"]:
            text = encode_prompts(pipeline, [image["prompt"]], 4.0)
            for step in range(STEPS):
                sample = np.load(run / f"samples/{image['image_id']:04d}_{step:03d}.npz")
                timestep = mx.array(sample["timestep"])
                with modulation_cache(pipeline, [text.pooled], timestep[None]):
                    x = mx.concatenate([mx.array(sample["x"])] * 2)
                    caught.clear()
                    mx.eval(pipeline.mmdit(x, mx.expand_dims(text.tokens, 2), mx.broadcast_to(timestep, [2])))
                everything[image["image_id"], step] = {
                    name: np.array(array, np.float64).reshape(-1, array.shape[-1]) for name, array in caught.items()
                }
    finally:
        nn.Linear.__call__ = original
    return everything


@pytest.mark.slow
def test_statistics_equal_an_independent_float64_computation(run, raw):
    layers = list(raw[0, 0])
    assert len(layers) == 93
    for step in range(STEPS):
        arrays = np.load(run / f"activations/timestep_stats/step_{step}.npz", allow_pickle=False)
        index = json.loads((run / f"activations/timestep_stats/step_{step}_index.json").read_bytes())
        assert sorted(index) == sorted(layers)
        for layer in layers:
            values = [raw[image, step][layer] for image in range(IMAGES)]
            minima, maxima = (np.array([getattr(v, f)(axis=0) for v in values]) for f in ("min", "max"))
            prefix, entry = layer.replace(".", "_") + "__", index[layer]
            np.testing.assert_allclose(arrays[prefix + "avg_min"], minima.mean(axis=0), rtol=1e-6, atol=0)
            np.testing.assert_allclose(arrays[prefix + "avg_max"], maxima.mean(axis=0), rtol=1e-6, atol=0)
            assert arrays[prefix + "avg_min"].dtype == np.float32

            counts, edges = arrays[prefix + "hist_counts"], arrays[prefix + "hist_edges"]
            assert counts.dtype == np.int64 and edges.dtype == np.float64 and edges.shape == (257,)
            everything = np.concatenate(values).ravel()
            widths = np.diff(edges)
            assert (widths == widths[0]).all() and np.log2(widths[0]) % 1 == 0
            expected = np.searchsorted(edges, everything, side="right") - 1
            assert expected.min() >= 0 and expected.max() <= 255
            assert np.array_equal(counts, np.bincount(expected, minlength=256))
            # the grid is the finest one: half the width would not hold the range
            low, high = min(everything.min(), 0), max(everything.max(), 0)
            assert np.floor(high / widths[0] * 2) - np.floor(low / widths[0] * 2) > 255

            assert entry["n_batches"] == IMAGES and entry["has_hist"] is True
            absmax = max(abs(minima.mean(axis=0)).max(), abs(maxima.mean(axis=0)).max())
            np.testing.assert_allclose(entry["tensor_absmax"], absmax, rtol=1e-6)
            np.testing.assert_allclose(entry["tensor_min"], minima.mean(axis=0).min(), rtol=1e-6)
            for key, exact in (
                ("hist_p999", np.percentile(abs(everything), 99.9)),
                ("hist_p99", np.percentile(abs(everything), 99)),
                ("hist_p01", np.percentile(everything, 1)),
                ("hist_p001", np.percentile(everything, 0.1)),
            ):
                assert abs(entry[key] - exact) <= widths[0], (layer, key)
            assert entry["has_shift"] == layer.endswith(".mlp.fc2") == (prefix + "shift" in arrays)
            if entry["has_shift"]:
                centres = (minima + maxima) / 2
                shift = centres[0]
                for centre in centres[1:]:
                    shift = 0.95 * shift + 0.05 * centre
                np.testing.assert_allclose(arrays[prefix + "shift"], shift, rtol=1e-6, atol=1e-9)
                shifted = np.maximum(abs(minima.mean(axis=0) - shift), abs(maxima.mean(axis=0) - shift)).max()
                np.testing.assert_allclose(entry["shifted_absmax"], shifted, rtol=1e-6)
                np.testing.assert_allclose(entry["shift_absmax"], abs(shift).max(), rtol=1e-6)


def test_layer_statistics_keeps_its_contract(run):
    statistics = json.loads((run / "activations/layer_statistics.json").read_bytes())
    assert statistics["format"] == "per_timestep_npz_v2" and statistics["hist_bins"] == 256
    assert statistics["timestep_dir"] == "timestep_stats" and statistics["step_keys"] == ["0", "1", "2", "3"]
    assert statistics["shift_momentum"] == 0.95 and statistics["post_gelu_suffix"] == ".mlp.fc2"
    for key, sigma in statistics["sigma_map"].items():
        assert sigma == float(np.load(run / f"samples/0000_{int(key):03d}.npz")["sigma"])
    metadata = statistics["metadata"]
    assert (metadata["num_images"], metadata["num_timesteps"], metadata["total_processed"]) == (3, 4, 12)
    assert metadata["key_timesteps"] == [0, 1, 2, 3] and metadata["selected_image_ids"] == [0, 1, 2]


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.01, 3.0, 7e4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_implementations_agree(scale, dtype):
    """The plain twin, the CPU's and, where there is a GPU, its kernel: the same bits."""
    shapes = ((300, 259), (1, 5), (64, 1024))
    inputs = [(mx.random.normal(shape, key=mx.random.key(7)) * scale).astype(dtype) for shape in shapes]
    inputs = [mx.clip(x, -6e4, 6e4).astype(dtype) for x in inputs]
    twin = [np.array(array) for array in mlx_statistics(inputs)]
    single = [cpu_statistics(np.array(x.astype(mx.float32))) for x in inputs]
    assert np.array_equal(twin[0], np.concatenate([limits for limits, *_ in single], axis=1))
    assert np.array_equal(twin[1], np.concatenate([histograms for _, histograms, _ in single]))
    exact = [np.array(x.astype(mx.float32), np.float64) for x in inputs]
    moments = np.concatenate([[x.mean(axis=0), (x * x).mean(axis=0)] for x in exact], axis=1)
    reach = np.concatenate([abs(x).max(axis=0) for x in exact])
    for found in (twin[2], np.concatenate([moments for *_, moments in single], axis=1)):
        assert (abs(found - moments) <= 1e-5 * np.array([reach, reach**2]) + 1e-30).all()
    for x, histogram in zip(inputs, twin[1], strict=True):
        assert histogram[:256].sum() == x.size and histogram[258] == 0
    if mx.default_device() != mx.Device(mx.cpu):
        backend = "metal" if mx.metal.is_available() else "cuda"
        assert kernel_self_check(backend) is None
        found = gpu_statistics(inputs, backend)
        for kernel, plain in zip(found, twin, strict=True):
            exact = kernel.dtype == mx.int32 or kernel is found[0]
            assert np.array_equal(np.array(kernel), plain) if exact else np.allclose(np.array(kernel), plain, 1e-4)


def test_a_gpu_kernel_that_cannot_run_is_found_out():
    if mx.default_device() == mx.Device(mx.cpu):
        assert kernel_self_check("metal") and kernel_self_check("cuda")


def test_metal_and_cuda_share_their_source_and_define_the_same_words():
    words = [set(re.findall(r"#define (\w+)", KERNEL_HEADER[backend])) for backend in ("metal", "cuda")]
    assert words[0] == words[1]
    used = set(re.findall(r"\b[A-Z][A-Z_]+\b", TILE_KERNEL + MERGE_KERNEL + KERNEL_FUNCTIONS))
    assert used <= words[0] | {"TILE_ROWS", "TILE_THREADS", "COPY"}


def merged_arrays(partials):
    """Return the arrays of the step's file that partial results merge to."""
    layers = merge_partials(partials)
    return {layer_key(name, field): array for name, (fields, _) in layers.items() for field, array in fields.items()}


@pytest.mark.slow
def test_parts_merge_to_the_whole_bit_for_bit(run):
    """Statistics of image 0 and of images 1-2, collected apart, merge to those of the run."""
    paths = ActivationPaths(run)
    pipeline = pipeline_of(run)
    images = read_manifest(run)["images"]
    whole = np.load(paths.step_arrays("1"))
    parts = []
    for ids in ([2, 1], [0]):
        for image_id in ids:
            sample = np.load(run / f"samples/{image_id:04d}_001.npz")
            image = images[image_id]
            text = encode_prompts(pipeline, [image["prompt"]], image["cfg_weight"], image["negative_prompt"])
            with replaying(pipeline, text, [sample["timestep"]]) as replay:
                recorder = new_recorder("mlx")
                with hooked_layers(pipeline.mmdit, recorder.record):
                    statistics = recorder.finish(replay.forward(sample["x"], sample["timestep"]))
            parts.append((image_id, partial_arrays(statistics, image_id, 1, "float32")))
    arrays = merged_arrays([partial for _, partial in sorted(parts, key=lambda part: part[0])])
    assert sorted([*arrays, "step_index", "calibration_run"]) == sorted(whole.files)
    moments = {key for key in arrays if key.endswith(("__mean", "__mean_square"))}
    assert all(np.array_equal(arrays[key], whole[key]) for key in arrays.keys() - moments)
    assert all(np.allclose(arrays[key], whole[key], rtol=1e-3, atol=1e-4) for key in moments)  # the twin sums otherwise
    identity = COLLECTION.read(paths.collection)["calibration_run"]
    kept = merged_arrays([read_partial(paths, identity, image_id, 1) for image_id in range(3)])
    assert all(np.array_equal(kept[key], whole[key]) for key in kept)


def test_a_sample_that_is_not_finite_is_refused(run, tmp_path):
    folder = copy_of(run, tmp_path)
    before = folder_bytes(folder / "activations")
    path = folder / "samples/0001_002.npz"
    arrays = dict(np.load(path))
    arrays["x"] = arrays["x"].copy()
    arrays["x"][0, 3, 3, 5] = np.nan
    np.savez(path, **arrays)
    done = invoke("collect_layer_activations", "--calib-dir", folder, "--num-images", IMAGES, "--stride", 1, "--force")
    assert done.exit_code != 0 and "0001_002.npz: not a calibration sample (x holds NaN or infinity)" in done.stderr
    assert folder_bytes(folder / "activations") == before


def test_not_finite_activations_name_layer_step_and_image():
    """A latent that is finite but too large for the model's precision."""
    x = mx.full((4, 8), mx.inf)
    statistics = PassStatistics({"mm0.img.attn.q_proj": 0}, [8], [mlx_statistics([x])])
    with pytest.raises(
        StoreError, match=r"mm0\.img\.attn\.q_proj: 32 activations are not finite at step 2 of image 1; .*smaller"
    ):
        partial_arrays(statistics, 1, 2, "float32")


@pytest.mark.slow
def test_resume_makes_what_is_missing_anew_and_refuses_another_run(run, tmp_path):
    folder = copy_of(run, tmp_path)
    arguments = ["--calib-dir", folder, "--num-images", IMAGES, "--stride", 1]
    before = folder_bytes(folder)
    (folder / "activations/partial/0001_001.npz").unlink()
    (folder / "activations/partial/0002_003.npz").write_bytes(b"PK half")
    (folder / "activations/timestep_stats/step_2.npz").unlink()
    (folder / "activations/layer_statistics.json").unlink()
    (folder / "activations/partial/.0000_000.npz.x.tmp").write_bytes(b"half")
    done = invoke("collect_layer_activations", *arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert folder_bytes(folder) == before
    again = invoke("collect_layer_activations", *arguments)
    assert again.exit_code == 2 and "--resume" in again.stderr and "--force" in again.stderr
    other = invoke("collect_layer_activations", *arguments[:-1], 2, "--resume")
    assert other.exit_code == 2 and "--stride 1, not 2" in other.stderr
    assert folder_bytes(folder) == before


def test_dry_run_writes_nothing(run, tmp_path):
    folder = copy_of(run, tmp_path)
    shutil.rmtree(folder / "activations")
    done = invoke("collect_layer_activations", "--calib-dir", folder, "--num-images", 2, "--stride", 2, "--dry-run")
    assert done.exit_code == 0 and re.search(r"4 passes.*\n.*about .* on this machine, at most .*[kM]B in", done.stdout)
    assert not (folder / "activations").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["collect_layer_activations", "cache_adaround_data"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "samples/0001_002.npz").unlink(), "samples/0001_002.npz: missing; run generate_calibration_data.py with --resume"),
        (lambda f: (f / "samples/0001_002.npz").write_bytes((f / "samples/0001_002.npz").read_bytes()[:-50]), "0001_002.npz: truncated or damaged"),
        (lambda f: shutil.copy(f / "samples/0000_002.npz", f / "samples/0001_002.npz"), "0001_002.npz: a sample of another run (image_id 0, expected 1)"),
        (lambda f: other_timestep(f / "samples/0001_002.npz"), "0001_002.npz: a sample of another run (timestep 1.0, expected"),
        (lambda f: np.savez(f / "samples/0001_002.npz", x=np.array([{}], dtype=object)), "0001_002.npz: holds a pickled array"),
        (lambda f: edit(f / "manifest.json", format="v9"), "manifest.json: format 'v9' is not 'calibration_manifest_v1'"),
        (lambda f: edit(f / "manifest.json", num_images=7), "the calibration run has 3 of 7 images; finish it with generate_calibration_data.py --resume"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: not found; run generate_calibration_data.py first"),
        (lambda f: edit(f / "manifest.json", model_version="/gone"), "/gone: the calibration run's model is not there; --model says where it is now"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_file(run, tmp_path, script, damage, message):
    folder = copy_of(run, tmp_path)
    shutil.rmtree(folder / "activations")
    damage(folder)
    done = invoke(script, "--calib-dir", folder, "--num-images", IMAGES, "--stride", 1)
    lines = [line for line in done.stderr.splitlines() if not re.match(r"(passes|samples) \d+/", line)]  # no progress
    assert done.exit_code == 2 and len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert not (folder / "activations/layer_statistics.json").exists()
    assert not (folder / "adaround_cache/metadata.json").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def other_timestep(path):
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"timestep": np.float32(1)}))


def test_more_images_than_the_run_has(run):
    done = invoke("collect_layer_activations", "--calib-dir", run, "--num-images", 9, "--resume")
    assert done.exit_code == 2 and "--num-images 9: the calibration run has 3 images" in done.stderr
