"""Read files of every format as another program might write them.

The numbers are a finished run's; json and NumPy write them here, with keys in another order and keys of their own, in
float64 and big-endian, compressed, and without the entries that FORMATS calls optional.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import invoke
from finished_run import SMALL, finished_run
from safetensors.numpy import load_file, save_file

from calibration_store.layout import WeightPaths
from calibration_store.weights import read_quantized_block
from w4a8.model.catalog import BUNDLED_FOLDER

OPTIONAL = {  # entries that a reader of FORMATS need not find, and that other programs do not write
    "manifest.json": (
        "local_checkpoint", "loras", "architecture", "negative_prompt", "stride", "batch_size", "batch_option", "save_images",
        "prompts_sha256",
    ),
    "adaround_cache/metadata.json": ("calibration_run", "boundaries"),
    "adaround_weights/metadata.json": (
        "calibration_run", "weights_fingerprint", "training_run", "block_digests", "losses", "unit", "iters", "seed",
        "micro_batch", "window", "block_inputs", "end_to_end", "range_sigmas", "schedule",
    ),
    "activations/layer_statistics.json": (),
    "activations/quant_config.json": ("summary",),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others") / "run"
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), folder)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def rewritten(content):
    """Return JSON with its keys in reverse order, and with a key of another writer beside every `format`."""
    if isinstance(content, dict):
        turned = {key: rewritten(value) for key, value in reversed(content.items())}
        return turned | {"written_by": {"program": "another"}} if "format" in content else turned
    return [rewritten(value) for value in content] if isinstance(content, list) else content


def write_json(path, drop=()):
    content = json.loads(path.read_bytes())
    path.write_text(
        json.dumps(rewritten({key: value for key, value in content.items() if key not in drop}), indent=None)
    )


def write_npz(path, exact=(), compressed=True):
    """Write an NPZ again without the run's identity, in wide big-endian dtypes; exact: members that keep their dtype."""
    arrays = {key: array for key, array in np.load(path).items() if not key.endswith("_run")}
    wide = {
        key: a.astype(np.float64 if a.dtype.kind == "f" else a.dtype) for key, a in arrays.items() if key not in exact
    }
    foreign = {key: a.astype(a.dtype.newbyteorder(">")) for key, a in wide.items()}
    own = {"writer": np.array("another"), "other__thing": np.zeros((3, 3), np.complex64)}
    path.unlink()
    (np.savez_compressed if compressed else np.savez)(path, **own, **dict(reversed((arrays | foreign).items())))


def done(script, folder, *arguments):
    found = invoke(script, "--calib-dir", folder, *arguments)
    assert found.exit_code == 0, found.output
    return found


def same_numbers(one, other):
    """Return whether two JSON files are equal, leaving out the digests of the files that they were made from."""
    skipped = ("calibration_run", "weights_fingerprint", "written_with")

    def plain(content):
        if isinstance(content, dict):
            return {key: plain(value) for key, value in content.items() if key not in skipped}
        return sorted(content) if isinstance(content, list) and content and isinstance(content[0], str) else content

    return plain(json.loads(one.read_bytes())) == plain(json.loads(other.read_bytes()))


@pytest.mark.slow
def test_samples_and_their_manifest(run, copy):
    write_json(copy / "manifest.json", OPTIONAL["manifest.json"])
    for path in (copy / "samples").iterdir():
        write_npz(path, exact=("x", "timestep", "is_final"))
    done("collect_layer_activations", copy, "--num-images", 2, "--stride", 2, "--force")
    done("analyze_activations", copy)
    assert same_numbers(copy / "activations/quant_config.json", run / "activations/quant_config.json")
    done("cache_adaround_data", copy, "--num-images", 2, "--stride", 2, "--boundaries", "all", "--force")
    again, first = (np.load(folder / "adaround_cache/samples/0000_000.npz") for folder in (copy, run))
    assert all(np.array_equal(again[key], first[key]) for key in first.files if not key.endswith("_run"))


