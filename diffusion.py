"""The one door to DiffusionKit: load a model, encode text, own the modulation cache, take Euler steps.

Everything else in the toolkit sees plain MLX arrays. Importing this module takes about 3 s
(torch and coremltools come along), so scripts import it inside their stage, never at the top.

Shapes: B images are sampled together; the model sees R rows, 2B with guidance (B conditional, then
B unconditional) and B without. Latents are (B, h, w, 16), text tokens (R, tokens, 4096).
"""

import contextlib
import copy
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import signal
import socket
import sys
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click


def _load_fast_blas() -> None:
    """Put torch's BLAS in front of the reference BLAS in MLX's Linux CPU wheel (benchmarks/generation_speed.py).

    libmlx calls `sgemm_` through the dynamic linker, so a library loaded globally before MLX takes its place.
    torch is installed anyway: DiffusionKit imports it.
    """
    torch = importlib.util.find_spec("torch")
    if platform.system() != "Linux" or torch is None:
        return
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return  # CUDA: matrix products never reach the BLAS
    if "mlx.core" in sys.modules:
        warnings.warn("mlx.core was imported before diffusion: matrix products stay slow (Issue 15)", stacklevel=2)
        return
    ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


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

    Below a stage's command line there is nothing to do: cli_options.CtrlC ends the process at once.
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


_load_fast_blas()

with _ctrl_c_at_the_end(), _quiet():  # after the BLAS
    import mlx.core as mx
    import numpy as np
    import torch
    from diffusionkit.mlx import MMDIT_CKPT, CFGDenoiser, DiffusionPipeline, SD3LatentFormat, append_dims
    from diffusionkit.mlx.clip import CLIPTextModel
    from diffusionkit.mlx.config import CLIPTextModelConfig, MMDiTConfig
    from diffusionkit.mlx.mmdit import MMDiT
    from diffusionkit.mlx.model_io import _CONFIG as HUB_MMDIT_CONFIGS
    from diffusionkit.mlx.model_io import _DEFAULT_MODEL as HUB_TEXT_ENCODERS
    from diffusionkit.mlx.model_io import _MMDIT as HUB_MMDIT_FILES
    from diffusionkit.mlx.model_io import _MODELS as HUB_TEXT_FILES
    from diffusionkit.mlx.sampler import ModelSamplingDiscreteFlow
    from diffusionkit.mlx.scripts.generate_images import HEIGHT, SHIFT, WIDTH
    from diffusionkit.mlx.tokenizer import Tokenizer
    from diffusionkit.mlx.vae import VAEDecoder
    from huggingface_hub import constants as hub_constants
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from mlx.utils import tree_flatten, tree_map
    from PIL import Image

from calibration_store import (  # noqa: E402
    BUNDLED_MODEL,
    LAYOUT,
    LOCAL_FILES,
    check_weight_file,
    folder_files,
    read_model_config,
    read_tokenizer_files,
    weights_fingerprint,
)

for _name in logging.root.manager.loggerDict:
    if _name.split(".")[0] in ("diffusionkit", "argmaxtools"):
        logging.getLogger(_name).setLevel(logging.ERROR)  # their INFO lines cut through progress bars

BUNDLED_FOLDER = Path(__file__).resolve().parent / "models" / BUNDLED_MODEL
HUB_MODELS = tuple(key for key in MMDIT_CKPT if "FLUX" not in key and "4bit" not in key)
HUB_CFG_WEIGHT = 5.0  # the default of DiffusionKit's own command line
HUB_VAE_DOWNSCALE = 8


