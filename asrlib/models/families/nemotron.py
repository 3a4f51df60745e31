"""The latent twin of transformers' NemotronAsrStreamingForRNNT: a FastConformer that streams, with a transducer.

It keeps a window of the past itself: `DynamicCache` holds keys and values of the last `sliding_window` − 1 frames of
every layer. The twin's window holds latents instead, which are smaller. Everything that runs the original runs the twin
too, also `generate` over chunks of audio. Positions are relative, as in Transformer-XL, and are not cached.

Shapes: B batch, n frames of a call, T frames attended to (those of the window, then the n), D width.
"""

from dataclasses import dataclass, replace

import torch
from huggingface_hub.dataclasses import strict
from transformers import Cache, NemotronAsrStreamingConfig, NemotronAsrStreamingForRNNT
from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderAttention,
)

from asrlib.attention.chunks import heard
from asrlib.attention.kinds import KeyValueMemory, LatentMemory, RelativeAttention
from asrlib.models.families import nemotron_eager  # noqa: F401  (mends a class of transformers)
from asrlib.models.families.parakeet import PARAKEET_RNNT, FastConformerNames
from asrlib.models.latent_twin import LatentConfig, latent_kv


@strict
class NemotronMLAConfig(LatentConfig, NemotronAsrStreamingConfig):
    """NemotronAsrStreamingConfig with the settings of `LatentConfig`."""

    model_type = "nemotron_asr_streaming-mla"


def check_streaming(config: NemotronAsrStreamingConfig) -> None:
    """Raises ValueError: the model has its own way to stream."""
    raise ValueError(
        f"{config.model_type} streams by its own cache and not by asrlib.stream: give model.generate a generator of "
        "chunks as input_features, as the documentation of transformers shows"
    )


def encode(model: NemotronAsrStreamingForRNNT, inputs: dict[str, torch.Tensor]):
    """Runs the encoder over a batch, with the lookahead of `inputs` or else of the config."""
    ahead = model.config.encoder_config.default_num_lookahead_tokens
    return model.get_audio_features(**{"num_lookahead_tokens": ahead} | inputs)


@dataclass(frozen=True)
class Context:
    """What the frames of one call attend to; stands in for a memory of `streaming.memory`."""

    embeddings_1PD: torch.Tensor  # of the distances T−1 … −(T−1)
    heard_B1nT: torch.Tensor | None
    cache: Cache | None
    layer: int

    def frames(self, new: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """(the window's frames and then the new ones [B, T, numbers], which keys each query attends to [B, n, T]); the
        window moves on."""
        held = new
        if self.cache is not None:
            second_BnN = new[1] if len(new) > 1 else new[0][..., :0]  # of a joint latent: a cache has two
            held = self.cache.update(new[0][:, None], second_BnN[:, None], self.layer)
            held = tuple(held_B1TN[:, 0] for held_B1TN in held[: len(new)])
        return held, None if self.heard_B1nT is None else self.heard_B1nT[:, 0]

    def positions(self, attention: RelativeAttention, frames: int) -> torch.Tensor:
        return attention.project_positions(self.embeddings_1PD)


class BlockedAttention(KeyValueMemory, FastConformerNames, NemotronAsrStreamingEncoderAttention):
    """The parent's parameters and results, in blocks of queries; projected positions stay from call to call."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `RelativeAttention`. `position_embeddings` [B, 2T−1, D] are the same for every utterance, and
        `past_key_values` is a window over the output of `remembered`."""
        context = Context(position_embeddings[:1], heard(attention_mask), past_key_values, self.layer_idx)
        return RelativeAttention.forward(self, hidden_states, past=context)


class LatentAttention(LatentMemory, BlockedAttention):
    """Self-attention whose keys and values come from a latent, which the window holds."""

    def __init__(self, encoder_config, config: NemotronMLAConfig, layer: int):
        super().__init__(encoder_config, layer)
        del self.k_proj, self.v_proj
        self.latent_kv = latent_kv(config, layer)


class NemotronMLAForRNNT(NemotronAsrStreamingForRNNT):
    """NemotronAsrStreamingForRNNT with latent keys and values."""

    config_class = NemotronMLAConfig
    config: NemotronMLAConfig

    def __init__(self, config: NemotronMLAConfig):
        super().__init__(config)
        for index, layer in enumerate(self.encoder.layers):
            layer.self_attn = LatentAttention(self.encoder.config, config, index)
        self.post_init()


NEMOTRON = replace(
    PARAKEET_RNNT,
    standard_model=NemotronAsrStreamingForRNNT,
    latent_model=NemotronMLAForRNNT,
    check_streaming=check_streaming,
    in_blocks={NemotronAsrStreamingEncoderAttention: BlockedAttention},
    encode=encode,
)
