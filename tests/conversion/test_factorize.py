"""Each factorisation is the minimiser of what it claims to minimise, and loses nothing on the way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from descent import descend

from asrlib.conversion.factorize import InputMoments, LayerWeights, Moments
from asrlib.conversion.layers import decompose_layer

WIDTH, HEADS = 12, 3
IDENTITY = torch.eye(WIDTH, dtype=torch.float64)
generator = torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def weights() -> LayerWeights:
    skewed = torch.linspace(2, 0.1, WIDTH, dtype=torch.float64)
    return LayerWeights(
        random(WIDTH, WIDTH) * skewed, random(WIDTH, WIDTH), random(WIDTH, WIDTH), random(WIDTH), random(WIDTH), HEADS
    )


def input_moments() -> InputMoments:
    mixed = random(WIDTH, 2 * WIDTH)  # uneven enough to tell methods apart, and no valley too flat to descend
    return InputMoments(random(WIDTH), mixed @ mixed.T / WIDTH)


@pytest.fixture(scope="module")
def moments() -> Moments:
    both, by_head = input_moments(), random(HEADS, WIDTH // HEADS, WIDTH)
    return Moments(both, both, by_head @ by_head.transpose(1, 2))


@pytest.fixture(scope="module")
def rotary_moments(moments) -> Moments:
    return replace(moments, value=input_moments())


def squared_error(difference: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """E‖A^½ Δ (x − μ)‖², head by head."""
    if metric is None:
        return torch.sum(difference @ covariance * difference)
    blocks = difference.unflatten(0, (HEADS, -1))
    return torch.sum(metric @ blocks @ covariance * blocks)


def output_metric(weights: LayerWeights) -> torch.Tensor:
    size = WIDTH // HEADS
    columns = [weights.output[:, h * size : (h + 1) * size] for h in range(HEADS)]
    return torch.stack([block.T @ block for block in columns])


def metrics(weights: LayerWeights, moments: Moments, method: str) -> tuple:
    """Of keys and of values: what their errors are weighed with, where the method weighs them."""
    return (moments.query, output_metric(weights)) if method == "two_sided" else (None, None)


def covariances(moments: Moments, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what keys and values read, as the method takes it to be."""
    return (IDENTITY, IDENTITY) if method == "svd" else (moments.key.covariance, moments.value.covariance)


def factor_starts(*shapes: tuple[int, ...], count: int = 2) -> list[list[torch.Tensor]]:
    return [[0.3 * random(*shape) for shape in shapes] for _ in range(count)]


def parts(weights: LayerWeights, factors) -> list[tuple]:
    """(weight, bias, product, shifted bias) of keys and of values."""
    return [
        (weights.key, weights.key_bias, factors.key_weight, factors.key_bias),
        (weights.value, weights.value_bias, factors.value_weight, factors.value_bias),
    ]


# ---- the minimum -------------------------------------------------------------------------------------------


def check_split(weights: LayerWeights, moments: Moments, method: str, rank: int) -> None:
    factors = decompose_layer(weights, "split", method, moments).cut(rank, rank)
    for (weight, _, product, _), covariance, metric in zip(
        parts(weights, factors), covariances(moments, method), metrics(weights, moments, method), strict=True
    ):
        ours = squared_error(weight - product, covariance, metric).item()
        found = descend(
            lambda up, down, w=weight, c=covariance, a=metric: squared_error(w - up @ down, c, a),
            factor_starts((WIDTH, rank), (rank, WIDTH)),
        )
        assert ours <= found * (1 + 1e-9)
        assert ours == pytest.approx(found, rel=0.02)  # the descent is no straw man


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_descent_gets_below_a_split_factorisation(weights, moments, method, rank):
    check_split(weights, moments, method, rank)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_keys_and_values_that_read_different_inputs_are_each_fitted_to_their_own(weights, rotary_moments, method):
    check_split(weights, rotary_moments, method, rank=4)


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("balance", [0.5, 1.0, 3.0])
def test_no_descent_gets_below_a_joint_factorisation(weights, moments, method, balance, rank=4):
    covariance, _ = covariances(moments, method)
    key_metric, value_metric = metrics(weights, moments, method)
    key_energy = squared_error(weights.key, covariance, key_metric)
    value_energy = squared_error(weights.value, covariance, value_metric)

    def error(up_k, up_v, down):
        keys = squared_error(weights.key - up_k @ down, covariance, key_metric) / key_energy
        values = squared_error(weights.value - up_v @ down, covariance, value_metric) / value_energy
        return keys + balance**2 * values

    factors = decompose_layer(weights, "joint", method, moments, balance).cut(rank, rank)
    assert torch.equal(factors.down_k, factors.down_v)
    ours = error(factors.up_k, factors.up_v, factors.down_k).item()
    found = descend(error, factor_starts((WIDTH, rank), (WIDTH, rank), (rank, WIDTH)))
    assert ours <= found * (1 + 1e-9)
    assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_svd_is_numpys(weights, rank):
    factors = decompose_layer(weights, "split").cut(rank, rank)
    for weight, product in ((weights.key, factors.key_weight), (weights.value, factors.value_weight)):
        left, values, right = np.linalg.svd(weight.numpy())
        np.testing.assert_allclose(product, left[:, :rank] * values[:rank] @ right[:rank], atol=1e-10)


