"""Run by test_hub.py in a process of its own: scripts, one after the other, over a hub cache whose models are tiny.

hub_driver.py write HF_HOME
hub_driver.py SCRIPT [ARGUMENT]... [then SCRIPT [ARGUMENT]...]...    a command line, or a function of SCRIPTS
"""

import w4a8  # noqa: F401  (before MLX)

# isort: split
import importlib
import itertools
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.hub_cache import (
    SD3_MEDIUM,
    T5_TINY,
    hub_folder,
    make_tiny,
    write_checkpoint,
    write_t5,
    write_text_encoders,
)
from w4a8.model.diffusionkit import model_io
from w4a8.model.layers import model_layers
from w4a8.model.loading import diffusionkit_pipeline
from w4a8.quantized.native import NativeLinear

LARGE = "argmaxinc/mlx-stable-diffusion-3.5-large"
SCHNELL = "argmaxinc/mlx-FLUX.1-schnell"
LARGE_4BIT = f"{LARGE}-4bit-quantized"
make_tiny()


def denoise(folder, prompt, seed, output):
    """Two samplings of one step by DiffusionKit's own pipeline around an exported transformer."""
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
    """What DiffusionKit's loaders of its 4-bit SD3.5-large make of a file."""
    model_io.LOCAl_SD3_CKPT = path
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


SCRIPTS = {"denoise": denoise, "load_hub_file": load_hub_file}


def run(script, *arguments):
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
        for repository in (SD3_MEDIUM, LARGE, SCHNELL):
            write_checkpoint(Path(sys.argv[2]), repository)
        (hub_folder(Path(sys.argv[2]), LARGE_4BIT) / "config.json").write_text("{}")
        write_t5(Path(sys.argv[2]), T5_TINY)
    else:
        for is_then, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
            if not is_then:
                run(*words)
