"""`attended` minimises errors where attention looks: of scores, weighed by attention, and of what it makes of values.

The errors are computed query by query from inputs and attention weights, never from covariances. The search is local,
and heads that look at very unlike things leave a joint latent several minima; the ones here have one.
"""

import gc
import math
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from descent import descend

from asrlib.conversion import attended
from asrlib.conversion.attended import Term
from asrlib.conversion.attended import decompose_attended as decompose_layers
from asrlib.conversion.factorize import DRAFT, Factors, InputMoments, LayerWeights, Moments
from asrlib.conversion.layers import decompose_layer

WIDTH, HEADS, FRAMES, UTTERANCES = 12, 3, 12, 4
SIZE = WIDTH // HEADS
generator = torch.Generator().manual_seed(3)


def decompose_attended(weights: LayerWeights, layout: str, moments: Moments, balance: float = 1.0):
    """Of one layer."""
    return decompose_layers([(weights, moments)], layout, [balance])[0][0]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Seen:
    """What attention makes of some speech, query by query."""

    frames_ND: torch.Tensor  # the inputs
    around_PD: torch.Tensor  # √a_ij (x_j − x̄_i) for all pairs of a query of any head and a frame
    queries: int  # of all heads
    attended_HND: torch.Tensor  # x̄_i, by head


def look(speech: list[torch.Tensor], weights: list[torch.Tensor]) -> Seen:
    """Of inputs [T, D] and attention weights [H, T, T] of several utterances."""
    around, attended = [], [[] for _ in range(HEADS)]
    for x_TD, weights_HTT in zip(speech, weights, strict=True):
        for head in range(HEADS):
            for query in range(len(x_TD)):
                mean = sum(weights_HTT[head, query, j] * x_TD[j] for j in range(len(x_TD)))
                attended[head].append(mean)
                around += [math.sqrt(weights_HTT[head, query, j]) * (x_TD[j] - mean) for j in range(len(x_TD))]
    attended_HND = torch.stack([torch.stack(rows) for rows in attended])
    return Seen(torch.cat(speech), torch.stack(around), attended_HND.shape[0] * attended_HND.shape[1], attended_HND)


def covariance(a_ND: torch.Tensor, b_ND: torch.Tensor) -> torch.Tensor:
    return sum(torch.outer(a, b) for a, b in zip(a_ND - a_ND.mean(0), b_ND - b_ND.mean(0), strict=True)) / len(a_ND)


def moments_of(read: Seen, query: torch.Tensor, wanted: Seen | None = None, value: Seen | None = None) -> Moments:
    """`value`: what values read, where it is not what keys read."""

    def plain(one: Seen) -> InputMoments:
        if wanted is None:
            return InputMoments(one.frames_ND.mean(0), covariance(one.frames_ND, one.frames_ND))
        cross = covariance(wanted.frames_ND, one.frames_ND)
        return InputMoments(
            one.frames_ND.mean(0), covariance(one.frames_ND, one.frames_ND), wanted.frames_ND.mean(0), cross
        )

    key = plain(read)
    attended_key = replace(key, covariance=read.around_PD.T @ read.around_PD / read.queries)
    if wanted is not None:
        attended_key = replace(attended_key, cross=wanted.around_PD.T @ read.around_PD / read.queries)
    value = value or read
    attended_values = []
    for head, x_ND in enumerate(value.attended_HND):
        inputs = InputMoments(x_ND.mean(0), covariance(x_ND, x_ND))
        if wanted is not None:
            wanted_ND = wanted.attended_HND[head]
            inputs = replace(inputs, wanted_mean=wanted_ND.mean(0), cross=covariance(wanted_ND, x_ND))
        attended_values.append(inputs)
    return Moments(key, plain(value) if value is not read else key, query, attended_key, tuple(attended_values))


@pytest.fixture(scope="module")
def weights() -> LayerWeights:
    skewed = torch.linspace(2, 0.2, WIDTH, dtype=torch.float64)
    return LayerWeights(
        random(WIDTH, WIDTH) * skewed, random(WIDTH, WIDTH), random(WIDTH, WIDTH), random(WIDTH), random(WIDTH), HEADS
    )


@pytest.fixture(scope="module")
def attention() -> list[torch.Tensor]:
    """Sharp and uneven: each head looks elsewhere, and some frames are looked at by all."""
    sharpness = torch.tensor([1.0, 1.5, 2.0])[:, None, None]
    return [
        (sharpness * (random(HEADS, FRAMES, FRAMES) + random(HEADS, 1, FRAMES))).softmax(-1) for _ in range(UTTERANCES)
    ]


