"""Converted models are numpy's truncated SVD, keep what they are not meant to lose, and can be converted back."""

import numpy as np
import pytest
import tiny
import torch

from asrlib import collect_statistics, convert, to_standard_attention
from asrlib.conversion.convert import decompose, latent_dim_for
from asrlib.conversion.twins import factors_of
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import new_processor

WIDTH, LAYERS = tiny.WIDTH, tiny.LAYERS


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix)
    return left[:, :rank] * values[:rank] @ right[:rank]


def key_and_value_weights(model) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = attention_modules(model)
    return [tuple(m.weight.detach().double().numpy() for m in (a.linear_k, a.linear_v)) for a in layers]


# ---- the factorisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [2, 7, 12, 31])
def test_a_split_latent_is_the_truncated_svd_of_each(latent_dim):
    mha = tiny.conformer().double()
    mla = convert(mha, latent_dim, layout="split")
    for (keys, values), layer in zip(key_and_value_weights(mha), attention_modules(mla), strict=True):
        kv = layer.latent_kv
        expected_k = truncated(keys, latent_dim // 2)  # an odd number is the value's
        expected_v = truncated(values, latent_dim - latent_dim // 2)
        np.testing.assert_allclose((kv.up_k.weight @ kv.down_k.weight).detach(), expected_k, atol=1e-12)
        np.testing.assert_allclose((kv.up_v.weight @ kv.down_v.weight).detach(), expected_v, atol=1e-12)


@pytest.mark.parametrize("latent_dim", [1, 5, 12])
def test_a_joint_latent_is_the_truncated_svd_of_both_at_equal_norm(latent_dim):
    mha = tiny.conformer().double()
    with torch.no_grad():  # unequal, or the scaling to unit norm would not show
        for layer in attention_modules(mha):
            layer.linear_v.weight.mul_(0.1)
    mla = convert(mha, latent_dim)
    for (keys, values), layer in zip(key_and_value_weights(mha), attention_modules(mla), strict=True):
        norms = np.linalg.norm(keys), np.linalg.norm(values)
        expected = truncated(np.concatenate([keys / norms[0], values / norms[1]]), latent_dim)
        kv = layer.latent_kv
        np.testing.assert_allclose((kv.up_k.weight @ kv.down.weight).detach(), expected[:WIDTH] * norms[0], atol=1e-12)
        np.testing.assert_allclose((kv.up_v.weight @ kv.down.weight).detach(), expected[WIDTH:] * norms[1], atol=1e-12)


@pytest.mark.parametrize(("layout", "latent_dim"), [("joint", 6), ("split", 9)])
def test_keys_and_values_are_the_low_rank_product_plus_the_bias(layout, latent_dim):
    mha = tiny.conformer().double()
    mla = convert(mha, latent_dim, layout=layout)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for theirs, ours in zip(attention_modules(mha), attention_modules(mla), strict=True):
        factors = factors_of(ours.latent_kv)
        assert torch.allclose(ours.linear_k(x), x @ factors.key_weight.T + theirs.linear_k.bias, atol=1e-12)
        assert torch.allclose(ours.linear_v(x), x @ factors.value_weight.T + theirs.linear_v.bias, atol=1e-12)


@pytest.mark.parametrize("latent_dim", [WIDTH, WIDTH + 5, 2 * WIDTH])
def test_a_joint_latent_wider_than_the_rank_is_exact_and_as_wide_as_asked(latent_dim):
    mha = tiny.conformer().double()
    mla = convert(mha, latent_dim)
    assert mla.config.latent_dim == [latent_dim] * LAYERS
    for (keys, values), layer in zip(key_and_value_weights(mha), attention_modules(mla), strict=True):
        factors = factors_of(layer.latent_kv)
        assert factors.down_k.shape == (latent_dim, WIDTH) and torch.isfinite(factors.down_k).all()
        np.testing.assert_allclose(factors.key_weight, keys, atol=1e-12)
        np.testing.assert_allclose(factors.value_weight, values, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["linear_k", "linear_v"])
def test_damaged_weights_are_refused(tiny_model, poison, name):
    with torch.no_grad():
        getattr(attention_modules(tiny_model)[1], name).weight[0, 0] = poison
    with pytest.raises(ValueError, match=f"the {'key' if name == 'linear_k' else 'value'} weight holds NaN or inf"):
        convert(tiny_model, 8)


def test_one_decomposition_serves_many_widths():
    mha = tiny.conformer()
    decomposition = decompose(mha, "split")
    for latent_dim in (4, [3, 20]):
        once, anew = (
            convert(mha, latent_dim, layout="split", decomposition=decomposition),
            convert(mha, latent_dim, layout="split"),
        )
        for name, weight in anew.state_dict().items():
            assert torch.equal(weight, once.state_dict()[name]), name


def test_a_decomposition_of_the_other_layout_is_refused(tiny_model):
    with pytest.raises(ValueError, match="layout is split, but the decomposition was made for the other one"):
        convert(tiny_model, 8, layout="split", decomposition=decompose(tiny_model, "joint"))


# ---- whole models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_everything_but_keys_and_values_is_kept(dtype):
    mha = tiny.conformer().to(dtype)
    with torch.no_grad():
        mha.wav2vec2_conformer.encoder.layers[0].conv_module.batch_norm.running_mean.normal_()
    mla = convert(mha, 6)
    assert mla.dtype == dtype and not mla.training
    theirs, ours = mha.state_dict(), mla.state_dict()
    kept = theirs.keys() & ours.keys()
    assert {name.rsplit(".", 2)[1] for name in theirs.keys() - kept} == {"linear_k", "linear_v"}
    assert all(".self_attn.latent_kv." in name for name in ours.keys() - kept)
    for name in kept:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    for a, b in zip(attention_modules(mha), attention_modules(mla), strict=True):
        assert torch.equal(a.linear_v.bias, b.latent_kv.up_v.bias)  # unlike b_k, softmax does not cancel b_v
        assert torch.equal(a.linear_k.bias, b.latent_kv.up_k.bias)


def test_the_given_model_stays_as_it_is():
    mha, twin = tiny.conformer(), tiny.conformer()
    mha.train().requires_grad_(True)
    config = mha.config.to_dict()
    mla = convert(mha, 6)
    with torch.no_grad():
        for parameter in mla.parameters():
            parameter.add_(1)
    mla.config.conv_dim[0] = 99
    assert mha.training and mha.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in mha.parameters())
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, mha.state_dict()[name]), name


