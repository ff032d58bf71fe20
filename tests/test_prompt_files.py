"""Prompts from the files that people have, and what is said of those that cannot be read."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import generate

from calibration_store.errors import OptionError
from w4a8.model.prompt_files import read_prompt_file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id, Caption \n1,rocket\n2,swan\n"),
        ("a.tsv", "id\tprompt\n1\trocket\n2\t swan \n"),
        ("a.TSV", '"PROMPT"\tid\n"rocket"\t1\n\n""\t2\nswan\n'),
        ("a.csv", "caption,prompt\nno,rocket\nno,swan\nno\n"),
        ("a.csv", "\ufeffprompt\nrocket\nswan\n"),
        ("a.csv", "\n\nprompt\nrocket\nswan\n"),
        ("a.csv", "Prompts,Category\nrocket,x\nswan,y\n"),
        ("a.csv", "file_name,text\n1.png,rocket\n2.png,swan\n"),
        ("a.txt", "\ufeffrocket\r\n\r\n  swan\n"),
        ("a.jsonl", '{"file_name": "1.png", "text": "rocket"}\n\n{"text": "swan", "n": 1}\n'),
        ("a.JSONL", '"rocket"\n"swan"\n'),
        ("a.json", '["rocket", {"prompt": "swan"}]'),
        ("a.json", '{"seed": 1, "prompts": ["rocket", "swan"]}'),
    ],
)
def test_files_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompt_file(tmp_path / name) == ["rocket", "swan"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["rocket", None, "swan"]}), path)
    assert read_prompt_file(path) == ["rocket", "swan"]
    path.write_bytes(b"PAR1" + bytes(40))
    assert "not a Parquet file" in refusal(path)


def test_parquet_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    assert refusal(tmp_path / "a.parquet").endswith("pyarrow is not installed; pip install pyarrow")


def test_captions_beside_images(tmp_path):
    said = []
    for name, content in (
        ("b.jpg", ""),
        ("b.txt", "swan\n"),
        ("a.PNG", ""),
        ("a.txt", " red  rocket "),
        ("c.webp", ""),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "notes.txt").write_text("no caption")
    assert read_prompt_file(tmp_path, note=said.append) == ["red rocket", "swan"]
    assert said == [f"--prompts {tmp_path}: 1 of 3 images have no caption."]
    done = generate("--prompts", tmp_path, "--num-images", 2, "--num-steps", 1, "--calib-dir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    images = json.loads((tmp_path / "run/manifest.json").read_bytes())["images"]
    assert [image["prompt"] for image in images] == ["red rocket", "swan"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.PNG", "text": "owl"}\n')
    assert read_prompt_file(tmp_path) == ["owl"]


def test_a_column_that_is_not_used_is_named(tmp_path):
    path, said = tmp_path / "a.tsv", []
    path.write_text("prompt\tNegative_Prompt\nrocket\tblurry\n")
    assert read_prompt_file(path, note=said.append) == ["rocket"]
    assert said == [
        f"--prompts {path}: its column 'Negative_Prompt' is not used; --negative-prompt is for every image."
    ]


def refusal(path) -> str:
    with pytest.raises(OptionError) as refused:
        read_prompt_file(path)
    return refused.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "id\tnote\n", "no column 'prompt', 'caption', 'text' or 'prompts' (columns: id, note)"),
        ("b.tsv", 'prompt\n"open\n', "not valid TSV (unexpected end of data)"),
        ("a.csv", "prompt\n\n", "holds no prompt"),
        ("a.csv", "", "no column 'prompt', 'caption', 'text' or 'prompts' (columns: none)"),
        ("a.yaml", "- rocket\n", ".yaml files are not read; give text (one prompt a line), .csv"),
        ("a.csv.gz", "x", ".gz files are not read; give text"),
        ("a.json", "{}", "not a JSON list of prompts"),
        ("a.json", "[1", "not JSON ("),
        ("a.json", "[1, 2]", "entry 1: neither a text nor an object; entry 2: neither"),
        ("a.jsonl", '{"text": "a"}\n1\n{"text"\n', "line 2: neither a text nor an object; line 3: "),
        ("a.jsonl", '{"text": 1}\n{"text": "a"}\n{"text": []}\n', "prompt 1 is no text; prompt 3 is no text"),
        ("a.jsonl", "1\n" * 9, "; and 4 more"),
    ],
)
def test_every_fault_of_a_file_is_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    found = refusal(path)
    assert found.startswith(f"--prompts {path}: ") and message in found and "\n" not in found


def test_files_that_cannot_be_read_say_why(tmp_path):
    assert "no captions beside images (0 images, no .txt of the same name)" in refusal(tmp_path)
    assert refusal(tmp_path / "none.txt") == f"--prompts {tmp_path}/none.txt: not found; give a file"
    assert refusal(Path("/proc/self/mem")) == "--prompts /proc/self/mem: cannot be read (Input/output error)"
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.txt").write_bytes(b"\xff")
    assert refusal(tmp_path).endswith("a.txt: not UTF-8 text (byte 0); b.txt: not UTF-8 text (byte 0)")


def test_files_without_permission_say_so(tmp_path):
    (tmp_path / "a.txt").touch(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert refusal(tmp_path / "a.txt") == f"--prompts {tmp_path}/a.txt: cannot be read (Permission denied)"
    finally:
        os.seteuid(user)