def some_speech() -> list[torch.Tensor]:
    """Inputs [T, D] of utterances, each with a mean of its own; they vary ten times more one way than another."""
    spread, basis, mean = (
        torch.logspace(0.5, -0.5, WIDTH).double(),
        torch.linalg.qr(random(WIDTH, WIDTH))[0],
        random(WIDTH),
    )
    return [(random(FRAMES, WIDTH) + 0.5 * random(WIDTH)) * spread @ basis + mean for _ in range(UTTERANCES)]


@pytest.fixture(scope="module")
def speech() -> list[torch.Tensor]:
    return some_speech()


@pytest.fixture(scope="module")
def seen(speech, attention) -> Seen:
    return look(speech, attention)


@pytest.fixture(scope="module")
def query() -> torch.Tensor:
    half = random(HEADS, SIZE, 2 * SIZE)
    return half @ half.transpose(1, 2) * torch.tensor([3.0, 1.0, 0.5])[:, None, None]


@pytest.fixture(scope="module")
def moments(seen, query) -> Moments:
    return moments_of(seen, query)


# ---- what is minimised -------------------------------------------------------------------------------------


def key_error(
    weights: LayerWeights, query: torch.Tensor, product: torch.Tensor, read: Seen, wanted: Seen | None = None
):
    """Σ_h E_i Σ_j a_ij ‖Q_h^½ (W_k,h (x_j − x̄_i) − product_h (x̂_j − x̂̄_i))‖²; [D, D] → scalar."""
    error_PHE = ((wanted or read).around_PD @ weights.key.T - read.around_PD @ product.T).unflatten(1, (HEADS, SIZE))
    return torch.einsum("phi,hij,phj->", error_PHE, query, error_PHE) / read.queries


def value_error(weights: LayerWeights, product: torch.Tensor, read: Seen, wanted: Seen | None = None):
    """Σ_h E_i ‖W_o,h (W_v,h (x̄_ih − E x̄_ih) − product_h (x̂̄_ih − E x̂̄_ih))‖²."""
    total = 0.0
    for head in range(HEADS):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        want_ND, read_ND = (one.attended_HND[head] - one.attended_HND[head].mean(0) for one in (wanted or read, read))
        error_NE = want_ND @ weights.value[rows].T - read_ND @ product[rows].T
        total = total + (error_NE @ weights.output[:, rows].T).square().sum() / len(error_NE)
    return total