@pytest.mark.parametrize(("positions", "layout"), [("relative", "joint"), ("relative", "split"), ("rotary", "split")])
def test_there_and_back_again(positions, layout):
    mha = tiny.conformer(positions, "eager").double()
    mla = convert(mha, [5, 9], layout=layout)
    back = to_standard_attention(mla)
    assert type(back) is type(mha) and back.dtype == torch.float64 and not back.training
    assert back.config._attn_implementation == "eager"
    assert not hasattr(back.config, "latent_dim")
    batch = tiny.padded_batch(torch.float64)
    with torch.no_grad():
        assert torch.allclose(back(**batch).logits, mla(**batch).logits, rtol=0, atol=1e-10)
        assert not torch.allclose(back(**batch).logits, mha(**batch).logits, atol=1e-2)
    again = convert(back, [5, 9], layout=layout)  # of rank 5 and 9 already: nothing more is lost
    with torch.no_grad():
        if layout == "split":
            assert torch.allclose(again(**batch).logits, mla(**batch).logits, rtol=0, atol=1e-10)


def test_what_cannot_be_converted_is_refused(tiny_model):
    mla = convert(tiny_model, 8)
    with pytest.raises(ValueError, match="latent already"):
        convert(mla, 8)
    with pytest.raises(ValueError, match="latent already"):
        decompose(mla)
    with pytest.raises(ValueError, match="has no latent attention"):
        to_standard_attention(tiny_model)


