"""Loading models from a folder, the hub or the package, with the checks and their messages."""

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from asrlib.models.heads import CTC, Head
from asrlib.models.registry import FAMILIES, family_of
from asrlib.runs import atomic_folder, resolve

PRETRAINED = Path(__file__).parent / "pretrained"  # the models shipped with the package


def resolve_model(source: str | Path) -> str:
    """Turns a shipped model's name, a folder (relative to the project root) or a hub id into an argument of
    `from_pretrained`. Raises FileNotFoundError for a path without a model."""
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
    """Raises OSError where `folder` holds no complete model. Reads no weights, only the headers of their files."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError):
        raise OSError(
            f"cannot load {folder}: its config.json is not a valid JSON object with a model_type: get the file again"
        ) from None
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(
            f"{folder} holds no vocab.json or tokenizer.json, so the model cannot spell: get the tokenizer's files too"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"cannot load {folder}: it holds no file named model.safetensors or pytorch_model.bin: get the weights too"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # reads the header, and checks the file's length against it
                pass
        except SafetensorError as error:
            raise OSError(f"cannot load {folder}: {_reason(error)}") from None


def check_loaded(model, processor=None) -> None:
    """Raises TypeError where `model` is no model, or `processor` no processor; `load` gives both."""
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str | Path) else f"a {type(model).__name__}"
        raise TypeError(f"a model is wanted, not {given}: model, processor = asrlib.load(...) gives one")
    if processor is not None and not hasattr(processor, "feature_extractor"):
        raise TypeError(
            f"a processor is wanted beside the model, not a {type(processor).__name__}: "
            "model, processor = asrlib.load(...) gives one"
        )


def load(
    source: str | Path, revision: str | None = None, language: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads (model, processor) from a folder, a hub id or a shipped name; the model is in evaluation mode.

    Weights are safetensors, or a .bin that torch's restricted loader reads; remote code never runs. `revision` is the
    branch, tag, commit or pull request (refs/pr/3) of a hub id. `language` is the one that a model of several languages
    writes; the processor remembers it. Raises ValueError where the checkpoint lacks weights or the language, OSError
    where it is truncated.
    """
    name = resolve_model(source)
    if Path(name).is_dir():
        check_folder(Path(name))
    # By default transformers silently has a server convert a hub's .bin, and downloads the weights a second time.
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
            "numbers. Is it the checkpoint of a fine-tuned recogniser?"
        )
    family_of(model.config)
    head.prepare(model, processor, language)
    return model.eval(), processor


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
    """Writes both to `folder`, from which `load` reads them, complete or not at all."""
    with atomic_folder(resolve(folder)) as written:
        model.save_pretrained(written)
        processor.save_pretrained(written)


def _head_of(config: PreTrainedConfig) -> Head:
    """The family's head; CTC for an unknown family, so that `family_of` raises the error instead of transformers."""
    return FAMILIES[config.model_type].head if config.model_type in FAMILIES else CTC()


def _reason(error: Exception) -> str:
    """Why a model's files cannot be read, in clearer words than those of the libraries where these are unclear."""
    if isinstance(error, UnpicklingError):  # torch's message advises the unrestricted loader
        return (
            "its .bin is damaged, or holds objects besides tensors, which could run code: get the model as safetensors"
        )
    if isinstance(error, SafetensorError | EOFError) or "PytorchStreamReader" in str(error):
        return "its weights are cut short or damaged: get the file again (git without LFS leaves a pointer there)"
    return str(error)
