"""A wrong folder, a damaged file, and the sentence that leads to the right one."""

import json
import shutil

import pytest
from conftest import folder_bytes, invoke
from finished_run import finished_run, one_line

from w4a8.cli.stages import STAGE_HELP

READERS = [
    name.removesuffix(".py") for name in STAGE_HELP if name not in ("generate_calibration_data.py", "draw_images.py")
]


@pytest.fixture
def runs(tmp_path):
    """Return a folder with two runs that have a manifest and nothing else."""
    for name in ("good", "demo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize("stage", READERS)
def test_a_folder_that_is_not_there_is_named_with_those_that_are(stage, runs):
    done = invoke(stage, "--calib-dir", runs / "dmeo")
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"Error: --calib-dir {runs / 'dmeo'}: no such folder; there are {runs / 'demo'}, {runs / 'good'} (Issue 42)\n"
    )
    done = invoke(stage, "--calib-dir", runs)
    assert (
        f"--calib-dir {runs}: holds no run itself; there are {runs / 'demo'}, {runs / 'good'} (Issue 42)" in done.stderr
    )
    done = invoke(stage, "--calib-dir", runs / "demo/none")
    assert "no such folder; generate_calibration_data.py makes one" in done.stderr
    assert sorted(path.name for path in runs.rglob("*")) == ["demo", "good", "manifest.json", "manifest.json"]


def test_resume_begins_no_run_of_the_default_model(runs):
    done = invoke("generate_calibration_data", "--calib-dir", runs / "dem", "--resume")
    assert done.exit_code == 2 and not (runs / "dem").exists()
    where = (
        f"--calib-dir {runs / 'dem'}; there are {runs / 'demo'}, {runs / 'good'}; give --model to begin one (Issue 42)"
    )
    assert done.stderr == f"Error: --resume: no run in {where}\n"
    done = invoke("generate_calibration_data", "--calib-dir", runs, "--resume")
    assert f"there are {runs / 'demo'}, {runs / 'good'}; give --model" in done.stderr


def test_models_of_similar_names_and_of_compare_are_named(runs):
    (runs / "quantized_model").mkdir()
    done = invoke("draw_images", "red heart", "--model", runs / "quantized_modle")
    assert "/runs/quantized_model (Issue 39)" in done.stderr and "; there is " in done.stderr
    done = invoke("draw_images", "red heart", "--model", "sd3-emoji", "--compare", runs / "demo")
    assert (
        f"--compare {runs / 'demo'}: a calibration folder, not a model" in done.stderr
        and "--model s" not in done.stderr
    )


@pytest.mark.parametrize("stage", ["draw_images", "generate_calibration_data"])
def test_a_calibration_folder_is_no_model(stage, runs):
    words = ("red heart",) if stage == "draw_images" else ("--calib-dir", runs / "new")
    done = invoke(stage, *words, "--model", runs / "demo")
    assert (
        done.exit_code
        and f"export_quantized_model.py --calib-dir {runs / 'demo'} writes one there (Issue 42)" in done.stderr
    )
    (runs / "demo/quantized_model").mkdir()
    done = invoke(stage, *words, "--model", runs / "demo")
    assert f"a calibration folder, not a model; give --model {runs / 'demo/quantized_model'} (Issue 42)" in done.stderr
    assert not (runs / "new").exists()


@pytest.mark.slow
def test_damaged_files_say_what_makes_them_anew(tmp_path_factory, tmp_path):
    folder = shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")
    where = ("--calib-dir", folder)
    step = next((folder / "activations").glob("*/step_0.npz"))
    whole = step.read_bytes()
    step.write_bytes(whole[:500])
    one_line(
        invoke("analyze_activations", *where),
        "run collect_layer_activations.py with --resume to make it anew (Issue 26)",
    )
    assert invoke("collect_layer_activations", *where, "--num-images", 2, "--stride", 2, "--resume").exit_code == 0
    assert invoke("analyze_activations", *where).exit_code == 0
    assert invoke("export_quantized_model", *where).exit_code == 0
    weights = folder / "quantized_model/mmdit.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    draw = ("red heart", "--num-steps", 1, "--model", weights.parent, "--output", tmp_path / "drawn")
    one_line(invoke("draw_images", *draw), "run export_quantized_model.py with --force")
    weights.unlink()
    one_line(invoke("draw_images", *draw), "run export_quantized_model.py with --force")
    assert invoke("export_quantized_model", *where, "--force").exit_code == 0
    assert invoke("draw_images", *draw).exit_code == 0
    assert json.loads((weights.parent / "config.json").read_bytes())["export"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "made", "damaged", "options"),
    [
        ("cache_adaround_data", "adaround_cache", "samples/0002_003.npz", ("--stride", 1)),
        ("collect_layer_activations", "activations", "samples/0002_003.npz", ("--num-images", 3, "--stride", 1)),
        ("optimize_adaround", "adaround_weights", "adaround_cache/samples/0002_002.npz", ()),
    ],
)
def test_a_damaged_input_is_found_before_force_removes_anything(
    stage, made, damaged, options, tmp_path_factory, tmp_path
):
    run = shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")
    (run / damaged).write_bytes((run / damaged).read_bytes()[:-300])
    before = folder_bytes(run / made)
    done = invoke(stage, "--calib-dir", run, *options, "--force")
    one_line(done, damaged)
    assert folder_bytes(run / made) == before