class ModelError(click.ClickException):
    """The model cannot be had or used; the message is one line that says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    version: str  # as it was given: sd3-emoji, a hub id, or a local folder
    folder: Path | None  # None for a hub id
    latent_size: tuple[int, int]
    max_latent_size: int
    patch_size: int
    vae_downscale: int  # image pixels per latent, each way
    cfg_weight: float
    use_t5: bool
    sampler_shift: float
    captions: Path | None  # prompts that the model was made for, if it brings any


def describe_model(name: str) -> ModelInfo:
    """Look a `--model` value up: `sd3-emoji`, a folder in its layout, or a hub id that DiffusionKit knows.

    Raises ModelError for anything else. Reads no weights and needs no network.
    """
    if name in HUB_MODELS:
        config = HUB_MMDIT_CONFIGS[name]
        return ModelInfo(
            version=name,
            folder=None,
            latent_size=(HEIGHT[name] // HUB_VAE_DOWNSCALE, WIDTH[name] // HUB_VAE_DOWNSCALE),
            max_latent_size=config.max_latent_resolution,
            patch_size=config.patch_size,
            vae_downscale=HUB_VAE_DOWNSCALE,
            cfg_weight=HUB_CFG_WEIGHT,
            use_t5=True,
            sampler_shift=SHIFT[name],
            captions=None,
        )
    try:
        folder = BUNDLED_FOLDER if name == BUNDLED_MODEL else Path(name).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a link that leads back to itself, a null character
        raise ModelError(f"--model {name!r}: {error}") from None
    if not name or not os.path.isdir(folder):
        known = ", ".join((BUNDLED_MODEL, *HUB_MODELS))
        raise ModelError(f"--model {name or repr(name)}: no such folder, and not one of {known}")
    config = read_model_config(folder)
    captions = folder / "captions.txt"
    return ModelInfo(
        version=name,
        folder=folder,
        latent_size=tuple(config["latent_size"]),
        max_latent_size=config["mmdit"]["max_latent_resolution"],
        patch_size=config["mmdit"]["patch_size"],
        vae_downscale=config["vae"]["downscale"],
        cfg_weight=float(config["default_cfg_weight"]),
        use_t5=False,
        sampler_shift=float(config["sampler_shift"]),
        captions=captions if captions.exists() else None,
    )


def model_fingerprint(info: ModelInfo, use_t5: bool, local_checkpoint: Path | None = None) -> str | None:
    """SHA-256 over the files that a model's numbers come from; None for a hub model that is not in the local cache.

    Raises StoreError when a file cannot be read. The names are roles: a folder, or a checkpoint, may lie anywhere.
    """
    if info.folder is not None:
        return weights_fingerprint(folder_files(info.folder))
    repository = MMDIT_CKPT[info.version]
    transformer, text = HUB_MMDIT_FILES[repository], HUB_TEXT_FILES[HUB_TEXT_ENCODERS]
    wanted = {part: (HUB_TEXT_ENCODERS, text[part]) for part in ("clip_l", "clip_g", *(["t5"] if use_t5 else []))}
    if local_checkpoint is None:
        wanted |= {"mmdit": (repository, transformer[info.version]), "vae": (repository, transformer["vae"])}
    try:
        files = {role: Path(hf_hub_download(*where, local_files_only=True)) for role, where in wanted.items()}
    except LocalEntryNotFoundError:
        return None
    return weights_fingerprint(files | ({"checkpoint": local_checkpoint} if local_checkpoint else {}))


def default_dtype() -> str:
    """float16 on Metal and CUDA; float32 on a CPU, where only float32 products have a fast BLAS."""
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else "float16"


class LocalPipeline(DiffusionPipeline):
    """DiffusionKit's pipeline over a folder in sd3-emoji's layout instead of the hub's files."""

    def __init__(self, info: ModelInfo, dtype: mx.Dtype):
        self.model_version = info.version
        self.folder, self.model_config = info.folder, read_model_config(info.folder)
        self.float16_dtype = mx.float16
        self.dtype = self.activation_dtype = dtype
        self.use_t5, self.use_clip_g, self.low_memory_mode = False, True, False
        self.sampler = ModelSamplingDiscreteFlow(shift=info.sampler_shift)
        self.latent_format = SD3LatentFormat()
        vars(self.latent_format).update(self.model_config["latent_format"])
        self.tokenizer_l = self._load_tokenizer("l", default=True)
        self.tokenizer_g = self._load_tokenizer("g", default=False)
        self.load_mmdit()
        self.clip_l = self._load(CLIPTextModel(CLIPTextModelConfig(**self.model_config["clip_l"])), "clip_l")
        self.clip_g = self._load(CLIPTextModel(CLIPTextModelConfig(**self.model_config["clip_g"])), "clip_g")
        vae = self.model_config["vae"]
        decoder = VAEDecoder(
            block_out_channels=vae["block_out_channels"],
            layers_per_block=vae["decoder_layers_per_block"],
            resnet_groups=vae["resnet_groups"],
        )
        self.decoder = self._load(decoder, "decoder")

    def load_mmdit(self, only_modulation_dict: bool = False):
        """Load the transformer; with `only_modulation_dict` return its adaLN weights, as DiffusionKit's does."""
        if only_modulation_dict:
            weights = mx.load(str(self.folder / "mmdit.safetensors"))
            return [(key, value.astype(self.dtype)) for key, value in weights.items() if "adaLN" in key]
        config = dict(self.model_config["mmdit"])
        config["hidden_size_override"] = config.pop("hidden_size")
        model = MMDiT(MMDiTConfig(**config, low_memory_mode=False, dtype=self.dtype))
        self.mmdit = self._load(model, "mmdit")

    def _load(self, model, part: str):
        path = self.folder / f"{part}.safetensors"
        check_weight_file(path)
        try:
            weights = [(key, value.astype(self.dtype)) for key, value in mx.load(str(path)).items()]
            model.load_weights(weights)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from None
        _check_finite(model, path)
        return model

    def _load_tokenizer(self, encoder: str, default: bool) -> Tokenizer:
        """The tokenizer of text encoder l or g; default: whether DiffusionKit pads with the end token there."""
        text = self.model_config[f"clip_{encoder}"]
        vocabulary, ranks = read_tokenizer_files(self.folder, text["vocab_size"])
        padding = self.model_config.get(f"tokenizer_{encoder}", {"pad_with_eos": default})
        tokenizer = Tokenizer(ranks, vocabulary, padding["pad_with_eos"])
        tokenizer.max_length = text["max_length"]
        return tokenizer


