"""Encoders of our own are converted, measured, fine-tuned and evaluated as those of transformers are."""

import copy

import pytest
import tiny
import torch

from asrlib import (
    analyze_compression_quality,
    collect_statistics,
    convert,
    evaluate,
    kv_cache_bytes,
    load,
    to_standard_attention,
)
from asrlib.attention.kinds import KINDS
from asrlib.conversion.convert import decompose, measure_sensitivity
from asrlib.conversion.grouped import group_heads, to_grouped_attention
from asrlib.conversion.methods import METHODS, grouping_methods, latent_methods
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.features import feature_statistics
from asrlib.measuring.transcribing import transcribe
from asrlib.models.blocks import BLOCKS
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import new_processor
from asrlib.training.training import TrainingSettings, train

WIDTH, LAYERS = tiny.WIDTH, tiny.LAYERS
EXACT = {"joint": WIDTH, "split": 2 * WIDTH}  # latent_dim that loses nothing
PROCESSOR = new_processor("conformer", tiny.MEL_BINS)
CORPUS = tiny.corpus(12)
ENCODERS = list(BLOCKS)


@pytest.fixture(scope="module", params=ENCODERS)
def model(request):
    return encoder(request.param)


def encoder(kind: str, **changes):
    """One that hears the differences between frames, as a trained one does."""
    model = tiny.encoder(kind, **changes)
    model.normalise_by(*feature_statistics(CORPUS, PROCESSOR))
    return model


def collected(model):
    return collect_statistics(model, PROCESSOR, CORPUS, batch_seconds=4.0, attention=True)


@pytest.fixture(scope="module")
def statistics(model):
    return collected(model)


def heard(count: int = 5) -> dict[str, torch.Tensor]:
    """A padded batch as a model hears it."""
    batch = SpeechCollator(PROCESSOR)(list(SpeechDataset(tiny.corpus(count, seed=50), PROCESSOR)))
    assert not batch["attention_mask"].all()
    return {name: values for name, values in batch.items() if name != "labels"}


