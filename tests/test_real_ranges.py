"""A8 from the config on activations with real SD3-Medium's extremes, all 285 layers, against float64."""

import json
import re

import numpy as np
import pytest
from conftest import invoke
from synthetic_activations import KINDS, ordinary_rows, real_layers, synthetic_inputs

from calibration_store.files import write_json
from calibration_store.histograms import histogram_edges
from calibration_store.layout import ActivationPaths
from calibration_store.statistics import write_step
from w4a8.analysis.clipping_ranges import clipping_fraction, unmigrated_clipping_ranges
from w4a8.statistics.kernels import cpu_statistics
from w4a8.statistics.merge import merge_partials
from w4a8.statistics.recorders import PassStatistics, partial_arrays

pytestmark = pytest.mark.slow

TOKENS, IMAGES, OUT = 64, 3, 32


def distinct_input(name):
    return re.sub("[kv]_proj", "q_proj", name)


def collected(layers, kind, calib_dir):
    """Statistics files as stage 2A writes them, from made-up inputs."""
    inputs = list(dict.fromkeys(map(distinct_input, layers)))
    of_image = [[] for _ in range(IMAGES)]
    for name in inputs:
        for image, x in enumerate(synthetic_inputs(layers[name], kind, TOKENS, IMAGES, 0)):
            of_image[image].append(cpu_statistics(x))
    channels = [layers[name]["inputs"] for name in inputs]
    index = {name: inputs.index(distinct_input(name)) for name in layers}
    partials = [
        partial_arrays(PassStatistics(index, channels, results), image, 0, "float32")
        for image, results in enumerate(of_image)
    ]
    paths = ActivationPaths(calib_dir)
    write_step(paths, 0, merge_partials(partials))
    write_json(paths.statistics, {"format": "per_timestep_npz_v2", "step_keys": ["0"], "sigma_map": {"0": 1.0}})
    return paths


def rebuilt(x, clipping_range, shift, multipliers=1.0):
    """x̂ as the README rebuilds it, float64."""
    step = clipping_range / 127
    return multipliers * step * np.clip(np.rint((x - shift) / multipliers / step), -127, 127) + shift


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_is_worse_than_its_own_full_range(tmp_path, kind):
    """On all tokens and on ordinary ones apart, with migration and without: at most 0.5 dB of output SQNR below."""
    layers = real_layers()
    assert len(layers) == 285
    paths = collected(layers, kind, tmp_path)
    done = invoke("analyze_activations", "--calib-dir", tmp_path)
    assert done.exit_code == 0, done.output
    config = json.loads(paths.quant_config.read_bytes())
    entries, migration = config["per_timestep"]["0"], config["outlier_config"]
    assert sorted(entries) == sorted(layers) and len(migration) > 20
    differences, before = {}, (None, None)
    for name in [
        name for name in layers if "mlp" in name or name in migration or name.startswith(("mm0.", "mm12.", "mm23."))
    ]:
        layer = layers[name]
        if before[0] != distinct_input(name):
            before = distinct_input(name), errors_of(layer, kind, entries[name], migration.get(name))
        _x, ways, ordinary = before[1]
        weight = np.random.default_rng(len(differences)).normal(size=(layer["inputs"], OUT))
        for rows in (slice(None), ordinary):
            noise = {way: np.square(error[rows] @ weight).sum() for way, error in ways.items()}
            for way in ("config", "unmigrated"):
                differences[name, way, rows is ordinary] = 10 * np.log10(noise["full"] / noise[way])
    worst = min(differences, key=differences.get)
    assert differences[worst] >= -0.5, (worst, differences[worst])


def errors_of(layer, kind, entry, migration):
    """x, the error of each way to quantize it, and which of its rows are ordinary."""
    x = np.concatenate(synthetic_inputs(layer, kind, TOKENS, IMAGES, 0)).astype(np.float64)
    shift = np.array(entry.get("shift", 0.0))
    multipliers = np.array(migration["multiplier_vector"]) if migration else 1.0
    unmigrated = entry.get("unmigrated_clipping_range", entry["clipping_range"])
    ways = {
        "full": rebuilt(x, np.abs(x - shift).max(), shift) - x,
        "config": rebuilt(x, entry["clipping_range"], shift, multipliers) - x,
        "unmigrated": rebuilt(x, unmigrated, shift) - x,
    }
    return x, ways, np.concatenate(ordinary_rows(layer, kind, TOKENS, IMAGES, 0))


def test_a_range_from_a_few_tokens_does_not_cut_ordinary_ones_off():
    """Check 308 tokens × 6,144 channels, maxima as in block 22's text fc2, one rare row: −9.6 dB once."""
    layer = real_layers()["mm22.txt.mlp.fc2"]
    x = np.concatenate(synthetic_inputs(layer, "rare", 308, 1, 0))
    limits, histograms, moments = cpu_statistics(x)
    shift = (limits[0] + limits[1]) / 2
    reach = np.maximum(abs(limits[0] - shift), abs(limits[1] - shift))
    power = moments[1] - 2 * shift * moments[0] + shift**2
    histogram = histograms[0, :256].astype(np.int64), histogram_edges(*histograms[0, 256:258].tolist())
    chosen = unmigrated_clipping_ranges(histogram, shift, reach, power, [8])[0]
    ordinary = np.concatenate(ordinary_rows(layer, "rare", 308, 1, 0))
    exact = x.astype(np.float64)
    noise = {r: np.square(rebuilt(exact, r, shift) - exact)[ordinary].mean() for r in (float(reach.max()), chosen)}
    assert noise[chosen] <= noise[float(reach.max())] * 10**0.05
    of_x = float(reach.max()) * clipping_fraction(*histogram, [8])[0]  # what was done before: judged on x
    assert np.square(rebuilt(exact, min(of_x, 0.4 * reach.max()), shift) - exact)[ordinary].mean() > 10 * noise[chosen]