def _check_finite(model, source: Path | str) -> None:
    """Read a model's weights. Raises ModelError that names a weight which is not finite: NaN would reach every image."""
    named = tree_flatten(model.parameters())
    finite = mx.stack([mx.isfinite(array).all() for _, array in named])
    mx.eval([array for _, array in named], finite)
    bad = [name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine]
    if bad:
        raise ModelError(
            f"{source}: {bad[0]} holds NaN or infinity ({len(bad)} such weights); copy or download it again"
        )


class _T5Encoder:
    """DiffusionKit's T5 without its `mx.metal` memory limits, which raise KeyError off macOS.

    The same layers in the same order as diffusionkit.mlx.t5.TransformerEncoder.__call__.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens: mx.array) -> mx.array:
        encoder = self.model.encoder
        x = self.model.wte(tokens)
        dtype, bias = x.dtype, encoder.relative_attention_bias(x.shape[1], x.shape[1])
        for layer in encoder.layers:
            x = layer(x, mask=bias)
        return encoder.ln(x).astype(dtype)


def _reach_hub() -> str | None:
    """Look the hub up once; without it use its local cache only, and say why.

    huggingface_hub by itself would retry for half a minute per file, with a warning for each try. Behind a proxy
    the name need not resolve here, so nothing is concluded.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    host = urllib.parse.urlsplit(hub_constants.ENDPOINT).hostname
    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        hub_constants.HF_HUB_OFFLINE = True
        return f"no network: {host} cannot be found, and it is not in the local cache"
    return None


def load_pipeline(
    info: ModelInfo, dtype: str, use_t5: bool = False, local_checkpoint: Path | None = None
) -> DiffusionPipeline:
    """Load a model ready to sample: weights and activations in `dtype` ("float16" or "float32").

    local_checkpoint replaces the hub's transformer and VAE file, as DiffusionKit's `--local-ckpt` does.
    Raises ModelError when the files cannot be had.
    """
    if info.folder is not None:
        if local_checkpoint is not None:
            raise ModelError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
        if use_t5:
            raise ModelError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
        wanted = [*(f"{part}.safetensors" for part in LOCAL_FILES), "vocab.json", "merges.txt"]
        missing = [name for name in wanted if not os.path.lexists(info.folder / name)]
        if missing:
            raise ModelError(f"{info.folder}: no {', '.join(missing)}; {LAYOUT}")
        try:
            return LocalPipeline(info, getattr(mx, dtype))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{info.folder / 'config.json'}: {error}; {LAYOUT}") from None
    if local_checkpoint is not None:
        check_weight_file(local_checkpoint)
    half = dtype == "float16"
    unreachable = _reach_hub()
    try:
        pipeline = DiffusionPipeline(
            w16=half, a16=half, shift=info.sampler_shift, use_t5=use_t5, model_version=info.version,
            low_memory_mode=False, local_ckpt=str(local_checkpoint) if local_checkpoint else None,
        )  # fmt: skip
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = unreachable or str(error).strip().split("\n")[0][:160]
        raise ModelError(
            f"cannot get {info.version} from the Hugging Face hub ({reason}): accept the licence on the model's page and "
            f"log in with `hf auth login`, or run now with --model {BUNDLED_MODEL}"
        ) from None
    except (RuntimeError, ValueError, KeyError) as error:
        source = local_checkpoint or info.version
        raise ModelError(f"cannot load {source}: {' '.join(str(error).split())[:200]}") from None
    parts = {"transformer": pipeline.mmdit, "VAE decoder": pipeline.decoder}
    parts |= {"CLIP-L": pipeline.clip_l, "CLIP-G": pipeline.clip_g} | ({"T5": pipeline.t5_encoder} if use_t5 else {})
    for part, model in parts.items():
        from_checkpoint = local_checkpoint and part in ("transformer", "VAE decoder")
        _check_finite(model, local_checkpoint if from_checkpoint else f"{info.version}, {part}")
    if use_t5:
        pipeline.t5_encoder = _T5Encoder(pipeline.t5_encoder)
    return pipeline


