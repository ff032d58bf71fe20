"""The readers that `calibration_store` has for other people's programs: their names, their examples, their refusals."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, invoke
from finished_run import finished_run

import calibration_store
from calibration_store import StoreError, api
from calibration_store.names import input_owner
from calibration_store.sensitivity import write_sensitivity

pytestmark = pytest.mark.slow

READERS = [name for name in calibration_store.__all__ if name.startswith("read_")]
BLOCK = re.compile(r"^## [^`\n]*`(\w+)`\n.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(BLOCK.findall((ROOT / "docs/api.md").read_text()))


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory):
    """Return a folder in which calibration_data is a run with every stage."""
    base = tmp_path_factory.mktemp("api")
    run = shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), base / "calibration_data")
    for stage, *options in (
        ("analyze_activations_multitier",),
        ("export_quantized_model",),
        ("evaluate_quantization", "--num-images", 1, "--num-steps", 2, "--variants", "w4-adaround"),
    ):
        done = invoke(stage, "--calib-dir", run, *options)
        assert done.exit_code == 0, done.output
    write_sensitivity(run, sensitivity_of(run))
    return base


@pytest.fixture(scope="module")
def folder_of_ends(working_folder, tmp_path_factory):
    """Return such a folder whose run has a cache of --boundaries ends."""
    base = shutil.copytree(working_folder, tmp_path_factory.mktemp("ends") / "base")
    options = ("--num-images", 2, "--stride", 2, "--boundaries", "ends", "--force")
    done = invoke("cache_adaround_data", "--calib-dir", base / "calibration_data", *options)
    assert done.exit_code == 0, done.output
    return base


@pytest.fixture
def damaged(working_folder, tmp_path):
    """Return a copy of the run, for a test to change."""
    return shutil.copytree(working_folder / "calibration_data", tmp_path / "run")


def sensitivity_of(run):
    """Return errors as --sensitivity-only would note them; to measure those of all layers takes a minute."""
    cache = calibration_store.read_cache_metadata(run)
    layers = calibration_store.read_statistics(run).read_step("0")
    same = ("calibration_run", "weights_fingerprint", "selected_image_ids", "key_timesteps")
    return {key: cache[key] for key in same} | {
        "group_size": 64,
        "num_samples": len(cache["samples"]),
        "sigmas": [1.0, 0.5],
        "layers": {name: {"weights": {"4": 0.01}, "size": 4096} for name in layers},
        "inputs": {input_owner(name): [1.0, 2.0] for name in layers},
    }


def test_the_package_shows_its_readers_and_nothing_else():
    assert dir(calibration_store) == calibration_store.__all__ == sorted(calibration_store.__all__) == api.__all__
    assert all(getattr(calibration_store, name) is getattr(api, name) for name in calibration_store.__all__)
    tree = ast.parse((ROOT / "calibration_store/__init__.py").read_text())
    (checked,) = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.endswith(".api")]
    assert [alias.name for alias in checked.names] == calibration_store.__all__  # the names that a type checker sees
    with pytest.raises(AttributeError, match="module 'calibration_store' has no attribute 'read_nothing'"):
        calibration_store.read_nothing


def test_names_of_earlier_versions_are_there():
    """All but `read_config`, one name for two files: `read_quant_config` and `read_multitier_config` read them."""
    earlier = {"read_manifest", "read_cached_block", "read_cached_ends", "read_statistics", "read_quantized_block"}
    assert earlier | {"StoreError"} <= set(calibration_store.__all__)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_the_folder_first_and_says_what_it_raises(name):
    reader = getattr(calibration_store, name)
    first = next(iter(inspect.signature(reader).parameters.values()))
    assert (first.name, first.annotation.__name__) == ("calib_dir", "Path")
    assert "StoreError" in reader.__doc__


def test_numpy_is_loaded_with_the_first_reader():
    code = (
        "import sys, calibration_store, calibration_store.limits, calibration_store.choices, calibration_store.sizes\n"
        "print('numpy' in sys.modules)\n"
        "from calibration_store import *\n"
        "print('numpy' in sys.modules, 'mlx' in sys.modules, 'click' in sys.modules, read_manifest.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\nTrue False False read_manifest\n"


def test_every_reader_has_an_example():
    assert set(EXAMPLES) == {*READERS, "StoreError"}
    assert all(
        re.search(rf"^from calibration_store import .*\b{name}\b", EXAMPLES[name], re.MULTILINE) for name in EXAMPLES
    )
    assert (ROOT / "docs/api.md").read_text().count("```python") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(name, request, monkeypatch, capsys):
    folder = "folder_of_ends" if name == "read_cached_ends" else "working_folder"
    monkeypatch.chdir(request.getfixturevalue(folder))
    exec(compile(EXAMPLES[name], f"docs/api.md: {name}", "exec"), {})
    assert capsys.readouterr().out.strip()


ARGUMENTS = {"read_sample": (0, 0), "read_cached_block": ("mm0",), "read_quantized_block": ("mm0",)}


def read(name, folder):
    """Call a reader, to the end of what it yields."""
    found = getattr(calibration_store, name)(folder, *ARGUMENTS.get(name, ()))
    return list(found) if inspect.isgenerator(found) else found


@pytest.mark.parametrize("name", READERS)
def test_a_folder_without_files_is_one_line(name, tmp_path):
    with pytest.raises(StoreError, match=rf"^{re.escape(str(tmp_path))}/\S+: not found; ") as raised:
        read(name, tmp_path)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("read_manifest", "read_cached_ends")])
def test_files_of_another_run_are_refused(name, damaged):
    read(name, damaged)
    manifest = json.loads((damaged / "manifest.json").read_bytes())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"sampler_shift": 2.5}))
    with pytest.raises(StoreError, match="another calibration run"):
        read(name, damaged)


def test_blocks_that_are_not_quantized_are_named(working_folder):
    with pytest.raises(StoreError, match=r"metadata.json: block mm99 is not quantized \(it has mm0, mm1"):
        calibration_store.read_quantized_block(working_folder / "calibration_data", "mm99")


def test_folders_of_their_own_are_read_too(working_folder, tmp_path):
    """Stages 4 and 5 have an --output; an exported folder may lie anywhere."""
    run = working_folder / "calibration_data"
    metrics = shutil.copytree(run / "evaluation", tmp_path / "metrics")
    assert calibration_store.read_metrics(metrics) == calibration_store.read_metrics(run)
    model = calibration_store.read_quantized_model(shutil.copytree(run / "quantized_model", tmp_path / "model"))
    assert model.config == calibration_store.read_quantized_model(run).config
    assert model.weights == tmp_path / "model/mmdit.safetensors"
    flipped = bytearray(model.weights.read_bytes())
    flipped[-1] ^= 1
    model.weights.write_bytes(flipped)
    with pytest.raises(StoreError, match=r"mmdit.safetensors: not what was exported"):
        calibration_store.read_quantized_model(tmp_path / "model")
