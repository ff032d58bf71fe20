"""A model folder in the layout of models/sd3-emoji: config, tokenizer, weight files; the fingerprint of any model.

A folder that stage 5 exports from a hub model holds the transformer alone; `base_model` names the hub model.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from calibration_store.errors import StoreError
from calibration_store.files import open_regular, read_bytes
from calibration_store.model_config import BASED_CONFIG, MODEL_CONFIG, ClipConfig, T5Section, TransformerConfig
from calibration_store.safetensors_header import weight_shapes, weight_sizes
from calibration_store.schema import Index, JsonFormat, distinct
from calibration_store.version import without_version

BUNDLED_MODEL = "sd3-emoji"
LAYOUT = f"models/{BUNDLED_MODEL} shows the layout of a model folder"
CONFIG_FILE = "config.json"
LOCAL_FILES = ("mmdit", "clip_l", "clip_g", "decoder")
T5_PART, T5_PIECES = "t5", "spiece.model"  # of folders whose config.json has a section t5
# Words for the files of a model folder.
FILE_WORDS = {
    "config.json": "sizes, quantization by layer, digests", "mmdit.safetensors": "the transformer",
    "activations.json": "ranges of the inputs", "clip_l.safetensors": "CLIP-L", "clip_g.safetensors": "CLIP-G",
    "t5.safetensors": "T5's encoder", "spiece.model": "T5's tokenizer", "decoder.safetensors": "the VAE's decoder", "encoder.safetensors": "the VAE's encoder", "vocab.json": "the tokenizer's vocabulary",
    "merges.txt": "the tokenizer's merges", "0.safetensors": "the transformer, packed", "model.safetensors.index.json": "its index", "captions.txt": "captions that the model was made for",
}  # fmt: skip
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = JsonFormat(None, dict[str, Index], "", lambda vocabulary: distinct(list(vocabulary.values()), "id"))


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Unknown keys are kept, but in the networks' sections refused. Raises StoreError in one line."""
    path = config_file(folder)
    based = b'"base_model"' in read_bytes(path, LAYOUT)
    (BASED_CONFIG if based else MODEL_CONFIG).read(path, LAYOUT)
    try:
        config = msgspec.json.decode(read_bytes(path, LAYOUT))
        config_digest(config)
    except (ValueError, TypeError, RecursionError) as error:  # in an entry that no schema looks at
        raise StoreError(f"{path}: not valid JSON ({error}); {LAYOUT}") from None
    networks = {"mmdit": TransformerConfig, "clip_l": ClipConfig, "clip_g": ClipConfig, "t5": T5Section}
    for section, known in ({} if based else networks).items():
        unknown = sorted(config.get(section, {}).keys() - known.__annotations__.keys())
        if unknown:  # it would change what the model is, or mean nothing
            raise StoreError(f"{path}: {section}: {unknown[0]!r} is none of {', '.join(known.__annotations__)}")
    return config


def read_tokenizer_files(folder: Path, vocab_size: int) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Return ({token: id}, {pair of tokens: rank}) of vocab.json and merges.txt. Raises StoreError in one line.

    Every id must be a row of the text encoders' tables (any other id reads outside their memory), and the end token's
    the largest: the pooled feature is taken where the ids are largest.
    """
    path = folder / "vocab.json"
    vocabulary = VOCABULARY.read(path, LAYOUT)
    outside = next((token for token, index in vocabulary.items() if index >= vocab_size), None)
    if outside is not None:
        raise StoreError(
            f"{path}: id {vocabulary[outside]} of {outside!r} is outside the encoders' {vocab_size} tokens"
        )
    missing = [token for token in (BOS, EOS) if token not in vocabulary]
    if missing or vocabulary[EOS] != max(vocabulary.values()):
        what = f"no {missing[0]}" if missing else f"{EOS} has not the largest id"
        raise StoreError(f"{path}: {what}; {LAYOUT}")
    path = folder / "merges.txt"
    try:
        lines = read_bytes(path, LAYOUT).decode("utf-8").strip().split("\n")[1:]
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not UTF-8 text (byte {error.start}); {LAYOUT}") from None
    ranks: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=2):
        pair = tuple(line.split())
        if len(pair) != 2 or "".join(pair) not in vocabulary or pair in ranks:
            raise StoreError(f"{path}: line {number} {line[:40]!r} is no merge of two tokens of vocab.json; {LAYOUT}")
        ranks[pair] = len(ranks)
    return vocabulary, ranks


def config_file(folder: Path) -> Path:
    return folder / CONFIG_FILE


def weight_file(folder: Path, part: str) -> Path:
    """Return the weight file of a part, one of LOCAL_FILES or T5_PART."""
    return folder / f"{part}.safetensors"


DECIDING_FILES = (
    "vocab.json",
    "merges.txt",
    "activations.json",
    T5_PIECES,
)  # decide the images, as weights and config.json do


def role_of(path: Path) -> str | None:
    """Return the key of a file in `export.files`: its part, or its name; None for a file that decides no image."""
    if path.stem in (*LOCAL_FILES, T5_PART) and path.suffix == ".safetensors":
        return path.stem
    return path.name if path.name in DECIDING_FILES else None


def path_of(folder: Path, role: str) -> Path:
    """Return the file of a role: the inverse of `role_of`."""
    return folder / role if role in DECIDING_FILES else weight_file(folder, role)


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of config.json without its `export` entry, whatever the order of its keys."""
    own = {key: value for key, value in config.items() if key != "export"}
    return hashlib.sha256(orjson.dumps(own, option=orjson.OPT_SORT_KEYS)).hexdigest()