# --- text ---------------------------------------------------------------------------------------------------


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], what: str = "prompt") -> int:
    """Tokenize every prompt with both CLIP tokenizers before any work is done.

    Returns how many prompts are longer than the tokenizer's positions and will be cut. Raises ModelError
    that names the prompt and the character when one is outside the vocabulary.
    """
    cut = set()
    for tokenizer in (pipeline.tokenizer_l, pipeline.tokenizer_g):
        unlimited = copy.copy(tokenizer)
        unlimited.max_length = sys.maxsize
        for index, prompt in enumerate(prompts):
            try:
                length = len(unlimited.tokenize(prompt))
            except KeyError as error:
                character = error.args[0].replace("</w>", "")
                number = f" {index + 1}" if len(prompts) > 1 else ""
                raise ModelError(
                    f"{what}{number} {prompt!r}: the character {character!r} is not in the tokenizer's vocabulary; "
                    "replace it"
                ) from None
            if length > tokenizer.max_length:
                cut.add(index)
    return len(cut)


@dataclass(frozen=True)
class TextConditioning:
    """Conditioning of one forward pass: tokens (R, tokens, 4096) and pooled (R, channels), activation dtype."""

    tokens: mx.array
    pooled: mx.array


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], cfg_weight: float, negative_prompt: str = ""
) -> TextConditioning:
    """Encode prompts one by one (as a batch of one would be) and stack them: conditional rows first.

    With `cfg_weight` <= 0 the unconditional rows that DiffusionKit always returns are left out.
    """
    rows = 2 if cfg_weight > 0 else 1
    tokens, pooled = [], []
    for prompt in prompts:
        prompt_tokens, prompt_pooled = pipeline.encode_text(prompt, cfg_weight, negative_prompt)
        tokens.append(prompt_tokens)
        pooled.append(prompt_pooled)
    stacked = [
        mx.concatenate([array[row : row + 1] for row in range(rows) for array in arrays]).astype(
            pipeline.activation_dtype
        )
        for arrays in (tokens, pooled)
    ]
    mx.eval(stacked)
    return TextConditioning(*stacked)


# --- the modulation cache -----------------------------------------------------------------------------------


@contextlib.contextmanager
def modulation_cache(
    pipeline: DiffusionPipeline, pooled: Sequence[mx.array], timesteps: mx.array
) -> Iterator[Callable[[int], None]]:
    """Own DiffusionKit's modulation cache: built here, adaLN weights back on exit, also after an exception.

    pooled: one (R, channels) array per group of rows that is run on its own. timesteps (steps,) in the
    activation dtype: a lookup needs the very same float. Yields `select(group)`, to be called before the
    model runs on that group's rows.

    DiffusionKit empties the live adaLN weights when it builds the cache and re-reads them from disk; here
    they are kept by reference instead, so nothing is loaded twice.
    """
    mmdit = pipeline.mmdit
    mmdit.load_weights([], strict=False)  # changes nothing; raises when hooks are live
    linears = [module for name, module in mmdit.named_modules() if name.endswith("adaLN_modulation.layers.1")]
    weights = [tree_map(lambda array: array, linear.parameters()) for linear in linears]
    groups: list[list[tuple[Any, dict]]] = []

    def restore() -> None:
        for linear, parameters in zip(linears, weights, strict=True):
            linear.update(parameters)
        mmdit.pop("to_offload", None)  # aliases that would show up in parameters()
        mmdit.clear_modulation_params_cache()

    try:
        for rows in pooled:
            mmdit.cache_modulation_params(rows, timesteps)
            owners = [module for _, module in mmdit.named_modules() if "_modulation_params" in module]
            groups.append([(module, module["_modulation_params"]) for module in owners])
            restore()

        def select(group: int) -> None:
            for module, params in groups[group]:
                module["_modulation_params"] = params

        select(0)
        yield select
    finally:
        restore()


