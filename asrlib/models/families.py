"""Model families: what conversion and evaluation must know of an architecture, and how models are loaded.

A new family is one file beside this one, which registers its classes with transformers, and one line in `FAMILIES`
(with its import). docs/extending.md has one worked out.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    HubertForCTC,
    NemotronAsrStreamingForRNNT,
    ParakeetForCTC,
    ParakeetForRNNT,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Wav2Vec2BertForCTC,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
)

from asrlib.attention.names import attends_across
from asrlib.data.audio import SAMPLE_RATE
from asrlib.models import encoder, nemotron, parakeet, wav2vec2, wav2vec2_bert, wav2vec2_conformer, whisper
from asrlib.models.heads import CTC, Decoder, Head, Transducer
from asrlib.models.latent_twin import LatentConfig, check_layout

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
    attention: Callable[[nn.Module], nn.Module]  # layer → attention, with projections of `attention.names`
    check_streaming: Callable[[PreTrainedConfig], None]  # raises where something takes the whole recording
    head: Head = field(default_factory=CTC)  # what writes the text: see heads.py
    check_layout: Callable[[PreTrainedConfig, str], None] = check_layout  # raises where attention forbids a layout
    # Of those that can stream: inputs → what the layers read [B, T, D], and what the last layer gives → [B, T, V].
    frames: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    work_in_blocks: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model  # own attention, same parameters
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
    # Where a pass of the model asks for a text: runs its layers over what they read of a batch, of labels nothing.
    encode: Callable[[PreTrainedModel, dict[str, torch.Tensor]], object] | None = None


WAV2VEC2_CONFORMER = Family(
    standard_model=Wav2Vec2ConformerForCTC,
    latent_model=wav2vec2_conformer.Wav2Vec2ConformerMLAForCTC,
    to_standard=wav2vec2_conformer.to_standard,
    to_latent=wav2vec2_conformer.to_latent,
    is_latent=lambda config: isinstance(config, LatentConfig),
    layers=lambda model: list(model.wav2vec2_conformer.encoder.layers),
    attention=lambda layer: layer.self_attn,
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
    check_streaming=lambda config: None,
    to_grouped=encoder.to_grouped,
    input_length=lambda config, samples: config.mel_frames(samples),
)

WAV2VEC2 = Family(
    standard_model=Wav2Vec2ForCTC,
    latent_model=wav2vec2.Wav2Vec2MLAForCTC,
    to_standard=wav2vec2.to_standard,
    to_latent=wav2vec2.to_latent,
    is_latent=lambda config: isinstance(config, LatentConfig),
    layers=lambda model: list(model.base_model.encoder.layers),
    attention=lambda layer: layer.attention,
    check_streaming=wav2vec2.check_streaming,
    positions=lambda config: "convolutional",
)

HUBERT = replace(WAV2VEC2, standard_model=HubertForCTC, latent_model=wav2vec2.HubertMLAForCTC)

WAV2VEC2_BERT = Family(
    standard_model=Wav2Vec2BertForCTC,
    latent_model=wav2vec2_bert.Wav2Vec2BertMLAForCTC,
    to_standard=wav2vec2_bert.to_standard,
    to_latent=wav2vec2_bert.to_latent,
    is_latent=lambda config: isinstance(config, LatentConfig),
    layers=lambda model: list(model.wav2vec2_bert.encoder.layers),
    attention=lambda layer: layer.self_attn,
    check_streaming=wav2vec2_bert.check_streaming,
    input_length=wav2vec2_bert.input_length,
    samples_per_frame=wav2vec2_bert.samples_per_frame,
)

PARAKEET = Family(
    standard_model=ParakeetForCTC,
    latent_model=parakeet.ParakeetMLAForCTC,
    to_standard=parakeet.to_standard,
    to_latent=parakeet.to_latent,
    is_latent=lambda config: isinstance(config, LatentConfig),
    layers=lambda model: list(model.encoder.layers),
    attention=lambda layer: layer.self_attn,
    check_streaming=parakeet.check_streaming,
    work_in_blocks=parakeet.work_in_blocks,
    positions=lambda config: "relative",
    input_length=parakeet.input_length,
    samples_per_frame=parakeet.samples_per_frame,
    frame_counts=lambda model, lengths: model._get_subsampling_output_length(lengths),
)

PARAKEET_RNNT = replace(
    PARAKEET,
    standard_model=ParakeetForRNNT,
    latent_model=parakeet.ParakeetMLAForRNNT,
    encode=parakeet.encode,
    head=Transducer(),
)

NEMOTRON = replace(
    PARAKEET_RNNT,
    standard_model=NemotronAsrStreamingForRNNT,
    latent_model=nemotron.NemotronMLAForRNNT,
    to_standard=nemotron.to_standard,
    to_latent=nemotron.to_latent,
    check_streaming=nemotron.check_streaming,
    work_in_blocks=nemotron.work_in_blocks,
    encode=nemotron.encode,
)

WHISPER = Family(
    standard_model=WhisperForConditionalGeneration,
    latent_model=whisper.WhisperMLAForConditionalGeneration,
    to_standard=whisper.to_standard,
    to_latent=whisper.to_latent,
    is_latent=lambda config: isinstance(config, LatentConfig),
    layers=lambda model: list(model.model.encoder.layers),
    attention=lambda layer: layer.self_attn,
    check_streaming=whisper.check_streaming,
    head=Decoder(),
    positions=lambda config: "sinusoidal",
    input_length=lambda config, samples: samples // whisper.HOP,
    samples_per_frame=lambda config: whisper.SAMPLES_PER_FRAME,
    parts=whisper.parts,
    part_names=whisper.PARTS,
    cached_parts=whisper.CACHED,
    frame_counts=lambda model, lengths: torch.full_like(lengths, model.config.max_source_positions),
)

FAMILIES = {
    "wav2vec2": WAV2VEC2,
    "wav2vec2-mla": WAV2VEC2,
    "hubert": HUBERT,
    "hubert-mla": HUBERT,
    "wav2vec2-conformer": WAV2VEC2_CONFORMER,
    "wav2vec2-conformer-mla": WAV2VEC2_CONFORMER,
    "wav2vec2-bert": WAV2VEC2_BERT,
    "wav2vec2-bert-mla": WAV2VEC2_BERT,
    "parakeet_ctc": PARAKEET,
    "parakeet_ctc-mla": PARAKEET,
    "parakeet_rnnt": PARAKEET_RNNT,
    "parakeet_rnnt-mla": PARAKEET_RNNT,
    "nemotron_asr_streaming": NEMOTRON,
    "nemotron_asr_streaming-mla": NEMOTRON,
    "whisper": WHISPER,
    "whisper-mla": WHISPER,
    "speech-encoder": SPEECH_ENCODER,
}


def family_of(config) -> Family:
    """The family of a model's config; ValueError names the known ones."""
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"no family for model type {config.model_type!r}: asrlib knows {known}")
    return FAMILIES[config.model_type]


