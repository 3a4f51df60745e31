"""Conformer and Branchformer are what their papers say, hear speech alone, and are citizens of transformers."""

import pytest
import tiny
import torch
import written_out
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, set_seed
from written_out import feed_forward, gelu, layer_norm, part, swish

from asrlib import load, to_standard_attention
from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import KINDS, attention_kind
from asrlib.attention.relative import sinusoids
from asrlib.data.audio import SAMPLE_RATE
from asrlib.models.blocks import BLOCKS, FrameBatchNorm, Subsampling
from asrlib.models.encoder import SpeechEncoderConfig
from asrlib.models.registry import attention_modules, frame_counts, frames_of
from asrlib.models.scratch import new_processor

ENCODERS, LAYERS = list(BLOCKS), tiny.LAYERS
LATENT = dict(latent_dim=[9, 6], latent_layout="split", latent_key_dim=[4, 5])
EVERY = [(encoder, attention) for encoder in ENCODERS for attention in KINDS]
CLOSE = dict(rtol=0, atol=1e-12)


def batch(dtype: torch.dtype = torch.float32, labels: bool = False) -> dict[str, torch.Tensor]:
    tensors = tiny.features(dtype)
    return tensors if labels else {name: values for name, values in tensors.items() if name != "labels"}


# ---- what the papers say -----------------------------------------------------------------------------------


def depthwise(weights: dict, x_TC: torch.Tensor) -> torch.Tensor:
    """Σ_k w_ck x_{t+k−K/2, c} + b_c, with zeros beyond the ends."""
    kernel_CK = weights["depthwise.weight"][:, 0]
    reach = kernel_CK.shape[1] // 2
    rows = []
    for t in range(len(x_TC)):
        near = [(k, t + k - reach) for k in range(kernel_CK.shape[1]) if 0 <= t + k - reach < len(x_TC)]
        rows.append(weights["depthwise.bias"] + sum(kernel_CK[:, k] * x_TC[at] for k, at in near))
    return torch.stack(rows)


