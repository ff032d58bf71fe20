"""The one door to DiffusionKit: everything that the toolkit takes from it, and from the hub's client, is imported here.

Importing this module takes about 3 s: torch and coremltools come along.
"""

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep coremltools' "Failed to load _ML…" and version warnings off the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _ctrl_c_at_the_end() -> Iterator[None]:
    """Hold KeyboardInterrupt back until the block ends: coremltools swallows it (`except:`) and goes on.

    Below a stage's command line there is nothing to do: w4a8.cli.CtrlC ends the process at once.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    held_back = []
    signal.signal(signal.SIGINT, lambda signum, frame: held_back.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held_back:
        raise KeyboardInterrupt


with _ctrl_c_at_the_end(), _quiet():
    from diffusionkit.mlx import (
        MMDIT_CKPT,
        CFGDenoiser,
        DiffusionPipeline,
        SD3LatentFormat,
        append_dims,
        model_io,
    )
    from diffusionkit.mlx.clip import CLIPTextModel
    from diffusionkit.mlx.config import CLIPTextModelConfig, MMDiTConfig, VAEDecoderConfig
    from diffusionkit.mlx.mmdit import MMDiT
    from diffusionkit.mlx.model_io import _CONFIG as HUB_MMDIT_CONFIGS
    from diffusionkit.mlx.model_io import _DEFAULT_MODEL as HUB_TEXT_ENCODERS
    from diffusionkit.mlx.model_io import _MMDIT as HUB_MMDIT_FILES
    from diffusionkit.mlx.model_io import _MODELS as HUB_TEXT_FILES
    from diffusionkit.mlx.sampler import ModelSamplingDiscreteFlow
    from diffusionkit.mlx.scripts.generate_images import HEIGHT, SHIFT, WIDTH
    from diffusionkit.mlx.t5 import SD3T5Encoder
    from diffusionkit.mlx.tokenizer import T5Tokenizer, Tokenizer
    from diffusionkit.mlx.vae import VAEDecoder, VAEEncoder
    from huggingface_hub import constants as hub_constants
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

for _name in logging.root.manager.loggerDict:
    if _name.startswith(("diffusionkit", "argmaxtools")):
        logging.getLogger(_name).setLevel(logging.ERROR)  # their INFO lines cut through progress bars

__all__ = [  # noqa: RUF022
    "MMDIT_CKPT", "HUB_MMDIT_CONFIGS", "HUB_MMDIT_FILES", "HUB_TEXT_ENCODERS", "HUB_TEXT_FILES", "HEIGHT", "WIDTH", "SHIFT",
    "DiffusionPipeline", "CFGDenoiser", "ModelSamplingDiscreteFlow", "SD3LatentFormat", "append_dims", "model_io",
    "MMDiT", "MMDiTConfig", "CLIPTextModel", "CLIPTextModelConfig", "SD3T5Encoder", "Tokenizer", "T5Tokenizer",
    "VAEDecoder", "VAEDecoderConfig", "VAEEncoder", "hub_constants", "hf_hub_download", "HfHubHTTPError", "LocalEntryNotFoundError",
]  # fmt: skip
