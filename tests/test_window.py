"""More samples than memory: a window of them moves on."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import folder_bytes, invoke
from finished_run import finished_run
from mlx.utils import tree_flatten

import w4a8.rounding.training_samples as samples_module
import w4a8.rounding.units as units_module
from calibration_store.block_cache import read_cache_metadata
from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.parts import TRANSFORMER
from w4a8.model.runs import load_run_pipeline
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import Samples
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit

pytestmark = pytest.mark.slow


@pytest.fixture
def cached(tmp_path_factory, tmp_path):
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")


def test_many_samples_are_drawn_from_a_window(cached, monkeypatch):
    """All pass by; batches are of those that are kept, and the same as from the files."""
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 0)
    mmdit = load_run_pipeline(read_manifest(cached), {TRANSFORMER: "float32"}).mmdit
    spec = BlockUnit.specs(model_layers(mmdit), list(model_blocks(mmdit)))[1]
    samples = Samples.of_stretch(cached, read_cache_metadata(cached), spec.blocks)
    settings = Settings(
        iters=20, batch_size=2, activation_bits=0, lr_activation_scale=1e-3, seed=3, activation_rule="static"
    )
    unit = BlockUnit.build(mmdit, spec, samples, settings)
    unit.settings = replace(settings, window=2)
    unit.samples.training = list(range(4))
    training, seen = UnitTraining(unit), set()
    for iteration in range(training.iters):
        near = training.near(iteration).tolist()
        assert len(near) == len(set(near)) == 2 and set(training.drawn(iteration).tolist()) <= set(near)
        seen |= set(near)
    assert seen == set(range(4))
    from_files = unit.samples.batch(near[:2])
    unit.samples.keep(near)
    kept = unit.samples.batch(near[:2])
    monkeypatch.setattr(unit.samples, "_read", None)  # what is kept is not read again
    kept = unit.samples.batch(near[:2])
    for (_, one), (_, other) in zip(tree_flatten(kept), tree_flatten(from_files), strict=True):
        assert mx.array_equal(one, other)


def test_a_sample_is_read_once_an_iteration(cached, monkeypatch):
    """Micro-batches one after the other, as on a GPU: the later ones find their samples kept, as the next batch does."""
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 0)
    monkeypatch.setattr(units_module, "streams_for", lambda count: nullcontext([mx.default_stream(mx.cpu)]))
    mmdit = load_run_pipeline(read_manifest(cached), {TRANSFORMER: "float32"}).mmdit
    spec = BlockUnit.specs(model_layers(mmdit), list(model_blocks(mmdit)))[1]
    samples = Samples.of_stretch(cached, read_cache_metadata(cached), spec.blocks)
    unit = BlockUnit.build(mmdit, spec, samples, Settings(iters=10, batch_size=2, micro_batch=1, activation_bits=0))
    read, unwatched = list[int](), samples._read
    monkeypatch.setattr(
        samples, "_read", lambda sample_id: read.append(samples.sample_ids.index(sample_id)) or unwatched(sample_id)
    )
    state = unit.nearest_state()
    samples.keep([])  # those that the norms were measured on
    unit.gradients(state, [0, 1], 0, [2, 3])
    unit.gradients(state, [2, 3], 1, [0, 2])
    samples.batch([0, 2])
    assert sorted(read) == [0, 0, 1, 2, 3]  # 0 twice: it had been let go


def test_a_window_is_kept_by_the_run(cached, monkeypatch):
    arguments = ("optimize_adaround", "--calib-dir", cached, "--iters", 10, "--unit", "block", "--blocks", "mm0")
    arguments += ("--batch-size", 1)
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 0)
    done = invoke(*arguments, "--force")
    assert done.exit_code == 0, done.output
    metadata, before = WeightPaths(cached).metadata, folder_bytes(cached)
    assert json.loads(metadata.read_bytes())["window"] == 4
    monkeypatch.undo()  # another machine, where all would fit
    metadata.with_name("mm0.npz").unlink()
    assert invoke(*arguments, "--resume").exit_code == 0
    assert folder_bytes(cached) == before
