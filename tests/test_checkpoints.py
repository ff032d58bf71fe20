"""Checkpoints in the layouts that people have: the same weights as the original, or a line that says what a file is."""

import ast
import json
from functools import partial

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from references.diffusers_transformers import drawn
from tiny_hub import MEDIUM, SCHNELL, run, tiny_hub

from calibration_store.errors import UserError
from tools.mutations import Mutation, file_mutations, replace
from w4a8.model.catalog import describe_model
from w4a8.model.transformer import open_transformer
from w4a8.model.weight_files import load_arrays

pytestmark = pytest.mark.slow

REFERENCES = ROOT / "tests/references"
PREFIX = "model.diffusion_model."
QKV = "double_blocks.0.img_attn.qkv.weight"
NAMES = {"float16": "F16", "float32": "F32", "uint8": "U8", "int8": "I8", "uint16": "BF16"}


def write(path, tensors):
    """Write a safetensors file by hand, for float8 too: {name: (dtype in safetensors' spelling, array of its bits)}."""
    header, data = {}, bytearray()
    for name, (dtype, array) in tensors.items():
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def bits(array):
    """Return (dtype in safetensors' spelling, NumPy array of the bits) of an MLX array."""
    if array.dtype == mx.bfloat16:
        return "BF16", np.array(array.view(mx.uint16))
    found = np.array(array)
    return NAMES[str(found.dtype)], found


def e4m3(values):
    """Round numbers to float8 of 4 and 3 bits; return their codes."""
    return np.array(mx.to_fp8(mx.array(values.astype(np.float32))))


def e5m2(values):
    """Cut float16 numbers to their upper byte, which is a float8 of 5 and 2 bits."""
    return (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)


@pytest.mark.parametrize("kind, encode", [("F8_E4M3", e4m3), ("F8_E5M2", e5m2)])
def test_float8_is_numbers(tmp_path, kind, encode):
    """All 256 codes but NaN and infinity, against their definition in float64: sign, exponent, fraction."""
    codes = np.arange(256, dtype=np.uint8)
    exponent_bits, fraction_bits, bias = (4, 3, 7) if kind == "F8_E4M3" else (5, 2, 15)
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent = (codes >> fraction_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**fraction_bits - 1)) / 2**fraction_bits
    expected = sign * np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent.astype(float) - bias)
    )
    finite = (codes & 0x7F) != 0x7F if kind == "F8_E4M3" else exponent != 31
    write(
        tmp_path / "a.safetensors",
        {"w": (kind, codes), "b": ("F32", np.float32([1, 2])), "c": ("BF16", np.uint16([16256]))},
    )
    found = load_arrays(tmp_path / "a.safetensors")
    assert np.array_equal(np.array(found["w"], np.float64)[finite], expected[finite])
    assert found["b"].tolist() == [1, 2] and found["c"].item() == 1 and found["c"].dtype == mx.bfloat16
    rounded = np.array(encode(expected[finite])) if kind == "F8_E5M2" else codes[finite]
    assert np.array_equal(rounded, codes[finite])


@pytest.mark.parametrize("name", ["layer.scale_weight", "layer.weight_scale"])
def test_scaled_float8(tmp_path, name):
    codes = e4m3(np.arange(12).reshape(3, 4) / 4)
    for scale in (np.float32([0.5]), np.float32([[0.5], [2], [4]])):
        tensors = {"layer.weight": ("F8_E4M3", codes), name: ("F32", scale), "scaled_fp8": ("F8_E4M3", np.uint8([0]))}
        write(tmp_path / "a.safetensors", tensors)
        found = load_arrays(tmp_path / "a.safetensors")
        assert list(found) == ["layer.weight"]
        np.testing.assert_allclose(
            np.array(found["layer.weight"]), scale.reshape(-1, 1) * np.arange(12).reshape(3, 4) / 4
        )
    write(tmp_path / "b.safetensors", {name: ("F32", np.float32([1]))})
    with pytest.raises(UserError, match=f"{name} belongs to no weight"):
        load_arrays(tmp_path / "b.safetensors")


@pytest.mark.parametrize("content, message", [
    (b"GGUF\x03\x00\x00\x00", "a GGUF file that holds no weights"),
    (b"PK\x03\x04 archive/data.pkl", "a pickle, which may run code"),
    (b"\x80\x02}q\x00", "a pickle, which may run code"),
    (b'{"weight_map": {}}', "JSON"),
])  # fmt: skip
def test_files_of_another_kind_are_named(tmp_path, content, message):
    (tmp_path / "a.ckpt").write_bytes(content + bytes(64))
    with pytest.raises(UserError, match=f"a.ckpt: {message}"):
        load_arrays(tmp_path / "a.ckpt")


