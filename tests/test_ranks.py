"""The budget is never exceeded, and spent as well as can be."""

import itertools

import numpy as np
import pytest
import tiny

from asrlib import collect_statistics, convert, kv_cache_bytes
from asrlib.conversion.convert import decompose, measure_sensitivity
from asrlib.conversion.ranks import energy, sensitivity
from asrlib.models.families import new_processor

WIDTH = 8


@pytest.fixture(scope="module")
def model():
    return tiny.conformer()


@pytest.fixture(scope="module")
def statistics(model):
    return collect_statistics(model, new_processor(), tiny.corpus(12))


def falling_costs(layers: int, seed: int) -> list[dict[int, float]]:
    random = np.random.default_rng(seed)
    return [
        dict(zip(range(1, WIDTH), np.sort(random.gamma(1.0, 1.0, WIDTH - 1))[::-1], strict=True)) for _ in range(layers)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("latent_dim", [1, 3, 6])
def test_sensitivity_finds_the_cheapest_split_of_all(seed, latent_dim, layers=3):
    costs = falling_costs(layers, seed)

    def total(ranks):
        return sum(cost.get(rank, 0.0) for cost, rank in zip(costs, ranks, strict=True))

    splits = [
        ranks for ranks in itertools.product(range(1, WIDTH + 1), repeat=layers) if sum(ranks) <= layers * latent_dim
    ]
    ours = sensitivity(costs, latent_dim, WIDTH)
    assert sum(ours) <= layers * latent_dim
    assert total(ours) == pytest.approx(min(map(total, splits)))


def test_a_layer_that_does_not_mind_gives_to_one_that_does():
    ranks = sensitivity([{1: 1e-6, 4: 1e-7}, {1: 10.0, 4: 1.0}], 4, WIDTH)
    assert ranks[0] <= 2 and sum(ranks) == 8


@pytest.mark.parametrize("multiple", [2, 4])
def test_ranks_are_multiples_within_the_budget(model, statistics, multiple):
    for ranks in ("uniform", "energy", "sensitivity"):
        latent = convert(model, 7, ranks=ranks, rank_multiple=multiple, statistics=statistics)
        assert all(width % multiple == 0 and width > 0 for width in latent.config.latent_dim)
        assert sum(latent.config.latent_dim) <= 7 * tiny.LAYERS


@pytest.mark.parametrize("ranks", ["uniform", "energy", "sensitivity"])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_a_cut_is_at_least_as_deep_as_asked(model, statistics, ranks, layout):
    latent = convert(model, cache_cut=0.8, ranks=ranks, layout=layout, statistics=statistics)
    assert kv_cache_bytes(latent.config, 10) <= 0.2 * kv_cache_bytes(model.config, 10)


def test_energy_takes_the_largest_values_first(model):
    decompositions = [candidates[0] for candidates in decompose(model)]
    ranks = energy(decompositions, 5)
    shares = [d.directions[0].values.square() / d.directions[0].values.square().sum() for d in decompositions]
    taken = min(share[rank - 1].item() for share, rank in zip(shares, ranks, strict=True) if rank > 1)
    left = max(share[rank].item() for share, rank in zip(shares, ranks, strict=True) if rank < tiny.WIDTH)
    assert sum(ranks) == 10 and taken >= left


def test_measured_costs_fall_to_nothing_at_full_width(model, statistics):
    decomposition = decompose(model, "joint", "two_sided", statistics)
    for cost in measure_sensitivity(model, "joint", statistics, decomposition):
        widths = sorted(cost)
        assert cost[widths[0]] > cost[widths[-1]] > 0


def test_impossible_budgets_are_refused(model, statistics):
    with pytest.raises(ValueError, match="no room for the 8 that each needs"):
        convert(model, 7, ranks="energy", rank_multiple=8)
    with pytest.raises(ValueError, match="has nothing to spend"):
        convert(model, [3, 4], ranks="energy")
    with pytest.raises(ValueError, match="needs statistics"):
        convert(model, 4, ranks="sensitivity")
    with pytest.raises(ValueError, match="choose one of uniform"):
        convert(model, 4, ranks="best")
