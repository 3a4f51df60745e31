"""What others have published, against the optimum that they publish."""

from dataclasses import replace

import pytest
import tiny
import torch

from asrlib import collect_statistics, convert
from asrlib.conversion.factorize import InputMoments, LayerWeights, Moments
from asrlib.conversion.layers import decompose_layer
from asrlib.models.scratch import new_processor
from asrlib.running.preflight import check_surroundings
from asrlib.runs import BadParameter

WIDTH, HEADS, FRAMES = 12, 3, 40
SIZE = WIDTH // HEADS
PER_HEAD = ("clover", "kq_svd")
generator = torch.Generator().manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def layer():
    """Weights, and the inputs x [N, D] of keys, values and queries."""
    biases = random(WIDTH), random(WIDTH)
    weights = LayerWeights(*(random(WIDTH, WIDTH) for _ in range(3)), *biases, HEADS, random(WIDTH, WIDTH))
    return weights, random(FRAMES, WIDTH) @ random(WIDTH, WIDTH) + random(WIDTH)


def of_heads(rows_ND: torch.Tensor) -> torch.Tensor:
    return rows_ND.unflatten(-1, (HEADS, SIZE)).transpose(0, 1)  # [H, N, d_h]


def moments_of(weights: LayerWeights, x_ND: torch.Tensor) -> Moments:
    inputs = InputMoments(x_ND.mean(0), torch.cov(x_ND.T, correction=0))
    queries_HNE = of_heads(x_ND @ weights.query.T)
    return Moments(inputs, inputs, queries_HNE.transpose(1, 2) @ queries_HNE / FRAMES)


def reproduced(weights: LayerWeights, moments: Moments, x_ND: torch.Tensor, method: str, rank: int) -> tuple:
    """Keys and values [H, N, d_h] of a split latent with `rank` numbers for each."""
    factors = decompose_layer(weights, "split", method, moments).cut(rank, rank)
    keys = x_ND @ factors.key_weight.T + factors.key_bias
    return of_heads(keys), of_heads(x_ND @ factors.value_weight.T + factors.value_bias)


def beyond(matrices_HNM: torch.Tensor, rank: int) -> torch.Tensor:
    """The least error [H] of any matrices of this rank (Eckart and Young 1936)."""
    return torch.linalg.svdvals(matrices_HNM)[:, rank:].square().sum(1).sqrt()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_kq_svd_is_the_best_for_the_scores_and_the_values_of_a_head(layer, rank):
    weights, x_ND = layer
    moments = moments_of(weights, x_ND)
    queries = of_heads(x_ND @ weights.query.T)
    outputs = torch.stack(weights.output.chunk(HEADS, 1)).transpose(1, 2)  # [H, d_h, D]

    def made(weights: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
        keys = of_heads(x_ND @ weights.key.T + weights.key_bias)
        return keys, of_heads(x_ND @ weights.value.T + weights.value_bias)

    def errors(weights: LayerWeights, method: str) -> tuple[torch.Tensor, torch.Tensor]:
        ours = reproduced(weights, moments, x_ND, method, HEADS * rank)
        keys, values = (wanted - reproduced for wanted, reproduced in zip(made(weights), ours, strict=True))
        return (keys @ queries.transpose(1, 2)).norm(dim=(1, 2)), (values @ outputs).norm(dim=(1, 2))

    keys, values = made(weights)
    best = beyond(keys @ queries.transpose(1, 2), rank), beyond(values @ outputs, rank)
    torch.testing.assert_close(errors(weights, "kq_svd"), best, rtol=1e-6, atol=1e-8)
    # Without biases: beside a latent, clover keeps them whole, and that is one rank more.
    plain = replace(weights, key_bias=torch.zeros_like(weights.key_bias), value_bias=torch.zeros_like(weights.key_bias))
    for ours, theirs in zip(errors(plain, "kq_svd"), errors(plain, "clover"), strict=True):
        assert (ours < theirs).all()


def test_clover_is_the_best_for_the_pairs_of_weights(layer):
    weights, _ = layer
    factors = decompose_layer(weights, "split", "clover").cut(2 * HEADS, 2 * HEADS)
    pairs = [
        (weights.query, weights.key, factors.key_weight),
        (weights.output.T, weights.value, factors.value_weight),
    ]
    for reads, made, ours in pairs:
        reads, made, ours = (weight.unflatten(0, (HEADS, SIZE)) for weight in (reads, made, ours))  # [H, d_h, D]
        error = (reads.transpose(1, 2) @ (made - ours)).norm(dim=(1, 2))
        torch.testing.assert_close(error, beyond(reads.transpose(1, 2) @ made, 2), rtol=1e-8, atol=1e-8)
    assert torch.equal(factors.key_bias, weights.key_bias)


def test_palu_in_one_group_is_whitened(layer):
    weights, x_ND = layer
    moments = moments_of(weights, x_ND)
    for ours, theirs in zip(
        *(reproduced(weights, moments, x_ND, name, 5) for name in ("palu", "whitened")), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_palu_has_groups_of_four_heads_at_most(layer):
    weights, x_ND = layer
    moments = moments_of(weights, x_ND)
    six = decompose_layer(replace(weights, heads=6), "split", "palu", moments)
    assert [len(group.weight) for group in six.keys] == [6, 6]
    factors = six.cut(5, 4)  # 3 and 2 numbers of the keys, 2 and 2 of the values
    assert factors.up_k[:6, 3:].abs().max() == 0 == factors.up_k[6:, :3].abs().max()
    assert factors.up_v[:6, 2:].abs().max() == 0 == factors.up_v[6:, :2].abs().max()


@pytest.mark.parametrize("method", [*PER_HEAD, "palu"])
def test_what_they_cannot_do_is_refused(method):
    with pytest.raises(ValueError, match="keeps keys and values apart: give layout=split"):
        convert(tiny.conformer(), 6, method=method)
    with pytest.raises(BadParameter, match="keys and values apart"):
        check_surroundings({"method": method, "convert_to": "mla", "device": "cpu"})
    with pytest.raises(ValueError, match="leave out sequential"):
        convert(tiny.conformer(), 6, layout="split", method=method, sequential=True, statistics=tiny_statistics())
    with pytest.raises(BadParameter, match="leave out sequential"):
        check_surroundings({"method": method, "layout": "split", "sequential": True, "device": "cpu"})


def tiny_statistics():
    return collect_statistics(tiny.conformer(), new_processor(), tiny.corpus())


@pytest.mark.parametrize("method", ["kq_svd", "palu"])
def test_their_importance_is_that_of_the_numbers_in_the_order_of_the_cut(layer, method):
    weights, x_ND = layer
    decomposition = decompose_layer(weights, "split", method, moments_of(weights, x_ND))
    for groups, directions in zip((decomposition.keys, decomposition.values), decomposition.directions, strict=True):
        assert len(directions.values) == WIDTH and (directions.values.diff() <= 0).all()
        each = len(groups)
        for turn in range(1, WIDTH // each):
            explained = sum(group.values[:turn].square().sum() for group in groups)
            torch.testing.assert_close(directions.values[: turn * each].square().sum(), explained)
