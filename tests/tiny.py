"""The smallest conformers, batches and corpora that still have everything the real ones have."""

import io
from functools import partial

import numpy as np
import soundfile
import torch
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

import asrlib
from asrlib.attention.chunks import Chunks
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus, Utterance
from asrlib.models.encoder import SpeechEncoderConfig, SpeechEncoderForCTC
from asrlib.models.registry import family_of, frame_counts
from asrlib.streaming.streams import Streams

WIDTH = 16
LAYERS = 2
MEL_BINS = 20


def conformer(positions: str | None = "relative", attention: str = "sdpa", **changes) -> Wav2Vec2ConformerForCTC:
    """Random weights, the same at every call; no bias is zero, as none is in a trained model."""
    torch.manual_seed(0)
    settings = dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
        conv_dim=[8, 8, 8, 8], conv_kernel=[25, 8, 8, 4], conv_stride=[10, 4, 4, 2],  # 320 samples a frame
        conv_bias=True, feat_extract_norm="layer", conv_depthwise_kernel_size=7, num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=1, max_source_positions=300, position_embeddings_type=positions,
        vocab_size=32, initializer_range=0.3, layerdrop=0.0, mask_time_length=2, mask_time_prob=0.2,
        ctc_loss_reduction="mean", ctc_zero_infinity=True,
    )  # fmt: skip
    model = Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # pos_bias_u and pos_bias_v too
                parameter.normal_(std=0.3)
    model.set_attn_implementation(attention)
    return model


def padded_batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three utterances of different lengths with their masks and labels."""
    lengths = torch.tensor([9_000, 6_500, 4_000])
    samples = int(lengths.max())
    noise = torch.randn(3, samples, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = (torch.arange(samples) < lengths[:, None]).long()
    labels = torch.tensor([[5, 6, 7, 8], [9, 9, 10, -100], [11, -100, -100, -100]])
    return {"input_values": (noise * mask).to(dtype), "attention_mask": mask, "labels": labels}


def corpus(count: int = 12, split: str = "train", seed: int = 0) -> Corpus:
    """Noise of 0.4 to 0.9 s in memory, each with a transcript of its own."""
    random = np.random.default_rng(seed)
    words = ["A", "E", "T", "O"]
    rows = []
    for i in range(count):
        seconds = round(float(random.uniform(0.4, 0.9)), 3)
        text = " ".join(random.choice(words, size=2))
        rows.append(Utterance(f"{split}-{i}", text, f"s{i % 3}", seconds, "memory", partial(_noise, seconds, seed + i)))
    return Corpus("noise", split, tuple(rows))


def _noise(seconds: float, seed: int) -> io.BytesIO:
    return wave(np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * SAMPLE_RATE)))


def wave(samples: np.ndarray) -> io.BytesIO:
    """A file of these 16 kHz samples, to be read from its start."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file.seek(0)
    return file


def encoder(kind: str = "conformer", attention: str = "mha", **changes) -> SpeechEncoderForCTC:
    """Random weights, the same at every call; no bias is zero and no gain is one, BatchNorm's moments included."""
    settings = dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, conv_depthwise_kernel_size=5, subsampling_channels=4, num_mel_bins=MEL_BINS,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SpeechEncoderForCTC(SpeechEncoderConfig(encoder=kind, attention=attention, **settings | changes)).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or name.endswith(("_mean", "linear_pos.weight")):
                values.normal_(std=0.3)
            elif name.endswith(("_var", "_std")) or ("norm" in name and name.endswith("weight")):
                values.uniform_(0.5, 1.5)
            elif "cgmlp.depthwise" in name:  # next to nothing before training
                values.normal_()
            elif ".self_attn." in name or "subsampling." in name:
                values.mul_(3)  # or frames would be alike, and attended to alike
    return model


def features(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three utterances of log-mel frames: of 14, 10 and 5 encoder frames, with their masks and labels."""
    lengths = torch.tensor([60, 43, 26])
    frames = int(lengths.max())
    noise = torch.randn(3, frames, MEL_BINS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(frames) < lengths[:, None]
    labels = torch.tensor([[5, 6, 7, 8], [9, 9, 10, -100], [11, -100, -100, -100]])
    return {"input_features": (noise * mask[..., None]).to(dtype), "attention_mask": mask, "labels": labels}


def variants() -> dict[str, dict]:
    """Every kind of attention with the settings that matter to what it keeps, by a name of their own."""
    split = dict(latent_dim=[9, 6], latent_layout="split", latent_key_dim=[4, 5])
    return {
        "mha": dict(attention="mha"),
        "mla": dict(attention="mla", latent_dim=[5, 8], query_latent_dim=6),
        "mla split": dict(attention="mla", **split),
        "mla_simple": dict(attention="mla_simple", latent_dim=[5, 8]),
        "mla_simple split": dict(attention="mla_simple", **split),
        "gqa": dict(attention="gqa"),
        "linear": dict(attention="linear"),
    }


def latent_conformer(layout: str, **changes) -> torch.nn.Module:
    """The latent twin of `conformer`."""
    widths = dict(joint=[11, 7], split=[18, 9])[layout]
    return asrlib.convert(conformer(**changes), latent_dim=widths, layout=layout).eval()


def streamed(
    model, inputs: torch.Tensor, chunks: Chunks, mask: torch.Tensor | None = None, cache: str = "float32"
) -> tuple[torch.Tensor, Streams]:
    """(logits [B, T, V] of the frames of `inputs` step by step, the streams at their end); behind the end of an
    utterance is junk."""
    with torch.no_grad():
        x_BTD = family_of(model.config).frames(model, inputs)
    streams, kept_BT = Streams(model, chunks, cache), None
    if mask is not None:
        kept_BT = torch.arange(x_BTD.shape[1]) < frame_counts(model, mask.sum(-1))[:, None]
        x_BTD = x_BTD.masked_fill(~kept_BT[..., None], 1e3)
    logits = []
    for first in range(0, x_BTD.shape[1], chunks.size):
        here = slice(first, first + chunks.block)
        logits.append(streams.step(x_BTD[:, here], kept_BT if kept_BT is None else kept_BT[:, here]))
    return torch.cat(logits, dim=1), streams