def test_whitened_is_numpys_svd_of_the_whitened_weight(weights, moments, rank=4):
    values, vectors = np.linalg.eigh(moments.key.covariance.numpy())
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    left, singular, right = np.linalg.svd(weights.key.numpy() @ root)
    expected = left[:, :rank] * singular[:rank] @ right[:rank] @ inverse
    decomposition = decompose_layer(weights, "split", "whitened", moments)
    np.testing.assert_allclose(decomposition.cut(rank, rank).key_weight, expected, atol=1e-9)
    np.testing.assert_allclose(decomposition.directions[0].values, singular, rtol=1e-9)


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("rank", [WIDTH, WIDTH + 3])
def test_full_rank_is_exact_and_as_wide_as_asked(weights, moments, rotary_moments, method, layout, rank):
    factors = decompose_layer(weights, layout, method, moments if layout == "joint" else rotary_moments).cut(rank, rank)
    assert factors.down_k.shape == (rank, WIDTH) and factors.up_v.shape == (WIDTH, rank)
    for weight, bias, product, shifted in parts(weights, factors):
        torch.testing.assert_close(product, weight, atol=1e-10, rtol=0)
        torch.testing.assert_close(shifted, bias, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_the_bias_takes_the_mean_error_out(weights, moments, rotary_moments, method):
    for layout, given in (("joint", moments), ("split", rotary_moments)):
        factors = decompose_layer(weights, layout, method, given).cut(3, 3)
        for (weight, bias, product, shifted), inputs in zip(
            parts(weights, factors), (given.key, given.value), strict=True
        ):
            torch.testing.assert_close(product @ inputs.mean + shifted, weight @ inputs.mean + bias)
    plain = decompose_layer(weights, "joint", "svd").cut(3, 3)
    assert torch.equal(plain.value_bias, weights.value_bias)


def test_a_whitened_latent_has_unit_covariance(weights, moments):
    down = decompose_layer(weights, "joint", "whitened", moments).cut(5, 5).down_k
    torch.testing.assert_close(down @ moments.key.covariance @ down.T, torch.eye(5, dtype=torch.float64))


# ---- behind layers that are converted already --------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted_and_read() -> tuple[torch.Tensor, torch.Tensor]:
    """x and x̂ [N, D], frame by frame: what should be read, and what is, of which it can be told only in part."""
    wanted_ND = random(100, 2 * WIDTH) @ random(2 * WIDTH, WIDTH) + random(WIDTH)
    read_ND = 0.3 * wanted_ND @ random(WIDTH, WIDTH) + 3 * random(100, WIDTH) + random(WIDTH)
    return wanted_ND, read_ND


@pytest.fixture(scope="module")
def behind(wanted_and_read, moments) -> Moments:
    wanted_ND, read_ND = wanted_and_read
    both = torch.cov(torch.cat([wanted_ND, read_ND], 1).T, correction=0)
    inputs = InputMoments(read_ND.mean(0), both[WIDTH:, WIDTH:], wanted_ND.mean(0), both[:WIDTH, WIDTH:])
    return replace(moments, key=inputs, value=inputs)


def weighed(error_ND: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """E‖A^½ error‖² over frames [N, D]."""
    if metric is None:
        return error_ND.square().sum() / len(error_ND)
    by_head = error_ND.unflatten(1, (HEADS, -1)).transpose(0, 1)  # [H, N, d_h]
    return torch.sum(by_head @ metric * by_head) / len(error_ND)


def regression(read_ND: torch.Tensor, targets_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """numpy's ordinary least squares: (weight [D, D], intercept [D])."""
    with_one = np.concatenate([read_ND.numpy(), np.ones((len(read_ND), 1))], 1)
    solution = torch.from_numpy(np.linalg.lstsq(with_one, targets_ND.numpy(), rcond=None)[0])
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("rank", [2, 7])
def test_no_descent_gets_below_the_regression_on_what_is_read(weights, wanted_and_read, behind, method, rank):
    wanted_ND, read_ND = wanted_and_read
    factors = decompose_layer(weights, "split", method, behind).cut(rank, rank)
    for (weight, bias, _, shifted), up_down, metric in zip(
        parts(weights, factors),
        ((factors.up_k, factors.down_k), (factors.up_v, factors.down_v)),
        metrics(weights, behind, method),
        strict=True,
    ):
        targets_ND = wanted_ND @ weight.T + bias

        def error(up, down, offset, targets_ND=targets_ND, metric=metric):
            return weighed(targets_ND - read_ND @ down.T @ up.T - offset, metric)

        ours = error(*up_down, shifted).item()
        found = descend(error, factor_starts((WIDTH, rank), (rank, WIDTH), (WIDTH,)))
        assert ours <= found * (1 + 1e-9)
        assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("balance", [0.5, 2.0])
@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_no_descent_gets_below_the_joint_regression(weights, wanted_and_read, behind, method, balance, rank=5):
    wanted_ND, read_ND = wanted_and_read
    targets = [wanted_ND @ w.T + b for w, b in ((weights.key, weights.key_bias), (weights.value, weights.value_bias))]
    weighing = metrics(weights, behind, method)
    known = []  # what of keys and of values can be told from what is read at all
    for targets_ND, metric in zip(targets, weighing, strict=True):
        slope, intercept = regression(read_ND, targets_ND)
        told_ND = read_ND @ slope.T + intercept
        known.append(weighed(told_ND - told_ND.mean(0), metric))

    def error(up_k, up_v, down, offset_k, offset_v):
        keys, values = (
            weighed(targets_ND - read_ND @ down.T @ up.T - offset, metric) / all_of_it
            for targets_ND, up, offset, metric, all_of_it in zip(
                targets, (up_k, up_v), (offset_k, offset_v), weighing, known, strict=True
            )
        )
        return keys + balance**2 * values

    factors = decompose_layer(weights, "joint", method, behind, balance).cut(rank, rank)
    ours = error(factors.up_k, factors.up_v, factors.down_k, factors.key_bias, factors.value_bias).item()
    found = descend(error, factor_starts((WIDTH, rank), (WIDTH, rank), (rank, WIDTH), (WIDTH,), (WIDTH,)))
    assert ours <= found * (1 + 1e-9)
    assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_the_full_regression_is_numpys_least_squares(weights, wanted_and_read, behind, method, layout):
    wanted_ND, read_ND = wanted_and_read
    factors = decompose_layer(weights, layout, method, behind).cut(WIDTH, WIDTH)
    for weight, bias, product, shifted in parts(weights, factors):
        slope, intercept = regression(read_ND, wanted_ND @ weight.T + bias)
        torch.testing.assert_close(product, slope, atol=1e-8, rtol=0)
        torch.testing.assert_close(shifted, intercept, atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_where_the_right_input_is_read_nothing_changes(weights, rotary_moments, moments, method, layout):
    given = moments if layout == "joint" else rotary_moments
    key, value = (
        replace(inputs, wanted_mean=inputs.mean, cross=inputs.covariance) for inputs in (given.key, given.value)
    )
    behind = decompose_layer(weights, layout, method, replace(given, key=key, value=value)).cut(4, 5)
    plain = decompose_layer(weights, layout, method, given).cut(4, 5)
    for ours, theirs in zip(parts(weights, behind), parts(weights, plain), strict=True):
        for tensor, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-9, rtol=0)


def test_svd_looks_at_weights_alone(weights, behind):
    with_speech, without = (decompose_layer(weights, "joint", "svd", given).cut(4, 4) for given in (behind, None))
    for name, tensor in vars(without).items():
        assert torch.equal(getattr(with_speech, name), tensor), name


# ---- odd and impossible ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_weights_of_zero_are_kept_as_zeros(weights, layout):
    zeros = replace(weights, key=torch.zeros(WIDTH, WIDTH))
    factors = decompose_layer(zeros, layout).cut(WIDTH, WIDTH)
    assert factors.key_weight.abs().max() < 1e-12
    torch.testing.assert_close(factors.value_weight, weights.value)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_an_input_that_never_varies_in_some_direction_is_refused(weights, moments, layout):
    flat = torch.diag(torch.tensor([0.0] + [1.0] * (WIDTH - 1), dtype=torch.float64))
    flat = replace(moments.key, covariance=flat)
    with pytest.raises(ValueError, match="covariance is singular: take more calibration speech"):
        decompose_layer(weights, layout, "whitened", replace(moments, key=flat, value=flat))


@pytest.mark.parametrize("method", ["whitened", "two_sided", "attended"])
def test_methods_that_weigh_speech_need_statistics(weights, method):
    with pytest.raises(ValueError, match="needs statistics"):
        decompose_layer(weights, "joint", method)


def test_an_unknown_method_is_refused(weights):
    with pytest.raises(ValueError, match="choose one of svd"):
        decompose_layer(weights, "joint", "pca")