def convolution_module(weights: dict, x_TD: torch.Tensor) -> torch.Tensor:
    value_TD, gate_TD = written_out.linear(weights, "pointwise1", layer_norm(weights, "layer_norm", x_TD)).chunk(2, -1)
    y_TD = depthwise(weights, value_TD / (1 + (-gate_TD).exp()))
    norm = part(weights, "batch_norm.")
    y_TD = (y_TD - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return written_out.linear(weights, "pointwise2", swish(y_TD))


def conformer_block(weights: dict, x_TD: torch.Tensor, attend) -> torch.Tensor:
    """Gulati et al. 2020, section 2.4."""
    x_TD = x_TD + 0.5 * feed_forward(part(weights, "ffn1."), x_TD)
    x_TD = x_TD + attend(layer_norm(weights, "self_attn_layer_norm", x_TD))
    x_TD = x_TD + convolution_module(part(weights, "conv_module."), x_TD)
    x_TD = x_TD + 0.5 * feed_forward(part(weights, "ffn2."), x_TD)
    return layer_norm(weights, "final_layer_norm", x_TD)


def branchformer_block(weights: dict, x_TD: torch.Tensor, attend) -> torch.Tensor:
    """Peng et al. 2022, sections 3.1 to 3.4."""
    global_TD = attend(layer_norm(weights, "self_attn_layer_norm", x_TD))
    mlp = part(weights, "cgmlp.")
    z_TC = gelu(written_out.linear(mlp, "linear1", layer_norm(mlp, "layer_norm", x_TD)))
    z1_TC, z2_TC = z_TC.chunk(2, -1)
    local_TD = written_out.linear(mlp, "linear2", z1_TC * depthwise(mlp, layer_norm(mlp, "gate_norm", z2_TC)))
    merged_TD = written_out.linear(weights, "merge", torch.cat([global_TD, local_TD], -1))
    return layer_norm(weights, "final_layer_norm", x_TD + merged_TD)


def subsampled(weights: dict, x_MF: torch.Tensor) -> torch.Tensor:
    """Two convolutions of 3 × 3 and stride 2, term by term."""
    maps = x_MF[None]
    for name in ("conv1", "conv2"):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        frames, bins = ((size - 1) // 2 for size in maps.shape[1:])
        terms = [
            torch.einsum("oc,ctf->otf", kernel[:, :, a, b], maps[:, a : a + 2 * frames : 2, b : b + 2 * bins : 2])
            for a in range(3)
            for b in range(3)
        ]
        maps = (sum(terms) + bias[:, None, None]).clamp(min=0)
    return written_out.linear(weights, "linear", maps.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(("encoder", "attention"), EVERY)
def test_it_is_what_the_papers_say(encoder, attention):
    changes = LATENT if attention.startswith("mla") else {}
    model = tiny.encoder(encoder, attention, **changes).double()
    features_MF = batch(torch.float64)["input_features"][0, :39]  # 8 encoder frames
    weights = model.state_dict()
    x_TD = subsampled(part(weights, "subsampling."), (features_MF - weights["feature_mean"]) / weights["feature_std"])
    positions_PD = sinusoids(len(x_TD), tiny.WIDTH).double()[0]
    block = {"conformer": conformer_block, "branchformer": branchformer_block}[encoder]
    expected = [x_TD]
    for index in range(LAYERS):
        of_layer = part(weights, f"layers.{index}.")
        of_attention = part(of_layer, "self_attn.")
        x_TD = block(of_layer, x_TD, lambda x_TD, w=of_attention: written_out.attention(w, x_TD, positions_PD, 4)[0])
        expected.append(x_TD)
    with torch.no_grad():
        output = model(features_MF[None], output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-10)
    expected_TV = written_out.linear(weights, "lm_head", x_TD)
    torch.testing.assert_close(output.logits[0], expected_TV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_dropout_is_on_in_training_and_every_weight_learns(encoder):
    model = tiny.encoder(encoder, hidden_dropout=0.1, attention_dropout=0.2).train()
    rates = []  # of every time that something is dropped
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, output: rates.append(module.p))
    set_seed(0)
    model(**batch(labels=True)).loss.backward()
    assert rates == [0.1] * (1 + LAYERS * {"conformer": 6, "branchformer": 4}[encoder])
    for name, parameter in model.named_parameters():
        if not name.endswith(("linear_k.bias", "conv_module.depthwise.bias")):  # softmax and BatchNorm cancel them
            assert parameter.grad.abs().max() > 1e-7, name


# ---- padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("encoder", "attention"), EVERY)
def test_logits_are_those_of_the_utterance_alone(encoder, attention, implementation):
    model = tiny.encoder(encoder, attention).double()
    model.set_attn_implementation(implementation)
    heard = batch(torch.float64)
    features_BMF, mask_BM = heard["input_features"], heard["attention_mask"]
    features_BMF = torch.cat([features_BMF, features_BMF[:2]])  # the last two are too short for a frame
    mask_BM = torch.cat([mask_BM, torch.arange(mask_BM.shape[1]) < torch.tensor([[6], [0]])])
    garbage = 1e3 * torch.randn(features_BMF.shape, generator=torch.Generator().manual_seed(2)).double()
    filled_BMF = torch.where(mask_BM[..., None], features_BMF, garbage)
    counts = frame_counts(model, mask_BM.sum(-1)).tolist()
    assert counts == [14, 10, 5, 0, 0]
    with torch.no_grad():
        logits_BTV = model(filled_BMF, mask_BM).logits
        assert torch.isfinite(logits_BTV).all()
        for logits_TV, features_MF, kept_M, count in zip(logits_BTV, features_BMF, mask_BM, counts, strict=True):
            if count:
                alone_TV = model(features_MF[kept_M][None]).logits[0]
                torch.testing.assert_close(logits_TV[:count], alone_TV, rtol=0, atol=1e-10)
        longer = model(nn.functional.pad(filled_BMF, (0, 0, 0, 9), value=7.0), nn.functional.pad(mask_BM, (0, 9)))
        torch.testing.assert_close(longer.logits[0, :14], logits_BTV[0], rtol=0, atol=1e-10)


def test_no_mask_means_that_all_is_speech():
    model, features_BMF = tiny.encoder(), batch()["input_features"]
    with torch.no_grad():
        for ones in (torch.ones(3, 60, dtype=torch.bool), torch.ones(3, 60, dtype=torch.long)):
            assert torch.equal(model(features_BMF).logits, model(features_BMF, ones).logits)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_padded_with_teaches_nothing(encoder):
    """Loss, gradients and BatchNorm's moments are the same, whatever the padding and however much there is of it."""
    outcomes = []
    for filling, more in ((0.0, 0), (1e3, 0), (-5.0, 12)):
        model = tiny.encoder(encoder).double().train()
        heard = batch(torch.float64, labels=True)
        mask_BM = nn.functional.pad(heard["attention_mask"], (0, more))
        features_BMF = nn.functional.pad(heard["input_features"], (0, 0, 0, more))
        loss = model(features_BMF.masked_fill(~mask_BM[..., None], filling), mask_BM, heard["labels"]).loss
        loss.backward()
        outcomes.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
        outcomes[-1] |= {name: value for name, value in model.named_buffers() if "running" in name}
    for outcome in outcomes[1:]:
        for name, value in outcomes[0].items():
            torch.testing.assert_close(outcome[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_moments_of_training_are_those_of_speech_alone():
    torch.manual_seed(0)
    x_BCT, kept_BT = torch.randn(3, 4, 9), torch.arange(9) < torch.tensor([[9], [4], [0]])
    norm = FrameBatchNorm(4).train()
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    output_BCT = norm(x_BCT, kept_BT)
    speech_NC = x_BCT.transpose(1, 2)[kept_BT]
    mean_C, variance_C = speech_NC.mean(0), speech_NC.var(0, correction=0)
    expected_NC = (speech_NC - mean_C) / (variance_C + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(output_BCT.transpose(1, 2)[kept_BT], expected_NC)
    assert not output_BCT.transpose(1, 2)[~kept_BT].any()
    torch.testing.assert_close(norm.running_mean, 0.1 * mean_C)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * speech_NC.var(0))
    plain = nn.BatchNorm1d(4).eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm.eval()(x_BCT, kept_BT), plain(x_BCT))


# ---- frames ------------------------------------------------------------------------------------------------


def test_lengths_are_those_the_convolutions_give():
    subsampling = tiny.encoder().subsampling
    mel_frames = torch.arange(7, 61)
    real = [subsampling(torch.zeros(1, count, tiny.MEL_BINS)).shape[1] for count in mel_frames.tolist()]
    assert [Subsampling.length(count) for count in mel_frames.tolist()] == real
    assert Subsampling.length(mel_frames).tolist() == real
    assert tiny.encoder()._get_feat_extract_output_lengths(torch.arange(7)).tolist() == [0] * 7


@pytest.mark.parametrize(("shift_ms", "ratio"), [(10.0, 640), (12.5, 800)])
def test_frames_of_audio_are_those_of_processor_and_model(shift_ms, ratio):
    processor = new_processor("conformer", tiny.MEL_BINS, shift_ms)
    hop = processor.feature_extractor.hop_length
    model = tiny.encoder(hop_length=hop, win_length=processor.feature_extractor.win_length)
    assert model.config.inputs_to_logits_ratio == ratio
    fewest = 400 + 6 * hop  # samples of one encoder frame
    for samples in (fewest, fewest + 1, fewest + hop - 1, fewest + 4 * hop - 1, fewest + 4 * hop, 8_231, 16_000):
        heard = processor(torch.zeros(samples).numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        assert heard.input_features.shape[1] == model.config.mel_frames(samples)
        with torch.no_grad():
            assert model(heard.input_features).logits.shape[1] == frames_of(model)(samples) > 0
    for samples in (0, 10, 399, 400, fewest - 1):
        assert frames_of(model)(samples) == 0
    assert model.config.mel_frames(399) == 0 and model.config.mel_frames(400) == 1


# ---- loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_every_utterance_alone(reduction):
    model, heard = tiny.encoder(ctc_loss_reduction=reduction).double(), batch(torch.float64, labels=True)
    losses = []
    with torch.no_grad():
        for features_MF, kept_M, labels_L in zip(*heard.values(), strict=True):
            log_TV = model(features_MF[kept_M][None]).logits[0].float().log_softmax(-1)
            labels_L = labels_L[labels_L >= 0]
            loss = nn.functional.ctc_loss(log_TV, labels_L, torch.tensor(len(log_TV)), torch.tensor(len(labels_L)), 0)
            losses.append(loss if reduction == "mean" else loss * len(labels_L))  # mean is per label
        ours = model(**heard).loss
    torch.testing.assert_close(ours, sum(losses) / (len(losses) if reduction == "mean" else 1))


def test_an_utterance_too_short_for_its_text_costs_nothing():
    model, heard = tiny.encoder().train(), batch(labels=True)
    heard["attention_mask"][2] = torch.arange(60) < 6  # no frame at all
    heard["labels"][1] = -100  # no text at all
    loss = model(**heard).loss
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_labels_beyond_the_vocabulary_are_refused():
    model, heard = tiny.encoder(), batch(labels=True)
    heard["labels"][0, 0] = 32
    with pytest.raises(ValueError, match="label 32 is beyond the 32 symbols"):
        model(**heard)


# ---- precision, memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "attention"), EVERY)
def test_autocast_to_bfloat16_runs_and_is_near(encoder, attention):
    model, heard = tiny.encoder(encoder, attention), batch(labels=True)
    with torch.no_grad():
        exact = model(**heard)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**heard)
    assert rough.loss.dtype == torch.float32
    kept = torch.arange(14) < torch.tensor([14, 10, 5])[:, None]
    error = (rough.logits.float() - exact.logits)[kept].norm() / exact.logits[kept].norm()
    assert 1e-4 < error < 0.05
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**heard).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("attention", KINDS)
def test_a_whole_model_of_bfloat16_runs(attention):
    model = tiny.encoder(attention=attention).bfloat16()
    with torch.no_grad():
        logits = model(batch()["input_features"].bfloat16(), batch()["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@pytest.mark.parametrize(("encoder", "attention"), EVERY)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(encoder, attention):
    settings = dict(hidden_dropout=0.1, attention_dropout=0.1, time_masks=2, time_mask_share=0.3, frequency_masks=1)
    plain, frugal = (tiny.encoder(encoder, attention, **settings).train() for _ in range(2))
    frugal.activation_checkpointing_enable()
    recomputed = []
    attention_modules(frugal)[0].register_forward_hook(lambda *_: recomputed.append(True))
    losses = []
    for model in (plain, frugal):
        set_seed(7)
        losses.append(model(**batch(labels=True)).loss)
        losses[-1].backward()
    assert len(recomputed) == 2
    assert losses[0].item() == losses[1].item()
    for (name, ours), theirs in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)


# ---- a citizen of transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_way_attention_is_computed_can_be_chosen(implementation):
    model, weights = tiny.encoder(), []
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(implementation)
    for attention in attention_modules(model):
        attention.register_forward_hook(lambda _, args, output: weights.append(output[1]))
    with torch.no_grad():
        model(**batch())
    assert [one is not None for one in weights] == [implementation == "eager"] * LAYERS


@pytest.mark.parametrize(("encoder", "attention"), EVERY)
def test_it_survives_the_disk(encoder, attention, tmp_path):
    model = tiny.encoder(encoder, attention, **(LATENT if attention.startswith("mla") else {}))
    model.normalise_by(torch.randn(tiny.MEL_BINS), torch.rand(tiny.MEL_BINS) + 0.5)
    processor = new_processor(encoder, tiny.MEL_BINS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SpeechEncoderConfig
    assert (config.encoder, config.attention) == (encoder, attention)
    assert config.latent_dim == model.config.latent_dim and config.latent_key_dim == model.config.latent_key_dim
    heard = AutoProcessor.from_pretrained(tmp_path)(
        torch.randn(8_000).numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**heard).logits
        for again in (AutoModelForCTC.from_pretrained(tmp_path), load(tmp_path)[0]):
            assert type(again) is type(model) and not again.training
            assert torch.equal(again(**heard).logits, expected)
            for name, values in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], values), name
        model.normalise_by(torch.zeros(tiny.MEL_BINS), torch.ones(tiny.MEL_BINS))
        assert not torch.allclose(model(**heard).logits, expected)


def test_a_config_is_complete_where_nothing_is_said():
    for attention in KINDS:
        config = SpeechEncoderConfig(attention=attention)
        again = AutoConfig.for_model(**config.to_dict())
        assert again.to_dict() == config.to_dict()
        latent = attention.startswith("mla")
        assert config.latent_dim == [256] * 12 * latent and config.latent_key_dim == []
        assert config.query_latent_dim == (256 if attention == "mla" else None)
    assert SpeechEncoderConfig(attention="mla", latent_layout="split").latent_key_dim == [128] * 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "flash"}, "attention is 'flash': choose one of mha, mla, mla_simple, gqa, linear"),
        ({"kind": "lstm"}, "encoder is 'lstm': choose one of conformer, branchformer"),
        ({"hidden_size": 18}, "hidden_size 18 must be even and divide into 4 heads"),
        ({"num_attention_heads": 3}, "must be even and divide into 3 heads"),
        ({"num_attention_heads": 0}, "must be even and divide into 0 heads"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "4 heads do not fall into 3 equal groups"),
        ({"attention": "gqa", "num_key_value_heads": 8}, "4 heads do not fall into 8 equal groups"),
        ({"attention": "gqa", "num_key_value_heads": 0}, "4 heads do not fall into 0 equal groups"),
        ({"conv_depthwise_kernel_size": 4}, "conv_depthwise_kernel_size is 4: it must be odd"),
        ({"num_mel_bins": 6}, "num_mel_bins is 6: .* at least 7"),
        ({"latent_dim": [4, 4]}, "latent widths are given, but attention 'mha' has no latent"),
        ({"attention": "linear", "latent_dim": [4, 4]}, "attention 'linear' has no latent"),
        ({"attention": "mla", "latent_dim": [4]}, "latent_dim has 1 widths for 2 layers"),
        ({"attention": "mla_simple", "latent_dim": [4, 4, 4]}, "latent_dim has 3 widths for 2 layers"),
        ({"attention": "mla_simple", "latent_dim": [4, 33]}, "latent_dim is 33"),
        ({"attention": "mla", "latent_layout": "both"}, "choose one of joint, split"),
        ({"attention": "mla", "latent_dim": [4, 4], "latent_key_dim": [2, 2]}, "share all of a joint latent"),
        ({"attention": "mla", **LATENT, "latent_key_dim": [4]}, "latent_key_dim has 1 widths for 2 layers"),
        ({"attention": "mla", "query_latent_dim": 0}, "query_latent_dim is 0"),
        ({"attention": "mla", "query_latent_dim": 17}, "query_latent_dim is 17"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        tiny.encoder(**changes)


def test_positions_are_named_as_in_transformers():
    for name in KINDS:
        assert attention_kind(name).position_embeddings_type == (None if name == "linear" else "relative")


# ---- back to standard attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [dict(latent_dim=[9, 6]), LATENT], ids=["joint", "split"])
@pytest.mark.parametrize("attention", ["mla", "mla_simple"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_latents_fold_back(encoder, attention, changes):
    latent = tiny.encoder(encoder, attention, **changes).double()
    plain = to_standard_attention(latent)
    assert plain.config.attention == "mha" and plain.config.latent_dim == [] and not plain.training
    assert all(isinstance(one.linear_q, nn.Linear) for one in attention_modules(plain))
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch(torch.float64)).logits, latent(**batch(torch.float64)).logits, **CLOSE)


# ---- for streaming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conformer", "branchformer"])
def test_no_frame_of_a_causal_encoder_in_chunks_hears_beyond_its_chunk(kind):
    model = tiny.encoder(kind, causal=True)
    batch = tiny.features()
    features = batch["input_features"][:1]
    later = features.clone()
    later[:, 15:] += 1  # encoder frame t reads mel frames 4t … 4t + 6: those from the fourth on hear it
    with torch.no_grad():
        one, other = (model(x, chunks=Chunks(3)).logits[0] for x in (features, later))
    assert torch.equal(one[:3], other[:3]) and (one[3:] != other[3:]).any(-1).all()


def test_chunks_are_drawn_in_training_alone():
    model = tiny.encoder(causal=True, largest_chunk=4)
    features = tiny.features()["input_features"]
    torch.manual_seed(0)
    drawn = [model._drawn_chunks() for _ in range(400)]
    sizes = [chunks.size for chunks in drawn if chunks]
    assert 0.4 < len(sizes) / len(drawn) < 0.6 and set(sizes) == {1, 2, 3, 4}
    with torch.no_grad():
        assert torch.equal(model(features).logits, model(features).logits)
        model.train()
        outputs = {float(model(features).logits.sum()) for _ in range(30)}
    assert len(outputs) > 2


def test_full_context_is_what_is_trained_without_chunks():
    assert tiny.encoder(causal=True)._drawn_chunks() is None


def test_chunks_that_cannot_be_trained_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="causal convolutions"):
        tiny.encoder(largest_chunk=4)
    with pytest.raises(StrictDataclassClassValidationError, match="largest_chunk is -1"):
        tiny.encoder(causal=True, largest_chunk=-1)
    features = tiny.features()["input_features"]
    for model, chunks in ((tiny.encoder(), Chunks(3)), (tiny.encoder(causal=True), Chunks(3, lookahead=1))):
        with pytest.raises(ValueError, match="takes causal convolutions and no lookahead"):
            model(features, chunks=chunks)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_a_checkpoint_lacks_is_initialised_as_in_a_new_model(encoder, tmp_path):
    model = tiny.encoder(encoder)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [name for name in weights if name.startswith("layers.1.") or name.startswith("lm_head")]
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(5)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    fresh = type(model)(model.config).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in kept.items())
    for name in lost:
        if name.endswith("weight") and fresh[name].numel() >= 16:
            torch.testing.assert_close(loaded[name].std(), fresh[name].std(), rtol=0.5, atol=1e-6)
    assert all(torch.isfinite(loaded[name]).all() for name in lost)
    assert not torch.equal(loaded["lm_head.weight"], weights["lm_head.weight"])