@pytest.mark.slow
def test_the_cache(run, copy):
    """Keep float16 and no compression, which the format demands, since stage 3W maps these samples."""
    write_json(copy / "adaround_cache/metadata.json", OPTIONAL["adaround_cache/metadata.json"])
    for path in (copy / "adaround_cache/samples").iterdir():
        arrays = {key: array for key, array in np.load(path).items() if not key.endswith("_run")}
        np.savez(path, other=np.zeros(3), **dict(reversed(arrays.items())))
    done("optimize_adaround", copy, "--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm0", "--force")
    ours, theirs = (read_quantized_block(WeightPaths(folder), "mm0") for folder in (run, copy))
    assert all(np.array_equal(ours[layer]["q"], theirs[layer]["q"]) for layer in ours)


def test_statistics(run, copy):
    write_json(copy / "activations/layer_statistics.json")
    for path in (copy / "activations/timestep_stats").glob("*.npz"):
        write_npz(path)
    for path in (copy / "activations/timestep_stats").glob("*.json"):
        index = json.loads(path.read_bytes())
        optional = ("tensor_min", "tensor_max", "shift_absmax", "hist_p01", "hist_p001", "hist_p99")
        layers = {
            name: {k: v for k, v in entry.items() if k not in optional} for name, entry in reversed(index.items())
        }
        path.write_text(json.dumps(layers))
    for script, name in (
        ("analyze_activations", "quant_config"),
        ("analyze_activations_multitier", "quant_config_multitier"),
    ):
        (copy / f"activations/{name}.json").unlink(missing_ok=True)
        done(script, copy)
        done(script, run)
        assert same_numbers(copy / f"activations/{name}.json", run / f"activations/{name}.json")


def test_steps_in_another_order(run, copy):
    path = copy / "activations/layer_statistics.json"
    content = json.loads(path.read_bytes())
    content["metadata"].pop("calibration_run")
    content["step_keys"] = content["step_keys"][::-1]
    path.write_text(json.dumps(content))
    done("analyze_activations", copy, "--output", copy / "activations/theirs.json")
    assert json.loads((copy / "activations/theirs.json").read_bytes())["per_timestep"].keys() == {"0", "2"}


@pytest.mark.slow
def test_figures(run, copy):
    done("evaluate_quantization", copy, "--variants", "w4-rtn,a8", "--num-images", 2, "--num-steps", 1)
    path = copy / "evaluation/metrics.json"
    write_json(path, ("calibration_run", "selected_image_ids", "weights_fingerprint", "model_version", "cfg_weight"))
    shutil.rmtree(copy / "evaluation/runs")
    assert "original against quantized" in done("report_calibration", copy).stdout.splitlines()[0]


@pytest.mark.slow
def test_a_model_folder(run, copy, tmp_path):
    folder = shutil.copytree(BUNDLED_FOLDER, tmp_path / "model")
    for name in ("config.json", "vocab.json"):
        content = json.loads((folder / name).read_bytes())
        turned = {
            key: dict(reversed(value.items())) if isinstance(value, dict) else value
            for key, value in reversed(content.items())
        }
        own = {} if name == "vocab.json" else {"license": "other", "tags": [1]}
        (folder / name).write_text(json.dumps(own | turned, indent=None))
    path = folder / "mmdit.safetensors"
    save_file(dict(reversed(load_file(path).items())), path, {"format": "pt"})
    done("generate_calibration_data", tmp_path / "drawn", "--model", folder, *SMALL)
    ours, theirs = (np.load(where / "samples/0000_004.npz")["x"] for where in (run, tmp_path / "drawn"))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("scales", [1, np.float64(127)])
def test_tiers_of_another_tool(copy, scales):
    """Read a config of version 3 that has bits of 4, 6 and 8, and no entry of ours beside."""
    steps = json.loads((copy / "activations/layer_statistics.json").read_bytes())["sigma_map"]
    names = list(json.loads((copy / "activations/timestep_stats/step_0_index.json").read_bytes()))
    layers = {
        name: {"scale": 10.0 / scales, "bits": (4, 6, 8)[i % 3], "reason": "by hand"} for i, name in enumerate(names)
    }
    content = {
        "sigma_map": steps,
        "per_timestep": dict.fromkeys(steps, layers),
        "format": "per_timestep_quant_config_v3",
    }
    (copy / "activations/quant_config_multitier.json").write_text(json.dumps(content))
    meaning = "range" if scales == 1 else "step"
    done(
        "evaluate_quantization",
        copy,
        "--variants",
        "multitier",
        "--scale-is",
        meaning,
        "--num-images",
        1,
        "--num-steps",
        1,
    )


