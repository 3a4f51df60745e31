"""Folders that transformers loads without asrlib, with the model's code or with standard attention."""

import copy
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from asrlib.attention.kinds import KINDS
from asrlib.conversion.twins import to_standard_attention
from asrlib.export.loading import generation_settings, loading
from asrlib.export.modules import flat_name, self_contained
from asrlib.models.registry import family_of, is_latent


def needs_code(config) -> bool:
    """Whether transformers lacks the classes of such a model."""
    return not type(config).__module__.startswith("transformers.")


def write_hub_folder(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Writes weights, configs, processor, and the modules that the model's class needs. Without asrlib, the head's Auto
    class loads the folder by `from_pretrained(folder, trust_remote_code=True)`.

    Raises ValueError where the model's class or attention is not asrlib's own code.
    """
    write_folder(model, processor, folder)
    if not needs_code(model.config):
        return
    kind = KINDS.get(getattr(model.config, "attention", None))
    for needed in filter(None, (type(model), type(model.config), kind)):
        if not needed.__module__.startswith("asrlib."):
            raise ValueError(
                f"{needed.__name__} is in {needed.__module__}, outside asrlib: only asrlib's own code can be exported "
                "(--to standard needs none)"
            )
    for name, source in self_contained(type(model).__module__).items():
        (folder / name).write_text(source, encoding="utf-8")
    config = type(model.config).from_pretrained(folder)
    classes = {"AutoConfig": type(model.config), family_of(config).head.auto_model.__name__: type(model)}
    # The file of each class. `register_for_auto_class` would write the same, but does not support absolute imports.
    config.auto_map = {auto: f"{flat_name(cls.__module__)}.{cls.__name__}" for auto, cls in classes.items()}
    config.save_pretrained(folder)


def standard(model: PreTrainedModel) -> PreTrainedModel:
    """A model with multi-head attention that computes the same as `model`.

    Raises ValueError where its attention is neither latent nor multi-head.
    """
    if is_latent(model.config):
        return to_standard_attention(model)
    attention = getattr(model.config, "attention", "mha")
    if attention != "mha":
        raise ValueError(
            f"the model's attention is {attention!r}, and no multi-head attention equals it: use --to hub or onnx"
        )
    return model


def write_folder(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Writes weights, configs and processor, without code. asrlib's arguments of `generate` become the defaults."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if settings := generation_settings(model, processor):
        generation = copy.deepcopy(model.generation_config)
        for name, value in settings.items():
            setattr(generation, name, value)
        generation.save_pretrained(folder)


def described(model: PreTrainedModel, processor: ProcessorMixin, to: str) -> tuple[str, str]:
    """(description of the folder, how to load it), for its card."""
    config = model.config
    kind = getattr(config, "attention", "mha")
    attention = "latent" if is_latent(config) else "multi-head" if kind == "mha" else kind
    if not needs_code(config):
        what = "A speech recogniser of transformers' own, with standard multi-head attention: it needs no other code."
        return what, loading(model, processor)
    if to == "hub":
        code = ", ".join(f"`{name}`" for name in self_contained(type(model).__module__))
        what = f"A speech recogniser with {attention} attention, and the code that transformers needs for it: {code}."
        return what, loading(model, processor, trust=True)
    what = f"A speech recogniser, a {config.encoder} of asrlib with multi-head attention, without its code."
    return what, loading(model, processor, register=True)
