"""Every kind of attention is its formula, of speech alone, and caches what it says."""

import pytest
import torch
import written_out
from torch import nn
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerSelfAttention

from asrlib.attention.kinds import KINDS, SelfAttention, attention_kind
from asrlib.attention.relative import sinusoids
from asrlib.models.encoder import SpeechEncoderConfig

WIDTH, HEADS, FRAMES = 16, 4, 7
SPLIT = dict(latent_dim=[9, 20], latent_layout="split", latent_key_dim=[6, 7])
VARIANTS = [
    ("mha", {}),
    ("mla_simple", dict(latent_dim=[5, 9])),
    ("mla_simple", SPLIT),
    ("mla", dict(latent_dim=[5, 9], query_latent_dim=6)),
    ("mla", SPLIT),
    ("gqa", dict(num_key_value_heads=1)),
    ("gqa", dict(num_key_value_heads=2)),
    ("gqa", dict(num_key_value_heads=4)),
    ("linear", {}),
]
CLOSE = dict(rtol=0, atol=1e-12)


def config(kind: str, implementation: str = "sdpa", **changes) -> SpeechEncoderConfig:
    settings = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, attention_dropout=0.0)
    made = SpeechEncoderConfig(attention=kind, **settings | changes)
    made._attn_implementation = implementation
    return made


def layer(kind: str, index: int = 0, implementation: str = "sdpa", **changes) -> SelfAttention:
    """Float64, random, and no bias is zero."""
    attention = attention_kind(kind)(config(kind, implementation, **changes), index).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return attention