def best_products(weights: LayerWeights, read: Seen, wanted: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """[D, D] for keys and for values, of no limited rank: torch's own least squares on what is read."""

    def fitted(weight, read_ND, wanted_ND):
        return torch.linalg.lstsq(read_ND - read_ND.mean(0), (wanted_ND - wanted_ND.mean(0)) @ weight.T).solution.T

    keys = torch.linalg.lstsq(read.around_PD, wanted.around_PD @ weights.key.T).solution.T
    values = zip(weights.value.chunk(HEADS), read.attended_HND, wanted.attended_HND, strict=True)
    return keys, torch.cat([fitted(*one) for one in values])


def joint_error(weights: LayerWeights, query: torch.Tensor, balance: float, read: Seen, wanted: Seen | None = None):
    """The function (up_k, up_v, down) → both errors, each as a share of what can be told from what is read at all."""
    nothing = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    best_k, best_v = best_products(weights, read, wanted or read)
    key_range = [key_error(weights, query, product, read, wanted) for product in (nothing, best_k)]
    value_range = [value_error(weights, product, read, wanted) for product in (nothing, best_v)]

    def error(up_k, up_v, down):
        keys = key_error(weights, query, up_k @ down, read, wanted) / (key_range[0] - key_range[1])
        values = value_error(weights, up_v @ down, read, wanted) / (value_range[0] - value_range[1])
        return keys + balance**2 * values

    return error


def starts(weights: LayerWeights, moments: Moments, layout: str, rank: int) -> list[list[torch.Tensor]]:
    """(up_k, up_v, down_k, down_v): those of two_sided, and random ones."""
    factors = decompose_layer(weights, layout, "two_sided", moments).cut(rank, rank)
    shapes = (WIDTH, rank), (WIDTH, rank), (rank, WIDTH), (rank, WIDTH)
    return [
        [factors.up_k, factors.up_v, factors.down_k, factors.down_v],
        *([0.3 * random(*shape) for shape in shapes] for _ in range(2)),
    ]


@pytest.mark.parametrize(("rank", "balance"), [(2, 0.5), (4, 1.0), (5, 2.0)])
def test_no_descent_gets_below_a_joint_latent(weights, seen, moments, rank, balance):
    error = joint_error(weights, moments.query, balance, seen)
    factors = decompose_attended(weights, "joint", moments, balance).cut(rank, rank)
    assert torch.equal(factors.down_k, factors.down_v)
    ours = error(factors.up_k, factors.up_v, factors.down_k).item()
    found = descend(error, [start[:3] for start in starts(weights, moments, "joint", rank)])
    assert ours <= found * (1 + 1e-3)
    assert ours == pytest.approx(found, rel=0.02)  # the descent is no straw man


@pytest.mark.parametrize("rank", [2, 5])
def test_no_descent_gets_below_a_split_latent(weights, seen, moments, rank):
    check_split(weights, moments, rank, seen, seen)


def test_keys_and_values_that_read_different_inputs_are_each_fitted_to_their_own(weights, seen, query, attention):
    value_seen = look(some_speech(), attention)
    check_split(weights, moments_of(seen, query, value=value_seen), 4, seen, value_seen)


def check_split(weights: LayerWeights, moments: Moments, rank: int, key_seen: Seen, value_seen: Seen) -> None:
    factors = decompose_attended(weights, "split", moments).cut(rank, rank)
    begun = starts(weights, moments, "split", rank)
    for error, up_down, first in (
        (lambda up, down: key_error(weights, moments.query, up @ down, key_seen), (factors.up_k, factors.down_k), 0),
        (lambda up, down: value_error(weights, up @ down, value_seen), (factors.up_v, factors.down_v), 1),
    ):
        ours = error(*up_down).item()
        found = descend(error, [start[first::2] for start in begun])
        assert ours <= found * (1 + 1e-3)
        assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_the_latent_is_decoded_by_least_squares(weights, seen, moments, layout):
    factors = decompose_attended(weights, layout, moments, 2.0).cut(4, 4)
    up_k, up_v = factors.up_k.clone().requires_grad_(), factors.up_v.clone().requires_grad_()
    error = key_error(weights, moments.query, up_k @ factors.down_k, seen)
    error = error + value_error(weights, up_v @ factors.down_v, seen)
    for gradient in torch.autograd.grad(error, (up_k, up_v)):
        assert gradient.abs().max() < 1e-9 * error.item()


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_it_is_better_than_two_sided_at_what_it_minimises(weights, seen, moments, layout):
    attended, two_sided = (
        decomposition.cut(3, 3)
        for decomposition in (
            decompose_attended(weights, layout, moments),
            decompose_layer(weights, layout, "two_sided", moments),
        )
    )
    assert value_error(weights, attended.value_weight, seen) < 0.95 * value_error(weights, two_sided.value_weight, seen)
    query = moments.query
    ours, theirs = (key_error(weights, query, one.key_weight, seen) for one in (attended, two_sided))
    assert ours < 0.95 * theirs


# ---- the descent -------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_what_is_explained():
    half, pull, rows = random(3, WIDTH, WIDTH), random(3, WIDTH, SIZE), random(4, WIDTH).requires_grad_()
    term = Term(half @ half.mT, pull, 0.7)
    with torch.no_grad():
        explained, gradient = term.explained(rows)
    wanted = 0.0
    for covariance, pull in zip(term.covariance, term.pull, strict=True):
        best = torch.linalg.solve(rows @ covariance @ rows.T, rows @ pull)  # of least squares
        wanted = wanted + 0.7 * (best * (rows @ pull)).sum()
    torch.testing.assert_close(explained, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, rows)[0])


def test_a_draft_is_on_the_way(weights, seen, moments):
    error, decomposition = joint_error(weights, moments.query, 1.0, seen), decompose_attended(weights, "joint", moments)
    start = decomposition.start.cut(5, 5)
    cuts = (start, decomposition.cut(5, 5, DRAFT), decomposition.cut(5, 5))
    errors = [error(factors.up_k, factors.up_v, factors.down_k) for factors in cuts]
    assert errors[0] > errors[1] > errors[2]


