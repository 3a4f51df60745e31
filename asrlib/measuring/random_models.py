"""Models with random weights that differ in their attention alone, for timing: time does not depend on the weights.

Models of a set share all weights except those of attention, so that a set takes little more memory than one model.
"""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import soundfile
import torch
from torch import nn
from transformers import (
    NemotronAsrStreamingConfig,
    NemotronAsrStreamingForRNNT,
    PreTrainedModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from asrlib.conversion.convert import latent_dim_for
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus, Utterance
from asrlib.measuring.names import IN_BLOCKS
from asrlib.models.encoder import SpeechEncoderConfig, SpeechEncoderForCTC
from asrlib.models.families.wav2vec2_conformer import LatentSelfAttention
from asrlib.models.families.whisper import CACHED
from asrlib.models.loading import load
from asrlib.models.registry import FAMILIES, family_of, latent_modules

PUBLISHED = dict(
    vocab_size=32,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    conv_bias=True,
    feat_extract_norm="layer",
    position_embeddings_type="relative",
)  # facebook/wav2vec2-conformer-rel-pos-large-960h-ft, 618.6 M parameters
RECOGNISER_SIZES = {"shipped": "synthetic-conformer", "published": PUBLISHED}
HOP = 80  # samples: 50 encoder frames a second, like wav2vec2
ENCODER_SIZES = {
    "shipped": dict(hidden_size=144, num_hidden_layers=4, num_attention_heads=4, conv_depthwise_kernel_size=15),
    "published": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, conv_depthwise_kernel_size=31),
}
WRITER_SIZES = {  # d_model, decoder_layers, decoder_attention_heads
    "tiny": (384, 4, 6),
    "small": (768, 12, 12),
    "large": (1280, 32, 20),
    "turbo": (1280, 4, 20),
}
STANDARD, SHARED = "MHA", "MLA shared, absorbed"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- recognisers -------------------------------------------------------------------------------------------


