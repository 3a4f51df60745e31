"""One cache budget for the whole model, spent over groups of numbers.

A group has one rank: a joint latent, of one layer or of several that share it, or the keys or the values of a layer of
a split latent. The budget counts the cached numbers per frame of all groups together. It is never exceeded.

    uniform      the same rank for every group
    energy       the largest singular values of all groups first, each group's relative to its own total. This reads
                 the weights (and the speech, if the method weighs them by it), and does not run the model
    sensitivity  every group is cut alone, at a few ranks, and the change of the output measured (KL divergence). If
                 changes add up, dynamic programming finds the cheapest split of the budget exactly

The last two work on groups alone, whatever the layout.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

RANKS = ("uniform", "energy", "sensitivity")
PROBED_SHARES = (1 / 64, 1 / 16, 1 / 8, 1 / 2, 3 / 4)  # of a group's width: ranks that are measured


def energy(singular_values: Sequence[np.ndarray], budget: int, multiple: int = 1) -> list[int]:
    """Greedy on squared singular values: the group that gains most gets the next `multiple` numbers.

    `singular_values`: arrays or tensors [width], descending, for every group. Because they descend, no other split of
    the `budget` explains more, summed over groups. A rank is a multiple of `multiple` and at most the group's width.
    Raises ValueError where the budget is too small for that.
    """
    widths = [len(values) for values in singular_values]
    start = smallest_rank(budget, widths, multiple)
    gains = []
    for values, width in zip(singular_values, widths, strict=True):
        squares = np.square(np.asarray(values, dtype=np.float64))
        explained = squares / max(squares.sum(), np.finfo(np.float64).tiny)  # a weight of zeros explains nothing
        gains.append(explained[: width // multiple * multiple].reshape(-1, multiple).sum(1))
    ranks = [start] * len(gains)
    waiting = [(-gain[start // multiple], group) for group, gain in enumerate(gains) if start // multiple < len(gain)]
    heapq.heapify(waiting)
    while waiting and sum(ranks) + multiple <= budget:
        _, group = heapq.heappop(waiting)
        ranks[group] += multiple
        if ranks[group] // multiple < len(gains[group]):
            heapq.heappush(waiting, (-gains[group][ranks[group] // multiple], group))
    return ranks


def sensitivity(costs: Sequence[dict[int, float]], budget: int, widths: Sequence[int], multiple: int = 1) -> list[int]:
    """The split of the `budget` with the lowest sum of costs, by dynamic programming over groups.

    `costs`: for every group, {rank: measured cost}. Between and below measured ranks, log cost is linear in log rank. A
    group at its full width costs nothing. The split is exact for these curves. Ranks have the limits of `energy`.
    """
    start = smallest_rank(budget, widths, multiple)
    cheapest = np.zeros(budget // multiple + 1)  # cost of the groups so far, by the units of `multiple` they may use
    taken = []
    for cost, width in zip(costs, widths, strict=True):
        cost_at = _interpolated(cost, width)
        total, rank_taken = np.full(len(cheapest), np.inf), np.zeros(len(cheapest), dtype=int)
        for rank in range(start, min(width, budget) + 1, multiple):
            unit = rank // multiple
            offered = cheapest[: len(cheapest) - unit] + cost_at(rank)
            better = offered < total[unit:]
            total[unit:][better], rank_taken[unit:][better] = offered[better], rank
        taken.append(rank_taken)
        cheapest = total
    ranks, left = [], len(cheapest) - 1
    for rank_taken in reversed(taken):
        ranks.append(int(rank_taken[left]))
        left -= ranks[-1] // multiple
    return ranks[::-1]


def smallest_rank(budget: int, widths: Sequence[int], multiple: int) -> int:
    """The lowest rank that a group can get: `multiple`.

    `widths`: of every group. Raises ValueError where one is narrower than `multiple`, or the budget too small for all.
    """
    if multiple > min(widths):
        raise ValueError(f"ranks cannot be multiples of {multiple} up to the width {min(widths)}: lower the multiple")
    if multiple * len(widths) > budget:
        raise ValueError(
            f"a budget of {budget} numbers per frame, for {len(widths)} ranks, has no room for the {multiple} that "
            "each needs: raise latent_dim, or lower rank_multiple"
        )
    return multiple


def _interpolated(cost: dict[int, float], width: int) -> Callable[[int], float]:
    """Rank → cost. Below the measured ranks the line through the first two continues: otherwise removing a group's last
    numbers would cost nothing."""
    ranks = sorted(rank for rank in cost if rank < width)
    falling = np.maximum.accumulate([cost[rank] for rank in reversed(ranks)])[::-1]  # never cheaper with less
    tiny = 1e-12  # for the logarithm
    x, y = np.log([*ranks, width]), np.log(np.maximum([*falling, 0.0], tiny))

    def at(rank: int) -> float:
        if rank >= width:
            return 0.0
        slope, below = (y[1] - y[0]) / (x[1] - x[0]), min(0.0, np.log(rank) - x[0])
        return float(np.exp(np.interp(np.log(rank), x, y) + slope * below))

    return at
