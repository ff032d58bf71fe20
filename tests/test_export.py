"""export_quantized_model.py: the folder holds what stage 4 measured, bit for bit, every stage takes it, nothing half-written is read."""

import functools
import json
import resource
import shutil
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import folder_bytes, invoke, start
from finished_run import finished_run, model_copy, note_digests, one_line

from calibration_store.layout import WeightPaths
from calibration_store.weights import read_quantized_block
from tools.prove import small_disk
from w4a8.evaluation.variants import make_variant
from w4a8.model.folder import load_folder_transformer
from w4a8.model.layers import model_layers
from w4a8.model.packed import NativeEmbedding, NativeLinear
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.sampling import euler_steps, initial_noise

QUANTIZED_LAYERS = 93


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_copy(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run with its export; shared, so tests write elsewhere."""
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), folder)
    for path in (folder / "adaround_weights").glob("mm*.npz"):
        arrays = dict(np.load(path))  # as few iterations leave the biases where float16 has them
        np.savez(path, **{key: a + np.float32(0.01) if key.endswith("__bias") else a for key, a in arrays.items()})
    note_digests(folder / "adaround_weights")
    done = export(folder)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def folder(run, tmp_path):
    """Return a copy of the exported folder, for tests to damage."""
    return shutil.copytree(run / "quantized_model", tmp_path / "model")


def export(run, *arguments):
    return invoke("export_quantized_model", "--calib-dir", run, *arguments)


def draw(folder, *arguments):
    return invoke("draw_images", "red heart", "--model", folder, "--num-steps", 1, *arguments)


def modules_of(mmdit):
    """Path -> every linear layer and table."""
    return {path: m for path, m in mmdit.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


def config_of(folder):
    return json.loads((folder / "config.json").read_bytes())


def equal(first, second):
    """Bit for bit, dtype included."""
    return first.dtype == second.dtype and mx.array_equal(first, second).item()


def dense(arrays, path, entry):
    """Return a packed layer's weight as MLX itself unpacks it, float32."""
    grid = (arrays[f"{path}.{key}"].astype(mx.float32) for key in ("scales", "biases"))
    return mx.dequantize(arrays[f"{path}.weight"], *grid, entry["group_size"], entry["bits"])


def latent_of(pipeline, mmdit=None):
    """Return the latent after two steps, of the pipeline's transformer or of another in its place."""
    original, pipeline.mmdit = pipeline.mmdit, mmdit or pipeline.mmdit
    try:
        text = encode_prompts(pipeline, ["red heart"], 4.0)
        return np.array(list(euler_steps(pipeline, text, initial_noise(1, (16, 16)), 2, 4.0))[-1].x)
    finally:
        pipeline.mmdit = original


# --- what is in the folder ----------------------------------------------------------------------------------


def test_packed_layers_are_what_stage_4_measured(run, emoji):
    arrays = mx.load(str(run / "quantized_model/mmdit.safetensors"))
    entry = config_of(run / "quantized_model")["quantization"]
    packed = {path: layer for path, layer in entry.items() if isinstance(layer, dict)}
    assert len(packed) == QUANTIZED_LAYERS and {path for path in packed} == quantized_paths(emoji.mmdit)
    with make_variant("w4-adaround", run).in_place(emoji):
        for path, module in modules_of(emoji.mmdit).items():
            if path in packed:
                assert arrays[f"{path}.scales"].dtype == arrays[f"{path}.biases"].dtype == mx.float16
                assert equal(dense(arrays, path, packed[path]), module.weight), path
                assert "bias" not in module or equal(arrays[f"{path}.bias"].astype(mx.float32), module.bias)


def quantized_paths(mmdit):
    in_blocks = {id(layer.module) for layer in model_layers(mmdit).values()}
    return {path for path, module in modules_of(mmdit).items() if id(module) in in_blocks}


def test_weights_and_biases_are_those_that_stage_3w_wrote(run, emoji):
    """From the block's file by NumPy alone: code · scale + minimum, rounded to float16."""
    arrays = mx.load(str(run / "quantized_model/mmdit.safetensors"))
    entry = config_of(run / "quantized_model")["quantization"]
    path_of = {id(module): path for path, module in modules_of(emoji.mmdit).items()}
    biases = 0
    for name, fields in read_quantized_block(WeightPaths(run), "mm3").items():
        path = path_of[id(model_layers(emoji.mmdit)[name].module)]
        scale, minimum = (
            a.astype(np.float16).astype(np.float32) for a in (fields["scale"], -fields["scale"] * fields["zero_point"])
        )
        expected = fields["q"].reshape(*scale.shape, -1) * scale[..., None] + minimum[..., None]
        assert np.array_equal(np.array(dense(arrays, path, entry[path])), expected.reshape(fields["q"].shape)), name
        if "bias" in fields:
            biases += 1
            assert equal(arrays[f"{path}.bias"], mx.array(fields["bias"].astype(np.float16)))
            assert not np.array_equal(fields["bias"], np.array(model_layers(emoji.mmdit)[name].bias))
    assert biases == 10


def test_everything_else_is_the_originals(run, model):
    arrays, original = (mx.load(str(f / "mmdit.safetensors")) for f in (run / "quantized_model", model))
    config = config_of(run / "quantized_model")
    packed = {path for path, layer in config["quantization"].items() if isinstance(layer, dict)}
    rest = {name for name in original if name.rpartition(".")[0] not in packed}
    assert len(rest) == 49 and all(equal(arrays[name], original[name]) for name in rest)
    assert set(arrays) == set(original) | {f"{path}.{key}" for path in packed for key in ("scales", "biases")}
    for name in ("clip_l.safetensors", "clip_g.safetensors", "decoder.safetensors", "vocab.json", "captions.txt"):
        assert (run / "quantized_model" / name).read_bytes() == (model / name).read_bytes()
    own = json.loads((model / "config.json").read_bytes())
    assert {key: config[key] for key in own} == own


def test_the_config_names_every_linear_layer_and_table(run, emoji):
    entry = config_of(run / "quantized_model")["quantization"]
    assert {key for key in entry if key not in ("group_size", "bits", "mode")} == set(modules_of(emoji.mmdit))
    layer = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert all(entry[path] in (False, layer) for path in modules_of(emoji.mmdit))
    note = config_of(run / "quantized_model")["export"]
    assert (note["weights"], note["activations"]) == ("w4-adaround", "a8")
    manifest = json.loads((run / "manifest.json").read_bytes())
    assert note["weights_fingerprint"] == manifest["weights_fingerprint"]


def test_how_small_it_is(run, model, tmp_path):
    arrays = mx.load(str(run / "quantized_model/mmdit.safetensors"))
    entry = config_of(run / "quantized_model")["quantization"]
    packed = [path for path, layer in entry.items() if isinstance(layer, dict)]
    parts = sum(arrays[f"{path}.{key}"].nbytes for path in packed for key in ("weight", "scales", "biases"))
    whole = sum(8 * arrays[f"{path}.weight"].size for path in packed)  # weights of a word
    assert 0.25 < parts / (2 * whole) <= 0.30
    sizes = [(f / "mmdit.safetensors").stat().st_size for f in (run / "quantized_model", model)]
    assert sizes[0] <= 0.58 * sizes[1]
    done = export(run, "--dry-run", "--output", tmp_path / "out")
    assert done.exit_code == 0 and f"{parts / (2 * whole):.3f} x their float16" in done.stdout, done.output
    assert "to do: 93 layers, about" in done.stdout and not (tmp_path / "out").exists()


# --- what it computes ---------------------------------------------------------------------------------------


def evaluated(run, output, native):
    """metrics.json, and {variant: arrays} of stage 4 with the learned weights and with their export."""
    quick = ("--num-images", 2, "--num-steps", 2, "--batch-size", 2, "--variants", "w4-adaround,native")
    done = invoke("evaluate_quantization", "--calib-dir", run, *quick, "--native", native, "--output", output)
    assert done.exit_code == 0, done.output
    runs = {path.name.rsplit("_", 1)[0]: np.load(path) for path in (output / "runs").glob("*.npz")}
    return json.loads((output / "metrics.json").read_bytes())["variants"], runs


@pytest.mark.slow
@pytest.mark.parametrize("native", ["auto", "dequantize"])
def test_the_export_draws_what_stage_4_measured(run, tmp_path, native):
    metrics, runs = evaluated(run, tmp_path / "out", native)
    for key in ("images", "latents"):
        assert np.array_equal(runs["native"][key], runs["w4-adaround"][key])
        assert not np.array_equal(runs["native"][key], runs["fp"][key])
    assert metrics["native"]["psnr"] == metrics["w4-adaround"]["psnr"]


@pytest.mark.slow
def test_products_of_packed_weights_are_as_good(run, tmp_path):
    metrics, runs = evaluated(run, tmp_path / "out", "quantized")
    assert not np.array_equal(runs["native"]["latents"], runs["w4-adaround"]["latents"])  # another order of sums
    assert abs(metrics["native"]["psnr"]["mean"] - metrics["w4-adaround"]["psnr"]["mean"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variant", "layers"),
    [
        (("--weights", "w4-rtn-g0"), "w4-rtn-g0", 93),
        (("--weights", "w3-rtn-g32"), "w3-rtn-g32", 93),
        (("--rest-bits", 8), "w4-adaround-r8", 93 + 23),
        (("--weights", "w4-rtn-g64", "--all-linears"), "w4-rtn-g64-all", 93 + 23),
    ],
)
def test_other_weights(run, emoji, tmp_path, arguments, variant, layers):
    done = export(run, *arguments, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    exported = load_folder_transformer(tmp_path / "out", mx.float32)
    native = [m for m in exported.modules() if isinstance(m, (NativeLinear, NativeEmbedding))]
    assert len(native) == layers
    with make_variant(variant, run).in_place(emoji):
        expected = latent_of(emoji)
    assert np.array_equal(latent_of(emoji, exported), expected)
    assert not np.array_equal(latent_of(emoji), expected)


@pytest.mark.slow
def test_an_export_is_a_model_for_the_stages(run, tmp_path):
    where = ("--calib-dir", tmp_path / "run")
    for script, *arguments in (
        ("generate_calibration_data", "--model", run / "quantized_model", "--num-images", 1, "--num-steps", 2),
        ("cache_adaround_data", "--num-images", 1, "--stride", 1),
        ("collect_layer_activations", "--num-images", 1, "--stride", 1),
        ("analyze_activations",),
        ("evaluate_quantization", "--num-images", 1, "--num-steps", 1, "--variants", "a8-dynamic"),
    ):
        done = invoke(script, *arguments, *where)
        assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run/activations/quant_config.json").read_bytes())
    assert all(len(layers) == QUANTIZED_LAYERS for layers in config["per_timestep"].values())
    one_line(invoke("optimize_adaround", "--iters", 10, *where), "packed already")
    one_line(export(tmp_path / "run", "--weights", "w4-rtn"), "packed already")
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "w4-rtn", "--force")
    one_line(invoke("evaluate_quantization", *quick, *where), "packed already")
    assert not (tmp_path / "run/adaround_weights").exists() and not (tmp_path / "run/quantized_model").exists()


# --- damaged, foreign, partial ------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "mmdit.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(folder):
    path = folder / "mmdit.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def seven_bits(folder):
    config = config_of(folder)
    layer = next(value for value in config["quantization"].values() if isinstance(value, dict))
    layer["bits"] = 7
    (folder / "config.json").write_text(json.dumps(config))


def changed(edit):
    """Return a function that damages config.json of a folder by an edit."""

    def apply(folder):
        config = config_of(folder)
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(lambda c: c.pop("quantization")), "an export without 'quantization'"),
        (
            changed(lambda c: c["quantization"].update({"a.layer": True})),
            "a.layer: True is neither an object nor false",
        ),
        (changed(lambda c: c.update(other=10**30)), "config.json: not valid JSON"),
        (truncate, "mmdit.safetensors: not what was exported"),
        (flip_a_bit, "mmdit.safetensors: not what was exported"),
        (seven_bits, "bits 7, group_size 64"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: not found"),
        (lambda folder: (folder / "clip_g.safetensors").unlink(), "clip_g.safetensors"),
        (lambda folder: (folder / "activations.json").write_text("{"), "activations.json"),
    ],
)
def test_damaged_exports_are_one_line(folder, tmp_path, damage, message):
    damage(folder)
    one_line(draw(folder, "--activations", "--output", tmp_path / "drawn"), message)
    assert not (tmp_path / "drawn").exists()


