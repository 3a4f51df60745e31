"""What model families name differently: the parts of an attention module, and the place of the sizes in a config."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

NAMES = (  # of the projections of queries, keys, values and outputs
    ("linear_q", "linear_k", "linear_v", "linear_out"),  # wav2vec2-conformer, wav2vec2-bert, and our own encoders
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # wav2vec2, hubert, whisper
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # parakeet, nemotron
)


@dataclass(frozen=True)
class Projections:
    """The projections of one attention module; each maps [..., D] to [..., D]."""

    query: nn.Module
    key: Callable[[torch.Tensor], torch.Tensor]  # an nn.Linear, or a latent module's method
    value: Callable[[torch.Tensor], torch.Tensor]
    output: nn.Module
    query_bias_HE: torch.Tensor | None  # u, which relative positions add to queries before they meet keys
    heads: int


def projections(attention: nn.Module) -> Projections:
    """Raises TypeError where `attention` has none of the known names."""
    for names in NAMES:
        if all(hasattr(attention, name) for name in names):
            bias_HE = getattr(attention, "pos_bias_u", getattr(attention, "bias_u", None))
            heads = getattr(attention, "num_heads", attention.config.num_attention_heads)
            return Projections(*(getattr(attention, name) for name in names), bias_HE, heads)
    known = "; ".join(", ".join(names) for names in NAMES)
    raise TypeError(f"{type(attention).__name__} has no projections by names that asrlib knows: {known}")


def is_rotary(attention: nn.Module) -> bool:
    """Whether positions rotate the inputs of queries and keys, so that keys and values read different inputs."""
    return getattr(attention, "position_embeddings_type", None) == "rotary"


def call_arguments(args: tuple, arguments: dict) -> dict:
    """The arguments of an attention module's call by name: some families pass the inputs by position."""
    return {"hidden_states": args[0], **arguments} if args else arguments


def attends_across(config) -> bool:
    """Whether a decoder attends to the encoder's frames: Whisper's does, a transducer's does not."""
    return hasattr(config, "decoder_attention_heads")


def latent_count(config) -> int:
    """How many attention modules have a latent: as many as `config` says, or one in each layer."""
    return getattr(config, "latent_count", encoder_config(config).num_hidden_layers)


def encoder_config(config):
    """The part of a model's config that has the encoder's width, layers and heads."""
    return getattr(config, "encoder_config", config)
