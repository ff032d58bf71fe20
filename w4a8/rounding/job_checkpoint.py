"""The checkpoint of the job under way: checkpoint.npz of stage 3W."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import remove_file
from calibration_store.layout import WeightPaths
from calibration_store.rounding_checkpoint import Position, read_checkpoint, write_checkpoint
from calibration_store.weights import training_run_of_0_8_0
from w4a8.rounding.training import Training
from w4a8.rounding.units import UnitSpec


class JobCheckpoint:
    """The last checkpoint of one job. A damaged one, or one of another run, is reported and left aside."""

    def __init__(self, paths: WeightPaths, spec: UnitSpec, plan: Mapping[str, Any], own: bool = False):
        """Note where the checkpoint lies.

        own: in a file that bears the job's name, beside the checkpoints of jobs that other processes are at.
        """
        self.name, self._paths = spec.name, (paths.checkpoint, paths.checkpoint_of(spec.name))
        self._path = self._paths[own]
        self.plan, self._older_plan = plan["training_run"], training_run_of_0_8_0(plan)

    def save(self, training: Training) -> None:
        """Write the iteration and the arrays of the training."""
        position = Position(plan=self.plan, job=self.name, iteration=training.iteration)
        write_checkpoint(self._path, position, {name: np.array(array) for name, array in training.arrays().items()})

    def load(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Return (iteration, arrays of the training) of this job's last checkpoint, or None where it has none."""
        found = [one for one in map(self._load, self._paths) if one is not None]
        return max(found, key=lambda one: one[0], default=None)

    def _load(self, path: Path) -> tuple[int, dict[str, np.ndarray]] | None:
        try:
            found = read_checkpoint(path)
        except (StoreError, ValueError) as error:
            self.discard(error, path)
            return None
        if found is None:
            return None
        position, arrays = found
        same = position["plan"] in (self.plan, self._older_plan) and position["job"] == self.name
        return (position["iteration"], arrays) if same else None

    def remove(self) -> None:
        """Remove the files of a finished job."""
        for path in {self._path, self._paths[1]}:
            remove_file(path)

    def discard(self, why: Exception, path: Path | None = None) -> None:
        """Print that a checkpoint cannot be used; the next one takes its place."""
        fault = " ".join(str(why).split())[:160]
        print(f"{(path or self._path).name} cannot be used ({fault}): {self.name} begins anew.", file=sys.stderr)
