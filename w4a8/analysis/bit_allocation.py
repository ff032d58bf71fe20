"""Assign bits to items at the least cost under a budget."""

import math
from collections.abc import Mapping, Sequence


def allocate(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[int], average_bits: float
) -> tuple[list[int], float]:
    """Return (bits of each item, proven gap): the least summed cost at `average_bits` or fewer, weighted by the sizes.

    costs: {width: cost} of each item, for every width that the item may have; sizes: of the items. Each item starts at
    its fewest bits and goes up along the lower convex hull of its costs; steps are taken in the order of cost saved per
    bit while the budget lasts. The result is the optimum of the linear relaxation, cut off at the budget. The loss by
    the cut bounds the distance from the optimum: the gap is this loss relative to the assignment's cost, and 0 means
    exact.
    """
    chosen = [min(item) for item in costs]
    steps = []  # (cost saved per bit of one unit of size, item, width before, width after)
    for index, item in enumerate(costs):
        here = chosen[index]
        while better := [width for width in item if width > here and item[width] < item[here]]:
            after = min(better, key=lambda width: ((item[width] - item[here]) / (width - here), -width))
            steps.append(((item[here] - item[after]) / ((after - here) * sizes[index]), index, here, after))
            here = after
    left = average_bits * sum(sizes) - sum(map(int.__mul__, chosen, sizes))
    taken = math.gcd(*((after - here) * sizes[index] for _, index, here, after in steps))
    left = math.floor(left / taken + 1e-9) * taken if taken else 0
    lost = 0.0
    for rate, index, here, after in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        need = (after - here) * sizes[index]
        if left == 0:
            break
        if chosen[index] != here:
            continue
        if need > left:
            lost = max(lost, rate * left)
            continue
        chosen[index] = after
        left -= need
    cost = sum(item[width] for item, width in zip(costs, chosen, strict=True))
    return chosen, lost / cost if cost else 0.0
