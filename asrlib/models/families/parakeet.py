"""The latent twins of transformers' ParakeetForCTC and ParakeetForRNNT: a FastConformer with CTC or a transducer, which
makes one frame of eight frames of features.

Positions are relative, as in Transformer-XL, so `attention.relative` computes the attention, with its own names for the
parameters.
"""

from dataclasses import replace

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    ParakeetCTCConfig,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetRNNTConfig,
)
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from asrlib.attention.kinds import KeyValueMemory, LatentMemory, RelativeAttention
from asrlib.models.family import Family
from asrlib.models.heads import Transducer
from asrlib.models.latent_twin import LatentConfig, latent_kv

HOP = 160  # samples at 16 kHz between frames of ParakeetFeatureExtractor; a model's config does not hold it


@strict
class ParakeetMLAConfig(LatentConfig, ParakeetCTCConfig):
    """ParakeetCTCConfig with the settings of `LatentConfig`."""

    model_type = "parakeet_ctc-mla"


@strict
class ParakeetRNNTMLAConfig(LatentConfig, ParakeetRNNTConfig):
    """ParakeetRNNTConfig with the settings of `LatentConfig`."""

    model_type = "parakeet_rnnt-mla"


ParakeetConfig = ParakeetCTCConfig | ParakeetRNNTConfig


def input_length(config: ParakeetConfig, samples: int) -> int:
    """Frames of features of `samples` samples."""
    return samples // HOP


def samples_per_frame(config: ParakeetConfig) -> int:
    return HOP * config.encoder_config.subsampling_factor


def check_streaming(config: ParakeetConfig) -> None:
    """Raises ValueError: the features need the whole recording."""
    raise ValueError(f"features of {config.model_type} are normalised over whole recordings, so it cannot stream")


def encode(model: ParakeetForRNNT, inputs: dict[str, torch.Tensor]):
    """The encoder's output for a batch."""
    return model.get_audio_features(**inputs)


class FastConformerNames:
    """A FastConformer's parameters under the names that `attention.kinds` expects."""

    linear_q = property(lambda self: self.q_proj)
    linear_k = property(lambda self: self.k_proj)
    linear_v = property(lambda self: self.v_proj)
    linear_out = property(lambda self: self.o_proj)
    linear_pos = property(lambda self: self.relative_k_proj)
    pos_bias_u = property(lambda self: self.bias_u)
    pos_bias_v = property(lambda self: self.bias_v)
    head_size = property(lambda self: self.head_dim)
    num_heads = property(lambda self: self.config.num_attention_heads)


class BlockedAttention(KeyValueMemory, FastConformerNames, ParakeetEncoderAttention):
    """The parent's parameters and results, in blocks of queries."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `RelativeAttention`. `position_embeddings` [B, 2T−1, D] are the same for every utterance."""
        embeddings_1PD = None if position_embeddings is None else position_embeddings[:1]
        return RelativeAttention.forward(self, hidden_states, attention_mask, embeddings_1PD, **kwargs)


class LatentAttention(LatentMemory, BlockedAttention):
    """Self-attention whose keys and values come from a latent."""

    def __init__(self, encoder_config, config: ParakeetMLAConfig | ParakeetRNNTMLAConfig, layer: int):
        super().__init__(encoder_config, layer)
        del self.k_proj, self.v_proj
        self.latent_kv = latent_kv(config, layer)


class ParakeetMLAForCTC(ParakeetForCTC):
    """ParakeetForCTC with latent keys and values."""

    config_class = ParakeetMLAConfig
    config: ParakeetMLAConfig

    def __init__(self, config: ParakeetMLAConfig):
        super().__init__(config)
        for index, layer in enumerate(self.encoder.layers):
            layer.self_attn = LatentAttention(self.encoder.config, config, index)
        self.post_init()


class ParakeetMLAForRNNT(ParakeetForRNNT):
    """ParakeetForRNNT with latent keys and values."""

    config_class = ParakeetRNNTMLAConfig
    config: ParakeetRNNTMLAConfig

    def __init__(self, config: ParakeetRNNTMLAConfig):
        super().__init__(config)
        for index, layer in enumerate(self.encoder.layers):
            layer.self_attn = LatentAttention(self.encoder.config, config, index)
        self.post_init()


PARAKEET = Family(
    standard_model=ParakeetForCTC,
    latent_model=ParakeetMLAForCTC,
    layers=lambda model: list(model.encoder.layers),
    check_streaming=check_streaming,
    in_blocks={ParakeetEncoderAttention: BlockedAttention},
    positions=lambda config: "relative",
    input_length=input_length,
    samples_per_frame=samples_per_frame,
    frame_counts=lambda model, lengths: model._get_subsampling_output_length(lengths),
)

PARAKEET_RNNT = replace(
    PARAKEET,
    standard_model=ParakeetForRNNT,
    latent_model=ParakeetMLAForRNNT,
    encode=encode,
    head=Transducer(),
)
