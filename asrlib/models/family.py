"""What conversion and evaluation need to know of an architecture, with standard and with latent attention."""

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
    """One architecture. Its two configs share all settings except those in `latent_twin.OWN`."""

    standard_model: type[PreTrainedModel]
    latent_model: type[PreTrainedModel]
    layers: Callable[[PreTrainedModel], list[nn.Module]]  # encoder layers, in order
    attention: Callable[[nn.Module], nn.Module] = lambda layer: layer.self_attn  # with projections of `attention.names`
    check_streaming: Callable[[PreTrainedConfig], None]  # raises where some part needs the whole recording
    head: Head = field(default_factory=CTC)  # writes the text: see heads.py
    is_latent: Callable[[PreTrainedConfig], bool] = lambda config: isinstance(config, LatentConfig)
    check_layout: Callable[[PreTrainedConfig, str], None] = check_layout  # raises where attention forbids a layout
    # Settings that tell the twins apart where one config class serves both.
    standard_settings: Mapping[str, Any] = field(default_factory=dict)
    latent_settings: Mapping[str, Any] = field(default_factory=dict)
    # Of families that can stream: inputs → the layers' input [B, T, D], and the last layer's output → [B, T, V].
    frames: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    # {class of transformers: our class with the same parameters and results, which works in blocks}
    in_blocks: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    to_grouped: Callable[[PreTrainedConfig, int], PreTrainedConfig] | None = None  # of a twin with GQA, if there is one
    positions: Callable[[PreTrainedConfig], str | None] = lambda config: config.position_embeddings_type
    input_length: Callable[[PreTrainedConfig, int], int] = lambda config, samples: samples  # of the model's input
    samples_per_frame: Callable[[PreTrainedConfig], int] = lambda config: config.inputs_to_logits_ratio
    # Lengths of inputs → frames of the logits: integer tensors [B] → [B].
    frame_counts: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = lambda model, lengths: (
        model._get_feat_extract_output_lengths(lengths)
    )
    # Of encoder-decoders: {part: attention modules, first layer first}, and the parts that keep a cache.
    parts: Callable[[PreTrainedModel], dict[str, list[nn.Module]]] | None = None
    part_names: tuple[str, ...] = ("encoder",)
    cached_parts: tuple[str, ...] = ("encoder",)
    # Of encoder-decoders: the encoder, whose states of an utterance do not depend on what is written.
    encoder: Callable[[PreTrainedModel], nn.Module] | None = None
    # Where a pass of the model needs a text: runs its encoder alone over a batch without labels.
    encode: Callable[[PreTrainedModel, dict[str, torch.Tensor]], object] | None = None

    @property
    def standard_config(self) -> type[PreTrainedConfig]:
        return self.standard_model.config_class

    @property
    def latent_config(self) -> type[PreTrainedConfig]:
        return self.latent_model.config_class

    def to_latent(self, config: PreTrainedConfig, **latent) -> PreTrainedConfig:
        """The config of the latent twin; `latent` are latent_dim, latent_layout, latent_key_dim, and other settings of
        the family's LatentConfig."""
        return self.latent_config(**settings(config), **self.latent_settings, **latent)

    def to_standard(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of a latent model's standard twin."""
        return self.standard_config(**settings(config), **self.standard_settings)

    def work_in_blocks(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model` itself, whose modules now work in blocks as far as `in_blocks` has classes for them: parameters and
        results are the same, and memory grows more slowly."""
        return with_classes(model, self.in_blocks)
