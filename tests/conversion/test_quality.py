"""The quality of a conversion is what explicit formulas give, from the weights, utterance by utterance."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from asrlib import analyze_compression_quality, convert
from asrlib.conversion.quality import EXCELLENT, GOOD, summarise_quality, verdict
from asrlib.models.inference import padding_silenced
from asrlib.models.registry import attention_modules, frame_counts

ERRORS = ["key_error", "value_error", "score_error", "output_error"]
COLUMNS = ["key_error", "value_error", "score_error", "attention_tv", "output_error", "output_cosine"]
SPLIT = dict(layout="split")


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def linear(x: np.ndarray, *layers) -> np.ndarray:
    for layer in layers:
        x = x @ numbers(layer.weight).T + (0 if layer.bias is None else numbers(layer.bias))
    return x


def position_code(offset: int, width: int) -> np.ndarray:
    angles = offset * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], -1).ravel()


def turned(x_THE: np.ndarray) -> np.ndarray:
    frames, _, size = x_THE.shape
    angles = np.arange(frames)[:, None, None] * 10_000.0 ** (-np.arange(0, size, 2) / size)
    z = (x_THE[..., : size // 2] + 1j * x_THE[..., size // 2 :]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def by_hand(module, x: np.ndarray) -> dict[str, np.ndarray]:
    """score(i, j) = ((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h, one pair of frames at a time."""
    frames, heads, kind = len(x), module.num_heads, module.position_embeddings_type
    read = turned(x.reshape(frames, heads, -1)).reshape(x.shape) if kind == "rotary" else x
    to_keys, to_values = [module.linear_k], [module.linear_v]
    if kv := getattr(module, "latent_kv", None):
        down_k, down_v = (kv.down, kv.down) if kv.layout == "joint" else (kv.down_k, kv.down_v)
        to_keys, to_values = [down_k, kv.up_k], [down_v, kv.up_v]
    keys, values = linear(read, *to_keys), linear(x, *to_values)
    queries, scores = linear(read, module.linear_q), np.zeros((heads, frames, frames))
    for h, part in enumerate(np.split(np.arange(x.shape[1]), heads)):
        for i, j in np.ndindex(frames, frames):
            q, k = queries[i, part], keys[j, part]
            scores[h, i, j] = q @ k / np.sqrt(len(part))
            if kind == "relative":
                u, v = numbers(module.pos_bias_u[h]), numbers(module.pos_bias_v[h])
                p = linear(position_code(i - j, x.shape[1]), module.linear_pos)[part]
                scores[h, i, j] = ((q + u) @ k + (q + v) @ p) / np.sqrt(len(part))
    weights = torch.from_numpy(scores).softmax(-1).numpy()
    mixed = [weights[h] @ part for h, part in enumerate(np.split(values, heads, 1))]
    output, centred = linear(np.concatenate(mixed, 1), module.linear_out), scores - scores.mean(-1, keepdims=True)
    return dict(key_error=keys, value_error=values, score_error=centred, weights=weights, output_error=output)


def table_by_hand(mha, mla, batch) -> pd.DataFrame:
    """The batch runs as a whole; the frames of each utterance are cut from what the layers read."""
    frames, read = frame_counts(mha, batch["attention_mask"].sum(-1)), []
    for module in attention_modules(mha):
        module.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True)
    with torch.no_grad(), padding_silenced(mha, frames):
        mha(**batch)
    rows = []
    for x_BTD, *pair in zip(read, attention_modules(mla), attention_modules(mha), strict=True):
        both = [[by_hand(m, numbers(x[:n])) for m in pair] for x, n in zip(x_BTD, frames, strict=True)]
        pooled = {name: [np.concatenate([u[i][name].ravel() for u in both]) for i in (0, 1)] for name in both[0][0]}
        weights, their_weights = pooled.pop("weights")
        y, z = (outputs.reshape(-1, tiny.WIDTH) for outputs in pooled["output_error"])
        row = {name: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for name, (ours, theirs) in pooled.items()}
        tv = abs(weights - their_weights).sum() / 2 / (pair[0].num_heads * int(frames.sum()))
        cosines = (y * z).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(z, axis=1)
        rows.append(row | {"attention_tv": tv, "output_cosine": cosines.mean()})
    return pd.DataFrame(rows)[COLUMNS]


@pytest.mark.parametrize("positions, layout", [("relative", "joint"), ("rotary", "split"), (None, "split")])
def test_every_column_is_what_the_formulas_give(positions, layout):
    mha = tiny.conformer(positions).double()
    mla, batch = convert(mha, [6, 10], layout=layout), tiny.padded_batch(torch.float64)
    table, expected = analyze_compression_quality(mha, mla, batch), table_by_hand(mha, mla, batch)
    assert table[["layer", "latent_dim"]].values.tolist() == [[0, 6], [1, 10]]
    pd.testing.assert_frame_equal(table[COLUMNS], expected, rtol=1e-5)  # transformers' position table is float32
    assert (expected["attention_tv"] > 0.05).all() and (expected["output_cosine"] < 0.99).all()


def test_scores_count_where_their_weights_underflow_in_float32(tiny_model):
    mla, batch = convert(tiny_model, 16, **SPLIT), tiny.padded_batch()
    for layer in [*attention_modules(tiny_model), *attention_modules(mla)]:
        layer.linear_q.weight.data.mul_(60)
    table = analyze_compression_quality(tiny_model, mla, batch)
    pd.testing.assert_frame_equal(table[COLUMNS], table_by_hand(tiny_model, mla, batch), rtol=1e-3)
    attention_modules(tiny_model)[0].linear_q.weight.data.mul_(1e4)  # underflow in float64 too
    assert np.isfinite(analyze_compression_quality(tiny_model, mla, batch)).all(axis=None)


OUTPUT, WEIGHTS = {"output_error", "output_cosine"}, {"score_error", "attention_tv"}
FAULTS = [
    (lambda kv: None, set()),
    (lambda kv: kv.up_k.bias.data.add_(3), {"key_error"}),  # softmax cancels it
    (lambda kv: kv.up_v.bias.data[::2].add_(3), {"value_error"} | OUTPUT),
    (lambda kv: kv.up_k.weight.data.copy_(kv.up_k.weight.data.T.clone()), {"key_error"} | WEIGHTS | OUTPUT),
    (lambda kv: kv.up_v.weight.data.copy_(kv.up_v.weight.data.T.clone()), {"value_error"} | OUTPUT),
]


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("fault, columns", FAULTS)
def test_a_fault_shows_where_it_belongs_and_nowhere_else(positions, fault, columns):
    mha = tiny.conformer(positions).double()
    mla = convert(mha, 2 * tiny.WIDTH, **SPLIT)
    for layer in attention_modules(mla):
        fault(layer.latent_kv)
    table = analyze_compression_quality(mha, mla, tiny.padded_batch(torch.float64))[COLUMNS]
    table["output_cosine"] -= 1
    assert (table[sorted(columns)].abs() > 1e-3).all(axis=None)
    assert (table.drop(columns=columns).abs() < 1e-12).all(axis=None)


def test_padding_does_not_count(tiny_model):
    mla, batch = convert(tiny_model, 6), tiny.padded_batch()
    sound, mask = batch["input_values"], batch["attention_mask"]
    table = analyze_compression_quality(tiny_model, mla, batch)
    louder = {"input_values": sound + 9 * (1 - mask), "attention_mask": mask}
    longer = {name: torch.nn.functional.pad(batch[name], (0, 5_000)) for name in louder}
    mute = {"input_values": sound[[0, 1, 2, 0]], "attention_mask": torch.cat([mask, mask[:1] * 0])}
    for other in (louder, longer, mute):
        pd.testing.assert_frame_equal(table, analyze_compression_quality(tiny_model, mla, other))
    with pytest.raises(ValueError, match=r"shorter than a frame \(lengths \[0\]\)"):
        analyze_compression_quality(tiny_model, mla, {name: tensor[3:] for name, tensor in mute.items()})
    unmasked = analyze_compression_quality(tiny_model, mla, {"input_values": sound})
    all_kept = analyze_compression_quality(tiny_model, mla, batch | {"attention_mask": torch.ones_like(mask)})
    pd.testing.assert_frame_equal(unmasked, all_kept)
    assert (unmasked[COLUMNS] != table[COLUMNS]).all(axis=None)


def test_a_wider_latent_is_never_further_off_and_a_full_one_is_exact(tiny_model):
    latents, batch = [convert(tiny_model, width, **SPLIT) for width in (4, 16, 32)], tiny.padded_batch()
    narrow, wide, full = (analyze_compression_quality(tiny_model, mla, batch) for mla in latents)
    assert (narrow[ERRORS] > wide[ERRORS]).all(axis=None)
    assert (full[[*ERRORS, "attention_tv"]] < 1e-5).all(axis=None)
    assert full["output_cosine"].tolist() == pytest.approx([1, 1], abs=1e-9)


def test_half_precision_is_compared_in_full(tiny_model):
    mla = convert(tiny_model.bfloat16(), 32, **SPLIT)  # all that is off is the rounding of the factors
    table = analyze_compression_quality(tiny_model, mla, tiny.padded_batch())
    batch = tiny.padded_batch(torch.bfloat16)
    pd.testing.assert_frame_equal(table[COLUMNS], table_by_hand(tiny_model, mla, batch), rtol=0.1)


def state(model) -> list:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [m.config._attn_implementation for m in [model, *attention_modules(model)]],
        [(t.dtype, t.device, t.requires_grad, hash(numbers(t).tobytes())) for t in tensors],
    ]


@pytest.mark.parametrize("positions, attention", [("relative", "eager"), ("rotary", "sdpa")])
def test_the_models_stay_as_they_are_and_can_be_trained(positions, attention):
    mha = tiny.conformer(positions, attention, max_source_positions=4)  # fewer than the batch's frames
    mla = convert(mha, 8, **SPLIT)
    batch = {name: tensor.flip(0) for name, tensor in tiny.padded_batch().items()}  # last the one as long as the batch
    table = analyze_compression_quality(mha, mla, batch)
    for model in (mha, mla):
        model.train().freeze_feature_encoder()
        model.wav2vec2_conformer.encoder.layers[1].eval()
    before = state(mha), state(mla)
    pd.testing.assert_frame_equal(table, analyze_compression_quality(mha, mla, batch))  # without dropout
    assert (state(mha), state(mla)) == before
    for model in (mha, mla):
        model.train()(**batch).loss.backward()


def test_only_a_standard_and_a_latent_model_can_be_compared(tiny_model):
    mla = convert(tiny_model, 8)
    for pair in [(mla, tiny_model), (mla, mla), (tiny_model, tiny_model)]:
        with pytest.raises(ValueError, match="give first the one with standard attention"):
            analyze_compression_quality(*pair, tiny.padded_batch())


def test_a_summary_is_the_root_mean_square_of_errors_the_mean_of_the_rest_and_a_verdict():
    table = pd.DataFrame({name: [0.03, 0.04] for name in COLUMNS}).assign(layer=[0, 1], latent_dim=8, fraction=0.5)
    summary = summarise_quality(table)
    assert {type(value) for value in summary.values()} == {float, str} and summary.pop("verdict") == "excellent"
    assert summary == pytest.approx(dict.fromkeys(COLUMNS, 0.035) | dict.fromkeys(ERRORS, 0.00125**0.5))
    assert summarise_quality(table.assign(output_error=[0.1, 0.2]))["verdict"] == "good"
    assert verdict(EXCELLENT - 1e-9) == "excellent" and verdict(EXCELLENT) == verdict(GOOD - 1e-9) == "good"
    assert verdict(GOOD) == verdict(2) == verdict(float("nan")) == "needs fine-tuning"