def test_what_float32_cannot_hold_is_searched_in_float64(weights, seen, moments, monkeypatch):
    wanted = decompose_attended(weights, "joint", moments).cut(4, 4)
    cholesky = torch.linalg.cholesky

    def choosy(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", choosy)
    factors = decompose_attended(weights, "joint", moments).cut(4, 4)
    torch.testing.assert_close(factors.key_weight, wanted.key_weight, atol=1e-2, rtol=1e-2)
    assert not torch.equal(factors.key_weight, wanted.key_weight)


def test_steps_that_lead_astray_are_taken_again_in_float64(weights, seen, moments, monkeypatch):
    wanted = decompose_attended(weights, "joint", moments).cut(4, 4)
    original, error = attended._descend, joint_error(weights, moments.query, 1.0, seen)

    def astray(rows, terms, iterations):
        found = original(rows, terms, iterations)
        return found if rows.dtype == torch.float64 else found + 10 * torch.rand_like(found)

    monkeypatch.setattr(attended, "_descend", astray)
    factors = decompose_attended(weights, "joint", moments).cut(4, 4)
    ours, theirs = (error(one.up_k, one.up_v, one.down_k).item() for one in (factors, wanted))
    assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize("steps", [DRAFT, None])
def test_a_head_that_always_reads_the_same_is_refused(weights, moments, steps):
    first, *others = moments.attended_values
    still = replace(first, covariance=torch.zeros_like(first.covariance))
    decomposition = decompose_attended(weights, "joint", replace(moments, attended_values=(still, *others)))
    with pytest.raises(ValueError, match="take more calibration speech"):
        decomposition.cut(4, 4, steps)


def test_what_a_search_needs_goes_with_the_layer(weights, moments):
    decomposition = decompose_attended(weights, "joint", moments)
    decomposition.cut(4, 4)
    aim = weakref.ref(decomposition.aim)
    assert aim() in attended._at_hand
    del decomposition
    gc.collect()
    assert aim() is None and not len(attended._at_hand)


def test_only_one_layer_is_at_hand(weights, moments):
    layers = [decompose_attended(weights, "joint", moments) for _ in range(2)]
    for layer in (*layers, *layers):
        layer.cut(4, 4, DRAFT)
        assert list(attended._at_hand) == [layer.aim]


def test_a_full_gpu_leaves_the_steps_to_the_cpu(weights, moments, monkeypatch):
    wanted = decompose_attended(weights, "joint", moments).cut(4, 4)
    original, tried = attended._descend, []

    def full(rows, terms, iterations):
        tried.append(rows.device.type)
        if rows.is_meta:
            raise torch.OutOfMemoryError
        return original(rows, terms, iterations)

    monkeypatch.setattr(attended, "_descend", full)
    there = replace(moments, device=torch.device("meta"))  # in place of a GPU
    factors = decompose_attended(weights, "joint", there).cut(4, 4)
    assert tried == ["meta", "cpu"] * 2 and torch.equal(factors.down_k, wanted.down_k)


# ---- biases and the whole width ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("ranks", [(WIDTH, WIDTH), (WIDTH + 2, WIDTH + 2)])
def test_full_rank_is_exact(weights, moments, layout, ranks):
    check_exact(weights, decompose_attended(weights, layout, moments).cut(*ranks), keys=True, values=True)


def test_either_of_a_split_latent_can_be_of_full_rank_alone(weights, moments):
    decomposition = decompose_attended(weights, "split", moments)
    both_cut, exact_keys, exact_values = (decomposition.cut(*ranks) for ranks in ((3, 3), (WIDTH, 3), (3, WIDTH)))
    check_exact(weights, exact_keys, keys=True, values=False)
    check_exact(weights, exact_values, keys=False, values=True)
    torch.testing.assert_close(exact_keys.value_weight, both_cut.value_weight)
    torch.testing.assert_close(exact_values.key_weight, both_cut.key_weight)


def check_exact(weights: LayerWeights, factors: Factors, keys: bool, values: bool) -> None:
    for exact, product, weight, shifted, bias in (
        (keys, factors.key_weight, weights.key, factors.key_bias, weights.key_bias),
        (values, factors.value_weight, weights.value, factors.value_bias, weights.value_bias),
    ):
        assert torch.allclose(product, weight, atol=1e-8) == exact
        assert torch.allclose(shifted, bias, atol=1e-8) == exact


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_each_head_gives_on_average_what_it_gave(weights, seen, moments, layout):
    factors = decompose_attended(weights, layout, moments).cut(3, 3)
    for head, x_ND in enumerate(seen.attended_HND):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        ours_NE = x_ND @ factors.value_weight[rows].T + factors.value_bias[rows]
        theirs_NE = x_ND @ weights.value[rows].T + weights.value_bias[rows]
        torch.testing.assert_close(ours_NE.mean(0), theirs_NE.mean(0))
        assert not torch.allclose(ours_NE, theirs_NE, atol=1e-2)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_keys_are_right_on_average_and_their_mean_changes_nothing_else(weights, seen, moments, layout):
    factors = decompose_attended(weights, layout, moments).cut(3, 3)
    ours_ND = seen.frames_ND @ factors.key_weight.T + factors.key_bias
    theirs_ND = seen.frames_ND @ weights.key.T + weights.key_bias
    torch.testing.assert_close(ours_ND.mean(0), theirs_ND.mean(0))
    moved = replace(moments.attended_key, mean=moments.attended_key.mean + 1)
    elsewhere = decompose_attended(weights, layout, replace(moments, attended_key=moved)).cut(3, 3)
    assert not torch.allclose(elsewhere.key_bias, factors.key_bias)
    for name, tensor in vars(factors).items():
        assert name == "key_bias" or torch.equal(getattr(elsewhere, name), tensor), name


def test_heads_are_not_interchangeable(weights, moments):
    in_order = decompose_attended(weights, "joint", moments).cut(3, 3)
    others = replace(moments, attended_values=moments.attended_values[::-1])
    swapped = decompose_attended(weights, "joint", others).cut(3, 3)
    assert not torch.allclose(in_order.value_weight, swapped.value_weight, atol=1e-2)


# ---- behind layers that are converted already --------------------------------------------------------------


@pytest.fixture(scope="module")
def read(speech, attention) -> Seen:
    """x̂ where x, `speech`, should be read; attention looks where it would."""
    mixing, mean = random(WIDTH, WIDTH), random(WIDTH)
    return look([0.3 * x_TD @ mixing + 0.7 * random(*x_TD.shape) + mean for x_TD in speech], attention)


@pytest.fixture(scope="module")
def behind(read, seen, query) -> Moments:
    return moments_of(read, query, seen)


@pytest.mark.parametrize("rank", [2, 4])
def test_no_descent_gets_below_the_regression_on_what_is_read(weights, read, seen, behind, rank, balance=2.0):
    error = joint_error(weights, behind.query, balance, read, seen)
    factors = decompose_attended(weights, "joint", behind, balance).cut(rank, rank)
    ours = error(factors.up_k, factors.up_v, factors.down_k).item()
    found = descend(error, [start[:3] for start in starts(weights, behind, "joint", rank)])
    assert ours <= found * (1 + 1e-3)
    assert ours == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_what_is_read_gives_on_average_what_it_should(weights, read, seen, behind, layout):
    factors = decompose_attended(weights, layout, behind).cut(4, 4)
    ours_D = (read.frames_ND @ factors.key_weight.T + factors.key_bias).mean(0)
    torch.testing.assert_close(ours_D, (seen.frames_ND @ weights.key.T + weights.key_bias).mean(0))
    for head, (read_ND, wanted_ND) in enumerate(zip(read.attended_HND, seen.attended_HND, strict=True)):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        ours_E = (read_ND @ factors.value_weight[rows].T + factors.value_bias[rows]).mean(0)
        theirs_E = (wanted_ND @ weights.value[rows].T + weights.value_bias[rows]).mean(0)
        torch.testing.assert_close(ours_E, theirs_E)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_where_the_right_input_is_read_nothing_changes(weights, seen, moments, query, layout):
    behind = decompose_attended(weights, layout, moments_of(seen, query, seen)).cut(3, 4 if layout == "split" else 3)
    plain = decompose_attended(weights, layout, moments).cut(3, 4 if layout == "split" else 3)
    for name in ("key_weight", "value_weight", "key_bias", "value_bias"):
        torch.testing.assert_close(getattr(behind, name), getattr(plain, name), atol=1e-6, rtol=1e-6)


# ---- impossible --------------------------------------------------------------------------------------------


def test_it_needs_statistics_of_attention(weights, moments):
    without = replace(moments, attended_key=None, attended_values=None)
    with pytest.raises(ValueError, match=r"statistics of attention: collect_statistics\(..., attention=True\)"):
        decompose_attended(weights, "joint", without)