# ---- how wide ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 20, 144, 512, 1024])
def test_a_budget_is_used_up_and_never_exceeded(width):
    for percent in [*range(1, 97), 93.75, 96.875]:
        cut = percent / 100
        latent_dim = latent_dim_for(cut, width)
        assert latent_dim / (2 * width) <= 1 - cut + 1e-9
        assert (latent_dim + 1) / (2 * width) > 1 - cut + 1e-9
    assert latent_dim_for(0.9, 10) == 2  # (1 − 0.9) · 20 is a little less than 2 in floating point


def test_a_budget_becomes_a_width(tiny_model):
    assert convert(tiny_model, cache_cut=0.75).config.latent_dim == [WIDTH // 2] * LAYERS
    assert convert(tiny_model, cache_cut=0.8, layout="split").config.latent_dim == [6] * LAYERS
    assert convert(tiny_model, np.int64(6)).config.latent_dim == [6] * LAYERS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"latent_dim": 2 * WIDTH + 1}, "latent_dim is 33"),
        ({"latent_dim": [4]}, "1 widths for 2 layers"),
        ({"latent_dim": [4, 4, 4]}, "3 widths for 2 layers"),
        ({"latent_dim": [4, 40]}, "latent_dim is 40"),
        ({"latent_dim": 4.5}, "4.5: it must be a whole number"),
        ({"latent_dim": "8"}, "'8': it must be a whole number"),
        ({"cache_cut": 0}, "cache_cut is 0: it must lie between"),
        ({"cache_cut": 1}, "cache_cut is 1: it must lie between"),
        ({"cache_cut": 0.98}, "cache_cut is 0.98, which leaves less than one .* the deepest cut is 0.96875"),
        ({"cache_cut": 0.96, "layout": "split"}, "between 2 and 32"),
        ({"latent_dim": 8, "cache_cut": 0.5}, "one of the two"),
        ({}, "one of the two"),
        ({"latent_dim": 8, "method": "magic"}, "'magic': choose one of svd"),
    ],
)
def test_impossible_widths_are_refused(tiny_model, arguments, said):
    with pytest.raises(ValueError, match=said):
        convert(tiny_model, **arguments)


@pytest.mark.parametrize("latent_dim", [2, 5, 16, 24, 31, 32])
def test_energy_spends_the_whole_budget_of_a_split_latent(latent_dim):
    mha = tiny.conformer()
    with torch.no_grad():  # all that the keys of the first layer say is one number
        weight = attention_modules(mha)[0].linear_k.weight
        weight.copy_(torch.outer(weight[:, 0], weight[0]))
    config = convert(mha, latent_dim, ranks="energy", layout="split").config
    assert sum(config.latent_dim) == LAYERS * latent_dim
    assert config.latent_key_dim[0] == max(1, WIDTH - (2 * WIDTH - latent_dim) * LAYERS)  # until all others are full


@pytest.mark.parametrize("latent_dim", [3, [3, 9]])
def test_a_width_below_the_multiple_is_refused(tiny_model, latent_dim):
    with pytest.raises(ValueError, match="no room for the 4 that each needs"):
        convert(tiny_model, latent_dim, rank_multiple=4)


def test_a_choice_needs_statistics_to_choose_by(tiny_model):
    statistics = collect_statistics(tiny_model, new_processor(), tiny.corpus(12))
    decomposition = decompose(tiny_model, "joint", "two_sided", statistics)
    with pytest.raises(ValueError, match="no statistics were given to choose by"):
        convert(tiny_model, 4, method="two_sided", decomposition=decomposition)


# ---- keys and values of unequal ranks ----------------------------------------------------------------------


def with_thin_values(rank: int = 3) -> torch.nn.Module:
    """Float64; what all values say of the input is `rank` numbers, and nothing else is lost in leaving the others."""
    mha = tiny.conformer().double()
    with torch.no_grad():
        for layer, (_, values) in zip(attention_modules(mha), key_and_value_weights(mha), strict=True):
            layer.linear_v.weight.copy_(torch.from_numpy(truncated(values, rank)))
    return mha


