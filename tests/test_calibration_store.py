"""Atomic files, locks and the errors of calibration_store, on real files."""

import os
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from calibration_store.errors import StoreError, UserError, WriteError
from calibration_store.files import BackgroundWriter, atomic_file, locked_folder, require_space, write_json
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import saved_steps
from calibration_store.names import block_kind
from calibration_store.npz import npz_bytes, read_npz, write_npz
from calibration_store.samples import read_sample, sample_arrays
from calibration_store.schema import JsonFormat

MANIFEST = {"latent_size": [4, 4], "activation_dtype": "float16", "num_steps": 4, "images": []}
ANY = JsonFormat("f", dict[str, Any], "x.py")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"format": "f", "n": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert ANY.read(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_the_system_refuses_is_one_line(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse the write in the middle of a file, as a full disk does."""
    code = (
        "import numpy as np, pathlib, resource\n"
        "from calibration_store.errors import WriteError\n"
        "from calibration_store.npz import write_npz\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: write_npz(pathlib.Path({str(tmp_path)!r}) / 'big.npz', {{'x': np.zeros(10000)}})\n"
        "except WriteError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == f"cannot write {tmp_path / 'big.npz'}: File too large\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write .*: Not a directory|cannot write .*: File exists"):
        write_json(tmp_path / "file" / "a.json", {})


def test_equal_arrays_give_equal_bytes_and_the_size_is_known_before(tmp_path):
    arrays = sample_arrays(np.ones((1, 4, 4, 16), np.float16), np.float16(3), 0.5, 2, 1, False)
    write_npz(tmp_path / "a.npz", arrays)
    write_npz(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.npz").stat().st_size == npz_bytes(arrays)


def test_a_second_writer_is_refused_and_the_lock_leaves_nothing(tmp_path):
    code = (
        "import pathlib\nfrom calibration_store.files import locked_folder\n"
        f"with locked_folder(pathlib.Path({str(tmp_path / 'run')!r})): pass"
    )
    with locked_folder(tmp_path / "run"):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "another process is writing here" in run.stderr
        (tmp_path / "run" / "file").write_text("")
    with locked_folder(tmp_path / "run"):
        pass
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["file"]
    with locked_folder(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    with pytest.raises(StoreError, match="cannot write to .*file: "), locked_folder(tmp_path / "run" / "file"):
        pass


def test_json_of_another_format_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(StoreError, match="not found; run x.py first"):
        ANY.read(path)
    path.write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="format 'other' is not 'f'; run x.py"):
        ANY.read(path)
    path.write_text("[1]")
    with pytest.raises(StoreError, match="Expected `object`, got `array`; run x.py"):
        ANY.read(path)
    path.write_text('{"format": ')
    with pytest.raises(StoreError, match=r"not valid JSON \(Input data was truncated\); run x.py"):
        ANY.read(path)


def test_damaged_npz_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, {"x": np.arange(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(StoreError, match="a.npz: truncated or damaged; do y"):
        read_npz(path, "do y", {"x"}.__contains__)
    flipped = bytearray(whole)
    flipped[4000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(StoreError, match="a.npz: truncated or damaged"):
        read_npz(path, "do y", {"x"}.__contains__)
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="a.npz: truncated or damaged"):
        read_npz(path, "do y", {"x"}.__contains__)
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(StoreError, match="a.npz: holds a pickled array"):
        read_npz(path, "do y", {"x"}.__contains__)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_equal_members_of_an_npz_are_one_array(tmp_path, save):
    """A member whose directory entry is another's, but whose bytes are not, is unpacked by itself, and refused."""
    path, values = tmp_path / "a.npz", np.arange(1000.0)
    save(path, x=values, y=values + 0, z=values[::-1])
    arrays = read_npz(path, "do y", lambda key: True)
    assert arrays["x"] is arrays["y"] and not arrays["x"].flags.writeable
    assert np.array_equal(arrays["y"], values) and np.array_equal(arrays["z"], values[::-1])
    with zipfile.ZipFile(path) as archive:
        later = archive.getinfo("y.npy")
    content = bytearray(path.read_bytes())
    content[later.header_offset + later.compress_size // 2 + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="a.npz: truncated or damaged; do y"):
        read_npz(path, "do y", lambda key: True)


def test_a_sample_of_another_run_is_named(tmp_path):
    paths = CalibrationPaths(tmp_path)

    def put(x=None, step=0, image=0):
        x = np.zeros((1, 4, 4, 16), np.float16) if x is None else x
        write_npz(paths.sample(0, 0), sample_arrays(x, np.float16(0), 0.0, step, image, False))

    put()
    assert read_sample(paths, MANIFEST, 0, 0)["x"].dtype == np.float16
    put(image=3)
    with pytest.raises(
        StoreError, match="0000_000.npz: a sample of another run .image_id 3, expected 0.; run generate"
    ):
        read_sample(paths, MANIFEST, 0, 0)
    put(x=np.zeros((1, 8, 8, 16), np.float32))
    with pytest.raises(StoreError, match="shape of x .*; dtype of x float32, expected float16"):
        read_sample(paths, MANIFEST, 0, 0)
    write_npz(paths.sample(0, 0), {"y": np.zeros(3)})
    with pytest.raises(StoreError, match="not a calibration sample"):
        read_sample(paths, MANIFEST, 0, 0)


def test_the_background_writer_keeps_order_bounds_its_queue_and_raises(tmp_path):
    done = []
    with BackgroundWriter(pending=1) as writer:
        for i in range(20):
            writer.submit(done.append, i)
        writer.drain()
        assert done == list(range(20))
    with pytest.raises(WriteError), BackgroundWriter() as writer:
        (tmp_path / "file").write_text("")
        writer.submit(write_json, tmp_path / "file" / "a.json", {})


def test_a_full_disk_is_refused_before_work_starts(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StoreError, match=r"needs 1000000.00 GB, the disk has .* free"):
        require_space(tmp_path, 10**15)


def test_saved_steps_keep_the_final_latent():
    assert saved_steps(5, 1) == [0, 1, 2, 3, 4, 5]
    assert saved_steps(5, 2) == [0, 2, 4, 5]
    assert saved_steps(4, 10) == [0, 4]
    assert len(saved_steps(50, 2)) == 26


def test_temporary_files_are_recognised_as_ours(tmp_path):
    paths = CalibrationPaths(tmp_path)
    (tmp_path / "samples").mkdir()
    for name in (
        "samples/.0000_001.npz.ab12_x.tmp",
        "samples/0000_000.npz",
        ".manifest.json.q8.tmp",
        "notes.txt",
        "samples/mine.npz",
    ):
        (tmp_path / name).write_text("")
    assert [p.name for p in paths.owned_files()] == [
        ".manifest.json.q8.tmp",
        ".0000_001.npz.ab12_x.tmp",
        "0000_000.npz",
    ]
    assert os.path.exists(tmp_path / "notes.txt")


def test_a_name_that_no_block_has_is_refused():
    assert block_kind("uni12") == ("uni", 12)
    with pytest.raises(ValueError, match="'mm' is not the name of a block"):
        block_kind("mm")


def test_a_message_is_one_line_whatever_a_file_calls_its_parts():
    error = UserError("tensor a\nb\x1b[2J\u2028: unknown, größer ✓")
    assert error.message == str(error) == "tensor a\\nb\\x1b[2J\\u2028: unknown, größer ✓"
