"""The dial `--effort`: how many prompts, cached steps and iterations a run takes where no option says so.

The module imports neither MLX nor NumPy, since `--help` needs it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from calibration_store.choices import EFFORTS, EffortName
from w4a8.options import RoundingOptions

SMALL_MODEL = 100_000_000  # weights of the blocks up to which a model is small, and trained as a whole
LATE = (
    0.9,
    0.7,
    0.8,
    0.5,
    0.85,
    0.6,
    0.4,
    0.3,
)  # places in a schedule, the most important first: late steps make the image


class Effort(NamedTuple):
    """The work of a run: images of stage 1, cached steps of each, and stage 3W's iterations, phase by phase."""

    num_images: int
    steps: int
    iters: int
    end_to_end: int
    unrolled: int
    batch_size: int = 16


OF_SMALL_MODELS = {
    "fast": Effort(128, 5, 100, 0, 0),
    "good": Effort(240, 5, 260, 130, 0),
    "best": Effort(3200, 5, 700, 350, 150, 64),
}
OF_LARGE_MODELS = {
    "fast": Effort(128, 4, 100, 50, 0, 8),
    "good": Effort(512, 4, 450, 225, 0, 8),
    "best": Effort(512, 8, 900, 450, 0, 8),
}
assert tuple(OF_SMALL_MODELS) == tuple(OF_LARGE_MODELS) == EFFORTS


def effort_of(name: EffortName, num_weights: int) -> Effort:
    """Return what an effort takes for a model of so many weights."""
    return (OF_SMALL_MODELS if num_weights <= SMALL_MODEL else OF_LARGE_MODELS)[name]


def rounding_effort(options: RoundingOptions, num_weights: int, before: Mapping[str, Any] | None) -> Effort:
    """Return the numbers of stage 3W: those that are given, and in place of others the effort's.

    Under --resume they are those of the plan `before`, unless `--effort` is given, too. Where `--iters` is given, the others
    follow from it: the last phase takes half of it, finished latents none.
    """
    effort = effort_of(options.effort, num_weights)
    if options.iters is not None:
        effort = Effort(0, 0, options.iters, options.iters // 2, 0)
    elif before is not None and not options.is_given("effort"):
        last = before.get("end_to_end", 0), before.get("unrolled", 0)
        effort = Effort(0, 0, before["iters"], *last, before["batch_size"])
    return effort._replace(
        batch_size=options.batch_size or effort.batch_size,
        end_to_end=effort.end_to_end if options.end_to_end is None else options.end_to_end,
        unrolled=effort.unrolled if options.unrolled is None else options.unrolled,
    )


def late_steps(saved: list[int], num_steps: int, count: int) -> list[int]:
    """Return `count` of the saved steps, ascending: those nearest to the places of LATE, and the latest ones beside them.

    num_steps: of the whole schedule. All saved steps where there are fewer.
    """
    found: list[int] = []
    for place in LATE[:count]:
        left = [step for step in saved if step not in found]
        if left:
            found.append(min(left, key=lambda step, place=place: (abs(step - place * num_steps), -step)))  # type: ignore[misc]
    return sorted(found)