@pytest.mark.parametrize("method", ["svd", "two_sided"])
@pytest.mark.parametrize("ranks", ["energy", "sensitivity"])
def test_unequal_ranks_are_those_cuts_of_the_decomposition(method, ranks):
    mha = with_thin_values().float()
    statistics = collect_statistics(mha, new_processor(), tiny.corpus(12))
    decomposition = decompose(mha, "split", method, statistics)
    mla = convert(mha, 9, layout="split", ranks=ranks, statistics=statistics, decomposition=decomposition)
    keys, widths = mla.config.latent_key_dim, mla.config.latent_dim
    assert sum(widths) == 9 * LAYERS < 2 * sum(keys)
    for layer, [one], rank_k, width in zip(attention_modules(mla), decomposition, keys, widths, strict=True):
        assert layer.latent_kv.ranks == (rank_k, width - rank_k)
        expected, factors = one.cut(rank_k, width - rank_k), factors_of(layer.latent_kv)
        for name in ("down_k", "down_v", "up_k", "up_v", "key_bias", "value_bias"):
            assert torch.equal(getattr(factors, name), getattr(expected, name).float().double()), name


def test_energy_finds_the_unequal_ranks_that_lose_nothing(tmp_path):
    mha, exact = with_thin_values(3), WIDTH + 3
    mla = convert(mha, exact, layout="split", ranks="energy")
    assert mla.config.latent_key_dim == [WIDTH] * LAYERS and mla.config.latent_dim == [exact] * LAYERS
    mla.save_pretrained(tmp_path)
    again = type(mla).from_pretrained(tmp_path, dtype=torch.float64)
    batch = tiny.padded_batch(torch.float64)
    with torch.no_grad():
        theirs = mha(**batch).logits
        assert torch.allclose(again(**batch).logits, theirs, rtol=0, atol=1e-10)
        assert torch.allclose(to_standard_attention(again)(**batch).logits, theirs, rtol=0, atol=1e-10)
        halves = convert(mha, exact, layout="split")
        assert not torch.allclose(halves(**batch).logits, theirs, rtol=0, atol=1e-3)


def test_there_and_back_again_with_unequal_ranks():
    mla = convert(with_thin_values(), 9, layout="split", ranks="energy")
    assert all(2 * rank > width for rank, width in zip(mla.config.latent_key_dim, mla.config.latent_dim, strict=True))
    back = to_standard_attention(mla)
    assert not any(hasattr(back.config, name) for name in ("latent_dim", "latent_layout", "latent_key_dim"))
    batch = tiny.padded_batch(torch.float64)
    with torch.no_grad():
        assert torch.allclose(back(**batch).logits, mla(**batch).logits, rtol=0, atol=1e-10)


# ---- defaults ----------------------------------------------------------------------------------------------


def test_the_default_is_the_best_that_the_statistics_allow(tiny_model):
    speech = new_processor(), tiny.corpus()
    plain, watched = (collect_statistics(tiny_model, *speech, attention=attention) for attention in (False, True))
    with pytest.warns(UserWarning, match="by the weights alone"):
        ours = [convert(tiny_model, cache_cut=0.75)]
    ours += [convert(tiny_model, cache_cut=0.75, statistics=statistics) for statistics in (plain, watched)]
    named = [("svd", "uniform", None), ("two_sided", "sensitivity", plain), ("attended", "sensitivity", watched)]
    for latent, (method, ranks, statistics) in zip(ours, named, strict=True):
        named = convert(tiny_model, cache_cut=0.75, method=method, ranks=ranks, statistics=statistics)
        assert_same_weights(latent, named)
    by_width = convert(tiny_model, 5, statistics=watched)
    assert_same_weights(by_width, convert(tiny_model, 5, method="attended", ranks="uniform", statistics=watched))


@pytest.mark.parametrize("how", [{"latent_dim": tiny.WIDTH}, {"latent_dim": 5, "method": "svd"}])
def test_nobody_is_warned_who_loses_nothing_or_chose_it(tiny_model, how, recwarn):
    convert(tiny_model, **how)
    assert not [warning for warning in recwarn if "by the weights alone" in str(warning.message)]


def assert_same_weights(ours, theirs) -> None:
    assert ours.config.latent_dim == theirs.config.latent_dim
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