@pytest.mark.slow
def test_weights(run, copy):
    write_json(copy / "adaround_weights/metadata.json", OPTIONAL["adaround_weights/metadata.json"])
    for path in (copy / "adaround_weights").glob("mm*.npz"):
        write_npz(path)
    for folder in (run, copy):
        done("export_quantized_model", folder, "--output", folder / "model")
    ours, theirs = ((folder / "model/mmdit.safetensors").read_bytes() for folder in (run, copy))
    assert ours == theirs


def foreign_config(path, **changes):
    """Write quant_config.json (version 4) as another tool does: without clipping_range and without our metadata."""
    config = json.loads(path.read_bytes())
    layers = {
        step: {name: {key: entry[key] for key in ("bits", "scale", "shift", "shifted_scale") if key in entry}
               for name, entry in reversed(found.items())}
        for step, found in reversed(config["per_timestep"].items())
    }  # fmt: skip
    content = {
        "per_timestep": layers,
        "sigma_map": config["sigma_map"],
        "format": config["format"],
        "notes": [1],
    } | changes
    path.write_text(json.dumps(content))


def migration(channels, wide=()):
    """Return an `outlier_config` entry that lists three channels; those in `wide` have the multiplier 4, all others 1."""
    multipliers = [4.0 if channel in wide else 1.0 for channel in range(channels)]
    return {"outlier_indices": [3, 7, 20], "multiplier_vector": multipliers, "scale_normal": 1.0, "scale_outlier": 4.0}


@pytest.mark.slow
def test_the_config_of_the_tool_whose_format_this_is(run, copy):
    """Measure a foreign config with `--scale-is`, which comes close to our own config's figure."""
    done(
        "evaluate_quantization", run, "--variants", "a8", "--num-images", 1, "--num-steps", 1, "--output", run / "ours"
    )
    foreign_config(copy / "activations/quant_config.json", outlier_config={"mm0.img.attn.q_proj": migration(192, (7,))})
    asked = ("--variants", "a8", "--num-images", 1, "--num-steps", 1)
    refused = invoke("evaluate_quantization", "--calib-dir", copy, *asked)
    assert refused.exit_code == 2 and "--scale-is" in refused.stderr
    done("evaluate_quantization", copy, *asked, "--scale-is", "range")
    foreign_config(copy / "activations/quant_config.json", outlier_config=None)
    done("evaluate_quantization", copy, *asked, "--scale-is", "range")
    ours, theirs = (json.loads(path.read_bytes())["variants"]["a8"]["psnr"]["mean"]
                    for path in (run / "ours/metrics.json", copy / "evaluation/metrics.json"))  # fmt: skip
    assert theirs > ours - 6  # ranges as they are, without our clipping and migration


@pytest.mark.parametrize("wide", [(), (3, 7, 20)])
def test_listed_outliers_may_have_multipliers_of_one(copy, wide):
    foreign_config(copy / "activations/quant_config.json", outlier_config={"mm0.img.attn.q_proj": migration(192, wide)})
    done(
        "export_quantized_model", copy, "--weights", "w4-rtn", "--activations", "a8", "--scale-is", "range", "--dry-run"
    )


def test_an_outlier_that_is_not_listed_is_refused(copy):
    foreign_config(copy / "activations/quant_config.json", outlier_config={"mm0.img.attn.q_proj": migration(192, (5,))})
    refused = invoke(
        "evaluate_quantization", "--calib-dir", copy, "--variants", "a8", "--scale-is", "range", "--num-images", 1
    )
    assert refused.exit_code == 2 and "outlier_indices lack a channel whose multiplier is above 1" in refused.stderr
