"""Statistics are those of unpadded frames alone, whatever the batches."""

import pytest
import tiny
import torch

from asrlib import collect_statistics, convert
from asrlib.conversion.quality import analyze_compression_quality
from asrlib.models.families import attention_modules, new_processor


@pytest.fixture(scope="module")
def model():
    return tiny.conformer()


@pytest.fixture(scope="module")
def statistics(model):
    return collect_statistics(model, new_processor(), tiny.corpus(12), batch_seconds=4.0)


def inputs_alone(model, corpus) -> list[torch.Tensor]:
    """What each layer's attention reads, float64 [frames, width], every utterance by itself."""
    processor, seen = new_processor(), [[] for _ in attention_modules(model)]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, rows=rows: rows.append(kwargs["hidden_states"][0].double()), with_kwargs=True
        )
        for module, rows in zip(attention_modules(model), seen, strict=True)
    ]
    with torch.no_grad():
        for utterance in corpus:
            model(**processor(utterance.audio(), sampling_rate=16_000, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in seen]


def test_they_are_those_of_every_utterance_alone(model, statistics):
    for layer, module, x_ND in zip(
        statistics.layers, attention_modules(model), inputs_alone(model, tiny.corpus(12)), strict=True
    ):
        assert layer.frames == len(x_ND)
        torch.testing.assert_close(layer.total, x_ND.sum(0), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(layer.products, x_ND.T @ x_ND, atol=1e-3, rtol=1e-4)
        with torch.no_grad():
            queries = module.linear_q(x_ND.float()).double().unflatten(-1, (module.num_heads, -1)) + module.pos_bias_u
        for head in range(module.num_heads):
            expected = queries[:, head].T @ queries[:, head]
            torch.testing.assert_close(layer.queries[head], expected.detach(), atol=1e-3, rtol=1e-4)


def test_the_size_of_a_batch_changes_nothing(model, statistics):
    alone = collect_statistics(model, new_processor(), tiny.corpus(12), batch_seconds=0.01)
    for ours, theirs in zip(statistics.layers, alone.layers, strict=True):
        assert ours.frames == theirs.frames
        torch.testing.assert_close(ours.products, theirs.products, atol=1e-3, rtol=1e-4)


def test_the_covariance_is_around_the_mean_and_hardly_shrunk(model, statistics):
    x_ND = inputs_alone(model, tiny.corpus(12))[1]
    moments = statistics.layers[1].moments()
    torch.testing.assert_close(moments.mean, x_ND.mean(0), atol=1e-4, rtol=1e-4)
    expected = torch.cov(x_ND.T, correction=0)
    assert (moments.covariance - expected).norm() < 1e-3 * expected.norm()
    assert torch.linalg.eigvalsh(moments.covariance)[0] > 0


def test_the_model_is_left_without_hooks(model, statistics):
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibration_on_a_test_split_is_refused(model):
    with pytest.raises(ValueError, match="would spoil the test"):
        collect_statistics(model, new_processor(), tiny.corpus(4, split="test-clean"))


def test_too_little_speech_is_refused_and_little_warned_of():
    wide = tiny.conformer(hidden_size=64, intermediate_size=64)
    with pytest.raises(ValueError, match="give at least 13 s"):
        collect_statistics(wide, new_processor(), tiny.corpus(1))
    with pytest.warns(UserWarning, match="13 s are enough"):
        collect_statistics(wide, new_processor(), tiny.corpus(6))


def test_only_as_much_speech_as_asked_is_taken(model):
    some = collect_statistics(model, new_processor(), tiny.corpus(40), max_seconds=7.0)
    assert 4.0 < some.frames / 50 < 7.5


def test_two_sided_takes_the_balance_that_serves_the_output_best(model, statistics):
    batch = {name: value for name, value in tiny.padded_batch().items() if name != "labels"}
    errors = {
        method: analyze_compression_quality(model, convert(model, 5, method=method, statistics=statistics), batch)
        for method in ("svd", "two_sided")
    }
    mean = {method: table["output_error"].mean() for method, table in errors.items()}
    assert mean["two_sided"] < mean["svd"]


@pytest.mark.parametrize(("method", "layout"), [("whitened", "joint"), ("two_sided", "joint"), ("two_sided", "split")])
def test_every_method_is_exact_at_full_rank(model, statistics, method, layout):
    batch = tiny.padded_batch()
    width = tiny.WIDTH if layout == "joint" else 2 * tiny.WIDTH
    latent = convert(model, width, layout=layout, method=method, statistics=statistics)
    with torch.no_grad():
        torch.testing.assert_close(latent(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)
