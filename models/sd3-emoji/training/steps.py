"""Take the three steps of train_sd3_emoji.py, its subcommands, from one folder to the next."""

import json
from pathlib import Path

import click
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from calibration_store.errors import StoreError
from calibration_store.files import atomic_file
from config import CONFIG, END, END_TOKEN
from files import reading, write_file
from preparation import captioned_files, encode_caption, read_image, train_tokenizer
from training import Dataset, encode_images, exported, train_autoencoder, train_text_to_image

DATA_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "emoji.npz", "tokenizer.json", "weights.safetensors"
CAPTIONS_PER_IMAGE = 4
PARTS = ("mmdit", "clip_l", "clip_g", "decoder", "encoder")


def prepare(package: Path, output: Path) -> None:
    """Turn emoji and their names into images, captions and a tokenizer."""
    source = "PACKAGE is npm's emoji-datasource-google 16.0.0, unpacked"
    with reading(package / "emoji.json", source):
        files = list(captioned_files(json.loads((package / "emoji.json").read_text(encoding="utf-8"))))
    images, captions = [], []
    for name, names in files:
        path = package / "img/google/64" / name
        if path.exists():
            with reading(path, source):
                images.append(read_image(path))
            captions.append(names)
    if not images:
        raise StoreError(f"{package / 'img/google/64'}: no image that emoji.json names ({source})")
    tokenizer = train_tokenizer([caption for names in captions for caption in names])
    used = [names[:CAPTIONS_PER_IMAGE] for names in captions]
    with atomic_file(output / DATA_FILE) as file:
        np.savez_compressed(
            file,
            images=np.stack(images),
            tokens=np.array([encode_caption(tokenizer, caption) for names in used for caption in names], np.int32),
            caption_counts=np.array([len(names) for names in used], np.int32),
            empty=np.array(encode_caption(tokenizer, ""), np.int32),
            captions=np.array([names[0] for names in captions]),
        )
    write_file(output / TOKENIZER_FILE, tokenizer.to_str())
    click.echo(f"wrote {output / DATA_FILE} ({len(images)} images) and {output / TOKENIZER_FILE}")


def train(
    data: Path, output: Path, vae_seconds: float, transformer_seconds: float, vae_steps: int | None,
    transformer_steps: int | None, batch_size: int, vae_batch_size: int, use_compile: bool, seed: int,
) -> None:  # fmt: skip
    """Train weights on the output of `prepare`, on the GPU if PyTorch sees one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)
    dataset = Dataset.load(data / DATA_FILE, device)
    with atomic_file(output / WEIGHTS_FILE) as file:  # opened first: a folder that cannot be written shows at once
        vae = train_autoencoder(dataset, vae_batch_size, use_compile, vae_seconds, vae_steps)
        latents = encode_images(vae.encoder, dataset.images)
        mean, deviation = latents.mean(), latents.std()
        latents = (latents - mean) / deviation
        model = train_text_to_image(dataset, latents, batch_size, use_compile, transformer_seconds, transformer_steps)
        parts = (model.mmdit, model.clip_l, model.clip_g, vae.decoder, vae.encoder)
        statistics = {"latent_mean": mean.cpu(), "latent_deviation": deviation.cpu()}
        file.write(save_tensors(exported(dict(zip(PARTS, parts, strict=True))) | statistics))
    click.echo(f"wrote {output / WEIGHTS_FILE}")


def bundle(data: Path, weights: Path, output: Path) -> None:
    """Make a model folder of the outputs of `train` and `prepare`."""
    try:
        with reading(weights, "`train` writes it"):
            tensors = load(weights.read_bytes())
            mean, deviation = (float(tensors.pop(f"latent_{name}")) for name in ("mean", "deviation"))
            context = tensors["mmdit.context_embedder.weight"]
    except SafetensorError as error:
        raise StoreError(f"cannot read {weights}: {error} (`train` writes it)") from None
    with reading(data / TOKENIZER_FILE, "`prepare` writes it"):
        tokenizer = json.loads((data / TOKENIZER_FILE).read_text(encoding="utf-8"))["model"]
        vocabulary = {token: index for token, index in tokenizer["vocab"].items() if token != END} | {END: END_TOKEN}
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer["merges"])])
    with reading(data / DATA_FILE, "`prepare` writes it"), np.load(data / DATA_FILE) as arrays:
        captions = sorted(set(arrays["captions"].tolist()))
    # DiffusionKit pads text features with zeros to SD3's 4,096 channels
    padding = CONFIG["mmdit"]["token_level_text_embed_dim"] - context.shape[1]
    tensors["mmdit.context_embedder.weight"] = np.pad(context, [(0, 0), (0, padding)])
    for part in PARTS:
        prefix = f"{part}."
        write_file(
            output / f"{part}.safetensors",
            save_arrays({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}),
        )
    config = CONFIG | {"latent_format": {"scale_factor": 1 / deviation, "shift_factor": mean}}
    config |= {key: {"pad_with_eos": True} for key in ("tokenizer_l", "tokenizer_g")}  # as encode_caption pads
    write_file(output / "config.json", json.dumps(config, indent=2))
    write_file(output / "vocab.json", json.dumps(vocabulary, ensure_ascii=False, indent=0))
    write_file(output / "merges.txt", merges + "\n")
    write_file(output / "captions.txt", "\n".join(captions) + "\n")
    click.echo(f"wrote {output}")
