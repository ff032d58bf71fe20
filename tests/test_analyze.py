"""analyze_activations.py and analyze_activations_multitier.py: against independent computations, foreign files, bad input."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, folder_bytes, generate, invoke

from calibration_store.histograms import histogram_edges, histogram_grid
from w4a8.analysis import steps
from w4a8.analysis.clipping_ranges import (
    absolute_histogram,
    centred_histogram,
    clipping_fraction,
    expected_noise,
    expected_sqnrs,
    histogram_percentile,
)
from w4a8.analysis.tiers import Decision, decide_by_average
from w4a8.backend.second_process import with_second_process

IMAGES, STEPS = 3, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a calibration run of 3 images × 4 steps with its statistics."""
    folder = tmp_path_factory.mktemp("analyze") / "run"
    assert generate("--num-images", IMAGES, "--num-steps", STEPS, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("collect_layer_activations", "--calib-dir", folder, "--num-images", IMAGES, "--stride", 1)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def analyze(folder, *arguments):
    return invoke("analyze_activations", "--calib-dir", folder, *arguments)


def analyze_tiers(folder, *arguments):
    return invoke("analyze_activations_multitier", "--calib-dir", folder, *arguments)


def load(path):
    return json.loads(path.read_bytes())


def step(folder, key):
    """Arrays as {layer: {field: array}} and the index of one step."""
    index = load(folder / f"activations/timestep_stats/step_{key}_index.json")
    arrays = dict(np.load(folder / f"activations/timestep_stats/step_{key}.npz"))
    layers = {}
    for name in index:
        prefix = name.replace(".", "_") + "__"
        layers[name] = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    return layers, index


def test_two_processes_write_what_one_does(copy, monkeypatch):
    stages = (analyze, analyze_tiers)
    assert [stage(copy).exit_code for stage in stages] == [0, 0]
    one = folder_bytes(copy)
    for name in ("quant_config.json", "quant_config_multitier.json"):
        (copy / "activations" / name).unlink()
    monkeypatch.setattr(steps, "SECOND_PROCESS_BYTES", 0)
    monkeypatch.setattr(steps, "cores", lambda: 2)
    started, start = [], steps.with_second_process
    monkeypatch.setattr(steps, "with_second_process", lambda *work: started.append(1) or start(*work))
    assert [stage(copy).exit_code for stage in stages] == [0, 0] and folder_bytes(copy) == one
    assert len(started) == 2
    path = copy / "activations/timestep_stats/step_1.npz"
    path.write_bytes(path.read_bytes()[:-40])
    done = analyze(copy)
    assert done.exit_code == 2 and "step_1.npz: truncated or damaged; run collect" in done.stderr


def half_of(number):
    """Return half of an even number; end the process that has 6 without a word."""
    if number == 6 and multiprocessing.parent_process():
        os._exit(1)
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2, os.getpid()


def test_a_second_process_takes_every_second_item():
    found = with_second_process(half_of, [0, 2, 4, 6, 8, 1, 10])
    results = [next(found) for _ in range(5)]
    assert [half for half, _ in results] == [0, 1, 2, 3, 4]
    assert [pid == os.getpid() for _, pid in results] == [True, False, True, True, True]
    with pytest.raises(ValueError, match="1 is odd"):
        next(found)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_config_equals_an_independent_computation(copy):
    done = analyze(copy, "--plot")
    assert done.exit_code == 0, done.output
    assert "93 layers × 4 steps" in done.stdout and "simulated" in done.stdout
    config = load(copy / "activations/quant_config.json")
    assert config["format"] == "per_timestep_quant_config_v4"
    assert config["sigma_map"] == load(copy / "activations/layer_statistics.json")["sigma_map"]
    widest = {}
    for key in map(str, range(STEPS)):
        layers, index = step(copy, key)
        assert sorted(config["per_timestep"][key]) == sorted(layers)
        for name, a in layers.items():
            entry = config["per_timestep"][key][name]
            low, high = a["avg_min"].astype(float), a["avg_max"].astype(float)
            assert entry["bits"] == 8
            assert math.isclose(entry["scale"], max(abs(low).max(), abs(high).max()), rel_tol=1e-6)
            assert math.isclose(entry["scale"], index[name]["tensor_absmax"], rel_tol=1e-6)
            shift = 0.0
            if name.endswith(".mlp.fc2"):
                shift = a["shift"].astype(float)
                assert np.array_equal(np.array(entry["shift"], np.float32), a["shift"])
                assert math.isclose(entry["shifted_scale"], index[name]["shifted_absmax"], rel_tol=1e-6)
            else:
                assert "shift" not in entry and "shifted_scale" not in entry
            reach = np.maximum(abs(low - shift), abs(high - shift))
            widest[name] = np.maximum(widest.get(name, 0), reach)
            full = np.maximum(abs(a["min"] - shift), abs(a["max"] - shift)).max()
            assert 0.2 * full < entry["clipping_range"] <= full * (1 + 1e-6)
    expected = {}
    for name, reach in widest.items():
        outliers = reach > 2.5 * np.median(reach)
        s = reach[~outliers].max()
        m = np.where(outliers, np.maximum(1, np.round(reach / s)), 1)
        if (m > 1).any():
            expected[name] = m.astype(int).tolist()
    assert {name: layer["multiplier_vector"] for name, layer in config["outlier_config"].items()} == expected
    temporal = load(copy / "activations/layer_temporal_analysis.json")["layers"]
    for name in widest:
        scales = [config["per_timestep"][str(k)][name]["scale"] for k in range(STEPS)]
        assert temporal[name]["scale"] == pytest.approx(
            {"mean": np.mean(scales), "min": min(scales), "max": max(scales)}
        )
        assert temporal[name]["widest_steps"][0] == str(int(np.argmax(scales)))
    for figure in ("scale_over_sigma", "scale_map", "shift_map"):
        assert (copy / f"activations/{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_percentile_scales_come_from_the_histogram(copy):
    assert analyze(copy, "--use-hist-p999").exit_code == 0
    config = load(copy / "activations/quant_config.json")
    _, index = step(copy, "1")
    for name, entry in config["per_timestep"]["1"].items():
        assert entry["scale"] == pytest.approx(index[name]["hist_p999"])
        assert entry["clipping_range"] == entry.get("shifted_scale", entry["scale"])
    assert config["outlier_config"] == {}


def test_statistics_of_an_older_version_are_read(copy):
    """0.2.0 noted no moments, no step in its arrays and no fingerprint: the full range stays where it cannot be judged."""
    statistics = load(copy / "activations/layer_statistics.json")
    del statistics["metadata"]["weights_fingerprint"]
    (copy / "activations/layer_statistics.json").write_text(json.dumps(statistics))
    for key in map(str, range(STEPS)):
        change(copy, key, lambda arrays: [arrays.pop(k) for k in list(arrays) if "__mean" in k or k == "step_index"])
    done = analyze(copy)
    assert done.exit_code == 0, done.output
    config = load(copy / "activations/quant_config.json")
    layers, _ = step(copy, "1")
    for name, entry in config["per_timestep"]["1"].items():
        if name.endswith(".mlp.fc2"):
            low, high, shift = (layers[name][field].astype(float) for field in ("min", "max", "shift"))
            full = np.maximum(abs(low - shift), abs(high - shift)).max()
            assert entry.get("unmigrated_clipping_range", entry["clipping_range"]) == pytest.approx(full, rel=1e-6)
    assert analyze_tiers(copy).exit_code == 0


def test_percentile_of_a_histogram_without_an_edge_at_zero():
    x = np.random.default_rng(0).normal(0.3, 1, 200_000)
    counts, edges = np.histogram(x, np.linspace(-5.013, 6.1, 257))
    found = histogram_percentile(*absolute_histogram(counts, edges), 0.999)
    assert abs(found - np.percentile(abs(x), 99.9)) < edges[1] - edges[0]


def test_statistics_of_another_tool(run, tmp_path, monkeypatch):
    """Compressed, float64, no histogram, bare index, folder relative to the working folder: the same W4A8 scales."""
    assert analyze(run, "--output", tmp_path / "own.json").exit_code == 0
    foreign = tmp_path / "foreign"
    (foreign / "steps").mkdir(parents=True)
    for key in map(str, range(STEPS)):
        layers, _ = step(run, key)
        arrays = {
            f"{name.replace('.', '_')}__{field}": a[field].astype(np.float64)
            for name, a in layers.items()
            for field in ("avg_min", "avg_max", "shift")
            if field in a
        }
        np.savez_compressed(foreign / f"steps/step_{key}.npz", **arrays)
        (foreign / f"steps/step_{key}_index.json").write_text(json.dumps({name: {"n_batches": 3} for name in layers}))
    statistics = load(run / "activations/layer_statistics.json")
    own = load(tmp_path / "own.json")
    for folder in ("foreign/steps", str(foreign / "steps"), "steps"):
        keep = {k: statistics[k] for k in ("format", "step_keys", "sigma_map")}
        (foreign / "layer_statistics.json").write_text(json.dumps(keep | {"timestep_dir": folder}))
        monkeypatch.chdir(tmp_path)
        done = invoke("analyze_activations", "--stats", foreign / "layer_statistics.json")
        assert done.exit_code == 0, done.output
        config = load(foreign / "quant_config.json")
        for key, layers in own["per_timestep"].items():
            for name, entry in layers.items():
                other = config["per_timestep"][key][name]
                assert all(other[field] == pytest.approx(entry[field]) for field in ("scale", "bits"))
                assert other.get("shift") == entry.get("shift")
    assert invoke("analyze_activations_multitier", "--stats", foreign / "layer_statistics.json").exit_code == 0
    for arguments in (
        ["analyze_activations", "--use-hist-p999"],
        ["analyze_activations_multitier", "--policy", "sqnr", "--min-sqnr", 20],
    ):
        done = invoke(*arguments, "--stats", foreign / "layer_statistics.json")
        assert (
            done.exit_code == 2 and "needs hist_counts and hist_edges" in done.stderr and done.stderr.count("\n") == 1
        )


def test_thresholds(copy):
    assert analyze(copy).exit_code == 0
    before = (copy / "activations/quant_config.json").read_bytes()
    done = analyze_tiers(copy, "--plot")
    assert done.exit_code == 0, done.output
    assert (copy / "activations/quant_config.json").read_bytes() == before
    config = load(copy / "activations/quant_config_multitier.json")
    assert config["format"] == "per_timestep_quant_config_v3"
    assert config["thresholds"]["shifted_a6_threshold"] == 8
    bits = []
    for layers in config["per_timestep"].values():
        for name, entry in layers.items():
            value, a4, a6 = (entry["shifted_scale"], 5, 8) if name.endswith("fc2") else (entry["scale"], 6, 10)
            assert entry["bits"] == (4 if value < a4 else 6 if value < a6 else 8), (name, entry)
            assert entry["reason"]
            bits.append(entry["bits"])
    assert {4, 6} <= set(bits)
    assert config["summary"]["average_bits"] == pytest.approx(np.mean(bits))
    assert f"{'all':20} {bits.count(4) / len(bits):6.0%}" in done.stdout
    assert (copy / "activations/bit_map.png").exists()
    done = analyze_tiers(copy, "--output", copy / "activations/quant_config.json")
    assert done.exit_code == 2 and "is no per_timestep_quant_config_v3 file; give another --output" in done.stderr


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("spread", ["normal", "laplace", "gelu"])
def test_expected_sqnr_equals_the_measured_one(bits, spread):
    random = np.random.default_rng(bits)
    x = {"normal": random.normal(size=400_000), "laplace": random.laplace(size=400_000)}.get(spread)
    if x is None:
        x = random.normal(0, 1.5, 400_000)
        x = x / (1 + np.exp(-1.702 * x))
    grid = histogram_grid(x.min(), x.max())
    edges = histogram_edges(*grid)
    counts = np.histogram(x, edges)[0]
    fraction = clipping_fraction(counts, edges, [bits])[0]
    for scale in (fraction * abs(x).max(), 0.5 * abs(x).max(), abs(x).max()):
        n = 2 ** (bits - 1) - 1
        rebuilt = np.clip(np.rint(x / scale * n), -n, n) * scale / n
        measured = 10 * np.log10((x**2).mean() / ((x - rebuilt) ** 2).mean())
        expected = expected_sqnrs(counts, edges, [scale], [bits])[0]
        assert expected == pytest.approx(measured, abs=0.6 if spread == "gelu" else 0.15)
    ranges = np.linspace(0.1, 1, 91) * abs(x).max()
    noises = expected_noise(counts, edges, ranges, [bits] * 91)
    chosen = expected_noise(counts, edges, [fraction * abs(x).max()], [bits])[0]
    if bits == 8:  # clipping must be worth it 64 times over: never worse than the full range
        assert chosen <= noises[-1] * 1.001
    else:
        assert chosen < noises.min() * (1.5 if spread == "gelu" else 1.05)


def test_centred_histogram_is_that_of_x_minus_shift():
    random = np.random.default_rng(0)
    shift = random.uniform(0.2, 1.5, 300)
    x = np.abs(random.normal(0, 0.5, (2000, 300)))  # independent of the shift, as the formula assumes
    edges = np.linspace(-0.5, 4, 257)
    counts, centred_edges = centred_histogram(np.histogram(x, edges)[0], edges, shift)
    exact = np.histogram(x - shift, centred_edges)[0]
    assert counts.sum() == pytest.approx(x.size)
    assert abs(np.cumsum(counts) - np.cumsum(exact)).max() < 0.01 * x.size


def entry(*sqnr):
    return Decision(1.0, None, None, [1.0] * 3, sqnr)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("average", [4, 4.7, 5.5, 5.6, 6, 7.1, 8])
def test_average_bits_against_every_assignment(seed, average):
    random = np.random.default_rng(seed)
    entries = [entry(*np.sort(random.uniform(5, 40, 3))) for _ in range(6)]
    noise = [[10 ** (-s / 10) for s in e.sqnr] for e in entries]
    best = min(
        sum(noise[i][t] for i, t in enumerate(tiers))
        for tiers in itertools.product(range(3), repeat=6)
        if sum(4 + 2 * t for t in tiers) <= average * 6 + 1e-9
    )
    gap = decide_by_average(entries, average)
    found = sum(noise[i][(e.bits - 4) // 2] for i, e in enumerate(entries))
    assert sum(e.bits for e in entries) <= average * 6 + 1e-9
    assert best <= found * (1 + 1e-12) and found - best <= gap * found + 1e-12
    if gap == 0:
        assert found == pytest.approx(best)


def test_sqnr_policies(copy):
    assert analyze_tiers(copy, "--policy", "sqnr", "--min-sqnr", 24).exit_code == 0
    config = load(copy / "activations/quant_config_multitier.json")
    entries = [entry for layers in config["per_timestep"].values() for entry in layers.values()]
    assert len({entry["bits"] for entry in entries}) > 1
    assert all(entry["expected_sqnr"] >= 24 or entry["bits"] == 8 for entry in entries)
    done = analyze_tiers(copy, "--policy", "sqnr", "--average-bits", 5)
    assert done.exit_code == 0 and "assignment: exact optimum" in done.stdout
    config = load(copy / "activations/quant_config_multitier.json")
    assert 4.99 < config["summary"]["average_bits"] <= 5


def no_model_is_imported(script, folder):
    code = f"import sys, runpy; sys.argv = ['{script}', '--calib-dir', {str(folder)!r}]\ntry: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit as end: assert not end.code\nassert not {{'mlx', 'diffusionkit', 'torch', 'matplotlib'}} & set(sys.modules)"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("script", ["analyze_activations.py", "analyze_activations_multitier.py"])
def test_needs_numpy_alone(copy, script):

    assert subprocess.run(no_model_is_imported(script, copy), cwd=ROOT, capture_output=True).returncode == 0


def change(folder, key, edit):
    path = folder / f"activations/timestep_stats/step_{key}.npz"
    arrays = dict(np.load(path))
    edit(arrays)
    np.savez(path, **arrays)


def with_nan(arrays):
    arrays["mm3_img_attn_q_proj__avg_max"] = np.full_like(arrays["mm3_img_attn_q_proj__avg_max"], np.nan)


def zero_width(arrays):
    arrays["mm1_txt_mlp_fc1__hist_edges"] = np.zeros(257)


BAD = {
    "missing step": (lambda f: (f / "activations/timestep_stats/step_2.npz").unlink(), "step_2.npz: missing; run collect_layer_activations.py"),
    "missing index": (lambda f: (f / "activations/timestep_stats/step_2_index.json").unlink(), "step_2_index.json: not found"),
    "damaged step": (lambda f: (f / "activations/timestep_stats/step_2.npz").write_bytes(b"PK"), "step_2.npz: truncated or damaged"),
    "absent layer": (lambda f: change(f, 1, lambda a: a.pop("mm0_img_mlp_fc1__avg_min")), "no mm0_img_mlp_fc1__avg_min and __avg_max for layer mm0.img.mlp.fc1"),
    "NaN": (lambda f: change(f, 1, with_nan), "step_1.npz: mm3.img.attn.q_proj: avg_max holds NaN or infinity"),
    "zero width": (lambda f: change(f, 3, zero_width), "step_3.npz: mm1.txt.mlp.fc1: hist_edges has bins of zero width"),
    "unknown format": (lambda f: (f / "activations/layer_statistics.json").write_text('{"format": "x"}'), "format 'x' is not 'per_timestep_npz_v2'"),
    "no statistics": (lambda f: (f / "activations/layer_statistics.json").unlink(), "not found; run collect_layer_activations.py first"),
    "no sigma": (lambda f: (f / "activations/layer_statistics.json").write_text('{"format": "per_timestep_npz_v2", "step_keys": ["0"], "sigma_map": {}}'), "'sigma_map' has no sigma for step 0"),
    "no folder": (lambda f: shutil.rmtree(f / "activations/timestep_stats"), "'timestep_dir' timestep_stats is neither beside it nor in the working folder"),
}  # fmt: skip


@pytest.mark.parametrize("script", ["analyze_activations", "analyze_activations_multitier"])
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_line_and_writes_nothing(copy, script, fault):
    damage, message = BAD[fault]
    damage(copy)
    before = folder_bytes(copy)
    done = invoke(script, "--calib-dir", copy)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert folder_bytes(copy) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy", "sqnr"], "--policy sqnr needs one of --min-sqnr and --average-bits"),
        (["--policy", "sqnr", "--min-sqnr", 20, "--average-bits", 6], "--policy sqnr needs one of"),
        (["--min-sqnr", 20], "--min-sqnr and --average-bits belong to --policy sqnr"),
        (["--a4-threshold", 11], "--a4-threshold is above --a6-threshold"),
        (["--shifted-a4-threshold", 9], "--shifted-a4-threshold is above --shifted-a6-threshold"),
        (["--policy", "sqnr", "--average-bits", 3], "--average-bits"),
    ],
)
def test_contradicting_options(run, arguments, message):
    done = analyze_tiers(run, *arguments)
    assert done.exit_code == 2 and message in done.stderr
