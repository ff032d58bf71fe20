"""Run scripts, one after the other, over a hub cache whose models are tiny. Tests start this file as a process.

hub_driver.py write HF_HOME
hub_driver.py SCRIPT [ARGUMENT]... [then SCRIPT [ARGUMENT]...]...    a command line, or a function of SCRIPTS
"""

import w4a8  # noqa: F401  (before MLX)

# isort: split
import importlib
import itertools
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.random_model import (
    SD3_MEDIUM,
    T5_TINY,
    hub_folder,
    make_tiny,
    write_checkpoint,
    write_t5,
    write_text_encoders,
)
from calibration_store.errors import UserError
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import read_manifest
from calibration_store.model_folder import weights_fingerprint
from calibration_store.samples import read_sample
from w4a8.model.catalog import HUB_MODELS, describe_model, model_files
from w4a8.model.diffusionkit import FluxPipeline, MMDiT, model_io
from w4a8.model.layers import model_layers
from w4a8.model.loading import check_checkpoint, diffusionkit_pipeline
from w4a8.model.location import Lora
from w4a8.model.original_model import OriginalTimestepAdapter
from w4a8.model.packed import NativeLinear
from w4a8.model.parts import TRANSFORMER, whole_model
from w4a8.model.t5 import T5Encoder
from w4a8.model.transformer import open_transformer

LARGE = "argmaxinc/mlx-stable-diffusion-3.5-large"
SCHNELL, DEV = "argmaxinc/mlx-FLUX.1-schnell", "argmaxinc/mlx-FLUX.1-dev"
SCHNELL_4BIT = f"{SCHNELL}-4bit-quantized"
LARGE_4BIT = f"{LARGE}-4bit-quantized"
make_tiny()


def denoise(folder, prompt, seed, output):
    """Sample one step twice by DiffusionKit's own pipeline around an exported transformer.

    The function writes `output`, an NPZ: native, (layers,) bool, whether each layer computes from packed weights, and
    the latents of the two samplings.
    """
    options = {"w16": False, "a16": False, "use_t5": False, "low_memory_mode": False, "shift": 3.0}
    pipeline = diffusionkit_pipeline(folder, **options)
    native = [isinstance(layer.module, NativeLinear) for layer in model_layers(pipeline.mmdit).values()]
    text = pipeline.encode_text(prompt, 5.0, "")
    found = [
        pipeline.latent_format.process_in(pipeline.denoise_latents(*text, 1, 5.0, (8, 8), int(seed))[0])
        for _ in range(2)
    ]
    np.savez(output, native=native, latents=np.stack([np.array(latent) for latent in found]))


def load_hub_file(path, output):
    """Load a file by DiffusionKit's loaders of its 4-bit SD3.5-large.

    The function writes the transformer's parameters to `output`. The decoder must equal that of the original model.
    """
    model_io.LOCAl_SD3_CKPT, model_io._FLOAT16 = path, mx.float16  # as DiffusionPipeline sets them
    mmdit = model_io.load_mmdit(key=LARGE_4BIT, float16=True, model_key=LARGE_4BIT, low_memory_mode=False)
    decoder = model_io.load_vae_decoder(key=LARGE_4BIT, float16=True)
    model_io.load_vae_encoder(key=LARGE_4BIT, float16=True)
    mx.save_safetensors(output, dict(tree_flatten(mmdit.parameters())))
    model_io.LOCAl_SD3_CKPT = None
    original = model_io.load_vae_decoder(key=LARGE, float16=True)
    for (name, array), (_, expected) in zip(
        tree_flatten(decoder.parameters()), tree_flatten(original.parameters()), strict=True
    ):
        assert mx.array_equal(array, expected), name


def flux_latents(folder, half):
    """Draw every image of a run of FLUX again by DiffusionKit's own pipeline; the finished latents must be equal.

    folder: of the run; half: the run's precision, float32 or bfloat16. The checkpoint's k has biases of 0, since
    DiffusionKit leaves them out; timesteps are embedded as the original does.
    """
    model_io._CONFIG[SCHNELL].dtype = mx.float32
    update = nn.Module.update
    MMDiT.update = lambda self, parameters: update(
        self, parameters, strict=False
    )  # the file has k's bias, which MLX refuses now
    options = {"w16": half == "bfloat16", "a16": half == "bfloat16", "low_memory_mode": False}
    pipeline = FluxPipeline(model_version=SCHNELL, **options)
    del MMDiT.update
    pipeline.mmdit.t_embedder.__class__ = OriginalTimestepAdapter
    pipeline.t5_encoder = T5Encoder(pipeline.t5_encoder)
    pipeline.latent_format.process_out = lambda latent: latent
    manifest = read_manifest(Path(folder))
    assert manifest["activation_dtype"] == half
    for image in manifest["images"]:
        text = [array.astype(pipeline.activation_dtype) for array in pipeline.encode_text(image["prompt"], 0.0)]
        size, steps = tuple(manifest["latent_size"]), manifest["num_steps"]
        found, _ = pipeline.denoise_latents(*text, steps, 0.0, size, image["seed"])
        sample = read_sample(CalibrationPaths(Path(folder)), manifest, image["image_id"], steps)["x"]
        np.testing.assert_array_equal(sample, np.array(found.astype(pipeline.activation_dtype).astype(mx.float32)))


