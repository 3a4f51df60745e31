"""Who gets how much: one cache budget for the whole model, spent over groups of numbers.

A group is what one rank decides: in a joint latent a layer, in a split latent the keys of a layer, or its values. A
budget is a number of cached numbers per frame, all groups together: layers × latent_dim. It is never exceeded.

    uniform      every layer the same; of a split latent, keys and values half each
    energy       the largest singular values of all groups first, each group's relative to its own total: what the
                 weights (and, weighed, the speech) say, without running the model
    sensitivity  every group is cut alone, at a few ranks, and the change of the CTC output measured (KL divergence per
                 frame); taking the changes to add up, the cheapest split of the budget is found exactly

Neither of the last two knows of layers or layouts.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

RANKS = ("uniform", "energy", "sensitivity")
PROBED_SHARES = (
    1 / 64,
    1 / 32,
    1 / 16,
    1 / 8,
    1 / 4,
    1 / 2,
    3 / 4,
)  # of a group's width, where sensitivity is measured


def energy(singular_values: Sequence[np.ndarray], budget: int, multiple: int = 1) -> list[int]:
    """Greedy on squared singular values: `multiple` more numbers at a time to the group that they explain most of.

    `singular_values`: of every group, descending, arrays or tensors [width]. Optimal, since each group's fall: no other
    split of the `budget` explains more, summed over groups. A rank is a multiple of `multiple`, at most the group's
    width; ValueError where the budget has no room for that.
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

    `costs`: for every group, {rank: measured cost}; between and below measured ranks the logarithm of the cost is taken
    to be linear in that of the rank. A group as wide as its `widths` costs nothing. Exact for these curves. Ranks are
    bounded as `energy`'s are.
    """
    start = smallest_rank(budget, widths, multiple)
    cheapest = np.zeros(budget // multiple + 1)  # with the groups so far, at most so many units of `multiple`
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

    `widths`: of every group. ValueError where one is narrower than that, or the budget has no room for it in each.
    """
    if multiple > min(widths):
        raise ValueError(f"ranks cannot be multiples of {multiple} up to the width {min(widths)}: lower the multiple")
    if multiple * len(widths) > budget:
        raise ValueError(
            f"a budget of {budget} numbers per frame, for {len(widths)} ranks, has no room for the {multiple} that "
            "each needs: raise latent_dim, or lower the multiple that ranks are rounded to"
        )
    return multiple


def _interpolated(cost: dict[int, float], width: int) -> Callable[[int], float]:
    """Rank → cost. Below the measured ranks the line through the first two goes on: else the last numbers of a group
    would be free to take away."""
    ranks = sorted(rank for rank in cost if rank < width)
    falling = np.maximum.accumulate([cost[rank] for rank in reversed(ranks)])[::-1]  # never cheaper with less
    nothing = 1e-12  # for the logarithm
    x, y = np.log([*ranks, width]), np.log(np.maximum([*falling, 0.0], nothing))

    def at(rank: int) -> float:
        if rank >= width:
            return 0.0
        slope, below = (y[1] - y[0]) / (x[1] - x[0]), min(0.0, np.log(rank) - x[0])
        return float(np.exp(np.interp(np.log(rank), x, y) + slope * below))

    return at
