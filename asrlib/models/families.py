"""Model families: what conversion and evaluation must know of an architecture, and how models are loaded.

A new family is one file beside this one, which registers its classes with transformers, and one line in `FAMILIES`
(with its import). EXTENDING.md has one worked out.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2Processor,
)

from asrlib.models import encoder, wav2vec2_conformer

PRETRAINED = Path(__file__).parent.parent / "pretrained"  # the models shipped with the package


@dataclass(frozen=True)
class Family:
    """One architecture, with standard and with latent attention."""

    standard_model: type[PreTrainedModel]
    latent_model: type[PreTrainedModel]
    to_standard: Callable[[PreTrainedConfig], PreTrainedConfig]  # the config of a latent model's standard twin
    to_latent: Callable[..., PreTrainedConfig]  # the other way; latent_dim, latent_layout, latent_key_dim by name
    is_latent: Callable[[PreTrainedConfig], bool]
    layers: Callable[[PreTrainedModel], list[nn.Module]]  # encoder layers, in order
    attention: Callable[[nn.Module], nn.Module]  # layer → attention with linear_k and linear_v
    check_layout: Callable[[PreTrainedConfig, str], None]  # raises where the attention forbids a layout
    frames: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]  # inputs → what the layers read [B, T, D]
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]  # what the last layer gives → [B, T, V]
    work_in_blocks: Callable[[PreTrainedModel], PreTrainedModel]  # with attention of our own, same parameters
    check_streaming: Callable[[PreTrainedConfig], None]  # raises where something takes the whole recording
    to_grouped: Callable[[PreTrainedConfig, int], PreTrainedConfig] | None = None  # of a twin with GQA, if there is one


WAV2VEC2_CONFORMER = Family(
    standard_model=Wav2Vec2ConformerForCTC,
    latent_model=wav2vec2_conformer.Wav2Vec2ConformerMLAForCTC,
    to_standard=wav2vec2_conformer.to_standard,
    to_latent=wav2vec2_conformer.to_latent,
    is_latent=lambda config: isinstance(config, wav2vec2_conformer.Wav2Vec2ConformerMLAConfig),
    layers=lambda model: list(model.wav2vec2_conformer.encoder.layers),
    attention=lambda layer: layer.self_attn,
    check_layout=wav2vec2_conformer.check_layout,
    frames=wav2vec2_conformer.frames,
    logits=wav2vec2_conformer.logits,
    work_in_blocks=wav2vec2_conformer.work_in_blocks,
    check_streaming=wav2vec2_conformer.check_streaming,
)

SPEECH_ENCODER = Family(
    standard_model=encoder.SpeechEncoderForCTC,
    latent_model=encoder.SpeechEncoderForCTC,
    to_standard=encoder.to_standard,
    to_latent=encoder.to_latent,
    is_latent=encoder.is_latent,
    layers=lambda model: list(model.layers),
    attention=lambda layer: layer.self_attn,
    check_layout=encoder.check_layout,
    frames=encoder.SpeechEncoderForCTC.frames,
    logits=lambda model, x_BTD: model.lm_head(x_BTD),
    work_in_blocks=lambda model: model,
    check_streaming=lambda config: None,
    to_grouped=encoder.to_grouped,
)

FAMILIES = {
    "wav2vec2-conformer": WAV2VEC2_CONFORMER,
    "wav2vec2-conformer-mla": WAV2VEC2_CONFORMER,
    "speech-encoder": SPEECH_ENCODER,
}


def family_of(config) -> Family:
    """The family of a model's config; ValueError names the known ones."""
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"no family for model type {config.model_type!r}: asrlib knows {known}")
    return FAMILIES[config.model_type]


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of `model`, first layer first."""
    family = family_of(model.config)
    return [family.attention(layer) for layer in family.layers(model)]


def is_latent(config) -> bool:
    return family_of(config).is_latent(config)


def frame_counts(model: PreTrainedModel, lengths: torch.Tensor) -> torch.Tensor:
    """Encoder frames for inputs of such lengths, samples or frames of features: integer tensors [B] → [B]."""
    return model._get_feat_extract_output_lengths(lengths).long()


def frames_of(model: PreTrainedModel) -> Callable[[int], int]:
    """The function samples of audio → encoder frames of `model`."""
    length = getattr(model.config, "mel_frames", int)  # of what the model reads
    return lambda samples: max(0, int(frame_counts(model, torch.tensor(length(samples)))))


def frames_per_second(config) -> float:
    """Encoder frames per second of 16 kHz audio."""
    return 16_000 / config.inputs_to_logits_ratio


def resolve_model(source: str | Path) -> str:
    """A shipped model's name, a folder (relative ones from the project root) or a hub id, as something
    `from_pretrained` takes. Raises FileNotFoundError for what looks like a path and is none."""
    from asrlib.runs import resolve

    if (PRETRAINED / str(source) / "config.json").is_file():
        return str(PRETRAINED / str(source))
    folder = resolve(source)
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no config.json: give a model folder made by save_pretrained")
    run = folder.parent.parent
    if folder.parent.name == "models" and (run.parent.parent / "params" / f"{run.name}.yaml").is_file():
        raise FileNotFoundError(f"no model at {folder}: `python run_all.py {run.name}` makes it")
    if Path(source).is_absolute() or len(Path(source).parts) != 2:
        shipped = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("*/config.json")))
        raise FileNotFoundError(
            f"no model at {folder}: give a folder made by save_pretrained, a hub id (owner/name), or a shipped "
            f"model ({shipped})"
        )
    return str(source)


def check_folder(folder: Path) -> None:
    """Raises OSError where `folder` holds no whole model, as far as can be told without reading its weights."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError):
        raise OSError(
            f"cannot load {folder}: its config.json is not a valid JSON object with a model_type: get the file again"
        ) from None
    if not (folder / "vocab.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vocab.json, the model's characters: get the tokenizer's files too")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"cannot load {folder}: it holds no file named model.safetensors or pytorch_model.bin: get the weights too"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # reads its header, which says how long the file should be
                pass
        except SafetensorError as error:
            raise OSError(f"cannot load {folder}: {_reason(error)}") from None