def load_flux_file(path, output):
    """Load a file by DiffusionKit's loader of its 4-bit FLUX.1-schnell, and write the parameters to `output`."""
    model_io.LOCAl_SD3_CKPT, model_io._FLOAT16 = path, mx.float16  # as DiffusionPipeline sets them
    mmdit = model_io.load_flux(key=SCHNELL_4BIT, float16=False, model_key=SCHNELL_4BIT, low_memory_mode=False)
    mx.save_safetensors(output, dict(tree_flatten(mmdit.parameters())))


def open_checkpoints(folder, output):
    """Open every checkpoint of a folder; write {name: the largest difference from its reference, or the error} as JSON.

    A name begins with its model, sd3, large, flux or dev, and the transformer and `images` in the name asks for the
    VAE, too. The reference is the file of that name in expected/ beside the folder, in the original keys, or else the
    hub's model; one that is called `drawn` has none.
    """
    found, originals = {}, {}
    for path in sorted(Path(folder).iterdir()):
        try:
            info = describe_model(str(path))
            parts = whole_model("float32") if "images" in path.name else {TRANSFORMER: "float32"}
            check_checkpoint(info, parts)
            given = dict(tree_flatten(open_transformer(info).parameters()))
            expected = Path(folder).parent / "expected" / path.name
            key = str(expected) if expected.exists() else info.hub_id
            if key not in originals:
                reference = describe_model(key)
                originals[key] = dict(tree_flatten(open_transformer(reference).parameters()))
            differences = [
                mx.abs(given[name].astype(mx.float32) - array.astype(mx.float32)).max().item()
                for name, array in originals[key].items()
                if "drawn" not in path.name
            ]
            found[path.name] = max(differences, default=0)
        except UserError as error:
            found[path.name] = error.message
    Path(output).write_text(json.dumps(found))


def note_fingerprint_of_080(folder):
    """Give a run's manifest the fingerprint that version 0.8.0 would have noted."""
    path = CalibrationPaths(Path(folder)).manifest
    manifest = json.loads(path.read_bytes())
    files = model_files(describe_model(manifest["model_version"]), manifest["use_t5"])
    path.write_text(json.dumps(manifest | {"weights_fingerprint": weights_fingerprint(files)}))


def open_loras(folder, output):
    """Fuse every LoRA of a folder; write {name: [largest relative error, changed parameters] or the error} as JSON.

    A name begins with its model, sd3 or flux. The reference is the checkpoint expected/NAME.safetensors beside the
    folder, or the hub's model, where nothing else may have changed.
    """
    found = {}
    for path in sorted(Path(folder).iterdir()):
        model = SCHNELL if path.name.startswith("flux") else SD3_MEDIUM
        expected = Path(folder).parent / "expected" / f"{path.stem}.safetensors"
        try:
            given = dict(tree_flatten(open_transformer(describe_model(model, [Lora(path, 0.5)])).parameters()))
        except UserError as error:
            found[path.name] = error.message
            continue
        base = dict(tree_flatten(open_transformer(describe_model(model)).parameters()))
        reference = describe_model(str(expected) if expected.exists() else model)
        wanted = dict(tree_flatten(open_transformer(reference).parameters()))
        worst, changed = 0.0, 0
        for name, array in wanted.items():
            one, other, before = (
                np.array(each.astype(mx.float32), np.float64) for each in (given[name], array, base[name])
            )
            worst = max(worst, np.abs(one - other).max() / np.abs(other).max())
            changed += not np.array_equal(one, before)
        found[path.name] = [worst, changed]
    Path(output).write_text(json.dumps(found))


SCRIPTS = {
    function.__name__: function
    for function in (
        denoise,
        load_hub_file,
        flux_latents,
        load_flux_file,
        open_checkpoints,
        note_fingerprint_of_080,
        open_loras,
    )
}


def run(script, *arguments):
    """Run a function of SCRIPTS, or a script's command line, which may end with exit code 0 only."""
    if script in SCRIPTS:
        SCRIPTS[script](*arguments)
        return
    try:
        importlib.import_module(script).main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_text_encoders(Path(sys.argv[2]))
        for repository in (name for name in HUB_MODELS if "turbo" not in name):
            write_checkpoint(Path(sys.argv[2]), repository)
        for repository in (LARGE_4BIT, SCHNELL_4BIT):
            (hub_folder(Path(sys.argv[2]), repository) / "config.json").write_text("{}")
        write_t5(Path(sys.argv[2]), T5_TINY)
    else:
        for is_then, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
            if not is_then:
                run(*words)
