"""Grouped heads are what a GQA layer can compute, and the best of it by the measure of each method."""

import copy
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCTC

import asrlib
from asrlib.conversion.convert import convert
from asrlib.conversion.grouped import group_heads
from asrlib.conversion.methods import grouping_methods
from asrlib.conversion.twins import factors_of
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import new_processor

WIDTH, LAYERS, HEADS = tiny.WIDTH, tiny.LAYERS, 4
SIZE = WIDTH // HEADS  # d_h
LEAST_SQUARES = grouping_methods()[1:]


def four_heads(positions: str | None = "relative", attention: str = "sdpa"):
    return tiny.conformer(positions, attention, num_attention_heads=HEADS)


@pytest.fixture(scope="module")
def statistics():
    return asrlib.collect_statistics(four_heads(), new_processor(), tiny.corpus(40))


def heads_of(matrix: torch.Tensor) -> torch.Tensor:
    """[D, ...] → [H, d_h, ...]"""
    return matrix.unflatten(0, (HEADS, SIZE))


def logits(model) -> torch.Tensor:
    batch = tiny.padded_batch(next(model.parameters()).dtype)
    with torch.no_grad():
        return model(**batch).logits


# ---- the mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_the_mean_is_transformers_own_layer_with_averaged_and_repeated_heads(tmp_path, kv_heads, positions):
    mha = four_heads(positions)
    group_heads(mha, kv_heads).save_pretrained(tmp_path)
    expected, each = copy.deepcopy(mha), HEADS // kv_heads
    with torch.no_grad():
        for layer in attention_modules(expected):
            for tensor in (layer.linear_k.weight, layer.linear_k.bias, layer.linear_v.weight, layer.linear_v.bias):
                for first in range(0, HEADS, each):
                    group = slice(first * SIZE, (first + each) * SIZE)
                    tensor[group] = (
                        sum(heads_of(tensor.clone())[first : first + each]).tile(each, *[1] * (tensor.dim() - 1)) / each
                    )
    ours = logits(AutoModelForCTC.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(ours, logits(expected), atol=2e-5, rtol=0)
    assert (ours - logits(mha)).abs().max() > 0.01


# ---- least squares -----------------------------------------------------------------------------------------


def claims(attention, layer, method: str, group: slice):
    """For keys, values: (wanted weights [n, d_h, D], factor F of the covariance F Fᵀ [D, D], metric [n, d_h, d_h])."""
    moments = layer.moments()
    identity, plain = torch.eye(WIDTH, dtype=torch.float64), torch.eye(SIZE, dtype=torch.float64).expand(HEADS, -1, -1)
    output = attention.linear_out.weight.detach().double().unflatten(1, (HEADS, SIZE)).transpose(0, 1)  # [H, D, d_h]
    metrics = (moments.query, output.mT @ output) if method == "two_sided" else (plain, plain)
    for linear, inputs, metric in zip(
        (attention.linear_k, attention.linear_v), (moments.key, moments.value), metrics, strict=True
    ):
        factor = identity if method == "svd" else torch.linalg.cholesky(inputs.covariance)
        yield heads_of(linear.weight.detach().double())[group], factor, metric[group]


def squared_error(difference: torch.Tensor, factor: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Σ_h E‖A_h^½ Δ_h (x − μ)‖² of Δ [n, d_h, D]."""
    felt = difference @ factor
    return torch.einsum("hie,hij,hje->", felt, metric, felt)


def descend(wanted: torch.Tensor, factor: torch.Tensor, metric: torch.Tensor, starts: int = 3) -> float:
    """The lowest error Σ_h E‖A_h^½ (W_h − R_h A)(x − μ)‖² that L-BFGS finds over R_h [d_h, d_h] and A [d_h, D].

    It seeks A times the factor of the covariance, an invertible one, which makes the descent no slower than for svd.
    """
    generator = torch.Generator().manual_seed(3)
    felt, best = wanted @ factor, math.inf
    scale = felt.abs().mean().sqrt()
    for _ in range(starts):
        maps, shared = (
            (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()
            for shape in ((len(wanted), SIZE, SIZE), (SIZE, WIDTH))
        )
        optimizer = torch.optim.LBFGS([maps, shared], max_iter=300, line_search_fn="strong_wolfe")

        def loss(maps=maps, shared=shared):
            return squared_error(felt - maps @ shared, torch.eye(WIDTH, dtype=torch.float64), metric)

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, loss().item())
    return best


@pytest.mark.parametrize("method", LEAST_SQUARES)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_no_descent_gets_below_and_the_mean_stays_above(statistics, method, kv_heads):
    mha, each = four_heads().double(), HEADS // kv_heads
    grouped, averaged = group_heads(mha, kv_heads, method, statistics), group_heads(mha, kv_heads)
    for theirs, ours, mean, layer in zip(
        *map(attention_modules, (mha, grouped, averaged)), statistics.layers, strict=True
    ):
        ours, mean = factors_of(ours.latent_kv), factors_of(mean.latent_kv)
        for first in range(0, HEADS, each):
            group = slice(first, first + each)
            for (wanted, factor, metric), product, average in zip(
                claims(theirs, layer, method, group),
                (ours.key_weight, ours.value_weight),
                (mean.key_weight, mean.value_weight),
                strict=True,
            ):
                error = squared_error(wanted - heads_of(product)[group], factor, metric).item()
                found = descend(wanted, factor, metric)
                assert error <= found * (1 + 1e-9)
                assert error == pytest.approx(found, rel=0.02)  # the descent is no straw man
                assert error < 0.9 * squared_error(wanted - heads_of(average)[group], factor, metric).item()


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_one_group_is_the_split_latent_itself(statistics, method):
    mha = four_heads().double()
    latent = convert(mha, 2 * SIZE, layout="split", method=method, statistics=statistics)
    torch.testing.assert_close(logits(group_heads(mha, 1, method, statistics)), logits(latent), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_the_bias_takes_the_mean_error_out(statistics, method):
    mha = four_heads().double()
    grouped = group_heads(mha, 2, method, statistics)
    for theirs, ours, layer in zip(attention_modules(mha), attention_modules(grouped), statistics.layers, strict=True):
        mean = layer.moments().key.mean
        torch.testing.assert_close(ours.linear_k(mean), theirs.linear_k(mean))
        torch.testing.assert_close(ours.linear_v(mean), theirs.linear_v(mean))


@pytest.mark.parametrize("method", grouping_methods())
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_as_many_as_there_are_heads_is_exact(method, positions):
    mha = four_heads(positions)
    statistics = asrlib.collect_statistics(mha, new_processor(), tiny.corpus(40))
    mha = mha.double()
    grouped = group_heads(mha, HEADS, method, statistics)
    torch.testing.assert_close(logits(grouped), logits(mha), atol=1e-9, rtol=0)


# ---- what it is, and what it costs -------------------------------------------------------------------------


def relative_gqa(layer, mha, kv_heads: int, x_BTD: torch.Tensor, positions_1PD: torch.Tensor) -> torch.Tensor:
    """A GQA layer written out: G keys and values of d_h, repeated, and all else of `layer` absorbed in other weights.

    Positions [1, 2T − 1, D] come with that of the farthest key in the past, T − 1 frames, first.
    """
    kv, each = layer.latent_kv, HEADS // kv_heads
    maps = [  # R_h, S_h [H, d_h, d_h]: of its rows of `up`, a head has the columns of its group
        torch.stack([heads_of(up.weight)[h][:, h // each * SIZE :][:, :SIZE] for h in range(HEADS)])
        for up in (kv.up_k, kv.up_v)
    ]
    back, inverse = maps[0].mT, torch.linalg.inv(maps[0])
    query = (back @ heads_of(mha.linear_q.weight)).flatten(0, 1)
    query_bias, u, v = (
        torch.einsum("hij,hj->hi", back, bias) for bias in (heads_of(mha.linear_q.bias), mha.pos_bias_u, mha.pos_bias_v)
    )
    position = (inverse @ heads_of(mha.linear_pos.weight)).flatten(0, 1)
    output_HDE = mha.linear_out.weight.unflatten(1, (HEADS, SIZE)).transpose(0, 1)
    output = (output_HDE @ maps[1]).transpose(0, 1).flatten(1)
    output_bias = mha.linear_out.bias + mha.linear_out.weight @ kv.up_v.bias

    def by_head(projected: torch.Tensor, heads: int) -> torch.Tensor:  # [B, T, ·] → [B, heads, T, d_h]
        return projected.unflatten(-1, (heads, SIZE)).transpose(1, 2)

    keys, values = (
        by_head(x_BTD @ down.weight.T, kv_heads).repeat_interleave(each, dim=1) for down in (kv.down_k, kv.down_v)
    )
    queries = by_head(x_BTD @ query.T + query_bias.flatten(), HEADS)
    frames = torch.arange(x_BTD.shape[1])
    distance = frames[:, None] - frames  # i − j
    projected = by_head(positions_1PD @ position.T, HEADS)[:, :, len(frames) - 1 - distance]  # [1, H, T, T, d_h]
    content = (queries + u[:, None]) @ keys.mT
    relative = torch.einsum("bhie,bhije->bhij", queries + v[:, None], projected.expand(len(x_BTD), -1, -1, -1, -1))
    weights = ((content + relative) / math.sqrt(SIZE)).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2) @ output.T + output_bias


@pytest.mark.parametrize("method", grouping_methods())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_gqa_layer_computes_the_same(statistics, method, kv_heads, frames=9):
    mha = four_heads(attention="eager").double()
    grouped = group_heads(mha, kv_heads, method, statistics)
    generator = torch.Generator().manual_seed(5)
    x_BTD, positions_1PD = (
        torch.randn(*shape, WIDTH, dtype=torch.float64, generator=generator)
        for shape in ((2, frames), (1, 2 * frames - 1))
    )
    with torch.no_grad():
        for theirs, ours in zip(attention_modules(mha), attention_modules(grouped), strict=True):
            wanted = ours(x_BTD, relative_position_embeddings=positions_1PD)[0]
            computed = relative_gqa(ours, theirs, kv_heads, x_BTD, positions_1PD)
            torch.testing.assert_close(computed, wanted, atol=1e-9, rtol=0)
            if kv_heads < HEADS:
                unchanged = theirs(x_BTD, relative_position_embeddings=positions_1PD)[0]
                assert (computed - unchanged).abs().max() > 0.01


@pytest.mark.parametrize("method", grouping_methods())
def test_a_head_reads_its_own_group_alone(statistics, method):
    for layer in attention_modules(group_heads(four_heads(), 2, method, statistics)):
        for up in (layer.latent_kv.up_k, layer.latent_kv.up_v):
            reads = up.weight.unflatten(0, (HEADS, SIZE)).unflatten(2, (2, SIZE)).abs().amax((1, 3))  # [H, G]
            assert (reads > 0).tolist() == [[True, False], [True, False], [False, True], [False, True]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_is_that_of_gqa(kv_heads, frames=1000):
    config = group_heads(four_heads(), kv_heads).config
    assert asrlib.kv_cache_bytes(config, frames, "float16") == 2 * kv_heads * SIZE * frames * 2 * LAYERS
    assert config.latent_key_dim == [kv_heads * SIZE] * LAYERS


def test_the_given_model_stays_as_it_is(statistics):
    mha, twin = four_heads().train(), four_heads()
    grouped = group_heads(mha, 2, "two_sided", statistics)
    assert mha.training and not grouped.training
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, mha.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kv_heads": 3}, "kv_heads is 3, but 4 heads fall into equal groups: choose one of 1, 2, 4"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"kv_heads": -2}, "kv_heads is -2"),
        ({"kv_heads": 8}, "kv_heads is 8"),
        ({"kv_heads": 2.0}, r"kv_heads is 2\.0"),
        ({"kv_heads": 2, "method": "median"}, "'median': choose one of mean, svd"),
        ({"kv_heads": 2, "method": "whitened"}, "'whitened' needs statistics"),
        ({"kv_heads": 2, "method": "two_sided"}, "'two_sided' needs statistics"),
    ],
)
def test_what_cannot_be_grouped_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        group_heads(four_heads(), **arguments)


def test_a_latent_model_is_refused():
    with pytest.raises(ValueError, match="latent already"):
        group_heads(convert(four_heads(), 8), 2)