# --- sampling -----------------------------------------------------------------------------------------------


def sigma_schedule(pipeline: DiffusionPipeline, num_steps: int) -> tuple[mx.array, mx.array]:
    """DiffusionKit's schedule: sigmas (num_steps + 1,) float32, the last 0, and timesteps in the activation dtype."""
    sigmas = pipeline.get_sigmas(pipeline.sampler, num_steps)
    timesteps = pipeline.sampler.timestep(sigmas).astype(pipeline.activation_dtype)
    mx.eval(sigmas, timesteps)
    return sigmas, timesteps


def initial_noise(seed: int, latent_size: tuple[int, int]) -> mx.array:
    """The noise (1, h, w, 16) float32 that DiffusionKit draws for `seed`, without reseeding NumPy's global state."""
    h, w = latent_size
    return mx.array(np.random.RandomState(seed).randn(1, 16, h, w)).transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class EulerStep:
    """State before step `step_index`; `is_final` marks the finished latent after the last one (sigma 0)."""

    step_index: int
    x: mx.array  # (B, h, w, 16) float32, evaluated
    timestep: mx.array  # () activation dtype, the key of the modulation cache
    sigma: mx.array  # () float32
    is_final: bool


def run_cpu_streams_side_by_side() -> None:
    """Let gradients of several CPU streams really run at the same time; call it before anything is evaluated.

    MLX walks a graph with many outputs depth first, one stream's part after the other's, unless this variable is
    large; it is read once. On a GPU nothing changes.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "2000")


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[list[tuple[slice, mx.Stream]]]:
    """Split `count` rows of work over the CPU's cores, one group elsewhere: (rows, the stream to compute them on)."""
    groups = _row_groups(count)
    streams = [mx.default_stream(mx.default_device())] if len(groups) == 1 else _cpu_streams(len(groups))
    with _blas_threads(len(groups)):
        yield list(zip(groups, streams, strict=True))


