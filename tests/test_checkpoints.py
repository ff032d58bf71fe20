"""Checkpoints in the layouts that people have: the same weights as the original, or a line that says what a file is."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_hub import run, tiny_hub

from calibration_store.errors import UserError
from w4a8.model.weight_files import load_arrays

pytestmark = pytest.mark.slow

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
    (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    (b"PK\x03\x04 archive/data.pkl", "a pickle, which may run code"),
    (b"\x80\x02}q\x00", "a pickle, which may run code"),
    (b'{"weight_map": {}}', "JSON"),
])  # fmt: skip
def test_files_of_another_kind_are_named(tmp_path, content, message):
    (tmp_path / "a.ckpt").write_bytes(content + bytes(64))
    with pytest.raises(UserError, match=f"a.ckpt: {message}"):
        load_arrays(tmp_path / "a.ckpt")


def layouts(sd3, flux, folder):
    """Write every checkpoint to a folder; return {file: what opening it gives, 0 or part of a message}."""
    body = {name.removeprefix(PREFIX): array for name, array in sd3.items() if name.startswith(PREFIX)}
    vae = {name: array for name, array in sd3.items() if not name.startswith(PREFIX)}
    prefixed = {PREFIX + name: array for name, array in flux.items()}
    first = "joint_blocks.0.x_block."
    clip = {"text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": ("F32", np.ones(8, np.float32))}
    wide = {name: ("F32", np.array(array, np.float32)) for name, (_, array) in sd3.items()}
    ema = {f"model_ema.{name.replace('.', '')}": array for name, array in body.items()}
    others = {"vae.decoder.conv_in.bias": ("F32", np.zeros(4, np.float32))}
    medium = {PREFIX + first + "attn2.qkv.weight": ("F16", np.zeros((8, 8), np.float16))}
    table = {PREFIX + "pos_embed": ("F16", np.zeros((1, 96 * 96, 128), np.float16))}
    inputs = {"img_in.weight": ("F16", np.zeros((128, 384), np.float16))}
    cases = {
        "sd3-images": (sd3, 0), "sd3-float32-images": (wide, 0), "sd3-no-prefix-images": (body | vae, 0), "sd3-no-vae": (body, 0),
        "sd3-no-vae-images": (body, "holds no VAE"), "sd3-ema": (sd3 | ema, 0), "sd3-with-clips-images": (sd3 | clip, 0),
        "sd3-is-medium": (sd3 | medium, "this is SD3.5-Medium"), "sd3-positions": (sd3 | table, "table of positions is 96 x 96"),
        "sd3-is-flux": (flux, "a transformer of FLUX"), "sd3-empty": (clip, "holds no transformer"),
        "sd3-diffusers": ({"transformer_blocks.0.attn.to_q.weight": ("F32", np.zeros((4, 4), np.float32))}, "layout of diffusers"),
        "flux": (flux, 0), "flux-prefix": (prefixed, 0), "flux-all-in-one": (prefixed | others | clip, 0),
        "flux-fill": (flux | inputs, "this is FLUX.1-Fill"),
        "flux-chroma": (flux | {"distilled_guidance_layer.in_proj.weight": inputs["img_in.weight"]}, "this is Chroma"),
        "flux-nf4": (flux | {QKV: ("U8", np.zeros((8, 1), np.uint8)), f"{QKV}.quant_state.bitsandbytes__nf4": ("U8", np.zeros(8, np.uint8))}, "bitsandbytes' NF4"),
        "flux-int8": (flux | {QKV: ("I8", np.zeros((384, 128), np.int8)), QKV.replace("weight", "weight_scale"): ("F32", np.ones((384, 1), np.float32))}, "8 bits with scales"),
        "flux-integers": (flux | {QKV: ("I8", np.zeros((384, 128), np.int8))}, "is integers (I8)"),
    }  # fmt: skip
    for name, (tensors, _) in cases.items():
        write(folder / f"{name}.safetensors", tensors)
    expected = {f"{name}.safetensors": outcome for name, (_, outcome) in cases.items()}
    keys, weight_map = sorted(flux), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        shard = f"flux-0000{number}-of-00002.safetensors"
        write(folder / shard, {key: flux[key] for key in part})
        weight_map |= dict.fromkeys(part, shard)
        expected[shard] = "one of 2 files of a model; give its index"
    (folder / "flux.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    missing = {"weight_map": {"a": "flux-00003-of-00003.safetensors"}}
    (folder / "flux-lacks.safetensors.index.json").write_text(json.dumps(missing))
    return expected | {"flux.safetensors.index.json": 0, "flux-lacks.safetensors.index.json": "is not beside it"}


def test_every_layout(tmp_path, tmp_path_factory):
    home = tiny_hub(tmp_path_factory.getbasetemp())
    files = [next(home.rglob(name)) for name in ("sd3_medium.safetensors", "flux-schnell.safetensors")]
    sd3, flux = ({name: bits(array) for name, array in mx.load(str(file)).items()} for file in files)
    (tmp_path / "files").mkdir()
    expected = layouts(sd3, flux, tmp_path / "files")
    done = run(home, "open_checkpoints", tmp_path / "files", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == expected.keys()
    for name, outcome in expected.items():
        assert found[name] == outcome if outcome == 0 else outcome in str(found[name]), (name, found[name])
