"""Who gets how much: one cache budget for the whole model, spent over its layers.

A budget is a number of cached numbers per frame, all layers together: layers × latent_dim. It is never exceeded.

    uniform      every layer the same
    energy       the largest singular values of all layers first, each layer's relative to its own total: what the
                 weights (and, weighed, the speech) say, without running the model
    sensitivity  every layer is cut alone, at a few widths, and the change of the CTC output measured (KL divergence per
                 frame); taking the changes to add up, the cheapest split of the budget is found exactly
"""

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from asrlib.conversion.factorize import Decomposition

RANKS = ("uniform", "energy", "sensitivity")
PROBED_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the width, where sensitivity is measured


def energy(decompositions: Sequence[Decomposition], latent_dim: int, multiple: int = 1, least: int = 1) -> list[int]:
    """Greedy on squared singular values: `multiple` more numbers at a time to the layer that they explain most of.

    Optimal, since every layer's values fall (a split latent's in pairs). A layer gets at least `least`, at most what
    is exact.
    """
    gains = []
    for decomposition in decompositions:
        squares = [directions.values.square().numpy() for directions in decomposition.directions]
        # Of a split latent's numbers every other one is the values', the first one included: see split_ranks.
        explained = np.stack([square / square.sum() for square in reversed(squares)], axis=1).ravel()
        gains.append(np.add.reduceat(explained, np.arange(0, len(explained), multiple)))
    start = smallest_rank(latent_dim, multiple, least)
    ranks, budget = [start] * len(gains), latent_dim * len(gains)
    waiting = [(-gain[start // multiple], layer) for layer, gain in enumerate(gains) if start // multiple < len(gain)]
    heapq.heapify(waiting)
    while waiting and sum(ranks) + multiple <= budget:
        _, layer = heapq.heappop(waiting)
        ranks[layer] += multiple
        if ranks[layer] // multiple < len(gains[layer]):
            heapq.heappush(waiting, (-gains[layer][ranks[layer] // multiple], layer))
    return ranks


def sensitivity(
    costs: Sequence[dict[int, float]], latent_dim: int, width: int, multiple: int = 1, least: int = 1
) -> list[int]:
    """The split of the budget with the lowest sum of costs, by dynamic programming.

    `costs`: for every layer, {rank: measured cost}; between measured ranks the logarithm of the cost is taken to be
    linear in that of the rank. A layer as wide as `width` costs nothing. Exact for these curves.
    """
    choices = range(smallest_rank(latent_dim, multiple, least), width + 1, multiple)
    curves = [[_interpolated(cost, width)(rank) for rank in choices] for cost in costs]
    budget = latent_dim * len(costs) // multiple  # in units of `multiple`
    units = [rank // multiple for rank in choices]
    cheapest = np.zeros(budget + 1)  # with the layers so far, at most so many units
    taken = []
    for curve in curves:
        totals = np.full((len(units), budget + 1), np.inf)
        for choice, (unit, cost) in enumerate(zip(units, curve, strict=True)):
            if unit <= budget:
                totals[choice, unit:] = cheapest[: budget + 1 - unit] + cost
        taken.append(totals.argmin(0))
        cheapest = totals.min(0)
    ranks, left = [], budget
    for choice in reversed(taken):
        ranks.append(choices[choice[left]])
        left -= units[choice[left]]
    return ranks[::-1]


def smallest_rank(latent_dim: int, multiple: int, least: int) -> int:
    """The fewest numbers a layer can get, a multiple of `multiple`; ValueError where the budget has not even that."""
    start = max(1, math.ceil(least / multiple)) * multiple
    if start > latent_dim:
        raise ValueError(
            f"a budget of {latent_dim} numbers a layer has no room for the {start} that each needs: raise latent_dim, "
            "or lower the multiple that ranks are rounded to"
        )
    return start


def _interpolated(cost: dict[int, float], width: int) -> Callable[[int], float]:
    ranks = sorted(rank for rank in cost if rank < width)
    falling = np.maximum.accumulate([cost[rank] for rank in reversed(ranks)])[::-1]  # never cheaper with less
    nothing = 1e-12  # for the logarithm
    x, y = np.log([*ranks, width]), np.log(np.maximum([*falling, 0.0], nothing))
    return lambda rank: float(np.exp(np.interp(np.log(rank), x, y))) if rank < width else 0.0