def scaled(tensors):
    """Return the matrices of the blocks as float8 with a factor each, and the numbers that they stand for."""
    files, numbers = {}, {}
    for name, (dtype, array) in tensors.items():
        files[name], numbers[name] = (dtype, array), (dtype, array)
        if array.ndim == 2 and "blocks" in name:
            wide = np.array(numbers_of(dtype, array), np.float32)
            factor = np.float32(np.abs(wide).max() / 448)
            codes = e4m3(wide / factor)
            files |= {name: ("F8_E4M3", codes), name.replace(".weight", ".scale_weight"): ("F32", factor.reshape(1))}
            numbers[name] = ("F32", np.array(mx.from_fp8(mx.array(codes), mx.float32)) * factor)
    return files, numbers


def plain_fp8(tensors):
    """Return the matrices as float8, and the float16 numbers that they stand for."""
    files, numbers = {}, {}
    for name, (dtype, array) in tensors.items():
        files[name], numbers[name] = (dtype, array), (dtype, array)
        if array.ndim == 2:
            codes = e4m3(np.array(numbers_of(dtype, array), np.float32))
            files[name], numbers[name] = ("F8_E4M3", codes), ("F16", np.array(mx.from_fp8(mx.array(codes), mx.float16)))
    return files, numbers


def numbers_of(dtype, array):
    """Return the float32 numbers of an array of bits."""
    return mx.array(array).view(mx.bfloat16).astype(mx.float32) if dtype == "BF16" else array.astype(np.float32)