def check_loaded(model, processor=None) -> None:
    """Raises TypeError where `model` is not a model, or `processor` not what goes with one: `load` gives the two."""
    if not isinstance(model, nn.Module):
        shown = repr(model) if isinstance(model, str | Path) else f"a {type(model).__name__}"
        raise TypeError(f"a model is wanted, not {shown}: model, processor = asrlib.load(...) gives one")
    if processor is not None and not hasattr(processor, "feature_extractor"):
        raise TypeError(
            f"a processor is wanted beside the model, not a {type(processor).__name__}: "
            "model, processor = asrlib.load(...) gives one"
        )


def load(source: str | Path, revision: str | None = None) -> tuple[PreTrainedModel, Wav2Vec2Processor]:
    """Loads (model, processor) from a folder, a hub id or a shipped name; the model is in evaluation mode.

    Weights are safetensors, or a .bin read by torch's restricted loader; remote code never runs. `revision` is a hub
    id's branch, tag, commit or pull request (refs/pr/3). Raises ValueError where the checkpoint lacks weights, OSError
    where it is truncated.
    """
    name = resolve_model(source)
    if Path(name).is_dir():
        check_folder(Path(name))
    # Else transformers, behind its caller's back, has a server convert a hub's .bin, and fetches the weights once more.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision or "main")
        model, report = AutoModelForCTC.from_pretrained(
            name, revision=revision or "main", output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:
        raise OSError(f"cannot load {source}: {_reason(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source} lacks {len(missing)} weights its config asks for, {missing[0]} first: it would run on random "
            "numbers. Is it the checkpoint of a fine-tuned CTC model?"
        )
    family_of(model.config)
    return model.eval(), processor


def _reason(error: Exception) -> str:
    """What is wrong with a model's files, where the words of those who read them do not say it."""
    if isinstance(error, UnpicklingError):  # torch's own words advise to read it unrestricted
        return (
            "its .bin is damaged, or holds objects besides tensors, which could run code: get the model as safetensors"
        )
    if isinstance(error, SafetensorError | EOFError) or "PytorchStreamReader" in str(error):
        return "its weights are cut short or damaged: get the file again (git without LFS leaves a pointer there)"
    return str(error)
