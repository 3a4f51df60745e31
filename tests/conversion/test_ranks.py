"""The budget is never exceeded, and spent as well as can be."""

import itertools

import family_models
import numpy as np
import pytest
import tiny
import torch
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from asrlib import collect_statistics, convert, kv_cache_bytes
from asrlib.conversion.convert import decompose, measure_sensitivity
from asrlib.conversion.ranks import PROBED_SHARES, energy, sensitivity
from asrlib.models.inference import padding_silenced
from asrlib.models.registry import attention_modules, frame_counts
from asrlib.models.scratch import new_processor

WIDTHS = (8, 5, 8)  # of three groups


@pytest.fixture(scope="module")
def model():
    return tiny.conformer()


@pytest.fixture(scope="module")
def statistics(model):
    return collect_statistics(model, new_processor(), tiny.corpus(12))


# ---- groups ------------------------------------------------------------------------------------------------


def falling(seed: int) -> list[np.ndarray]:
    """Random numbers [width] for every group, descending."""
    random = np.random.default_rng(seed)
    return [np.sort(random.gamma(1.0, 1.0, width))[::-1] for width in WIDTHS]


def every_split(budget: int, multiple: int) -> list[tuple[int, ...]]:
    """All that is allowed, one by one."""
    choices = [[rank for rank in range(1, width + 1) if rank % multiple == 0] for width in WIDTHS]
    return [ranks for ranks in itertools.product(*choices) if sum(ranks) <= budget]