def _row_groups(images: int) -> list[slice]:
    """Split the images of one pass over the CPU's cores; one group elsewhere.

    Most of MLX's CPU operations use one thread of their stream, so groups on streams of their own run side by
    side. Which group an image falls in depends on its place in the batch and on the number of cores.
    """
    cores = min(images, os.cpu_count() or 1) if mx.default_device() == mx.Device(mx.cpu) else 1
    edges = [images * core // cores for core in range(cores + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


@functools.cache
def _cpu_streams(count: int) -> list[mx.Stream]:
    """Made once: MLX never frees a stream, and each is a thread."""
    return [mx.new_stream(mx.cpu) for _ in range(count)]


@contextlib.contextmanager
def _blas_threads(groups: int) -> Iterator[None]:
    """One BLAS thread per group when several run side by side; the result then never depends on their timing."""
    threads = torch.get_num_threads()
    try:
        if groups > 1:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def euler_steps(
    pipeline: DiffusionPipeline, text: TextConditioning, noise: mx.array, num_steps: int, cfg_weight: float
) -> Iterator[EulerStep]:
    """Sample B images (Euler method, Karras et al. 2022, Algorithm 2): yields num_steps + 1 states.

    text: R rows; noise (B, h, w, 16). The modulation cache lives as long as the generator: close it (or run
    it to its end) before the model is used for anything else. For B = 1 every state equals that of
    DiffusionKit's `sample_euler` bit for bit.
    """
    images = noise.shape[0]
    rows_per_image = text.pooled.shape[0] // images
    sigmas, timesteps = sigma_schedule(pipeline, num_steps)
    start = pipeline.get_empty_latent(*noise.shape[1:3])
    x = pipeline.sampler.noise_scaling(sigmas[0], noise, start, pipeline.max_denoise(sigmas))
    mx.eval(x)

    def rows_of(array: mx.array, group: slice) -> mx.array:
        return mx.concatenate(
            [array[r * images + group.start : r * images + group.stop] for r in range(rows_per_image)]
        )

    tokens = [rows_of(text.tokens, group) for group in _row_groups(images)]
    pooled = [rows_of(text.pooled, group) for group in _row_groups(images)]
    mx.eval(tokens, pooled)
    denoise = CFGDenoiser(pipeline)
    with side_by_side(images) as groups, modulation_cache(pipeline, pooled, timesteps) as select:
        for i in range(num_steps):
            yield EulerStep(i, x, timesteps[i], sigmas[i], is_final=False)
            parts = []
            for index, (group, stream) in enumerate(groups):
                select(index)
                with mx.stream(stream):
                    part = x[group]
                    denoised = denoise(part, timesteps[i], sigmas[i], tokens[index], cfg_weight=cfg_weight)
                    derivative = (part - denoised) / append_dims(sigmas[i], part.ndim)
                    parts.append(part + derivative * (sigmas[i + 1] - sigmas[i]))
            x = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            mx.eval(x)
        yield EulerStep(num_steps, x, timesteps[num_steps], sigmas[num_steps], is_final=True)


class Replay:
    """Runs the model as it ran for one image of a calibration run; `replaying` makes it."""

    def __init__(self, pipeline: DiffusionPipeline, text: TextConditioning):
        self._mmdit = pipeline.mmdit
        self._pooled = text.pooled
        self._tokens = mx.expand_dims(text.tokens, 2)
        self._rows = text.pooled.shape[0]

    def forward(self, x: np.ndarray, timestep: np.ndarray) -> mx.array:
        """x (1, h, w, 16) and timestep () as stored -> the transformer's output (R, h, w, 16), unevaluated."""
        return self._mmdit(
            latent_image_embeddings=mx.concatenate([mx.array(x)] * self._rows),
            token_level_text_embeddings=self._tokens,
            timestep=mx.broadcast_to(mx.array(timestep), [self._rows]),
        )

    def modulation_input(self, timestep: np.ndarray) -> mx.array:
        """What feeds every adaLN layer: pooled text plus timestep embedding, (R, 1, 1, hidden), unevaluated."""
        embedded = self._mmdit.t_embedder(mx.repeat(mx.array(timestep)[None], self._rows, axis=0))
        return self._mmdit.y_embedder(self._pooled)[:, None, None, :] + embedded


@contextlib.contextmanager
def replaying(pipeline: DiffusionPipeline, image: dict[str, Any], timesteps: Sequence[np.ndarray]) -> Iterator[Replay]:
    """Replay `image` (an entry of the manifest) with its own prompt and guidance: R = 2 rows with guidance
    (conditional, unconditional), else 1.

    timesteps are the stored ones that will be asked for. Hooks go inside this block: leaving it puts the adaLN
    weights back.
    """
    text = encode_prompts(pipeline, [image["prompt"]], image["cfg_weight"], image["negative_prompt"])
    with modulation_cache(pipeline, [text.pooled], mx.array(np.array(timesteps))):
        yield Replay(pipeline, text)


def run_block(block: Any, tokens: Sequence[mx.array], modulation_input: mx.array) -> list[mx.array]:
    """A multimodal block on its own: image and text tokens (R, tokens, 1, hidden) -> the same (the last block: image only).

    modulation_input (R, 1, 1, hidden), pooled text plus timestep embedding, feeds the block's adaLN; every row may
    be of another prompt and step.
    """
    for stream in (block.image_transformer_block, block.text_transformer_block):
        stream["_modulation_params"] = {0.0: stream.adaLN_modulation(modulation_input)}
    return [output for output in block(*tokens, mx.zeros((1,))) if output is not None]


def run_final_layer(mmdit: MMDiT, tokens: mx.array, modulation_input: mx.array) -> mx.array:
    """Image tokens of the last block -> the velocity, one patch a token (R, tokens, 1, patch² · 16)."""
    mmdit.final_layer["_modulation_params"] = {0.0: mmdit.final_layer.adaLN_modulation(modulation_input)}
    return mmdit.final_layer(tokens, mx.zeros((1,)))


def describe_run_model(
    manifest: dict[str, Any], model: str | None = None, local_checkpoint: Path | None = None
) -> tuple[ModelInfo, Path | None]:
    """Where a calibration run's model is: as the manifest says, or where `--model`, `--local-checkpoint` say it is now."""
    noted = manifest.get("local_checkpoint") if model in (None, manifest["model_version"]) else None
    checkpoint = local_checkpoint or (Path(noted) if noted else None)
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ModelError(
            f"{checkpoint}: the calibration run's local checkpoint is not there; --local-checkpoint FILE says where it is now"
        )
    try:
        return describe_model(model or manifest["model_version"]), checkpoint
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"{manifest['model_version']}: the calibration run's model is not there; --model says where it is now "
            f"({error.message.split(': ', 1)[-1]})"
        ) from None