@pytest.mark.slow
def test_a_damaged_export_is_no_variant(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    flip_a_bit(tmp_path / "run/quantized_model")
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "native", "--calib-dir", tmp_path / "run")
    one_line(invoke("evaluate_quantization", *quick), "not what was exported")
    assert export(tmp_path / "run", "--force").exit_code == 0
    assert invoke("evaluate_quantization", *quick).exit_code == 0


def test_an_export_of_other_learned_weights_is_no_variant(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    metadata = tmp_path / "run/adaround_weights/metadata.json"
    metadata.write_bytes(metadata.read_bytes() + b"\n")
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "native", "--calib-dir", tmp_path / "run")
    one_line(invoke("evaluate_quantization", *quick), "exported from other learned weights")


def test_an_output_that_is_a_link_to_itself_is_one_line(run, tmp_path):
    loop = tmp_path / "model"
    loop.symlink_to(loop)
    one_line(export(run, "--output", loop), "model")
    one_line(draw(loop, "--output", tmp_path / "drawn"), "model")
    assert loop.is_symlink()


@pytest.mark.slow
def test_the_old_export_stays_until_the_new_one_is_complete(run, tmp_path):
    """Write an export over an old one where the system refuses a large file, and on a disk that is too small for both."""
    folder = shutil.copytree(run / "quantized_model", tmp_path / "disk/model")
    before = folder_bytes(folder)
    command = ("export_quantized_model", "--calib-dir", run, "--force", "--weights", "w4-rtn", "--output")
    refuse = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    process = start(*command, folder, preexec_fn=refuse)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot write" in stderr and "File too large" in stderr, stderr
    assert folder_bytes(folder) == before
    with small_disk(tmp_path / "disk", sum(map(len, before.values())) + 10**7) as made:
        if made:  # only root may make one
            shutil.copytree(run / "quantized_model", folder)
            one_line(invoke(*command, folder), "the old export stays until the new one is complete")
            assert folder_bytes(folder) == before