LIMITS = [(3, 1), (4, 1), (9, 1), (16, 1), (20, 1), (21, 1), (30, 1)]  # budget, multiple
LIMITS += [(6, 2), (11, 2), (13, 2), (9, 3), (16, 3), (17, 4), (12, 4), (15, 5), (99, 2)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limits", LIMITS)
def test_sensitivity_finds_the_cheapest_split_of_all(seed, limits):
    costs = [dict(zip(range(1, len(values)), values[:-1], strict=True)) for values in falling(seed)]

    def total(ranks):
        return sum(cost.get(rank, 0.0) for cost, rank in zip(costs, ranks, strict=True))

    budget, multiple = limits
    splits = every_split(budget, multiple)
    ours = sensitivity(costs, budget, WIDTHS, multiple)
    assert tuple(ours) in splits
    assert total(ours) == pytest.approx(min(map(total, splits)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limits", LIMITS)
def test_energy_explains_as_much_as_any_split_can(seed, limits):
    spectra = falling(seed)

    def explained(ranks):
        return sum(np.sum(s[:rank] ** 2) / np.sum(s**2) for s, rank in zip(spectra, ranks, strict=True))

    budget, multiple = limits
    splits = every_split(budget, multiple)
    scaled = [torch.from_numpy(values.copy()) * scale for values, scale in zip(spectra, (1.0, 1e3, 1e-3), strict=True)]
    ours = energy(scaled, budget, multiple)  # each group's relative to its own total
    assert tuple(ours) in splits
    assert explained(ours) == pytest.approx(max(map(explained, splits)))


def test_a_group_that_does_not_mind_gives_to_one_that_does():
    ranks = sensitivity([{1: 1e-6, 4: 1e-7}, {1: 10.0, 4: 1.0}], 8, (8, 8))
    assert ranks[0] <= 2 and sum(ranks) == 8
    assert energy([np.eye(8)[0], np.ones(8)], 8) == [1, 7]


def test_costs_between_and_below_measured_ranks_lie_on_a_line_of_logarithms():
    # Both cost 1 / rank²: one was measured where it is, the other is known from ranks 4 and 16 alone.
    known, read_off = {rank: rank**-2.0 for rank in range(1, 17)}, {4: 4**-2.0, 16: 16**-2.0}
    for budget in (4, 9, 14, 20):
        ranks = sensitivity([known, read_off], budget, (64, 64))
        assert sum(ranks) == budget and abs(ranks[0] - ranks[1]) <= 1


def test_less_is_never_taken_to_be_cheaper():
    assert sensitivity([{1: 1.0, 2: 0.1, 4: 0.5, 6: 0.45}], 6, (8,)) == [6]  # the 0.1 is luck


def test_groups_without_a_choice_are_no_trouble():
    assert energy([np.zeros(8), np.ones(8)], 9) == [1, 8]
    assert sensitivity([{1: 0.0}, {1: 2.0, 4: 1.0}], 6, (1, 8)) == [1, 5]


@pytest.mark.parametrize(
    ("budget", "multiple", "said"),
    [
        (2, 1, "a budget of 2 numbers per frame, for 3 ranks, has no room for the 1 that each needs"),
        (11, 4, "no room for the 4 that each needs: raise latent_dim, or lower rank_multiple"),
        (99, 6, "ranks cannot be multiples of 6 up to the width 5: lower the multiple"),
    ],
)
def test_impossible_limits_are_refused(budget, multiple, said):
    with pytest.raises(ValueError, match=said):
        energy(falling(0), budget, multiple)
    with pytest.raises(ValueError, match=said):
        sensitivity([{1: 1.0}] * 3, budget, WIDTHS, multiple)


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "latent_dim"), [("joint", 7), ("split", 13)])
@pytest.mark.parametrize("multiple", [2, 4])
def test_ranks_are_multiples_within_the_budget(model, statistics, multiple, layout, latent_dim):
    for ranks in ("uniform", "energy", "sensitivity"):
        latent = convert(model, latent_dim, layout=layout, ranks=ranks, rank_multiple=multiple, statistics=statistics)
        spent = latent.config.latent_dim
        assert all(width % multiple == 0 and width > 0 for width in spent)
        assert sum(spent) <= latent_dim * tiny.LAYERS
        if layout == "split" and ranks != "uniform":
            assert all(width % multiple == 0 for width in latent.config.latent_key_dim)
            assert sum(spent) > latent_dim * tiny.LAYERS - multiple  # nothing is left that could be given away


@pytest.mark.parametrize("ranks", ["uniform", "energy", "sensitivity"])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_a_cut_is_at_least_as_deep_as_asked(model, statistics, ranks, layout):
    latent = convert(model, cache_cut=0.8, ranks=ranks, layout=layout, statistics=statistics)
    assert kv_cache_bytes(latent.config, 10) <= 0.2 * kv_cache_bytes(model.config, 10)


@pytest.mark.parametrize("latent_dim", [5, 10])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_energy_takes_the_largest_values_of_the_model_first(model, layout, latent_dim):
    values = [group.values for [one] in decompose(model, layout) for group in one.directions]
    config = convert(model, latent_dim, layout=layout, ranks="energy").config
    ranks = config.latent_dim
    if layout == "split":
        pairs = zip(config.latent_key_dim, config.latent_dim, strict=True)
        ranks = [rank for keys, both in pairs for rank in (keys, both - keys)]
    shares = [one.square() / one.square().sum() for one in values]
    taken = min(share[rank - 1].item() for share, rank in zip(shares, ranks, strict=True) if rank > 1)
    left = max(share[rank].item() for share, rank in zip(shares, ranks, strict=True) if rank < tiny.WIDTH)
    assert sum(ranks) == latent_dim * tiny.LAYERS and taken >= left


@pytest.mark.parametrize("weak", ["linear_v", "linear_k"])
@pytest.mark.parametrize("ranks", ["energy", "sensitivity"])
def test_whichever_of_keys_and_values_say_more_get_more(ranks, weak):
    mha = tiny.conformer()
    with torch.no_grad():  # of rank one, but as large as before
        for layer in attention_modules(mha):
            weight = getattr(layer, weak).weight
            thin = torch.outer(weight[:, 0], weight[0])
            weight.copy_(thin * weight.norm() / thin.norm())
    statistics = collect_statistics(mha, new_processor(), tiny.corpus(12))
    config = convert(mha, 10, layout="split", ranks=ranks, statistics=statistics).config
    for keys, both in zip(config.latent_key_dim, config.latent_dim, strict=True):
        less, more = (both - keys, keys) if weak == "linear_v" else (keys, both - keys)
        assert less <= 2 and more >= 2 * less + 1
    halves = convert(mha, 10, layout="split").config
    assert halves.latent_key_dim == [5] * tiny.LAYERS


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_each_group_is_measured_with_all_others_whole(model, statistics, layout):
    decomposition = decompose(model, layout, "whitened", statistics)
    measured = measure_sensitivity(model, layout, statistics, decomposition)
    frames_B = frame_counts(model, statistics.inputs["attention_mask"].sum(-1))

    def log_posteriors(any_model):
        with torch.no_grad(), padding_silenced(any_model, frames_B):
            logits_BTV = any_model(**statistics.inputs).logits
        rows = [row[:count] for row, count in zip(logits_BTV, frames_B.tolist(), strict=True)]
        return torch.cat(rows).double().log_softmax(-1)

    wanted = log_posteriors(model)
    names = [("linear_k", "linear_v")] if layout == "joint" else [("linear_k",), ("linear_v",)]
    groups = [(layer, cut) for layer in range(tiny.LAYERS) for cut in names]
    for (layer, cut), cost in zip(groups, measured, strict=True):
        assert sorted(cost) == sorted({max(1, round(share * tiny.WIDTH)) for share in PROBED_SHARES})
        for rank in cost:
            mha = tiny.conformer()  # what standard attention says, with these weights alone cut
            factors = decomposition[layer][0].cut(rank, rank)
            with torch.no_grad():
                for name in cut:
                    part, ours = name[-1], getattr(attention_modules(mha)[layer], name)
                    down, up = getattr(factors, f"down_{part}"), getattr(factors, f"up_{part}")
                    ours.weight.copy_(up @ down)
                    ours.bias.copy_(factors.key_bias if part == "k" else factors.value_bias)
            by_hand = (wanted.exp() * (wanted - log_posteriors(mha))).sum(1).mean().item()
            assert cost[rank] == pytest.approx(by_hand, rel=1e-3, abs=1e-7), (layer, cut, rank)


def test_what_comes_before_a_layer_is_computed_once(model, statistics, monkeypatch):
    calls, forward = [], Wav2Vec2ConformerEncoderLayer.forward
    monkeypatch.setattr(
        Wav2Vec2ConformerEncoderLayer, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named)
    )
    measure_sensitivity(model, "joint", statistics, decompose(model, "joint", "whitened", statistics))
    probes = len({max(1, round(share * tiny.WIDTH)) for share in PROBED_SHARES})
    behind = sum(range(1, tiny.LAYERS + 1))  # a cut layer, and those behind it
    assert len(calls) == 2 * tiny.LAYERS + probes * behind