def load_run_pipeline(
    manifest: dict[str, Any], dtype: str | None = None, model: str | None = None, local_checkpoint: Path | None = None
) -> DiffusionPipeline:
    """The model of a calibration run, in the run's precision unless another one is given.

    Raises ModelError when it is not there, when its weights are not those that the run was made with, or when the manifest
    holds a prompt that it cannot read.
    """
    info, checkpoint = describe_run_model(manifest, model, local_checkpoint)
    if manifest["sampler_shift"] != info.sampler_shift:
        raise ModelError(
            f"manifest.json: sampler_shift {manifest['sampler_shift']:g}, but {info.version} has {info.sampler_shift:g}; "
            "run generate_calibration_data.py with --force to make the run anew"
        )
    if info.folder is not None:
        check_fingerprint(manifest, info, checkpoint)
    pipeline = load_pipeline(info, dtype or manifest["activation_dtype"], manifest["use_t5"], checkpoint)
    if info.folder is None:
        check_fingerprint(manifest, info, checkpoint)  # now that its files are in the cache
    check_prompts(pipeline, [image["prompt"] for image in manifest["images"]], "manifest.json: prompt")
    check_prompts(pipeline, [manifest["negative_prompt"]], "manifest.json: negative prompt")
    return pipeline


def check_fingerprint(manifest: dict[str, Any], info: ModelInfo, checkpoint: Path | None) -> None:
    """Raise ModelError when the model's weights are not those that the calibration run was made with."""
    if model_fingerprint(info, manifest["use_t5"], checkpoint) != manifest["weights_fingerprint"]:
        raise ModelError(
            f"{checkpoint or info.version}: its weights are not those that the calibration run was made with "
            f"({manifest['model_version']}); --model names the right ones, or run generate_calibration_data.py with --force"
        )


def run_schedule(manifest: dict[str, Any]) -> tuple[list[float], list[float]]:
    """A run's sigmas and timesteps (num_steps + 1 each), as its samples note them; needs no weights."""
    sampler = ModelSamplingDiscreteFlow(shift=manifest["sampler_shift"])
    sigmas = DiffusionPipeline.get_sigmas(None, sampler, manifest["num_steps"])
    timesteps = sampler.timestep(sigmas).astype(getattr(mx, manifest["activation_dtype"]))
    return sigmas.tolist(), timesteps.tolist()


def decode_latents(
    pipeline: DiffusionPipeline, x: mx.array, image_ids: Sequence[int] | None = None
) -> list[Image.Image]:
    """Turn finished latents (B, h, w, 16) in model space into B RGB images, one decoder pass each.

    image_ids: what to call them in an error (default: 0 …). Raises ModelError when a pixel is not finite: as an integer it would be black or white.
    """
    images = []
    for row in range(x.shape[0]):
        latent = pipeline.latent_format.process_out(x[row : row + 1]).astype(pipeline.activation_dtype)
        pixels = pipeline.decoder(latent)[0].astype(mx.float32)
        if not mx.isfinite(pixels).all().item():
            what = "the decoded pixels" if mx.isfinite(latent).all().item() else "the finished latent's values"
            image = row if image_ids is None else image_ids[row]
            raise ModelError(f"image {image}: {what} hold NaN or infinity; {not_finite_advice(pipeline)}")
        pixels = mx.clip(pixels / 2 + 0.5, 0, 1)  # as DiffusionKit's decode_latents_to_image
        images.append(Image.fromarray(np.array((pixels * 255).astype(mx.uint8))))
    return images


def not_finite_advice(pipeline: DiffusionPipeline) -> str:
    """What to try when numbers overflow in this precision."""
    if pipeline.activation_dtype == mx.float32:
        return "try a smaller --cfg-weight, or another copy of the model"
    return "try --dtype float32 in stage 1, or a smaller --cfg-weight"


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("mlx", "diffusionkit", "numpy")}