def inputs(frames: int = FRAMES, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [B, T, D], positions [1, 2T−1, D])"""
    x_BTD = torch.randn(batch, frames, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x_BTD, sinusoids(frames, WIDTH, dtype=torch.float64)


# ---- formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_every_kind_is_its_formula(kind, changes, index, implementation):
    attention = layer(kind, index, implementation, **changes)
    x_BTD, positions_1PD = inputs()
    with torch.no_grad():
        output_BTD, weights_BHTT = attention(x_BTD, None, positions_1PD)
    assert (weights_BHTT is None) == (implementation == "sdpa" or kind == "linear")
    for utterance, x_TD in enumerate(x_BTD):
        expected_TD, expected_HTT = written_out.attention(attention.state_dict(), x_TD, positions_1PD[0], HEADS)
        torch.testing.assert_close(output_BTD[utterance], expected_TD, **CLOSE)
        if weights_BHTT is not None:
            torch.testing.assert_close(weights_BHTT[utterance], expected_HTT, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_what_is_padded_with_does_not_matter(kind, changes, implementation):
    attention = layer(kind, implementation=implementation, **changes)
    x_BTD, positions_1PD = inputs()
    lengths = (FRAMES, 4, 0)  # of the last there is nothing
    kept_BT = torch.arange(FRAMES) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        output_BTD, _ = attention(x_BTD.masked_fill(~kept_BT[..., None], 1e6), kept_BT, positions_1PD)
        assert torch.isfinite(output_BTD).all()
        for utterance, length in enumerate(lengths[:2]):
            alone_1TD, _ = attention(x_BTD[utterance, None, :length], None, sinusoids(length, WIDTH).double())
            torch.testing.assert_close(output_BTD[utterance, :length], alone_1TD[0], **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_every_weight_learns_and_padding_teaches_nothing(kind, changes, implementation):
    attention = layer(kind, implementation=implementation, **changes).train()
    kept_BT = torch.arange(FRAMES) < torch.tensor([FRAMES, 4, 0])[:, None]
    gradients = []
    for filling in (0.0, 1e4):
        x_BTD, positions_1PD = inputs()
        x_BTD = x_BTD.masked_fill(~kept_BT[..., None], filling).requires_grad_()
        attention.zero_grad()
        attention(x_BTD, kept_BT, positions_1PD)[0][kept_BT].square().sum().backward()
        assert not x_BTD.grad[~kept_BT].any() and x_BTD.grad[kept_BT].any(-1).all()
        gradients.append({name: parameter.grad for name, parameter in attention.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)
        cancelled = kind != "linear" and name in ("linear_k.bias", "latent_kv.up_k.bias")  # softmax does
        assert (gradient.abs().max() > 1e-6) != cancelled, name


@pytest.mark.parametrize("kind", ["mla", "mla_simple"])
def test_each_layer_has_the_latent_that_the_config_says(kind):
    assert [layer(kind, index, **SPLIT).latent_kv.ranks for index in (0, 1)] == [(6, 3), (7, 13)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_dropped_in_training_alone(implementation):
    dropping, plain = (layer("mha", 0, implementation, attention_dropout=rate) for rate in (0.5, 0.0))
    x_BTD, positions_1PD = inputs()
    with torch.no_grad():
        expected = plain(x_BTD, None, positions_1PD)[0]
        assert torch.equal(dropping(x_BTD, None, positions_1PD)[0], expected)
        assert (dropping.train()(x_BTD, None, positions_1PD)[0] - expected).abs().max() > 0.1


# ---- one kind as another -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mha_is_that_of_transformers(implementation):
    ours = layer("mha", implementation=implementation)
    wav2vec2 = Wav2Vec2ConformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, position_embeddings_type="relative", attention_dropout=0.0
    )
    wav2vec2._attn_implementation = implementation
    theirs = Wav2Vec2ConformerSelfAttention(wav2vec2).double().eval()
    theirs.load_state_dict(ours.state_dict())  # strict: they have the same names
    x_BTD, positions_1PD = inputs()
    kept_BT = torch.arange(FRAMES) < torch.tensor([FRAMES, 4, 2])[:, None]
    least = torch.finfo(torch.float64).min
    beyond_B1TT = torch.zeros(3, 1, FRAMES, FRAMES, dtype=torch.float64).masked_fill(~kept_BT[:, None, None], least)
    with torch.no_grad():
        for our_mask, their_mask in ((None, None), (kept_BT, beyond_B1TT)):
            our_output, our_weights = ours(x_BTD, our_mask, positions_1PD)
            their_output, their_weights = theirs(x_BTD, their_mask, positions_1PD)
            torch.testing.assert_close(our_output, their_output, **CLOSE)
            if implementation == "eager":
                torch.testing.assert_close(our_weights, their_weights, **CLOSE)


def copied(kind: str, weights: dict, **changes) -> SelfAttention:
    """A layer of `kind` with `weights`, which must be all that it has."""
    attention = layer(kind, **changes)
    attention.load_state_dict(weights)
    return attention


def as_latent(mha: SelfAttention, **changes) -> dict:
    """The weights of `mha` behind latents that are the input itself."""
    weights = mha.state_dict()
    for which in "kv":
        for part in ("weight", "bias"):
            weights[f"latent_kv.up_{which}.{part}"] = weights.pop(f"linear_{which}.{part}")
    return weights | {f"latent_kv.{name}.weight": torch.eye(WIDTH).double() for name in changes.pop("downs")}


@pytest.mark.parametrize(
    ("layout", "latent_dim", "downs"), [("joint", WIDTH, ["down"]), ("split", 2 * WIDTH, ["down_k", "down_v"])]
)
@pytest.mark.parametrize("kind", ["mla", "mla_simple"])
def test_a_latent_that_is_the_input_is_mha(kind, layout, latent_dim, downs):
    mha = layer("mha")
    weights = as_latent(mha, downs=downs)
    if kind == "mla":
        weights["linear_q.down.weight"] = torch.eye(WIDTH).double()
        weights |= {f"linear_q.up.{part}": weights.pop(f"linear_q.{part}") for part in ("weight", "bias")}
    query_latent_dim = WIDTH if kind == "mla" else None
    ours = copied(kind, weights, latent_dim=[latent_dim] * 2, latent_layout=layout, query_latent_dim=query_latent_dim)
    x_BTD, positions_1PD = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(x_BTD, None, positions_1PD)[0], mha(x_BTD, None, positions_1PD)[0], **CLOSE)


def test_gqa_of_as_many_keys_as_heads_is_mha():
    mha = layer("mha")
    ours = copied("gqa", mha.state_dict(), num_key_value_heads=HEADS)
    x_BTD, positions_1PD = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(x_BTD, None, positions_1PD)[0], mha(x_BTD, None, positions_1PD)[0], **CLOSE)


def test_gqa_is_mha_whose_neighbouring_heads_have_equal_keys_and_values():
    ours = layer("gqa", num_key_value_heads=2)
    weights = ours.state_dict()
    for name in ("linear_k.weight", "linear_k.bias", "linear_v.weight", "linear_v.bias"):
        first, second = weights[name].chunk(2)
        weights[name] = torch.cat([first, first, second, second])
    x_BTD, positions_1PD = inputs()
    with torch.no_grad():
        mha = copied("mha", weights)
        torch.testing.assert_close(ours(x_BTD, None, positions_1PD)[0], mha(x_BTD, None, positions_1PD)[0], **CLOSE)


# ---- what is cached ----------------------------------------------------------------------------------------


def test_linear_attention_needs_no_more_of_the_past_than_it_says():
    """Two sums, taken over pieces of the past in any order, are all that a query meets."""
    attention = layer("linear")
    x_BTD, _ = inputs(frames=9, batch=1)
    with torch.no_grad():
        query, key, value = (
            attention.heads(linear(x_BTD))[0] for linear in (attention.linear_q, attention.linear_k, attention.linear_v)
        )
        query, key = (nn.functional.elu(tensor) + 1 for tensor in (query, key))
        states = [
            (key[:, piece].mT @ value[:, piece], key[:, piece].sum(1, keepdim=True))
            for piece in (slice(5, 9), slice(0, 2), slice(2, 5))
        ]
        assert {sum(part.numel() for part in state) for state in states} == {
            attention.cached_numbers(attention.config, 0, frames) for frames in (1, 9, 10_000)
        }
        products, total = (sum(parts) for parts in zip(*states, strict=True))
        output_HTE = query @ products / (query @ total.mT)
        expected = attention.linear_out(output_HTE.transpose(0, 1).flatten(1))
        torch.testing.assert_close(attention(x_BTD)[0][0], expected, **CLOSE)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS[:-1])
def test_the_cache_is_what_the_layer_makes_of_each_frame(kind, changes, index):
    attention = layer(kind, index, **changes)
    if kind.startswith("mla"):
        makers = [module for name, module in attention.latent_kv.named_modules() if name.startswith("down")]
    else:
        makers = [attention.linear_k, attention.linear_v]
    made = []
    for maker in makers:
        maker.register_forward_hook(lambda _, args, output: made.append(output[0].numel()))
    x_BTD, positions_1PD = inputs()
    attention(x_BTD, None, positions_1PD)
    assert len(made) == len(makers)  # a joint latent is made once
    assert sum(made) == attention.cached_numbers(attention.config, index, FRAMES)


@pytest.mark.parametrize(
    ("kind", "changes", "numbers"),
    [
        ("mha", {}, 2 * WIDTH * 10),
        ("mla_simple", dict(latent_dim=[5, 9]), 9 * 10),
        ("mla", dict(latent_dim=[5, 9]), 9 * 10),
        ("gqa", dict(num_key_value_heads=2), 2 * 2 * 4 * 10),
        ("linear", {}, HEADS * 4 * 5),
    ],
)
def test_ten_frames_of_the_second_layer(kind, changes, numbers):
    assert KINDS[kind].cached_numbers(config(kind, **changes), 1, 10) == numbers


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="attention is 'flash': choose one of mha, mla, mla_simple, gqa, linear"):
        attention_kind("flash")