KINDS = {  # by family: the parts, and whether cross-attention shares a latent
    **{name: (None, False) for name in ("wav2vec2", "wav2vec2-bert", "parakeet_ctc", "parakeet_rnnt", "nemotron")},
    "whisper": (["encoder", "decoder", "cross"], False),
    "whisper, decoder": (["decoder"], False),
    "whisper, shared": (["encoder", "decoder", "cross"], True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replayed_changes_no_cost(kind, monkeypatch):
    (name, *_), (parts, shared) = kind.split(","), KINDS[kind]
    model, processor = (
        getattr(family_models, name.replace("-", "_").removesuffix("_ctc"))(),
        family_models.processor_of(name),
    )
    statistics = collect_statistics(model, processor, tiny.corpus(24), batch_seconds=4.0, parts=parts)
    given = "joint", statistics, decompose(model, "joint", "whitened", statistics, parts, shared), parts, shared
    replayed = measure_sensitivity(model, *given)
    monkeypatch.setattr("asrlib.conversion.convert.modules_before", lambda *given: [])
    for ours, theirs in zip(replayed, measure_sensitivity(model, *given), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_measured_costs_fall_to_nothing_at_full_width(model, statistics, layout):
    decomposition = decompose(model, layout, "two_sided", statistics)
    for cost in measure_sensitivity(model, layout, statistics, decomposition):
        ranks = sorted(cost)
        assert cost[ranks[0]] > cost[ranks[-1]] > 0


def test_impossible_budgets_are_refused(model, statistics, monkeypatch):
    with pytest.raises(ValueError, match="no room for the 8 that each needs"):
        convert(model, 7, ranks="energy", rank_multiple=8)
    with pytest.raises(ValueError, match="no room for the 4 that each needs"):
        convert(model, 7, layout="split", ranks="energy", rank_multiple=4)  # keys and values are rounded apart
    monkeypatch.setattr("asrlib.conversion.convert.measure_sensitivity", None)  # minutes that need not be spent
    with pytest.raises(ValueError, match="no room for the 4 that each needs"):
        convert(model, 7, layout="split", ranks="sensitivity", rank_multiple=4, statistics=statistics)
    with pytest.raises(ValueError, match="has nothing to spend"):
        convert(model, [3, 4], ranks="energy")
    with pytest.raises(ValueError, match="needs statistics"):
        convert(model, 4, ranks="sensitivity")
    with pytest.raises(ValueError, match="choose one of uniform"):
        convert(model, 4, ranks="best")
