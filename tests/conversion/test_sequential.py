"""Conversion in sequence fits every layer to what really reaches it, and BatchNorm to what really leaves it."""

import copy

import pytest
import tiny
import torch
from alone import run_alone

from asrlib import collect_statistics, convert
from asrlib.conversion.convert import decompose
from asrlib.conversion.factorize import LayerWeights, Moments
from asrlib.conversion.layers import decompose_layer
from asrlib.conversion.sequential import convert_in_sequence
from asrlib.conversion.sums import InputSums
from asrlib.conversion.twins import factors_of
from asrlib.models.registry import attention_modules, family_of
from asrlib.models.scratch import new_processor

SUMS = dict(atol=2e-3, rtol=1e-4)  # float32 models, hundreds of frames
CORPUS = tiny.corpus(12)
METHODS = ["whitened", "two_sided", "attended"]


def conformer(positions: str | None = "relative", **changes):
    """A tiny one whose BatchNorm has gathered moments, as a trained one's has."""
    model = tiny.conformer(positions, **{"num_hidden_layers": 3, **changes})
    generator = torch.Generator().manual_seed(2)
    for norm in batch_norms(model):
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model


def batch_norms(model) -> list[torch.nn.Module]:
    return [layer.conv_module.batch_norm for layer in family_of(model.config).layers(model)]


def collected(model, batch_seconds: float = 4.0, **options):
    return collect_statistics(model, new_processor(), CORPUS, batch_seconds=batch_seconds, **options)


@pytest.fixture(scope="module", params=["relative", "rotary", None], ids=str)
def model(request):
    return conformer(request.param)


@pytest.fixture(scope="module")
def layout(model) -> str:
    return "split" if model.config.position_embeddings_type == "rotary" else "joint"


@pytest.fixture(scope="module")
def statistics(model):
    return collected(model)


@pytest.fixture(scope="module")
def relative():
    """(model, statistics) with relative positions."""
    model = conformer()
    return model, collected(model)


# ---- what the layers are fitted to -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(model, layout, statistics):
    """Not in sequence, and so narrow that what reaches its layers is another thing."""
    return convert(model, 4, layout=layout, method="whitened", statistics=statistics)


@pytest.fixture(scope="module")
def theirs(model):
    return run_alone(model, CORPUS)


@pytest.fixture(scope="module")
def ours(converted):
    return run_alone(converted, CORPUS)


@pytest.fixture(scope="module")
def fitted(model, converted, statistics):
    """The statistics that each layer is fitted to, where the layers before it become those of `converted`."""
    latent, found = copy.deepcopy(converted), []
    for attention in attention_modules(latent):
        for parameter in attention.latent_kv.parameters():
            torch.nn.init.zeros_(parameter)

    def fit(index, layer):
        found.append(layer)
        attention_modules(latent)[index].load_state_dict(attention_modules(converted)[index].state_dict())

    convert_in_sequence(model, latent, statistics.speech, fit, batch_norm=False, attention=True)
    return found


