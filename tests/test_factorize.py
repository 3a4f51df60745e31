"""Each factorisation is the minimiser of what it claims to minimise, and loses nothing on the way."""

import math

import numpy as np
import pytest
import torch

from asrlib.conversion.factorize import LayerWeights, Moments, decompose_layer

WIDTH, HEADS = 12, 3
generator = torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def weights() -> LayerWeights:
    skewed = torch.linspace(2, 0.1, WIDTH, dtype=torch.float64)
    return LayerWeights(
        random(WIDTH, WIDTH) * skewed, random(WIDTH, WIDTH), random(WIDTH, WIDTH), random(WIDTH), random(WIDTH), HEADS
    )


@pytest.fixture(scope="module")
def moments() -> Moments:
    mixed, by_head = random(WIDTH, WIDTH), random(HEADS, WIDTH // HEADS, WIDTH // HEADS)
    return Moments(
        random(WIDTH), mixed @ mixed.T / WIDTH + 0.01 * torch.eye(WIDTH), by_head @ by_head.transpose(1, 2) + 0.01
    )


def squared_error(difference: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """E‖A^½ Δ (x − μ)‖², head by head, written out."""
    if metric is None:
        metric = torch.eye(WIDTH, dtype=torch.float64)[None]
    size = WIDTH // len(metric)
    blocks = [difference[h * size : (h + 1) * size] for h in range(len(metric))]
    return sum(torch.trace(a @ block @ covariance @ block.T) for a, block in zip(metric, blocks, strict=True))


def output_metric(weights: LayerWeights) -> torch.Tensor:
    size = WIDTH // HEADS
    columns = [weights.output[:, h * size : (h + 1) * size] for h in range(HEADS)]
    return torch.stack([block.T @ block for block in columns])


def claims(weights: LayerWeights, moments: Moments, method: str):
    """(covariance, metric of keys, metric of values) whose error the method says it minimises."""
    identity = torch.eye(WIDTH, dtype=torch.float64)
    return {
        "svd": (identity, None, None),
        "whitened": (moments.covariance, None, None),
        "two_sided": (moments.covariance, moments.query, output_metric(weights)),
    }[method]


def descend(loss, shapes: list[tuple[int, int]], starts: int = 3) -> float:
    """The lowest loss that L-BFGS finds from several random starts."""
    best = math.inf
    for _ in range(starts):
        factors = [random(*shape).requires_grad_() for shape in shapes]
        optimizer = torch.optim.LBFGS(factors, max_iter=500, line_search_fn="strong_wolfe")

        def closure(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*factors)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, loss(*factors).item())
    return best


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_descent_gets_below_a_split_factorisation(weights, moments, method, rank):
    covariance, key_metric, value_metric = claims(weights, moments, method)
    factors = decompose_layer(weights, "split", method, moments).cut(rank, rank)
    for weight, product, metric in (
        (weights.key, factors.key_weight, key_metric),
        (weights.value, factors.value_weight, value_metric),
    ):
        ours = squared_error(weight - product, covariance, metric).item()
        found = descend(
            lambda up, down, weight=weight, metric=metric: squared_error(weight - up @ down, covariance, metric),
            [(WIDTH, rank), (rank, WIDTH)],
        )
        assert ours <= found * (1 + 1e-9)
        assert ours == pytest.approx(found, rel=0.02)  # the descent is no straw man


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("balance", [0.5, 1.0, 3.0])
def test_no_descent_gets_below_a_joint_factorisation(weights, moments, method, balance, rank=4):
    covariance, key_metric, value_metric = claims(weights, moments, method)
    key_energy = squared_error(weights.key, covariance, key_metric)
    value_energy = squared_error(weights.value, covariance, value_metric)

    def error(up_k, up_v, down):
        keys = squared_error(weights.key - up_k @ down, covariance, key_metric) / key_energy
        values = squared_error(weights.value - up_v @ down, covariance, value_metric) / value_energy
        return keys + balance**2 * values

    factors = decompose_layer(weights, "joint", method, moments, balance).cut(rank, rank)
    assert torch.equal(factors.down_k, factors.down_v)
    ours = error(factors.up_k, factors.up_v, factors.down_k).item()
    found = descend(error, [(WIDTH, rank), (WIDTH, rank), (rank, WIDTH)])
    assert ours <= found * (1 + 1e-9)
    assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_svd_is_numpys(weights, rank):
    factors = decompose_layer(weights, "split").cut(rank, rank)
    for weight, product in ((weights.key, factors.key_weight), (weights.value, factors.value_weight)):
        left, values, right = np.linalg.svd(weight.numpy())
        np.testing.assert_allclose(product, left[:, :rank] * values[:rank] @ right[:rank], atol=1e-10)


def test_whitened_is_numpys_svd_of_the_whitened_weight(weights, moments, rank=4):
    values, vectors = np.linalg.eigh(moments.covariance.numpy())
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    left, singular, right = np.linalg.svd(weights.key.numpy() @ root)
    expected = left[:, :rank] * singular[:rank] @ right[:rank] @ inverse
    np.testing.assert_allclose(
        decompose_layer(weights, "split", "whitened", moments).cut(rank, rank).key_weight, expected, atol=1e-9
    )


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("rank", [WIDTH, WIDTH + 3])
def test_full_rank_is_exact_and_as_wide_as_asked(weights, moments, method, layout, rank):
    factors = decompose_layer(weights, layout, method, moments).cut(rank, rank)
    assert factors.down_k.shape == (rank, WIDTH) and factors.up_v.shape == (WIDTH, rank)
    for ours, theirs in (
        (factors.key_weight, weights.key),
        (factors.value_weight, weights.value),
        (factors.key_bias, weights.key_bias),
        (factors.value_bias, weights.value_bias),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_the_bias_takes_the_mean_error_out(weights, moments, method):
    factors = decompose_layer(weights, "joint", method, moments).cut(3, 3)
    for weight, bias, product, shifted in (
        (weights.key, weights.key_bias, factors.key_weight, factors.key_bias),
        (weights.value, weights.value_bias, factors.value_weight, factors.value_bias),
    ):
        torch.testing.assert_close(product @ moments.mean + shifted, weight @ moments.mean + bias)
    plain = decompose_layer(weights, "joint", "svd").cut(3, 3)
    assert torch.equal(plain.value_bias, weights.value_bias)


def test_a_whitened_latent_has_unit_covariance(weights, moments):
    down = decompose_layer(weights, "joint", "whitened", moments).cut(5, 5).down_k
    torch.testing.assert_close(down @ moments.covariance @ down.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_weights_of_zero_are_kept_as_zeros(weights, layout):
    zeros = LayerWeights(torch.zeros(WIDTH, WIDTH), *list(vars(weights).values())[1:])
    factors = decompose_layer(zeros, layout).cut(WIDTH, WIDTH)
    assert factors.key_weight.abs().max() < 1e-12
    torch.testing.assert_close(factors.value_weight, weights.value)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_methods_that_weigh_speech_need_statistics(weights, method):
    with pytest.raises(ValueError, match="needs statistics"):
        decompose_layer(weights, "joint", method)


def test_an_unknown_method_is_refused(weights):
    with pytest.raises(ValueError, match="choose one of svd"):
        decompose_layer(weights, "joint", "pca")
