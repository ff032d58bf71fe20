"""Where the job under way stands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import remove_file
from calibration_store.layout import WeightPaths
from calibration_store.rounding_checkpoint import Layers, read_checkpoint, write_checkpoint
from calibration_store.weights import layer_fault, training_run_of_0_8_0
from w4a8.rounding.settings import Settings
from w4a8.rounding.training import Training
from w4a8.rounding.units import Job


class JobCheckpoint:
    """Where the job under way stands, on the disk; a damaged one, or one of another run, is said and left aside."""

    def __init__(self, paths: WeightPaths, job: Job, plan: Mapping[str, Any], own: bool = False):
        """own: in a file of the job's own, beside those of jobs that other ranks are at."""
        self.job, self._places = job, (paths.checkpoint, paths.checkpoint_of(job.name))
        self._path = self._places[own]
        self.plan, self._older_plan = plan["training_run"], training_run_of_0_8_0(plan)

    def save(self, index: int, training: Training, done: Layers, losses: list[dict]) -> None:
        position = {"plan": self.plan, "job": self.job.name, "stage": index, "iteration": training.iteration}
        arrays = {name: np.array(array) for name, array in training.arrays().items()}
        write_checkpoint(self._path, position | {"losses": losses}, arrays, done)

    def load(self, settings: Settings) -> tuple[dict[str, Any], dict[str, np.ndarray], Layers] | None:
        """(position, arrays of the training, layers of finished parts) of this job's last checkpoint, or None."""
        found = [one for one in (self._load(path, settings) for path in self._places) if one is not None]
        return max(found, key=lambda one: (one[0]["stage"], one[0]["iteration"]), default=None)

    def _load(self, path: Path, settings: Settings) -> tuple[dict[str, Any], dict[str, np.ndarray], Layers] | None:
        try:
            found = read_checkpoint(path)
            if found is None:
                return None
            position, arrays, done = found
            if position["plan"] not in (self.plan, self._older_plan) or position["job"] != self.job.name:
                return None
            if not position["stage"] < len(self.job.parts) or len(position["losses"]) != position["stage"]:
                raise ValueError(f"stage {position['stage']}")
            expected = {name for part in self.job.parts[: position["stage"]] for name in part.layers}
            if done.keys() != expected or any(layer_fault(f, settings.bits(name)) for name, f in done.items()):
                raise ValueError("arrays of another unit")
        except (StoreError, ValueError) as error:
            self.discard(error, path)
            return None
        return position, arrays, done

    def remove(self) -> None:
        """The job is finished."""
        for path in {self._path, self._places[1]}:
            remove_file(path)

    def discard(self, why: Exception, path: Path | None = None) -> None:
        """Say that a checkpoint cannot be used; the next one takes its place."""
        click.echo(
            f"{(path or self._path).name} cannot be used ({' '.join(str(why).split())[:160]}): {self.job.name} begins anew.",
            err=True,
        )
