"""The families of models, and questions that any model can answer.

A new family is one file in `families` that ends in its record, and this record in FAMILIES.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from asrlib.attention.names import attends_across, encoder_config
from asrlib.data.audio import SAMPLE_RATE
from asrlib.models.encoder import SPEECH_ENCODER
from asrlib.models.families.nemotron import NEMOTRON
from asrlib.models.families.parakeet import PARAKEET, PARAKEET_RNNT
from asrlib.models.families.wav2vec2 import HUBERT, WAV2VEC2
from asrlib.models.families.wav2vec2_bert import WAV2VEC2_BERT
from asrlib.models.families.wav2vec2_conformer import WAV2VEC2_CONFORMER
from asrlib.models.families.whisper import WHISPER
from asrlib.models.family import Family

FAMILIES = {  # by the model types of both twins
    config.model_type: family
    for family in (
        WAV2VEC2,
        HUBERT,
        WAV2VEC2_CONFORMER,
        WAV2VEC2_BERT,
        PARAKEET,
        PARAKEET_RNNT,
        NEMOTRON,
        WHISPER,
        SPEECH_ENCODER,
    )
    for config in (family.standard_config, family.latent_config)
}


def register() -> None:
    """Registers asrlib's own model types with transformers' Auto classes; a second call changes nothing.

    Afterwards `AutoModelForCTC.from_pretrained` and the like load latent models. asrlib's own functions need no call.
    """
    for family in FAMILIES.values():
        config = family.latent_config
        AutoConfig.register(config.model_type, config, exist_ok=True)
        family.head.auto_model.register(config, family.latent_model, exist_ok=True)


register()


def family_of(config) -> Family:
    """The family of a model's config. Raises ValueError, which names the known ones."""
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"no family for model type {config.model_type!r}: asrlib knows {known}")
    return FAMILIES[config.model_type]


def attention_parts(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """{part: attention modules of `model`, first layer first}; most models have one part, the encoder."""
    family = family_of(model.config)
    if family.parts:
        return family.parts(model)
    return {"encoder": [family.attention(layer) for layer in family.layers(model)]}


def attention_modules(model: PreTrainedModel, parts: Sequence[str] | None = None) -> list[nn.Module]:
    """The attention modules of `model`, or those of some `parts` of it, first layer first."""
    modules = attention_parts(model)
    return [module for part in (modules if parts is None else parts) for module in modules[part]]


def latent_modules(latent: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a latent model that have a latent, in the order of its config's widths."""
    return attention_modules(latent, getattr(latent.config, "latent_parts", None))


def chosen_parts(config, parts: Sequence[str] | None) -> list[str]:
    """The parts of a model to convert, in order: those given, else those that keep a cache.

    Raises ValueError where the model has no such part.
    """
    family = family_of(config)
    known, given = family.part_names, family.cached_parts if parts is None else parts
    if isinstance(given, str) or not given or set(given) - set(known):
        raise ValueError(
            f"parts is {given!r}, but the parts of {config.model_type} with attention are {', '.join(known)}: give a "
            "list of one or more"
        )
    return [part for part in known if part in given]


def layer_names(model: PreTrainedModel, parts: Sequence[str] | None) -> list[str]:
    """The name of each module of `chosen_parts`: its layer's number, with its part before it if there are several."""
    modules = attention_parts(model)
    names = [(part, index) for part in chosen_parts(model.config, parts) for index in range(len(modules[part]))]
    return [f"{part} {index}" if len(modules) > 1 else str(index) for part, index in names]


def run(model: PreTrainedModel, batch: dict[str, torch.Tensor]):
    """Runs all layers once over a batch in the form that the head reads (see heads.py), without a cache."""
    if encode := family_of(model.config).encode:
        return encode(model, {name: values for name, values in batch.items() if name != "labels"})
    no_cache = {"use_cache": False} if attends_across(model.config) else {}
    return family_of(model.config).head.forward(model, batch, **no_cache)


def positions_of(config) -> str | None:
    """How an encoder encodes positions: relative, rotary, … None: not at all."""
    return family_of(config).positions(config)


def is_latent(config) -> bool:
    return family_of(config).is_latent(config)


def frame_counts(model: PreTrainedModel, lengths: torch.Tensor) -> torch.Tensor:
    """Lengths of inputs (samples or frames of features) → frames of the logits: integer tensors [B] → [B]."""
    return family_of(model.config).frame_counts(model, lengths).long()


def layer_frame_counts(model: PreTrainedModel, lengths: torch.Tensor) -> torch.Tensor:
    """Frames that the layers process: more than those of the logits where an adapter reduces these."""
    if getattr(model.config, "add_adapter", False):
        return model._get_feat_extract_output_lengths(lengths, add_adapter=False).long()
    return frame_counts(model, lengths)


@dataclass(frozen=True)
class EncoderFrames:
    """The function samples of audio → encoder frames of `model`, and a check of utterances."""

    model: PreTrainedModel

    def __call__(self, samples: int) -> int:
        length = family_of(self.model.config).input_length(self.model.config, samples)
        return max(0, int(frame_counts(self.model, torch.tensor(length))))

    def problem(self, ids: list[int], samples: int) -> str | None:
        """Why `model` cannot be trained or scored on the labels `ids` of audio with `samples` samples, or None."""
        head = family_of(self.model.config).head
        return head.problem(self.model.config, ids, samples, self(samples))


def frames_of(model: PreTrainedModel) -> EncoderFrames:
    return EncoderFrames(model)


def frames_per_second(config) -> float:
    """Encoder frames per second of 16 kHz audio."""
    return SAMPLE_RATE / family_of(config).samples_per_frame(config)


def model_facts(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """A recogniser's name, type, size, attention, positions and frames a second, for a table."""
    config, encoder = model.config, encoder_config(model.config)
    return {
        "model": name,
        "type": config.model_type,
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "layers": encoder.num_hidden_layers,
        "width": encoder.hidden_size,
        "heads": encoder.num_attention_heads,
        "attention": getattr(config, "attention", "mha"),
        "positions": positions_of(config),
        "frames a second": f"{frames_per_second(config):.1f}",
    }
