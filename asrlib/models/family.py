"""What conversion and evaluation must know of an architecture, with standard and with latent attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from asrlib.models.heads import CTC, Head
from asrlib.models.latent_twin import LatentConfig, check_layout, settings, with_classes


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Its two configs are made of each other: they share all settings that `latent_twin.OWN` does
    not list."""

    standard_model: type[PreTrainedModel]
    latent_model: type[PreTrainedModel]
    layers: Callable[[PreTrainedModel], list[nn.Module]]  # encoder layers, in order
    attention: Callable[[nn.Module], nn.Module] = lambda layer: layer.self_attn  # with projections of `attention.names`
    check_streaming: Callable[[PreTrainedConfig], None]  # raises where something takes the whole recording
    head: Head = field(default_factory=CTC)  # what writes the text: see heads.py
    is_latent: Callable[[PreTrainedConfig], bool] = lambda config: isinstance(config, LatentConfig)
    check_layout: Callable[[PreTrainedConfig, str], None] = check_layout  # raises where attention forbids a layout
    # What the config of either twin says where one class serves both.
    standard_settings: Mapping[str, Any] = field(default_factory=dict)
    latent_settings: Mapping[str, Any] = field(default_factory=dict)
    # Of those that can stream: inputs → what the layers read [B, T, D], and what the last layer gives → [B, T, V].
    frames: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    # {class of transformers: ours, which has the same parameters and results and works in blocks}
    in_blocks: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    to_grouped: Callable[[PreTrainedConfig, int], PreTrainedConfig] | None = None  # of a twin with GQA, if there is one
    positions: Callable[[PreTrainedConfig], str | None] = lambda config: config.position_embeddings_type
    input_length: Callable[[PreTrainedConfig, int], int] = lambda config, samples: samples  # of what the model reads
    samples_per_frame: Callable[[PreTrainedConfig], int] = lambda config: config.inputs_to_logits_ratio
    # Frames of the logits for inputs of such lengths: integer tensors [B] → [B].
    frame_counts: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = lambda model, lengths: (
        model._get_feat_extract_output_lengths(lengths)
    )
    # Of encoder-decoders: {part: attention modules, first layer first}, and of which a run keeps something.
    parts: Callable[[PreTrainedModel], dict[str, list[nn.Module]]] | None = None
    part_names: tuple[str, ...] = ("encoder",)
    cached_parts: tuple[str, ...] = ("encoder",)
    # Of encoder-decoders: the encoder, whose states of an utterance do not depend on what is written.
    encoder: Callable[[PreTrainedModel], nn.Module] | None = None
    # Where a pass of the model asks for a text: runs its layers over what they read of a batch, of labels nothing.
    encode: Callable[[PreTrainedModel, dict[str, torch.Tensor]], object] | None = None

    @property
    def standard_config(self) -> type[PreTrainedConfig]:
        return self.standard_model.config_class

    @property
    def latent_config(self) -> type[PreTrainedConfig]:
        return self.latent_model.config_class

    def to_latent(self, config: PreTrainedConfig, **latent) -> PreTrainedConfig:
        """The config of the latent twin; `latent` are latent_dim, latent_layout, latent_key_dim, and what else the
        family's LatentConfig has."""
        return self.latent_config(**settings(config), **self.latent_settings, **latent)

    def to_standard(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of a latent model's standard twin."""
        return self.standard_config(**settings(config), **self.standard_settings)

    def work_in_blocks(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model`, with the same parameters and results, whose memory grows more slowly where `in_blocks` says how."""
        return with_classes(model, self.in_blocks)
