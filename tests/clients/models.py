"""Make models of random weights, their GGUF exports and our velocities, for tests/clients/in_diffusers.py and the like.

    python tests/clients/models.py m4 /tmp/clients/m4 --k-bias 0.2

Each folder gets original.safetensors (original keys, float32), the export's .gguf, and ours.npz: the inputs, and the
velocity of the original and of the export, computed in float32. `make clients` runs all of it.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

NAMES = {  # model -> (hub id, sizes in DiffusionKit's config)
    "m4": (
        "argmaxinc/mlx-stable-diffusion-3-medium",
        {"num_heads": 4, "depth_multimodal": 4, "hidden_size_override": 256},
    ),
    "l2": (
        "argmaxinc/mlx-stable-diffusion-3.5-large",
        {"num_heads": 2, "depth_multimodal": 2, "hidden_size_override": 128},
    ),
    "t2": (
        "stabilityai/stable-diffusion-3.5-medium",
        {"num_heads": 2, "depth_multimodal": 2, "hidden_size_override": 128, "dual_attention_blocks": 1},
    ),
    "f1": ("argmaxinc/mlx-FLUX.1-schnell", {"depth_multimodal": 1, "depth_unified": 1}),
    "d1": ("argmaxinc/mlx-FLUX.1-dev", {"depth_multimodal": 1, "depth_unified": 1}),
    "m24": ("argmaxinc/mlx-stable-diffusion-3-medium", {}),
}
TEXT, SIDES, TIMESTEP, GUIDANCE = 154, (16, 24), 700.0, 3.5


@click.command()
@click.argument("name", type=click.Choice(list(NAMES)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--k-bias", type=float, help="Standard deviation of k's biases.  [default: as the others, 0.02]")
def main(name: str, folder: Path, k_bias: float | None) -> None:
    """Write one model, export it to GGUF, and compute our velocities."""
    repository, sizes = NAMES[name]
    home = folder / "hub"
    os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(folder, ignore_errors=True)
    random_model = importlib.import_module("benchmarks.random_model")  # after HF_HOME is set
    toolkit = importlib.import_module("w4a8.model.catalog")
    vars(toolkit.family_of(repository).config).update(sizes)
    random_model.write_text_encoders(home)
    original = random_model.write_checkpoint(home, repository)
    if toolkit.family_of(repository).needs_t5:
        random_model.write_t5(home, random_model.T5_TINY)
    if k_bias is not None:
        set_k_bias(original, k_bias)
    where = ("--calib-dir", str(folder / "run"))
    stage("generate_calibration_data", "--model", repository, "--num-images", "1", "--num-steps", "1", "--no-images",
          "--latent-size", "8", "8", *(() if "FLUX" in repository else ("--no-t5",)), *where)  # fmt: skip
    stage(
        "export_quantized_model",
        *where,
        "--weights",
        "w4-rtn-g32",
        "--format",
        "gguf",
        "--output",
        str(folder / "export"),
    )
    if "FLUX" in repository:
        for layout in ("mlx", "mflux"):
            stage(
                "export_quantized_model",
                *where,
                "--weights",
                "w4-rtn",
                "--format",
                layout,
                "--activations",
                "none",
                "--output",
                str(folder / layout),
            )
    (gguf,) = (folder / "export").glob("*.gguf")
    gguf.rename(folder / "model.gguf")
    shutil.copyfile(original, folder / "original.safetensors")
    compute(folder)


def stage(script: str, *arguments: str) -> None:
    """Run a stage's command line in this process."""
    try:
        importlib.import_module(script).main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise


def set_k_bias(path: Path, deviation: float) -> None:
    """Give k other biases, of this standard deviation."""
    import mlx.core as mx

    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    for number, key in enumerate(sorted(arrays)):
        if key.endswith(("attn.qkv.bias", "linear1.bias")):
            width = arrays["model.diffusion_model.context_embedder.bias" if "model." in key else "txt_in.bias"].size
            drawn = deviation * mx.random.normal((width,), key=mx.random.key(number))
            whole = [arrays[key][:width], drawn.astype(arrays[key].dtype), arrays[key][2 * width :]]
            arrays[key] = mx.concatenate(whole)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)


def compute(folder: Path) -> None:
    """Write ours.npz: inputs, and velocities (1, h, w, 16) of the original and of the export."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map

    from w4a8.model.catalog import describe_model, with_guidance
    from w4a8.model.folder import load_folder_transformer
    from w4a8.model.parts import cast
    from w4a8.model.transformer import open_transformer

    random = np.random.default_rng(0)
    info = describe_model(str(folder / "original.safetensors"))
    inputs: dict[str, Any] = {
        "latent": random.standard_normal((1, *SIDES, 16)),
        "text": random.standard_normal((1, TEXT, 4096)),
        "pooled": random.standard_normal((1, info.family.config.pooled_text_embed_dim)),
    }
    inputs = {key: array.astype(np.float32) for key, array in inputs.items()}
    found = {}
    for key, file in (("original", "original.safetensors"), ("gguf", "model.gguf"), ("mflux", "mlx")):
        if not (folder / file).exists():
            continue
        info = describe_model(str(folder / file))
        if key == "mflux":  # the same codes as in mflux's layout
            model = load_folder_transformer(folder / file, mx.float32, guidance=GUIDANCE)
        else:
            model = open_transformer(with_guidance(info, GUIDANCE) if info.guidance is not None else info)
        model.update(tree_map(lambda array: cast(array, mx.float32), model.parameters()))
        timestep = mx.array([TIMESTEP], mx.float32)
        model.cache_modulation_params(mx.array(inputs["pooled"]), timestep)
        text = mx.array(inputs["text"])[:, :, None]
        velocity = model(
            latent_image_embeddings=mx.array(inputs["latent"]), token_level_text_embeddings=text, timestep=timestep
        )
        found[key] = np.array(velocity)
    np.savez(folder / "ours.npz", **inputs, **found, timestep=TIMESTEP, guidance=GUIDANCE)
    click.echo(f"wrote {folder / 'ours.npz'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
