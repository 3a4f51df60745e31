"""The smallest conformers, batches and corpora that still have everything the real ones have."""

import io
from functools import partial

import numpy as np
import soundfile
import torch
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

from asrlib.data.corpus import SAMPLE_RATE, Corpus, Utterance

WIDTH = 16
LAYERS = 2


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
    file = io.BytesIO()
    samples = np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * SAMPLE_RATE))
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file.seek(0)
    return file