def attention_parts(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The attention modules of `model`, first layer first, by what they are part of: the encoder, if nothing else."""
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
    """The parts of a model to convert, in order: those given, else all of which a run keeps something.

    Raises ValueError where it has no such part.
    """
    family = family_of(config)
    known, given = family.part_names, family.cached_parts if parts is None else parts
    if isinstance(given, str) or not given or set(given) - set(known):
        raise ValueError(
            f"parts is {given!r}, but attention of {config.model_type} is of the {', '.join(known)}: give a list "
            "of one or more"
        )
    return [part for part in known if part in given]


def layer_names(model: PreTrainedModel, parts: Sequence[str] | None) -> list[str]:
    """What to call each module of `chosen_parts`: its layer's number, behind its part where there are several."""
    modules = attention_parts(model)
    names = [(part, index) for part in chosen_parts(model.config, parts) for index in range(len(modules[part]))]
    return [f"{part} {index}" if len(modules) > 1 else str(index) for part, index in names]


def run(model: PreTrainedModel, batch: dict[str, torch.Tensor]):
    """Runs all layers once over a batch as the head reads it (see heads.py), of which no cache is kept."""
    if encode := family_of(model.config).encode:
        return encode(model, {name: values for name, values in batch.items() if name != "labels"})
    no_cache = {"use_cache": False} if attends_across(model.config) else {}
    return family_of(model.config).head.forward(model, batch, **no_cache)


def positions_of(config) -> str | None:
    """How an encoder tells frames apart by their place: relative, rotary, … None: not at all."""
    return family_of(config).positions(config)


def is_latent(config) -> bool:
    return family_of(config).is_latent(config)


def frame_counts(model: PreTrainedModel, lengths: torch.Tensor) -> torch.Tensor:
    """Frames of the logits for inputs of such lengths, samples or frames of features: integer tensors [B] → [B]."""
    return family_of(model.config).frame_counts(model, lengths).long()


def layer_frame_counts(model: PreTrainedModel, lengths: torch.Tensor) -> torch.Tensor:
    """Frames that the layers work on: more than those of the logits where an adapter behind them thins these out."""
    if getattr(model.config, "add_adapter", False):
        return model._get_feat_extract_output_lengths(lengths, add_adapter=False).long()
    return frame_counts(model, lengths)


@dataclass(frozen=True)
class EncoderFrames:
    """The function samples of audio → encoder frames of `model`, and what can not be learnt from so many."""

    model: PreTrainedModel

    def __call__(self, samples: int) -> int:
        length = family_of(self.model.config).input_length(self.model.config, samples)
        return max(0, int(frame_counts(self.model, torch.tensor(length))))

    def problem(self, ids: list[int], samples: int) -> str | None:
        """Why `model` can not be trained or scored on these labels of audio that long, or None."""
        head = family_of(self.model.config).head
        return head.problem(self.model.config, ids, samples, self(samples))


def frames_of(model: PreTrainedModel) -> EncoderFrames:
    return EncoderFrames(model)


def frames_per_second(config) -> float:
    """Encoder frames per second of 16 kHz audio."""
    return SAMPLE_RATE / family_of(config).samples_per_frame(config)


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
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(
            f"{folder} holds no vocab.json or tokenizer.json, what the model spells with: get the tokenizer's files too"
        )
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


def load(source: str | Path, revision: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
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
        head = _head_of(AutoConfig.from_pretrained(name, revision=revision or "main"))
        model, report = head.auto_model.from_pretrained(
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
    head.prepare(model, processor)
    return model.eval(), processor


def _head_of(config: PreTrainedConfig) -> Head:
    """CTC too where no family is known, so that it is `family_of` that says so, and not transformers."""
    return FAMILIES[config.model_type].head if config.model_type in FAMILIES else CTC()


def _reason(error: Exception) -> str:
    """What is wrong with a model's files, where the words of those who read them do not say it."""
    if isinstance(error, UnpicklingError):  # torch's own words advise to read it unrestricted
        return (
            "its .bin is damaged, or holds objects besides tensors, which could run code: get the model as safetensors"
        )
    if isinstance(error, SafetensorError | EOFError) or "PytorchStreamReader" in str(error):
        return "its weights are cut short or damaged: get the file again (git without LFS leaves a pointer there)"
    return str(error)