def logits(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of speech alone [N, V]."""
    batch = heard()
    with torch.no_grad():
        logits_BTV = model(batch["input_features"].to(dtype), batch["attention_mask"]).logits
    frames_B = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    return logits_BTV[torch.arange(logits_BTV.shape[1]) < frames_B[:, None]]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", EXACT)
def test_a_latent_of_full_rank_changes_nothing(model, layout, implementation):
    mha = copy.deepcopy(model).double()
    mha.set_attn_implementation(implementation)
    mla = convert(mha, EXACT[layout], layout=layout)
    assert (mla.config.attention, mla.config.latent_layout) == ("mla_simple", layout)
    assert mla.config._attn_implementation == implementation and mla.dtype == torch.float64 and not mla.training
    theirs, ours = mha.state_dict(), mla.state_dict()
    for name in theirs.keys() & ours.keys():  # feature_mean, feature_std and the moments of BatchNorm too
        assert torch.equal(theirs[name], ours[name]), name
    assert all("linear_k" in name or "linear_v" in name for name in theirs.keys() - ours.keys())
    expected = logits(mha, torch.float64)
    torch.testing.assert_close(logits(mla, torch.float64), expected, rtol=0, atol=1e-10)
    table = analyze_compression_quality(mha, mla, heard())
    assert table[["key_error", "value_error", "score_error", "output_error"]].to_numpy().max() < 1e-6


@pytest.mark.parametrize("layout", EXACT)
def test_there_and_back_again(model, layout, tmp_path):
    mha = copy.deepcopy(model).double()
    settings = mha.config.to_dict()
    mla = convert(mha, [5, 9], layout=layout)
    back = to_standard_attention(mla)
    torch.testing.assert_close(logits(back, torch.float64), logits(mla, torch.float64), rtol=0, atol=1e-10)
    assert error(logits(back, torch.float64), logits(mha, torch.float64)) > 0.01
    assert back.state_dict().keys() == mha.state_dict().keys()
    unlike = {name for name, value in back.config.to_dict().items() if settings.get(name) != value}
    assert unlike <= {"dtype", "architectures", "_name_or_path"}
    assert mha.config.to_dict() == settings
    mla.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0].double(), torch.float64), logits(mla.float().double(), torch.float64))


@pytest.mark.parametrize("attention", sorted(KINDS.keys() - {"mha"}))
def test_only_standard_attention_is_converted(attention):
    other = tiny.encoder(attention=attention)
    said = "latent already" if attention.startswith("mla") else f"attention is '{attention}': only 'mha' can be made"
    for attempt in (convert, decompose):
        with pytest.raises(ValueError, match=said):
            attempt(other, *([8] if attempt is convert else []))
    with pytest.raises(ValueError, match=said):
        group_heads(other, 2)


# ---- calibration -------------------------------------------------------------------------------------------


def test_statistics_are_those_of_every_utterance_alone(model, statistics):
    read = [[] for _ in range(LAYERS)]
    hooks = [
        attention.linear_k.register_forward_hook(lambda _, args, output, of=of: of.append(args[0][0].double()))
        for attention, of in zip(attention_modules(model), read, strict=True)
    ]
    with torch.no_grad():
        for utterance in CORPUS:
            model(**PROCESSOR(utterance.audio(), sampling_rate=16_000, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    for layer, inputs in zip(statistics.layers, read, strict=True):
        x_ND = torch.cat(inputs)
        assert layer.frames == len(x_ND) == statistics.frames
        torch.testing.assert_close(layer.key.total, x_ND.sum(0), atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(layer.key.products, x_ND.T @ x_ND, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("layout", EXACT)
@pytest.mark.parametrize("method", latent_methods())
def test_every_method_converts_and_calibration_helps(model, statistics, method, layout):
    if layout not in METHODS[method].layouts:
        with pytest.raises(ValueError, match="keys and values apart"):
            convert(model, 6, layout=layout, method=method, statistics=statistics)
        return
    narrow = convert(model, 6, layout=layout, method=method, statistics=statistics)
    wide = convert(model, 14, layout=layout, method=method, statistics=statistics)
    tables = [analyze_compression_quality(model, one, heard()) for one in (narrow, wide)]
    assert all(len(table) == LAYERS and table.notna().all(axis=None) for table in tables)
    assert (tables[0].output_error > 1e-3).all()
    assert (tables[1].output_error < tables[0].output_error).all()
    if method != "svd" and "joint" in METHODS[method].layouts:  # a latent of one head is too narrow for that
        svd = analyze_compression_quality(model, convert(model, 6, layout=layout), heard())
        felt = ["key_error", "value_error"] if method == "whitened" else ["score_error", "output_error"]
        assert tables[0][felt].mean().sum() < svd[felt].mean().sum()


@pytest.mark.parametrize("layout", EXACT)
@pytest.mark.parametrize("ranks", ["energy", "sensitivity"])
def test_a_budget_is_spent_where_it_is_needed(model, statistics, ranks, layout):
    mla = convert(model, cache_cut=0.75, layout=layout, method="whitened", ranks=ranks, statistics=statistics)
    assert sum(mla.config.latent_dim) == LAYERS * WIDTH // 2
    assert (len(mla.config.latent_key_dim) == LAYERS) == (layout == "split")
    assert error(logits(mla), logits(model)) < 0.9


@pytest.mark.parametrize("layout", EXACT)
def test_sensitivities_fall_to_nothing_with_the_rank(model, statistics, layout):
    costs = measure_sensitivity(model, layout, statistics, decompose(model, layout, "whitened", statistics))
    assert len(costs) == LAYERS * {"joint": 1, "split": 2}[layout]
    for cost in costs:
        ranks = sorted(cost)
        assert ranks[0] == 1 and cost[1] > 1e-5 and all(value > -1e-6 for value in cost.values())
        assert cost[ranks[-1]] < cost[1] / 2


# ---- in sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["whitened", "two_sided", "attended"])
def test_in_sequence_nothing_is_lost_at_full_rank(model, statistics, method):
    settings = dict(method=method, statistics=statistics, sequential=True, reestimate_batch_norm=True)
    assert error(logits(convert(model, WIDTH, **settings)), logits(model)) < 1e-3


def second_layer_values(model) -> torch.Tensor:
    """On calibration speech, each utterance alone [N, D]."""
    attention, values = attention_modules(model)[1], []
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, output: values.append(module.linear_v(kwargs["hidden_states"])[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for utterance in CORPUS:
            model(**PROCESSOR(utterance.audio(), sampling_rate=16_000, return_tensors="pt"))
    hook.remove()
    return torch.cat(values)


def test_in_sequence_a_layer_answers_for_the_one_before_it(model, statistics):
    settings = dict(layout="split", method="whitened", statistics=statistics)
    apart, sequential = (convert(model, 8, sequential=sequential, **settings) for sequential in (False, True))
    wanted = second_layer_values(model)
    assert error(second_layer_values(sequential), wanted) < 0.98 * error(second_layer_values(apart), wanted)


def test_moments_of_batch_norm_are_matched_where_there_are_any(model, statistics):
    mla = convert(model, 3, method="whitened", statistics=statistics, reestimate_batch_norm=True)
    moved = [
        not torch.equal(ours, theirs)
        for (name, ours), theirs in zip(mla.named_buffers(), model.buffers(), strict=True)
        if "running" in name
    ]
    assert moved == [True] * len(moved) and len(moved) == {"conformer": 4, "branchformer": 0}[model.config.encoder]


# ---- grouped heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_mean_of_heads_is_the_gqa_encoder_of_averaged_weights(model, kv_heads):
    weights = model.state_dict()
    for name in [name for name in weights if ".linear_k." in name or ".linear_v." in name]:
        heads = weights[name].unflatten(0, (kv_heads, 4 // kv_heads, -1))
        weights[name] = heads.mean(1).flatten(0, 1)
    gqa = tiny.encoder(model.config.encoder, "gqa", num_key_value_heads=kv_heads)
    gqa.load_state_dict(weights)
    ours = logits(group_heads(model, kv_heads))
    torch.testing.assert_close(ours, logits(gqa), rtol=0, atol=2e-5)
    assert (error(ours, logits(model)) > 0.01) == (kv_heads < 4)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("method", grouping_methods())
def test_a_gqa_model_computes_what_its_latent_twin_does(model, statistics, method, kv_heads):
    twin = group_heads(model, kv_heads, method, statistics).double()
    grouped = to_grouped_attention(twin, kv_heads)
    assert grouped.config.attention == "gqa" and grouped.config.num_key_value_heads == kv_heads
    torch.testing.assert_close(logits(grouped), logits(twin), rtol=0, atol=1e-9)
    assert kv_cache_bytes(grouped.config, 1000) == kv_cache_bytes(twin.config, 1000)


def test_only_what_caches_that_many_heads_becomes_a_gqa_model(model):
    twin = group_heads(model, 2)
    for other, kv_heads in ((twin, 1), (model, 2), (convert(model, 16), 2)):
        with pytest.raises(ValueError, match=f"does not cache {kv_heads} keys and values"):
            to_grouped_attention(other, kv_heads)
    with pytest.raises(ValueError, match="wav2vec2-conformer-mla has no grouped-query attention"):
        to_grouped_attention(group_heads(tiny.conformer(), 1), 1)


@pytest.mark.parametrize("method", grouping_methods()[1:])
def test_least_squares_group_heads_better_than_the_mean(model, statistics, method):
    felt = "output_error" if method == "two_sided" else "key_error"
    tables = {
        name: analyze_compression_quality(model, group_heads(model, 2, name, statistics), heard())
        for name in ("mean", method)
    }
    assert (tables[method][felt] < tables["mean"][felt]).all()


# ---- fine-tuning and evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["latent", "attention", "all"])
def test_fine_tuning_with_a_teacher_brings_it_nearer(model, trainable, tmp_path):
    mla = convert(model, 4)
    before, start = copy.deepcopy(mla.state_dict()), error(logits(mla), logits(model))
    settings = TrainingSettings(
        trainable=trainable, epochs=4, learning_rate=3e-3, batch_seconds=3.0, ctc_weight=0.0, kl_weight=1.0,
        hidden_weight=1.0, device="cpu", patience=10,
    )  # fmt: skip
    result = train(mla, PROCESSOR, CORPUS, tiny.corpus(4, "validation", 90), tmp_path, settings, teacher=model)
    assert result.steps > 2 and not mla.training
    assert result.trainable_parameters == sum(p.numel() for p in mla.parameters() if p.requires_grad)
    changed = {name for name, values in mla.state_dict().items() if not torch.equal(values, before[name])}
    part = {"latent": ".latent_kv.", "attention": ".self_attn.", "all": ""}[trainable]
    assert changed and all(part in name for name in changed)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < losses[0]
    if result.best_step == result.steps:  # else the weights are those of an earlier evaluation
        assert error(logits(mla), logits(model)) < start


@pytest.mark.parametrize("attention", KINDS)
def test_every_kind_is_trained_from_scratch(attention, tmp_path):
    model = tiny.encoder(attention=attention, time_masks=1, frequency_masks=1, hidden_dropout=0.1)
    settings = TrainingSettings(trainable="all", epochs=2, learning_rate=1e-3, batch_seconds=3.0, device="cpu")
    result = train(model, PROCESSOR, CORPUS, tiny.corpus(4, "validation", 90), tmp_path, settings)
    assert result.steps > 2 and all(row["loss"] > 0 for row in result.history if "loss" in row)
    assert all(torch.isfinite(values).all() for values in model.state_dict().values())


def test_transcripts_are_those_of_the_utterance_alone(model):
    found, logits_of = {}, {}
    for seconds in (0.1, 60.0):
        found[seconds] = transcribe(
            model, PROCESSOR, CORPUS, seconds, record=lambda i, x_TV, s=seconds: logits_of.update({(s, i): x_TV})
        )
    assert found[0.1] == found[60.0] and any(one["hypothesis"] for one in found[60.0])
    for i in range(len(CORPUS)):
        torch.testing.assert_close(logits_of[0.1, i], logits_of[60.0, i], rtol=0, atol=1e-5)
    result = evaluate(convert(model, 8), PROCESSOR, CORPUS)
    assert result.words == 2 * len(CORPUS) and result.wer > 0
