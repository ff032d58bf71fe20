"""The toolkit's version: said once, noted in every file of a run, and never a reason to refuse or repeat anything."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, folder_bytes, invoke
from finished_run import finished_run

import w4a8
from calibration_store.files import write_json
from calibration_store.model_folder import folder_files, weights_fingerprint
from calibration_store.version import content_digest, without_version
from calibration_store.weights import training_run
from w4a8.generation_plan import continue_run
from w4a8.model.catalog import package_versions

OTHER = "0.0.1"  # a version that nobody runs
NOTED = {  # file of a calibration folder -> where in it the version stands
    "manifest.json": ("package_versions", "w4a8"),
    "adaround_cache/plan.json": ("w4a8_version",),
    "adaround_cache/metadata.json": ("w4a8_version",),
    "activations/partial/collection.json": ("w4a8_version",),
    "activations/layer_statistics.json": ("metadata", "w4a8_version"),
    "activations/quant_config.json": ("metadata", "w4a8_version"),
    "activations/quant_config_multitier.json": ("metadata", "w4a8_version"),
    "adaround_weights/plan.json": ("w4a8_version",),
    "adaround_weights/metadata.json": ("w4a8_version",),
    "quantized_model/config.json": ("export", "w4a8_version"),
    "evaluation/metrics.json": ("w4a8_version",),
}
EVALUATE = ("--num-images", 1, "--num-steps", 2, "--variants", "native,w4-adaround,a8")


def succeed(script, folder, *arguments):
    done = invoke(script, *arguments, "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    return done


def complete(folder):
    """Run the stages that `finished_run` leaves out."""
    succeed("analyze_activations_multitier", folder)
    succeed("export_quantized_model", folder)
    succeed("evaluate_quantization", folder, *EVALUATE)
    succeed("report_calibration", folder)


slow = pytest.mark.slow  # tests of a whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Make a folder with every file of a run, by this version."""
    folder = tmp_path_factory.mktemp("version") / "run"
    shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), folder)
    complete(folder)
    return folder


@pytest.fixture(params=["none", "other"])
def older(request, whole, tmp_path):
    """Make the same folder as a version that noted none, or another one, would have left it."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name, (*outer, key) in NOTED.items():
        content = json.loads((folder / name).read_bytes())
        place = content
        for part in outer:
            place = place[part]
        if request.param == "none":
            del place[key]
        else:
            place[key] = OTHER
        write_json(folder / name, content)
    # an export has the digest of the metadata.json of its codes: it is made for the changed one
    shutil.rmtree(folder / "quantized_model")
    succeed("export_quantized_model", folder)
    return folder


def version_in(folder, name):
    found = json.loads((folder / name).read_bytes())
    for part in NOTED[name]:
        found = found.get(part)
    return found


@slow
def test_every_file_of_a_run_notes_the_version(whole):
    assert {name: version_in(whole, name) for name in NOTED} == dict.fromkeys(NOTED, w4a8.__version__)
    assert f" by w4a8 {w4a8.__version__};" in (whole / "report/index.html").read_text()


@slow
def test_runs_of_another_version_go_on_without_a_word(older):
    """Every stage reads them, finds its files finished, and leaves them as they are; no warning, no image drawn again."""
    before = {name: version_in(older, name) for name in NOTED if "quantized_model" not in name}
    described = [
        name for name in before if name.startswith("ada") or name.endswith(("collection.json", "statistics.json"))
    ]
    found = folder_bytes(older)
    kept = {name: content for name, content in found.items() if name.endswith((".npz", ".png")) or name in described}
    sources = {name: (older / name).stat().st_mtime_ns for name in kept if name.endswith(".npz") and "weights" in name}
    generated = succeed("generate_calibration_data", older, "--num-images", 3, "--num-steps", 4, "--resume")
    assert "nothing to do" in generated.stdout and "Warning" not in generated.output
    succeed("cache_adaround_data", older, "--num-images", 2, "--stride", 2, "--boundaries", "all", "--resume")
    succeed("collect_layer_activations", older, "--num-images", 2, "--stride", 2, "--resume")
    succeed("optimize_adaround", older, "--iters", 10, "--batch-size", 2, "--unit", "block", "--resume")
    assert {name: (older / name).stat().st_mtime_ns for name in sources} == sources
    assert {name: version_in(older, name) for name in before} == before
    succeed("evaluate_quantization", older, *EVALUATE, "--resume")
    assert version_in(older, "evaluation/metrics.json") == w4a8.__version__
    succeed("report_calibration", older, "--force")
    after = folder_bytes(older)
    assert {name: after[name] for name in kept if not name.startswith("evaluation")} == {
        name: content for name, content in kept.items() if not name.startswith("evaluation")
    }


@slow
def test_variants_of_another_version_are_not_drawn_again(whole, tmp_path):
    """A config that a newer version writes anew, with the same content, asks for no new image."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    config = folder / "activations/quant_config.json"
    config.write_bytes(config.read_bytes().replace(w4a8.__version__.encode(), OTHER.encode()))
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "evaluation/runs").iterdir()}
    succeed("evaluate_quantization", folder, *EVALUATE, "--resume")
    assert len(drawn) == 4 and {path: path.stat().st_mtime_ns for path in drawn} == drawn


def test_only_other_packages_are_warned_of():
    manifest = {"batch_option": 1, "batch_size": 1, "num_images": 0, "images": [], "weights_fingerprint": None}
    manifest |= {"prompts_sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    plan = manifest | {"package_versions": package_versions()}
    began = package_versions() | {"w4a8": OTHER}
    assert continue_run(dict(plan), manifest | {"package_versions": began}) == ""
    warning = continue_run(dict(plan), manifest | {"package_versions": began | {"numpy": "1.0"}})
    assert "'numpy': '1.0'" in warning and OTHER not in warning and w4a8.__version__ not in warning


def test_digests_leave_the_version_out(tmp_path):
    plan = {"iters": 10, "w4a8_version": "1"}
    assert training_run(plan) == training_run(plan | {"w4a8_version": "2"}) == training_run({"iters": 10})
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text('{\n  "w4a8_version": "1.0",\n  "bits": 4\n}')
    second.write_text('{\n  "w4a8_version": "1.1.dev0",\n  "bits": 4\n}')
    assert content_digest(first) == content_digest(second)
    second.write_text('{\n  "w4a8_version": "1.1.dev0",\n  "bits": 3\n}')
    assert content_digest(first) != content_digest(second)
    assert json.loads(without_version(first.read_bytes())) == {"bits": 4}


@slow
def test_a_models_fingerprint_leaves_the_version_out(whole, tmp_path):
    """An export made anew by another version is the same model to every stage that has it as --model."""
    folder = tmp_path / "model"
    shutil.copytree(whole / "quantized_model", folder)
    before = weights_fingerprint(folder_files(folder))
    config = folder / "config.json"
    config.write_bytes(config.read_bytes().replace(w4a8.__version__.encode(), OTHER.encode()))
    assert f'"w4a8_version": "{OTHER}"' in config.read_text() and weights_fingerprint(folder_files(folder)) == before
    config.write_bytes(config.read_bytes().replace(b'"export"', b'"exported"'))
    assert weights_fingerprint(folder_files(folder)) != before


def test_the_version_is_said_once_and_costs_nothing():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert w4a8.__version__.partition(".dev")[0] == newest
    code = "import sys, w4a8; print(w4a8.__version__, {'mlx', 'numpy'} & {name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{w4a8.__version__} set()\n"
    said = [
        path for path in ROOT.glob("*.*") if path.suffix in (".py", ".toml") and w4a8.__version__ in path.read_text()
    ]
    assert said == []
