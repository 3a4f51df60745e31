"""Model families: what conversion and evaluation must know of an architecture, and how models are loaded.

A new family is one file beside this one and one line in `FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    PreTrainedModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

from asrlib.models.wav2vec2_conformer import (
    Wav2Vec2ConformerMLAConfig,
    Wav2Vec2ConformerMLAForCTC,
    check_layout,
)

PRETRAINED = Path(__file__).parent.parent / "pretrained"  # the models shipped with the package
CHARACTERS = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"  # LibriSpeech's, by frequency; | stands for the space


@dataclass(frozen=True)
class Family:
    """One architecture, with standard and with latent attention."""

    standard_config: type
    standard_model: type[PreTrainedModel]
    latent_config: type
    latent_model: type[PreTrainedModel]
    layers: Callable[[PreTrainedModel], list[nn.Module]]  # encoder layers, in order
    attention: Callable[[nn.Module], nn.Module]  # layer → attention with linear_k and linear_v
    check_layout: Callable[[object, str], None]  # raises where positions forbid a layout


WAV2VEC2_CONFORMER = Family(
    standard_config=Wav2Vec2ConformerConfig,
    standard_model=Wav2Vec2ConformerForCTC,
    latent_config=Wav2Vec2ConformerMLAConfig,
    latent_model=Wav2Vec2ConformerMLAForCTC,
    layers=lambda model: list(model.wav2vec2_conformer.encoder.layers),
    attention=lambda layer: layer.self_attn,
    check_layout=check_layout,
)

FAMILIES = {
    "wav2vec2-conformer": WAV2VEC2_CONFORMER,
    "wav2vec2-conformer-mla": WAV2VEC2_CONFORMER,
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
    return isinstance(config, family_of(config).latent_config)


def frame_counts(model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
    """Encoder frames for utterances of so many samples: integer tensors [B] → [B]."""
    return model._get_feat_extract_output_lengths(samples).long()


def frames_of(model: PreTrainedModel) -> Callable[[int], int]:
    """The function samples → encoder frames of `model`."""
    return lambda samples: max(0, int(frame_counts(model, torch.tensor(samples))))


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
    if Path(source).is_absolute() or len(Path(source).parts) != 2:
        shipped = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("*/config.json")))
        raise FileNotFoundError(
            f"no model at {folder}: give a folder made by save_pretrained, a hub id (owner/name), or a shipped "
            f"model ({shipped})"
        )
    return str(source)


def load(source: str | Path, revision: str | None = None) -> tuple[PreTrainedModel, Wav2Vec2Processor]:
    """Loads (model, processor) from a folder, a hub id or a shipped name; the model is in evaluation mode.

    Weights are safetensors, or a .bin read by torch's restricted loader; remote code never runs. Raises
    ValueError where the checkpoint lacks weights, OSError where it is truncated.
    """
    name = resolve_model(source)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision or "main")
        model, report = AutoModelForCTC.from_pretrained(
            name, revision=revision or "main", output_loading_info=True, dtype=torch.float32
        )
    except UnpicklingError as error:  # torch's own words advise to read it unrestricted
        raise OSError(
            f"cannot load {source}: its .bin is damaged, or holds objects besides tensors, which could run code: get "
            "the model as safetensors"
        ) from error
    except Exception as error:
        raise OSError(f"cannot load {source}: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source} lacks {len(missing)} weights its config asks for, {missing[0]} first: it would run on random "
            "numbers. Is it the checkpoint of a fine-tuned CTC model?"
        )
    family_of(model.config)
    return model.eval(), processor


def new_processor() -> Wav2Vec2Processor:
    """16 kHz audio, normalised per utterance; the 32 symbols of facebook's LibriSpeech models."""
    import json
    import tempfile

    symbols = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def new_model(
    architecture: str,
    processor: Wav2Vec2Processor,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    depthwise_kernel: int,
    dropout: float,
    seed: int,
) -> PreTrainedModel:
    """A model with random weights, reproducible by `seed`, made to be trained from scratch."""
    if architecture not in NEW_MODELS:
        raise ValueError(f"architecture is {architecture!r}: choose one of {', '.join(NEW_MODELS)}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
    set_seed(seed)
    return NEW_MODELS[architecture](hidden_size, num_layers, num_heads, depthwise_kernel, dropout, processor)


def new_conformer(
    hidden_size: int, layers: int, heads: int, depthwise_kernel: int, dropout: float, processor: Wav2Vec2Processor
) -> Wav2Vec2ConformerForCTC:
    """A small wav2vec2-conformer with relative positions and random weights.

    Four convolutions give the usual 320 samples per frame at a fraction of the seven's cost.
    """
    config = Wav2Vec2ConformerConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        conv_dim=(64, 96, 144, 144),
        conv_kernel=(25, 8, 8, 4),
        conv_stride=(10, 4, 4, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        conv_depthwise_kernel_size=depthwise_kernel,
        num_conv_pos_embeddings=1,  # made by the parent class, used by no conformer
        num_conv_pos_embedding_groups=1,
        position_embeddings_type="relative",
        hidden_dropout=dropout,
        activation_dropout=dropout,
        attention_dropout=dropout,
        conformer_conv_dropout=dropout,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.05,
        pad_token_id=processor.tokenizer.pad_token_id,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    return Wav2Vec2ConformerForCTC(config)


NEW_MODELS = {"wav2vec2-conformer": new_conformer}