def test_other_peoples_files_are_left_alone(run, model, folder, tmp_path):
    (tmp_path / "named").mkdir()  # holds a file with the name of an export's, and no export
    (tmp_path / "named/captions.txt").write_text("mine")
    export(run, "--output", tmp_path / "named", "--format", "gguf", "--weights", "w4-rtn-g32")
    assert (tmp_path / "named/captions.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()  # another model, whose files have the names of an export's
    (tmp_path / "other/config.json").write_text('{"name": "exported-cat", "export": 1}')
    (tmp_path / "other/mmdit.safetensors").write_text("weights")
    before = folder_bytes(tmp_path), folder_bytes(model), folder_bytes(folder)
    for force in ((), ("--force",)):
        one_line(export(run, "--output", tmp_path / "mine", *force), "holds notes.txt, which stage 5 did not write")
        one_line(export(run, "--output", model, *force), "is the original model; give another --output")
        one_line(export(run, "--output", tmp_path / "other", *force), "config.json, which stage 5 did not write")
    one_line(export(run, "--output", folder), "holds an export; give --force")
    assert before == (folder_bytes(tmp_path), folder_bytes(model), folder_bytes(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "nonsense"), "--weights nonsense: not known"),
        (("--weights", "native"), "--weights native: not known"),
        (("--weights", "w3-adaround"), "holds 4 bits"),
        (("--weights", "w4-rtn-g128"), "groups of 128 do not divide the 192 inputs"),
        (("--activations", "multitier"), "--activations multitier: not known"),
        (("--activations", "a8-dynamic"), "--activations a8-dynamic: not known"),
        (("--rest-bits", 8, "--all-linears"), "exclude each other"),
        (("--weights", "w4-rtn-g32", "--all-linears"), "4 bits in groups of 64"),
    ],
)
def test_bad_options(run, tmp_path, arguments, message):
    one_line(export(run, *arguments, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_kill_9_leaves_no_config_or_the_old_export(run, folder):
    """Packing touches nothing; then the old config.json goes first and the new one comes last."""
    whole = folder_bytes(folder)
    config, arguments = folder / "config.json", ("--calib-dir", run, "--output", folder, "--force")
    for _ in range(5):
        process = start("export_quantized_model", *arguments)
        while config.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        if not config.exists():
            break
    assert not config.exists() and set(folder_bytes(folder)) != set(whole)
    one_line(draw(folder), "config.json: not found")
    one_line(export(run, "--output", folder), "holds an export; give --force")
    assert export(run, "--output", folder, "--force").exit_code == 0
    assert folder_bytes(folder) == whole
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "README.md"}
    assert max(written, key=written.get) == "config.json"