def check_sums(sums: InputSums, read: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Over lists of [T, D]."""
    read_ND, wanted_ND = torch.cat(read), torch.cat(wanted)
    assert sums.frames == len(read_ND)
    torch.testing.assert_close(sums.total, read_ND.sum(0), **SUMS)
    torch.testing.assert_close(sums.products, sum(torch.outer(x, x) for x in read_ND), **SUMS)
    torch.testing.assert_close(sums.wanted_total, wanted_ND.sum(0), **SUMS)
    expected = sum(torch.outer(wanted, x) for wanted, x in zip(wanted_ND, read_ND, strict=True))
    torch.testing.assert_close(sums.cross, expected, **SUMS)


def test_a_layer_is_fitted_to_what_reaches_it_through_those_converted_before(fitted, ours, theirs):
    assert len(fitted) == len(ours) == len(theirs)
    for index, (layer, here, there) in enumerate(zip(fitted, ours, theirs, strict=True)):
        check_sums(layer.key, here["keys_read"], there["keys_read"])
        check_sums(layer.value, here["values_read"], there["values_read"])
        queries_NHE = torch.cat(here["queries"])
        torch.testing.assert_close(layer.queries, torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE), **SUMS)
        reached_as_before = torch.allclose(layer.key.cross, layer.key.products, **SUMS)
        assert reached_as_before == (index == 0)


def test_attention_looks_where_it_does_in_the_unconverted_model(fitted, ours, theirs):
    for layer, here, there in zip(fitted, ours, theirs, strict=True):
        width, heads = tiny.WIDTH, len(layer.queries)
        around, cross = torch.zeros(width, width).double(), torch.zeros(width, width).double()
        means = [[] for _ in range(heads)], [[] for _ in range(heads)]
        for utterance, weights_HTT in enumerate(there["weights"]):
            x_TD, wanted_TD = here["keys_read"][utterance], there["keys_read"][utterance]
            for head, weights_TT in enumerate(weights_HTT):
                for weights_T in weights_TT:
                    apart_TD, wanted_apart_TD = x_TD - weights_T @ x_TD, wanted_TD - weights_T @ wanted_TD
                    around += (weights_T[:, None] * apart_TD).T @ apart_TD
                    cross += (weights_T[:, None] * wanted_apart_TD).T @ apart_TD
                for one, model in zip(means, (here, there), strict=True):
                    one[head].append(weights_TT @ model["values_read"][utterance])
        torch.testing.assert_close(layer.attention.key.products, around, **SUMS)
        torch.testing.assert_close(layer.attention.key.cross, cross, **SUMS)
        for sums, read, wanted in zip(layer.attention.values, *means, strict=True):
            check_sums(sums, read, wanted)
        attended, keys = layer.moments().attended_key, layer.moments().key
        assert torch.equal(attended.mean, keys.mean) and torch.equal(attended.wanted_mean, keys.wanted_mean)


def test_a_choice_is_made_by_the_output_on_what_reaches_a_layer(fitted, converted, ours, theirs):
    longest_first = sorted(range(len(CORPUS)), key=lambda i: -CORPUS[i].seconds)
    for layer, attention, here, there in zip(fitted, attention_modules(converted), ours, theirs, strict=True):
        apart = [here["attended"][i] - there["attended"][i] for i in longest_first[: len(layer.sample.kept_BT)]]
        with torch.no_grad():
            assert layer.sample.error(attention) == pytest.approx(torch.cat(apart).norm().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_every_layer_is_the_best_regression_on_what_reaches_it(relative, method):
    """In the model that comes out: brute force on every utterance alone, then the closed form of test_factorize."""
    model, statistics = relative
    latent = convert(
        model, 9, layout="split", method=method, statistics=statistics, sequential=True,
        decomposition=decompose(model, "split", method, statistics),  # of the right input: of no use here
    )  # fmt: skip
    layers = zip(
        attention_modules(model),
        attention_modules(latent),
        run_alone(model, CORPUS),
        run_alone(latent, CORPUS),
        strict=True,
    )
    for attention, attention_ours, there, here in layers:
        sums, queries_NHE = InputSums(tiny.WIDTH), torch.cat(here["queries"])
        sums.add(torch.cat(here["keys_read"]), torch.cat(there["keys_read"]))
        query = torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE) / len(queries_NHE)
        linear = attention.linear_k, attention.linear_v, attention.linear_out
        weights = LayerWeights(
            *(one.weight.detach() for one in linear), *(one.bias.detach() for one in linear[:2]), attention.num_heads
        )
        moments = Moments(sums.moments(), sums.moments(), query)
        expected = decompose_layer(weights, "split", method, moments).cut(*attention_ours.latent_kv.ranks)
        found = factors_of(attention_ours.latent_kv)
        for name in ("key_weight", "value_weight", "key_bias", "value_bias"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_the_last_layer_is_closer_to_what_it_should_be(method):
    model = tiny.conformer(num_hidden_layers=5)
    statistics = collected(model, attention=True)
    wanted_ND = torch.cat(run_alone(model, CORPUS)[-1]["output"])
    plain, sequential = (
        torch.cat(
            run_alone(convert(model, 6, method=method, statistics=statistics, sequential=one), CORPUS)[-1]["output"]
        )
        for one in (False, True)
    )
    assert (sequential - wanted_ND).norm() < 0.95 * (plain - wanted_ND).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_at_full_width_nothing_changes(model, statistics, layout, method, batch_norm):
    batch = tiny.padded_batch()
    for shape, width in {"joint": tiny.WIDTH, "split": 2 * tiny.WIDTH}.items():
        if shape == "split" or layout == "joint":
            latent = convert(
                model, width, layout=shape, method=method, statistics=statistics, sequential=True,
                reestimate_batch_norm=batch_norm,
            )  # fmt: skip
            with torch.no_grad():
                torch.testing.assert_close(latent(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)


def test_padding_does_not_leak(model, statistics, layout):
    options = dict(layout=layout, method="whitened", sequential=True, reestimate_batch_norm=True)
    batched, alone = (
        convert(model, 5, statistics=one, **options) for one in (statistics, collected(model, batch_seconds=0.01))
    )
    for theirs, ours in zip(attention_modules(batched), attention_modules(alone), strict=True):
        for name in ("key_weight", "value_weight", "key_bias", "value_bias"):
            expected, found = (getattr(factors_of(one.latent_kv), name) for one in (theirs, ours))
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    for theirs, ours in zip(batch_norms(batched), batch_norms(alone), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ours.running_var, theirs.running_var, atol=1e-3, rtol=1e-3)


# ---- BatchNorm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_channels_leave_batch_norm_as_distributed_as_they_left_it(model, statistics, layout, sequential):
    options = dict(layout=layout, method="whitened", statistics=statistics, sequential=sequential)
    matched, unmatched = (convert(model, 3, reestimate_batch_norm=one, **options) for one in (True, False))
    wanted, found, before = (
        [torch.cat(layer["normed"], 1) for layer in run_alone(one, CORPUS)] for one in (model, matched, unmatched)
    )
    for wanted_CN, found_CN, before_CN in zip(wanted, found, before, strict=True):
        torch.testing.assert_close(found_CN.mean(1), wanted_CN.mean(1), atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(found_CN.var(1), wanted_CN.var(1), atol=2e-3, rtol=1e-3)
        assert not torch.allclose(before_CN.var(1), wanted_CN.var(1), atol=2e-3, rtol=1e-3)
        assert not torch.allclose(before_CN.mean(1), wanted_CN.mean(1), atol=2e-3, rtol=1e-3)


def test_only_the_moments_of_batch_norm_are_matched(relative):
    model, statistics = relative
    options = dict(method="whitened", statistics=statistics)
    plain, matched = (convert(model, 4, reestimate_batch_norm=one, **options) for one in (False, True))
    expected, changed = plain.state_dict(), set()
    for name, value in matched.state_dict().items():
        if not torch.equal(value, expected[name]):
            changed.add(name)
    wanted = {name for name in expected if name.endswith(("running_mean", "running_var"))}
    assert changed == wanted and len(wanted) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("dead", [False, True])
def test_batch_norm_of_an_exact_model_keeps_its_moments(dead):
    model = conformer()
    if dead:  # a channel that never varies
        with torch.no_grad():
            family_of(model.config).layers(model)[1].conv_module.depthwise_conv.weight[3] = 0
    latent = convert(model, tiny.WIDTH, statistics=collected(model), reestimate_batch_norm=True)
    for theirs, ours in zip(batch_norms(model), batch_norms(latent), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.running_var, theirs.running_var, atol=1e-6, rtol=1e-6)


# ---- the models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_models_are_left_as_they_should_be(implementation):
    model = conformer(attention=implementation)
    statistics = collected(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    latent = convert(model, 5, method="attended", statistics=statistics, sequential=True, reestimate_batch_norm=True)
    assert model.training and not any(module.training for module in latent.modules())
    for one in (model, latent):
        assert one.config._attn_implementation == implementation
        for module in one.modules():
            assert not module._forward_pre_hooks and not module._forward_hooks
        assert {value.device.type for value in one.state_dict().values()} == {"cpu"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_converted_model_can_be_trained(relative):
    model, statistics = relative
    latent = convert(
        model, 5, method="two_sided", statistics=statistics, sequential=True, reestimate_batch_norm=True
    ).train()
    latent(**tiny.padded_batch()).loss.backward()
    for attention in attention_modules(latent):
        for name, parameter in attention.latent_kv.named_parameters():
            # softmax cancels the keys' bias
            assert parameter.grad is not None and (parameter.grad.abs().max() > 1e-6 or name == "up_k.bias"), name
    assert not torch.equal(batch_norms(latent)[0].running_mean, batch_norms(model)[0].running_mean)


def test_what_has_nothing_to_go_by_is_refused(relative):
    model, statistics = relative
    for option in ("sequential", "reestimate_batch_norm"):
        with pytest.raises(ValueError, match="need calibration speech"):
            convert(model, 4, method="svd", **{option: True})
    with pytest.raises(ValueError, match="'svd' does not look at what converted layers change: leave out sequential"):
        convert(model, 4, method="svd", statistics=statistics, sequential=True)
