"""cache_adaround_data.py: replayed blocks give the cached outputs, the format, the reader, bad input."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke

from calibration_store.block_cache import boundary_keys, read_cached_block
from calibration_store.errors import StoreError
from calibration_store.manifest import read_manifest
from w4a8.block_recording import BlockRecorder
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.replay import Replay

ARGUMENTS = ["--num-images", 2, "--stride", 2, "--boundaries", "all"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "run"
    assert generate("--num-images", 3, "--num-steps", 4, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("cache_adaround_data", "--calib-dir", folder, *ARGUMENTS)
    assert done.exit_code == 0, done.output
    return folder


def mapped(array):
    """Whether an array's memory is a file's."""
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base if not isinstance(array.base, memoryview) else array.base.obj
    return isinstance(array, np.memmap)


def test_files_keep_their_contract(run):
    metadata = json.loads((run / "adaround_cache/metadata.json").read_bytes())
    assert metadata["format"] == "adaround_cache_v2" and metadata["dtype"] == "float16"
    assert metadata["block_names"] == [f"mm{i}" for i in range(8)]
    assert metadata["selected_image_ids"] == [0, 2] and metadata["key_timesteps"] == [0, 2]
    assert (metadata["stride"], metadata["cfg_weight"], metadata["num_steps"]) == (2, 4.0, 4)
    assert [(s["image_id"], s["step_index"]) for s in metadata["samples"]] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    keys = {
        "mm0__arg0",
        "mm0__arg1",
        "modulation_input",
        *(f"mm{i}__out0" for i in range(8)),
        *(f"mm{i}__out1" for i in range(7)),
    }
    for sample in metadata["samples"]:
        arrays = np.load(run / "adaround_cache" / sample["file"], allow_pickle=False)
        assert set(arrays.files) == keys | {"image_id", "step_index", "calibration_run"} and all(
            arrays[key].dtype == np.float16 for key in keys
        )
        assert arrays["mm0__arg0"].shape == (2, 64, 1, 192) and arrays["mm3__out1"].shape == (2, 32, 1, 192)
        assert arrays["modulation_input"].shape == (2, 1, 1, 192)
    separate = sum(
        arrays[k].nbytes
        for i in range(8)
        for k in boundary_keys(metadata["block_names"])[f"mm{i}"][0]
        + boundary_keys(metadata["block_names"])[f"mm{i}"][1]
    )
    assert sum(arrays[key].nbytes for key in keys) < 0.56 * separate  # (n + 1) / 2n boundaries: 0.52 for 24 blocks


def test_each_block_replayed_alone_gives_the_cached_outputs(run, emoji):
    """With the cached modulation input, float16 rounding of inputs and outputs is all that differs."""
    image = read_manifest(run)["images"][2]
    text = encode_prompts(emoji, [image["prompt"]], 4.0)
    blocks = emoji.mmdit.multimodal_transformer_blocks
    for index in range(8):
        for cached in read_cached_block(run, f"mm{index}"):
            modulation = mx.array(np.array(cached.modulation_input)).astype(mx.float32)
            timestep = mx.array([7.0, 7.0])
            streams = (blocks[index].image_transformer_block, blocks[index].text_transformer_block)
            for stream in streams:
                stream._modulation_params = {7.0: stream.adaLN_modulation(modulation)}
            image_tokens, text_tokens = (mx.array(np.array(tokens)).astype(mx.float32) for tokens in cached.inputs)
            outputs = [o for o in blocks[index](image_tokens, text_tokens, timestep) if o is not None]
            assert len(outputs) == len(cached.outputs) == (1 if index == 7 else 2)
            for got, expected in zip(outputs, cached.outputs, strict=True):
                scale = np.abs(np.array(expected, np.float32)).max()
                np.testing.assert_allclose(np.array(got), np.array(expected, np.float32), atol=4e-3 * scale, rtol=4e-3)
            for stream in streams:
                del stream._modulation_params
        if index == 7 and cached.image_id == 2:  # the last block's output through the final layer is the model's own
            final = emoji.mmdit.final_layer
            final._modulation_params = {7.0: final.adaLN_modulation(modulation)}
            tokens = final(mx.array(np.array(cached.outputs[0])).astype(mx.float32), timestep)
            del final._modulation_params
            sample = np.load(run / f"samples/0002_{cached.step_index:03d}.npz")
            with modulation_cache(emoji, [text.pooled], mx.array(sample["timestep"])[None]):
                own = np.array(Replay(emoji, text).forward(sample["x"], sample["timestep"]))
            patches = np.array(tokens).reshape(2, 8, 8, 2, 2, 16).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 16)
            np.testing.assert_allclose(patches, own, atol=4e-3 * np.abs(own).max())


def test_the_reader_maps_one_block_and_nothing_else(run):
    cached = next(iter(read_cached_block(run, "mm5")))
    assert all(mapped(array) and array.flags.aligned for array in (*cached.inputs, *cached.outputs))
    with np.load(run / "adaround_cache/samples/0000_000.npz") as arrays:
        assert np.array_equal(cached.inputs[1], arrays["mm4__out1"]) and np.array_equal(
            cached.outputs[0], arrays["mm5__out0"]
        )
    with pytest.raises(StoreError, match="block mm9 is not cached"):
        next(iter(read_cached_block(run, "mm9")))


def test_only_the_boundaries_of_the_chosen_blocks_are_stored(run, tmp_path):
    shutil.copytree(run / "samples", tmp_path / "samples")
    shutil.copy(run / "manifest.json", tmp_path)
    done = invoke("cache_adaround_data", "--calib-dir", tmp_path, *ARGUMENTS, "--blocks", "mm4,mm7")
    assert done.exit_code == 0, done.output
    with (
        np.load(tmp_path / "adaround_cache/samples/0002_002.npz") as some,
        np.load(run / "adaround_cache/samples/0002_002.npz") as whole,
    ):
        assert set(some.files) == {
            "mm3__out0",
            "mm3__out1",
            "mm4__out0",
            "mm4__out1",
            "mm6__out0",
            "mm6__out1",
            "mm7__out0",
            "modulation_input",
            "image_id",
            "step_index",
            "calibration_run",
        }
        assert all(np.array_equal(some[key], whole[key]) for key in some.files)
    assert [c.step_index for c in read_cached_block(tmp_path, "mm7")] == [0, 2, 0, 2]
    done = invoke("cache_adaround_data", "--calib-dir", tmp_path, *ARGUMENTS, "--blocks", "mm4,mm9", "--force")
    assert done.exit_code == 2 and "--blocks: no block 'mm9'; the model has mm0 to mm7" in done.stderr


def test_keys_of_flux():
    keys = boundary_keys(["mm0", "mm1", "uni0", "uni1"])
    assert keys["mm1"] == (["mm0__out0", "mm0__out1"], ["mm1__out0", "mm1__out1"])
    assert keys["uni0"] == (["uni0__arg0"], ["uni0__out0"]) and keys["uni1"] == (["uni0__out0"], ["uni1__out0"])


def test_what_does_not_fit_float16_is_an_error_that_names_the_block():
    recorder = BlockRecorder(boundary_keys(["mm0", "mm1"]))
    tokens = mx.ones((2, 4, 1, 8))
    recorder.record("mm0", (tokens, tokens, None), (tokens * 1e5, tokens))
    with pytest.raises(StoreError, match="mm0: mm0__out0 does not fit float16 .* at step 3 of image 1"):
        recorder.finish(tokens, tokens, "step 3 of image 1").checked()


def test_resume_makes_what_is_missing_anew_and_refuses_another_run(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = folder_bytes(folder)
    (folder / "adaround_cache/samples/0000_002.npz").unlink()
    path = folder / "adaround_cache/samples/0002_000.npz"
    path.write_bytes(path.read_bytes()[:-100])
    (folder / "adaround_cache/metadata.json").unlink()
    with pytest.raises(StoreError, match="metadata.json: not found; run cache_adaround_data.py first"):
        next(iter(read_cached_block(folder, "mm0")))
    done = invoke("cache_adaround_data", "--calib-dir", folder, *ARGUMENTS, "--resume")
    assert done.exit_code == 0, done.output
    assert folder_bytes(folder) == before
    for arguments, message in (
        (["--num-images", 3, "--stride", 2], "--num-images 2, not 3"),
        ([*ARGUMENTS, "--blocks", "mm0"], "--blocks None, not mm0"),
    ):
        done = invoke("cache_adaround_data", "--calib-dir", folder, *arguments, "--resume")
        assert done.exit_code == 2 and message in done.stderr
    assert invoke("cache_adaround_data", "--calib-dir", folder, *ARGUMENTS).exit_code == 2
    assert folder_bytes(folder) == before


def test_a_damaged_cache_is_named_by_the_reader(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "adaround_cache/samples/0002_000.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match="0002_000.npz: truncated or damaged"):
        list(read_cached_block(folder, "mm0"))
    np.savez_compressed(
        path,
        **{
            key: np.zeros(3, np.float16)
            for key in ("mm0__arg0", "mm0__arg1", "mm0__out0", "mm0__out1", "modulation_input")
        },
    )
    with pytest.raises(StoreError, match="compressed members cannot be mapped"):
        list(read_cached_block(folder, "mm0"))


def test_dry_run_gives_the_bytes_and_writes_nothing(run, tmp_path):
    shutil.copytree(run / "samples", tmp_path / "samples")
    shutil.copy(run / "manifest.json", tmp_path)
    done = invoke("cache_adaround_data", "--calib-dir", tmp_path, *ARGUMENTS, "--dry-run")
    assert done.exit_code == 0 and not (tmp_path / "adaround_cache").exists()
    size = (run / "adaround_cache/samples/0000_000.npz").stat().st_size
    assert f"{4 * size / 1e6:.1f} MB" in done.stdout
