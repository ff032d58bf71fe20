"""Run train_sd3_emoji.py from a made-up package to a model that samples, on the CPU.

It needs PyTorch, so it is no part of `make test`: pip install -r requirements.txt, then python -m pytest test_training.py.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from autoencoder import Decoder
from config import END_TOKEN, TEXT_CHANNELS
from train_sd3_emoji import main
from transformer import TextToImage
from w4a8.model.catalog import BUNDLED_FOLDER, describe_model
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import encode_prompts, say_what_is_not_read
from w4a8.model.sampling import decode_latents, euler_steps, initial_noise

COLOURS = ("red", "green", "blue", "orange", "purple", "brown")
SHAPES = ("disc", "square", "bar", "frame")
PARTS = ("mmdit", "clip_l", "clip_g", "decoder", "encoder")


def draw(path, colour, shape):
    picture = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(picture)
    if shape == "disc":
        pen.ellipse((8, 8, 56, 56), fill=colour)
    elif shape == "frame":
        pen.rectangle((8, 8, 56, 56), outline=colour, width=8)
    else:
        pen.rectangle((8, 8, 56, 56) if shape == "square" else (8, 24, 56, 40), fill=colour)
    picture.save(path)


def make_package(folder):
    """Write 24 emoji and one skin tone in emoji-datasource's structure, and entries that Google did not draw."""
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for number, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        image = f"1f{number:03x}.png"
        draw(pictures / image, colour, shape)
        names = [f"{colour}-{shape}", f"{shape}_{number}"]
        entries.append(
            {
                "name": f"{colour.upper()} {shape.upper()}",
                "short_name": names[0],
                "short_names": names,
                "image": image,
                "has_img_google": True,
            }
        )
    entries[1]["name"] = None
    entries[0]["skin_variations"] = {
        "1F3FB-1F3FF": {"image": "1f000-tone.png", "has_img_google": True},
        "1F3FC": {"image": "1f000-other.png", "has_img_google": False},
    }
    draw(pictures / "1f000-tone.png", "pink", "disc")
    entries.append(entries[2] | {"short_names": ["undrawn"], "has_img_google": False})
    (folder / "emoji.json").write_text(json.dumps(entries))


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def emoji():
    return load_pipeline(describe_model("sd3-emoji"), whole_model("float32"))


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a folder with package/, data/, run/ and model/ by the three commands, one after the other."""
    root = tmp_path_factory.mktemp("emoji")
    make_package(root / "package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns in processes that later tests fork
        succeed("prepare", root / "package", root / "data")
    train(root / "data", root / "run")
    succeed("bundle", root / "data", root / "run" / "weights.safetensors", root / "model")
    return root


def train(data, output):
    sizes = ("--vae-steps", 2, "--vae-batch-size", 4, "--transformer-steps", 4, "--batch-size", 4)  # 4: one average
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another, a minute in all, where other processes are busy
    try:
        succeed("train", data, output, *sizes, "--no-compile", "--seed", 1)
    finally:
        torch.set_num_threads(threads)


def described(path):
    return {name: (array.shape, array.dtype) for name, array in mx.load(str(path)).items()}


def test_the_folder_has_the_layout_of_the_bundled_model(made):
    model, bundled = made / "model", BUNDLED_FOLDER
    expected = {path.name for path in bundled.iterdir()} - {"README.md", "training"}
    assert {path.name for path in model.iterdir()} == expected
    for part in PARTS:
        assert described(model / f"{part}.safetensors") == described(bundled / f"{part}.safetensors")
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (model, bundled))
    assert list(config) == list(expected)
    assert config.pop("latent_format").keys() == expected.pop("latent_format").keys() and config == expected
    vocabulary = json.loads((model / "vocab.json").read_text())
    assert vocabulary["<|startoftext|>"] == 0 and vocabulary["<|endoftext|>"] == 2048 == max(vocabulary.values())
    captions = (model / "captions.txt").read_text().splitlines()
    assert len(captions) == 25 and captions == sorted(captions) and "undrawn" not in captions
    assert {"bar 2", "disc 0", "disc 0 light skin tone and dark skin tone", "green square"} <= set(captions)


def test_the_model_samples(made):
    info = describe_model(str(made / "model"))
    pipeline = load_pipeline(info, whole_model("float32"))
    prompt = info.captions.read_text().splitlines()[-1]
    assert not say_what_is_not_read(pipeline, [prompt])
    with np.load(made / "data" / "emoji.npz") as arrays:
        assert pipeline.tokenizer_l.tokenize(prompt) in [
            [*row[: row.index(2048)], 2048] for row in arrays["tokens"].tolist()
        ]
    text = encode_prompts(pipeline, [prompt], 4.0)
    *_, last = euler_steps(pipeline, text, initial_noise(0, (16, 16)), 1, 4.0)
    assert last.is_final and np.isfinite(np.array(last.x)).all()
    assert decode_latents(pipeline, last.x)[0].size == (64, 64)
    assert mx.abs(pipeline.mmdit.final_layer.linear.weight).max() > 0  # what starts at zero was trained


def test_every_run_gives_the_same_bytes(made, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        succeed("prepare", made / "package", tmp_path / "data")
    for name in ("emoji.npz", "tokenizer.json"):
        assert (tmp_path / "data" / name).read_bytes() == (made / "data" / name).read_bytes()
    train(tmp_path / "data", tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == (made / "run" / "weights.safetensors").read_bytes()


def bundled_weights(part):
    """Read float32 weights of the bundled model as PyTorch has them: channels first."""
    arrays = mx.load(str(BUNDLED_FOLDER / f"{part}.safetensors"))
    tensors = {name: torch.tensor(np.array(array.astype(mx.float32))) for name, array in arrays.items()}
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t for name, t in tensors.items()}


def test_the_modules_compute_what_diffusionkit_computes(emoji):
    model, decoder = TextToImage(), Decoder()
    decoder.load_state_dict(bundled_weights("decoder"))
    for part in ("clip_l", "clip_g", "mmdit"):
        weights = bundled_weights(part)
        if part == "mmdit":
            weights["context_embedder.weight"] = weights["context_embedder.weight"][:, :TEXT_CHANNELS]
        getattr(model, part).load_state_dict(weights)

    latents, sigma = initial_noise(3, (16, 16)), 0.7
    tokens = emoji.tokenizer_l.tokenize("rocket")
    ids = [tokens + [END_TOKEN] * (16 - len(tokens))]
    emoji_l, emoji_g = (encoder(mx.array(ids)) for encoder in (emoji.clip_l, emoji.clip_g))
    text = mx.concatenate([emoji_l.hidden_states[-2], emoji_g.hidden_states[-2]], axis=-1)
    text = mx.pad(text, [(0, 0), (0, 16), (0, 4096 - text.shape[-1])])
    pooled = mx.concatenate([emoji_l.pooled_output, emoji_g.pooled_output], axis=-1)
    with modulation_cache(emoji, [pooled], mx.array([1000 * sigma])):
        expected = emoji.mmdit(
            latent_image_embeddings=latents,
            token_level_text_embeddings=mx.expand_dims(text, 2),
            timestep=mx.array([1000 * sigma]),
        )
    x = torch.tensor(np.array(latents)).permute(0, 3, 1, 2)
    with torch.no_grad():
        velocity = model.velocity(x, torch.tensor(ids), torch.tensor([sigma])).permute(0, 2, 3, 1)
        image = decoder(x).permute(0, 2, 3, 1)
    np.testing.assert_allclose(velocity, np.array(expected), atol=1e-3)
    np.testing.assert_allclose(image, np.array(emoji.decoder(latents)), atol=1e-3)


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    nowhere = tmp_path / "nowhere"
    make_package(tmp_path / "package")
    for arguments, message in (
        (("prepare", nowhere, tmp_path), "nowhere/emoji.json: No such file"),
        (("prepare", tmp_path / "package", tmp_path / "file" / "data"), "cannot write"),
        (("train", nowhere, tmp_path), "nowhere/emoji.npz: No such file"),
        (("bundle", nowhere, tmp_path / "file", tmp_path / "model"), "cannot read"),
        ((), "Missing command"),
    ):
        result = invoke(*arguments)
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
        assert message in result.stderr and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