def write_gguf_file(path, tensors, kind, expected):
    """Write a GGUF file as ComfyUI-GGUF's converter does, by the package gguf, and the numbers in it as safetensors."""
    writer, numbers = gguf.GGUFWriter(path, "flux"), {}
    for name, (dtype, array) in tensors.items():
        wide = np.array(numbers_of(dtype, array), np.float32)
        packs = wide.ndim == 2 and "blocks" in name
        data = gguf.quants.quantize(wide, kind) if packs else wide
        writer.add_tensor(name, data, raw_dtype=kind if packs else None)
        unpacked = gguf.quants.dequantize(data, kind).astype(np.float16) if packs else wide
        numbers[name] = ("F16" if packs else "F32", unpacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write(expected, numbers)


def diffusers_file(path, name):
    """Write a checkpoint in the layout of diffusers, whose keys and shapes diffusers itself has written down."""
    with np.load(REFERENCES / "diffusers_transformers.npz") as file:
        pairs = [row.split(" ", 1) for row in file[f"{name} keys"].tolist()]
    write(path, {key: ("F16", drawn(key, ast.literal_eval(shape)).astype(np.float16)) for key, shape in pairs})


class Layouts:
    """Every checkpoint, written to a folder: rows of the table in docs/what-you-bring.md, and what opening one gives."""

    def __init__(self, folder, expected, sd3, flux, clips):
        self.folder, self.expected, self.rows = folder, expected, []
        body = {name.removeprefix(PREFIX): array for name, array in sd3.items() if name.startswith(PREFIX)}
        vae = {name: array for name, array in sd3.items() if not name.startswith(PREFIX)}
        other_vae = {name.replace("first_stage_model.", "vae."): array for name, array in vae.items()}
        wide = {name: ("F32", np.array(numbers_of(*array), np.float32)) for name, array in sd3.items()}
        block, h = PREFIX + "joint_blocks.0.x_block.", 128
        zeros = ("F16", np.zeros((h, 64), np.float16))
        packed = ("U8", np.zeros((8, 1), np.uint8))
        ema = {f"model_ema.{name.replace('.', '')}": array for name, array in body.items()}
        t5 = {"text_encoders.t5xxl.transformer.shared.weight": zeros}
        self.add("SD3, as published: `model.diffusion_model.` and the VAE", "sd3-images", sd3)
        self.add("SD3 in float32", "sd3-float32-images", wide)
        self.add("SD3 without `model.diffusion_model.`", "sd3-no-prefix-images", body | vae)
        self.add("SD3 with its VAE under `vae.`", "sd3-other-vae-images", body | other_vae)
        self.add("SD3 without a VAE (the hub's decodes, where the cache has it)", "sd3-no-vae-images", body)
        self.add("SD3 with averaged weights (`model_ema.`), which are left out", "sd3-ema", sd3 | ema)
        self.add("SD3 with CLIP-L, CLIP-G and T5 inside (T5's are left out)", "sd3-with-clips-images", sd3 | clips | t5)
        self.add("SD3 in float8 (F8_E4M3)", "sd3-fp8", *plain_fp8(sd3))
        self.add("SD3 in scaled float8 (`scale_weight`)", "sd3-scaled-fp8", *scaled(sd3))
        self.add("FLUX, as published", "flux", flux)
        self.add("FLUX with `model.diffusion_model.`", "flux-prefix", {PREFIX + n: a for n, a in flux.items()})
        self.add("FLUX in float8", "flux-fp8", *plain_fp8(flux))
        self.add("FLUX in scaled float8", "flux-scaled-fp8", *scaled(flux))
        everything = {PREFIX + n: a for n, a in flux.items()} | {
            n: a for n, a in (t5 | other_vae).items() if "decoder.conv_out" in n or n in t5
        }
        self.add("FLUX with other parts beside it (`vae.`, `text_encoders.`)", "flux-all-in-one", everything)
        self.shards(flux)
        for kind in ("F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0"):
            name = f"flux-{kind}.gguf"
            write_gguf_file(folder / name, flux, gguf.GGMLQuantizationType[kind], expected / name)
            self.rows.append((f"FLUX as GGUF, {kind}", name, 0))
        write(folder / "flux-other-end.sft", flux)
        self.rows.append(("A safetensors file under another ending (`.sft`)", "flux-other-end.sft", 0))
        for name, words in (
            ("sd3", "SD3-Medium"),
            ("sd3.5-large", "SD3.5-large"),
            ("sd3.5-medium", "SD3.5-Medium"),
            ("flux-schnell", "FLUX.1-schnell"),
            ("flux-dev", "FLUX.1-dev"),
        ):
            home = folder / f"{name}-drawn-diffusers"
            (home / "transformer").mkdir(parents=True)
            diffusers_file(home / "transformer/diffusion_pytorch_model.safetensors", name)
            self.rows.append((f"{words} as a folder of diffusers (`transformer/`)", home.name, 0))
        home = folder / "flux-local-dir"
        home.mkdir()
        (home / "config.json").write_text("{}")
        write(home / "flux1-schnell.safetensors", flux)
        self.rows.append(("A folder of `hf download --local-dir`", home.name, 0))
        qkv = {QKV: ("I8", np.zeros((3 * h, h), np.int8))}
        for words, name, tensors, message in (
            ("SD3.5-Medium of another depth or width", "sd3-is-medium", sd3 | {block + "attn2.qkv.weight": zeros}, "1 of them with a second attention"),
            ("SD3 of another depth or width", "sd3-shallow", {n: a for n, a in sd3.items() if "joint_blocks.1." not in n}, "a transformer of SD3's kind with 1 blocks of 128 channels"),
            ("FLUX.1-Fill", "flux-fill", flux | {"img_in.weight": ("F16", np.zeros((h, 384), np.float16))}, "this is FLUX.1-Fill"),
            ("FLUX.1-Canny, FLUX.1-Depth", "flux-canny", flux | {"img_in.weight": ("F16", np.zeros((h, 128), np.float16))}, "this is FLUX.1-Canny or -Depth"),
            ("FLUX.1-Kontext, by its name", "flux-kontext-dev", flux, "this is FLUX.1-Kontext"),
            ("Chroma", "chroma", flux | {"distilled_guidance_layer.in_proj.weight": zeros}, "this is Chroma"),
            ("FLUX.2", "flux2", flux | {"double_stream_modulation_img.lin.weight": zeros}, "this is FLUX.2"),
            ("Qwen-Image", "qwen", {"transformer_blocks.0.img_mod.1.weight": zeros}, "this is Qwen-Image"),
            ("Z-Image", "z-image", {"noise_refiner.0.attention.qkv.weight": zeros}, "this is Z-Image or Lumina"),
            ("SDXL, SD1.5", "sdxl", {"model.diffusion_model.input_blocks.0.0.weight": zeros}, "this is a U-Net (SDXL or SD1.5)"),
            ("A LoRA", "lora", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": zeros}, "this is a LoRA; give it with --lora"),
            ("T5 alone", "t5xxl", {"encoder.block.0.layer.0.SelfAttention.q.weight": zeros}, "this is T5, a text encoder"),
            ("CLIP alone", "clip_l", {"text_model.final_layer_norm.weight": zeros}, "this is CLIP, a text encoder"),
            ("A VAE alone", "a-vae", {"decoder.conv_in.weight": zeros}, "this is a VAE"),
            ("bitsandbytes NF4", "flux-nf4", flux | {QKV: packed, f"{QKV}.quant_state.bitsandbytes__nf4": packed}, "packed in bitsandbytes' NF4"),
            ("8-bit integers with scales", "flux-int8", flux | qkv | {QKV.replace("weight", "weight_scale"): ("F32", np.ones((3 * h, 1), np.float32))}, "packed in 8 bits with scales"),
            ("Integers without a layout", "flux-integers", flux | qkv, "is integers (I8)"),
        ):  # fmt: skip
            self.add(words, name, tensors, outcome=message)
        (folder / "sd3-pickle.ckpt").write_bytes(b"PK\x03\x04 archive/data.pkl" + bytes(64))
        self.rows.append(("A pickle (`.ckpt`, `.bin`, `.pt`)", "sd3-pickle.ckpt", "a pickle, which may run code"))

    def add(self, words, name, tensors, numbers=None, outcome=0):
        """Write a file; numbers: what it holds where that is not the original. outcome: 0, or a part of the message."""
        write(self.folder / f"{name}.safetensors", tensors)
        if numbers is not None:
            write(self.expected / f"{name}.safetensors", numbers)
        self.rows.append((words, f"{name}.safetensors", outcome))

    def shards(self, flux):
        """Write a model in two files with their index, and an index of a file that is not there."""
        keys, weight_map = sorted(flux), {}
        for number, part in enumerate((keys[::2], keys[1::2]), 1):
            shard = f"flux-0000{number}-of-00002.safetensors"
            write(self.folder / shard, {key: flux[key] for key in part})
            weight_map |= dict.fromkeys(part, shard)
        index = "flux.safetensors.index.json"
        (self.folder / index).write_text(json.dumps({"weight_map": weight_map}))
        self.rows.append(("Several files, by their index", index, 0))
        self.rows.append(("One file of several", shard, "one of 2 files of a model; give its index"))
        lacks = "flux-lacks.safetensors.index.json"
        (self.folder / lacks).write_text(json.dumps({"weight_map": {"a": "flux-00003-of-00003.safetensors"}}))
        self.rows.append(("An index whose file lacks", lacks, "is not beside it"))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Return the layouts and, by file name, what opening each gave; the hub's models are tiny."""
    home = tiny_hub(tmp_path_factory.getbasetemp())
    base = tmp_path_factory.mktemp("layouts")
    (base / "files").mkdir()
    (base / "expected").mkdir()
    files = [next(home.rglob(name)) for name in ("sd3_medium.safetensors", "flux-schnell.safetensors")]
    sd3, flux = ({name: bits(array) for name, array in mx.load(str(file)).items()} for file in files)
    clips = {
        f"text_encoders.{name}.transformer.{key}": bits(array)
        for name in ("clip_l", "clip_g")
        for key, array in mx.load(str(next(home.rglob(f"{name}/model.fp16.safetensors")))).items()
    }
    made = Layouts(base / "files", base / "expected", sd3, flux, clips)
    done = run(home, "open_checkpoints", base / "files", base / "found.json")
    assert done.returncode == 0, done.stderr
    return made, json.loads((base / "found.json").read_text()), home


def test_every_layout(layouts):
    made, found, _ = layouts
    for words, name, outcome in made.rows:
        assert found[name] == outcome if outcome == 0 else outcome in str(found[name]), (words, found[name])


def test_the_page_lists_them(layouts):
    """docs/what-you-bring.md has one row for each layout, with the line that a refused one gets."""
    rows = [
        f"| {words} | {'read' if outcome == 0 else f'refused: {outcome}'} |" for words, _, outcome in layouts[0].rows
    ]
    page = (ROOT / "docs/what-you-bring.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "the table should be:\n" + "\n".join(rows)


def test_images_equal_those_of_the_original(layouts, tmp_path):
    """draw_images.py --model FILE draws what the hub's id draws, with what it says of the file's parts."""
    made, _, home = layouts
    one = ("a red rocket", "--num-steps", 1, "--latent-size", 8, 8)
    drawn_by = {
        "hub-sd3": MEDIUM, "hub-flux": SCHNELL, "clips": made.folder / "sd3-with-clips-images.safetensors",
        "none": made.folder / "sd3-no-vae-images.safetensors",
        "local": made.folder / "flux-local-dir", "index": made.folder / "flux.safetensors.index.json",
    }  # fmt: skip
    words = []
    for name, model in drawn_by.items():
        t5 = "--t5" if model == SCHNELL or "flux" in str(model) else "--no-t5"
        words += ["then", "draw_images", *one, "--model", model, t5, "--output", tmp_path / f"{name}.png"]
    done = run(home, *words[1:])
    assert done.returncode == 0, done.stderr
    pictures = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in drawn_by}
    for name, picture in pictures.items():
        assert np.array_equal(picture, pictures["hub-flux" if name in ("hub-flux", "local", "index") else "hub-sd3"]), (
            name
        )
    assert "(transformer, VAE, CLIP-L, CLIP-G); not read: T5" in done.stdout
    assert "holds no VAE; images are decoded by that of" in done.stdout
    assert "from the hub, nothing of it gated: " in done.stdout
    assert "sd3-with-clips-images.safetensors" in Image.open(tmp_path / "clips.png").text["parameters"]


def test_few_steps_follow_from_the_name(layouts, tmp_path):
    made, _, home = layouts
    large = next(home.rglob("sd3.5_large.safetensors"))
    for name, file in (
        ("sd3.5_large_turbo", large), ("my-flux-8steps", made.folder / "flux.safetensors"),
        ("my-flux-lightning", made.folder / "flux.safetensors"),
    ):  # fmt: skip
        (tmp_path / f"{name}.safetensors").symlink_to(file)
    for name, steps in (("sd3.5_large_turbo", 4), ("my-flux-8steps", 8), ("my-flux-lightning", 0)):
        done = run(
            home,
            "generate_calibration_data",
            "--model",
            f"{tmp_path / name}.safetensors",
            "--dry-run",
            "--calib-dir",
            tmp_path / "run",
            "--latent-size",
            8,
            8,
        )
        if steps:
            assert done.returncode == 0 and f"{steps} steps, no guidance," in done.stdout, done.stdout + done.stderr
            assert f"its name says {steps} steps, without guidance" in done.stdout
        else:
            assert done.returncode == 2 and "not for how many; give --num-steps" in done.stderr


def test_two_checkpoints_and_a_folder_of_several_are_refused(layouts, tmp_path):
    made, _, _ = layouts
    flux = made.folder / "flux.safetensors"
    with pytest.raises(UserError, match="leave --local-checkpoint out"):
        describe_model(str(flux), checkpoint=flux)
    with pytest.raises(UserError, match="--local-checkpoint goes with a hub model"):
        describe_model("sd3-emoji", checkpoint=flux)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").symlink_to(flux)
    with pytest.raises(UserError, match=r"holds 2 checkpoints \(a.safetensors, b.safetensors\); name one"):
        describe_model(str(tmp_path))
    with pytest.raises(UserError, match="truncated or damaged"):
        (tmp_path / "half.gguf").write_bytes((made.folder / "flux-Q8_0.gguf").read_bytes()[:3000])
        describe_model(str(tmp_path / "half.gguf"))


def test_a_damaged_gguf_file_is_one_line(layouts, tmp_path):
    """Everything that a file can suffer, and a place in forty of its header with another byte: one line, or it is read."""
    made, _, _ = layouts
    whole = (made.folder / "flux-Q8_0.gguf").read_bytes()
    path, refused = tmp_path / "damaged.gguf", []
    changes = [
        Mutation(f"byte {at}", partial(replace, content=whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]))
        for at in range(0, 4000, 40)
    ]
    path.write_bytes(whole)
    for mutation in (*file_mutations(path), *changes):
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        mutation.apply(path)
        try:
            open_transformer(describe_model(str(path)), headers_only=True)
        except UserError as error:
            assert "\n" not in error.message and "damaged" in error.message
            refused.append(mutation.name)
        if path.is_dir():
            path.rmdir()
    general = {"truncated", "empty", "garbage", "missing", "a folder", "a link to itself", "a dangling link", "a pipe"}
    assert general <= set(refused) and len(refused) > 20
