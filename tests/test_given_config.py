"""Two configs side by side: an analyzer's files bear the name of --output, and stage 4 measures the one that --config names."""

import json

import pytest
from conftest import generate, invoke

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a calibration run of 2 images x 3 steps with statistics and the default config with its figures."""
    folder = tmp_path_factory.mktemp("configs") / "run"
    assert generate("--num-images", 2, "--num-steps", 3, "--no-images", "--calib-dir", folder).exit_code == 0
    for stage, *options in (
        ("collect_layer_activations", "--num-images", 2, "--stride", 1),
        ("analyze_activations", "--plot"),
    ):
        assert invoke(stage, "--calib-dir", folder, *options).exit_code == 0
    return folder


def test_a_config_of_another_name_keeps_its_files_apart(run):
    folder = run / "activations"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    output = folder / "p999.json"
    done = invoke("analyze_activations", "--calib-dir", run, "--use-hist-p999", "--plot", "--output", output)
    assert done.exit_code == 0, done.output
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    new = {path.name for path in folder.iterdir() if path.is_file()} - before.keys()
    assert {"p999.json", "p999_layer_temporal_analysis.json", "p999_scale_map.png"} <= new, new
    assert all(name.startswith("p999") for name in new)


def test_a_config_is_measured_where_it_lies(run, tmp_path):
    """It takes the place of the folder's config for the variant that reads its format; no other variant may be meant."""
    other = tmp_path / "p999.json"
    done = invoke("analyze_activations", "--calib-dir", run, "--use-hist-p999", "--output", other)
    assert done.exit_code == 0, done.output

    def evaluate(*arguments):
        options = ("--num-images", 1, "--num-steps", 2, "--output", tmp_path / "evaluation")
        return invoke("evaluate_quantization", "--calib-dir", run, *options, *arguments)

    psnr = []
    for arguments in ((), ("--config", other)):
        done = evaluate("--variants", "a8", *arguments)
        assert done.exit_code == 0, done.output
        metrics = json.loads((tmp_path / "evaluation/metrics.json").read_bytes())
        psnr.append(metrics["variants"]["a8"]["psnr"]["mean"])
    assert psnr[0] != psnr[1]
    for config, message in ((other, "no variant reads it; give --variants a8"), (tmp_path / "gone.json", "gone.json")):
        done = evaluate("--variants", "w4-rtn", "--config", config)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