def captions_file(folder: Path) -> Path | None:
    """Return the file with prompts that the model was made for, or None where the folder has none."""
    path = folder / "captions.txt"
    return path if path.exists() else None


def t5_files(folder: Path) -> dict[str, Path]:
    """Return {role: file} of T5's weights and its tokenizer."""
    return {T5_PART: weight_file(folder, T5_PART), T5_PIECES: folder / T5_PIECES}


def missing_files(folder: Path, based: bool = False, t5: bool = False) -> list[str]:
    """Return the names of the files that a model folder lacks.

    based: its base model has all but the transformer. t5: its config.json has a section t5.
    """
    wanted = folder_files(folder, based) | (t5_files(folder) if t5 else {})
    return [path.name for path in wanted.values() if not os.path.lexists(path)]


def check_exported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise StoreError unless a folder's files are those whose digests the `export` entry of its config has, if any."""
    note = config.get("export", {})
    if note and "quantization" not in config:
        raise StoreError(
            f"{config_file(folder)}: an export without 'quantization'; run export_quantized_model.py with --force"
        )
    wrong = [
        path
        for role, digest in note.get("files", {}).items()
        if weights_fingerprint({role: (path := path_of(folder, role))}) != digest
    ]
    if "config" in note and note["config"] != config_digest(config):
        wrong.append(config_file(folder))
    if wrong:
        raise StoreError(
            f"{wrong[0]}: not what was exported (damaged, or exchanged); run export_quantized_model.py with --force, "
            "or copy the whole folder again"
        )
    fault = packed_fault(config, weight_shapes(weight_file(folder, "mmdit"))) if note else None
    if fault:
        raise StoreError(f"{config_file(folder)}: {fault}; run export_quantized_model.py with --force")


def packed_fault(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the first contradiction between an export's packed arrays and its config.json, or None.

    A layer of b bits in groups of g has 32-bit words (out, in · b / 32) and scales (out, in / g).
    """
    quantization, note = config["quantization"], config["export"]
    allowed = {note["weight_bits"], *note.get("layer_bits", {}).values()}
    rest = {"r8": 8, "all": 4}.get(note["weights"].rpartition("-")[2])
    found = set()
    for name, shape in shapes.items():
        layer = name.removesuffix(".scales")
        if layer == name or f"{layer}.weight" not in shapes:
            continue
        own = quantization.get(layer, quantization)
        if (
            not isinstance(own, dict)
            or shapes[f"{layer}.weight"][-1] * 32 != shape[-1] * own["group_size"] * own["bits"]
        ):
            return f"quantization: {layer} is not packed with the bits and group size that it says"
        found.add(own["bits"])
    if not found <= allowed | {rest} or (not note.get("layer_bits") and note["weight_bits"] not in found):
        return f"export: weight_bits {note['weight_bits']} over layers of {', '.join(map(str, sorted(found)))} bits"
    return None


def check_weight_file(path: Path) -> None:
    """Raise StoreError unless a safetensors file is whole: its header, and the number of bytes that the header says."""
    weight_sizes(path)


WHOLE_FILE = 64 * 2**20  # largest file, in bytes, that is hashed as a whole
SAMPLES, SAMPLE_BYTES = 256, 2**16


def weights_fingerprint(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 over the roles, sizes and contents of a model's files, {role: file}, in whatever folder.

    A file above 64 MiB is sampled: its safetensors header and 256 evenly spaced pieces of 64 KiB, in 0.1 s. The version
    of the toolkit in an export's config.json is left out. Raises StoreError when a file cannot be read.
    """
    digest = hashlib.sha256()
    for role in sorted(files):
        with open_regular(files[role], LAYOUT, limit=None) as file:
            size = os.fstat(file.fileno()).st_size
            if role == CONFIG_FILE:
                content = without_version(file.read())
                digest.update(f"{role} {len(content)}\n".encode() + content)
                continue
            digest.update(f"{role} {size}\n".encode())
            if size <= WHOLE_FILE:
                digest.update(file.read())
                continue
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, WHOLE_FILE)))
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def folder_files(folder: Path, based: bool = False) -> dict[str, Path]:
    """Return {role: file} of the files in a model folder that decide its images (captions and README do not).

    based: the folder of a hub model's export, which needs the transformer alone; other parts are listed where they
    exist.
    """
    if based:
        own = [part for part in LOCAL_FILES if part == "mmdit" or os.path.lexists(weight_file(folder, part))]
        return {part: weight_file(folder, part) for part in own} | {CONFIG_FILE: config_file(folder)}
    weights = {part: weight_file(folder, part) for part in LOCAL_FILES}
    weights |= {role: path for role, path in t5_files(folder).items() if os.path.lexists(path)}
    return weights | {name: folder / name for name in (CONFIG_FILE, "vocab.json", "merges.txt")}