def random_recognisers(size: str, shares: Sequence[int] = (2, 4, 8)) -> dict[str, nn.Module]:
    """{name: wav2vec2-conformer in evaluation mode}. They share all weights except those of keys and values.

    Multi-head attention comes twice, by transformers and in blocks. Then follow latents, of the width divided by each
    of `shares`."""
    torch.manual_seed(0)
    sizes = RECOGNISER_SIZES[size]
    config = Wav2Vec2ConformerConfig(**sizes) if isinstance(sizes, dict) else load(sizes)[0].config
    standard = Wav2Vec2ConformerForCTC(config).eval()
    made = {"MHA by transformers": standard, IN_BLOCKS: in_blocks(standard)}
    for rank in (config.hidden_size // share for share in shares):
        latent = in_blocks(standard)
        latent_config = family_of(config).to_latent(config, latent_dim=[rank] * config.num_hidden_layers)
        for index, layer in enumerate(family_of(config).layers(latent)):
            attention = LatentSelfAttention(latent_config, index)
            attention.load_state_dict(layer.self_attn.state_dict(keep_vars=True), strict=False, assign=True)
            layer.self_attn = attention
        latent.config = latent_config
        made[f"MLA {rank}"] = latent.eval()
    return made


def in_blocks(model: nn.Module) -> nn.Module:
    """A model that shares the parameters of `model` and works in blocks, to measure the gain by blocks alone."""
    sharing = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    return family_of(model.config).work_in_blocks(sharing)


# ---- encoders of streams -----------------------------------------------------------------------------------


def size_of(config) -> dict[str, int]:
    """The sizes of a model's encoder, by the names of SpeechEncoderConfig, and the hop for its frames a second.

    Raises ValueError where the config lacks one of them.
    """
    if not all(hasattr(config, name) for name in (*ENCODER_SIZES["shipped"], "inputs_to_logits_ratio")):
        raise ValueError(
            f"benchmark_left_seconds times an encoder of this model's size, and {config.model_type} has other sizes: "
            "give benchmark_stream_size (shipped or published), or leave it out"
        )
    return {name: getattr(config, name) for name in ENCODER_SIZES["shipped"]} | {
        "hop_length": config.inputs_to_logits_ratio // 4  # the subsampling of SpeechEncoder's
    }


def kinds_of(width: int, heads: int) -> dict[str, dict]:
    """{name: settings of SpeechEncoderConfig}: standard attention first, then by decreasing cache."""
    ranks = [width // 2, width // 4, width // 8]
    return {
        "MHA": {"attention": "mha"},
        "GQA": {"attention": "gqa", "num_key_value_heads": max(1, heads // 4)},
        **{f"MLA {rank}": {"attention": "mla_simple", "latent_dim": rank} for rank in ranks},
        "linear": {"attention": "linear"},
    }


def random_encoders(
    hidden_size: int, num_hidden_layers: int, num_attention_heads: int, hop_length: int = HOP, **others
) -> dict[str, SpeechEncoderForCTC]:
    """{name: Conformer in evaluation mode}. They share all weights except those of attention."""
    torch.manual_seed(0)
    made, shared = {}, {}
    for name, kind in kinds_of(hidden_size, num_attention_heads).items():
        latent = {"latent_dim": [kind["latent_dim"]] * num_hidden_layers} if "latent_dim" in kind else {}
        config = SpeechEncoderConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * hidden_size,
            causal=True,
            subsampling_channels=8,  # not measured
            hop_length=hop_length,
            **kind | latent | others,
        )
        made[name] = _filled(SpeechEncoderForCTC, config, shared)
    return made


def window_models(latent_dims: Sequence[int] = (1024, 512, 128), **encoder) -> dict[str, PreTrainedModel]:
    """{name: a Nemotron of one layer}: transformers' own, the same in blocks with cached positions, and its latent
    twins. `encoder` are settings of the encoder; others are as published."""
    torch.manual_seed(0)
    small = {"vocab_size": 8, "blank_token_id": 7, "decoder_hidden_size": 8, "num_decoder_layers": 1}  # not measured
    encoder = {"num_hidden_layers": 1, "subsampling_conv_channels": 8} | encoder
    config = NemotronAsrStreamingConfig(encoder_config=encoder, **small)
    standard, family = NemotronAsrStreamingForRNNT(config), family_of(config)
    blocked = family.work_in_blocks(copy.deepcopy(standard))
    latents = {f"MLA {dim}": family.latent_model(family.to_latent(config, latent_dim=[dim])) for dim in latent_dims}
    return {"MHA": standard, IN_BLOCKS: blocked, **latents}


# ---- decoders ----------------------------------------------------------------------------------------------


def writer_config(name: str) -> WhisperConfig:
    """The config of a Whisper. Its encoder is not measured, and has one layer."""
    width, layers, heads = WRITER_SIZES[name]
    return WhisperConfig(
        d_model=width,
        encoder_layers=1,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )


@dataclass(frozen=True)
class Writer:
    """A decoder, and the form of its latents: absorbed, expanded or auto (also for a decoder without latents)."""

    model: WhisperForConditionalGeneration
    form: str = "auto"

    def set_form(self) -> None:
        for attention in latent_modules(self.model) if self.form != "auto" else []:
            attention.form = self.form


def random_writers(
    config: WhisperConfig, cuts: Sequence[float], parts: Sequence[str] = CACHED, precision: str = "fp32"
) -> dict[str, Writer]:
    """{name: writer}: standard attention first, then latents in `parts` with their cache cut by each of `cuts`, in both
    forms. The last one has exact latents, as wide as the model, and all layers share that of cross-attention. All
    writers share all weights except those of latents. Weights and cache are in `precision`: fp32, bf16 or fp16."""
    family, weights, dtype = FAMILIES[config.model_type], {}, PRECISIONS[precision]

    def latent(width: int, shared: bool = False) -> WhisperForConditionalGeneration:
        settings = {"latent_dim": [width] * len(parts) * config.decoder_layers, "latent_shared": shared}
        latent_config = family.to_latent(config, latent_parts=list(parts), **settings)
        return _filled(family.latent_model, latent_config, weights, dtype)

    writers = {STANDARD: Writer(_filled(family.standard_model, config, weights, dtype))}
    for cut in cuts:
        model = latent(latent_dim_for(cut, config.d_model))
        for form in ("absorbed", "expanded"):
            writers[f"MLA −{100 * cut:g} %, {form}"] = Writer(model, form)
    if "cross" in parts:
        writers[SHARED] = Writer(latent(config.d_model, shared=True), "absorbed")
    return writers


# ---- weights -----------------------------------------------------------------------------------------------


def _filled(
    kind: type, config, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model in evaluation mode with random weights. It takes those of `weights` that fit, and adds the others."""
    with torch.device("meta"):
        model = kind(config)
    own = {}
    for key, like in model.state_dict().items():
        if "latent_kv" in key or key not in weights or weights[key].shape != like.shape:
            scale = max(1, like.shape[-1] if like.dim() > 1 else 1) ** 0.5
            weights[key] = (torch.randn(like.shape) / scale).to(dtype)
            if key.endswith(("running_var", "feature_std")):
                weights[key].fill_(1.0)
        own[key] = weights[key]
    model.load_state_dict(own, assign=True)
    model.tie_weights()
    return model.eval()


# ---- audio -------------------------------------------------------------------------------------------------


def noise(seconds: float) -> Corpus:
    """One utterance of noise in place of speech: a pass takes the same time, whatever the audio holds."""
    samples_S = np.random.default_rng(0).normal(scale=0.1, size=round(seconds * SAMPLE_RATE)).astype(np.float32)
    source = partial(_as_file, samples_S)
    return Corpus("noise", "all", (Utterance("noise", "A", "", len(samples_S) / SAMPLE_RATE, "memory", source),))


def _as_file(samples_S: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples_S, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file.seek(0)
    return file
