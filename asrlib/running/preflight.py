"""Refuses, before anything starts, what this model, this speech or this machine cannot do."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asrlib.attention.widths import check_latent_dim
from asrlib.conversion.methods import METHODS, check_follows, check_layout_of, grouping_methods, latent_methods
from asrlib.running.parameters import Schema, known_step
from asrlib.runs import BadParameter, nearest, read_json, resolve


@contextmanager
def refused(what: str = "") -> Iterator[None]:
    """Raises an error of the block as BadParameter, whose message begins with `what`."""
    try:
        yield
    except BadParameter:
        raise
    except (OSError, ValueError) as error:
        raise BadParameter(f"{what}: {error}" if what else str(error)) from None


def merged(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all `layers` (where given, values), of which the last counts, and by name where each was given.

    latent_dim and cache_cut both say how wide the latent is. A layer that gives one takes back the other of earlier
    layers.
    """
    values, origin = {}, {}
    for where, given in layers:
        for width, other in (("latent_dim", "cache_cut"), ("cache_cut", "latent_dim")):
            if given.get(width) is not None:
                values.pop(other, None)
        values |= given
        origin |= dict.fromkeys(given, where)
    return values, origin


def checked(
    layers: Iterable[tuple[str, Mapping[str, Any]]], schema: Schema, steps: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Checked parameters of the merged `layers`, and the steps that run (their `steps`, or all).

    Raises BadParameter where one cannot be used, or not with this model or on this machine.
    """
    values, origin = merged(layers)
    only = values.pop("steps", steps)
    if not isinstance(only, list) or not only:
        raise BadParameter(f"'steps' (in {origin['steps']}) should be a list of steps: {', '.join(steps)}")
    chosen = {steps[known_step(step, steps, origin.get("steps", ""))] for step in only}
    values = schema.check(values, origin)
    check_width(schema.defaults | values)
    names = [step for step in steps if step in chosen]
    check_whose_width(values, names)
    every = schema.defaults | values
    if names == ["00_baseline"] and not every.get("baseline_epochs"):  # it trains nothing
        every |= {"train_split": None, "validation_split": None}
    check_surroundings(every)
    return values, names


def check_width(values: dict[str, Any]) -> None:
    """Refuse a latent wider or narrower than the model allows, where that can be known without a download."""
    latent_dim, cache_cut = values.get("latent_dim"), values.get("cache_cut")
    if (latent_dim is None and cache_cut is None) or not values.get("model"):
        return
    if values.get("architecture"):  # a new model is made
        hidden_size = values["hidden_size"]
    else:
        hidden_size = model_width(values["model"], values.get("revision"))
    if hidden_size is None:
        return
    with refused():
        if cache_cut is not None:
            from asrlib.conversion.convert import latent_dim_for

            latent_dim = latent_dim_for(cache_cut, hidden_size)
        check_latent_dim(latent_dim, hidden_size, values.get("layout") or "joint")


def check_whose_width(values: Mapping[str, Any], steps: Iterable[str]) -> None:
    """Refuse a width of the conversion, among the `values` that were given, where a new model is made and never
    converted: the width would do nothing."""
    if not values.get("architecture") or "01_convert" in steps:
        return
    for name in ("latent_dim", "kv_heads"):
        if values.get(name) is not None:
            raise BadParameter(f"{name} is the conversion's; the new model's is new_{name}")


def model_width(source: str, revision: str | None = None) -> int | None:
    """hidden_size of a model folder, a shipped model, or a hub model that was downloaded before; None where
    only a download would tell."""
    folder = resolve(source)
    if not (folder / "config.json").is_file():
        from asrlib.models.loading import resolve_model  # costs the import of torch

        try:
            folder = Path(resolve_model(source))
        except FileNotFoundError:
            return None
    config = folder / "config.json"
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    try:
        settings = read_json(config)
        settings = settings.get("encoder_config") or settings
        return settings.get("hidden_size", settings.get("d_model"))
    except (ValueError, AttributeError):  # damaged, as `check_model` will say
        return None


def check_surroundings(values: dict[str, Any]) -> None:
    """Refuse what would fail in the middle of a run for what this machine has: model, splits, device, precision.

    Reads no audio and no weights, and nothing from a network but a list of the files where the corpus is a URL. A hub
    id is believed. Raises BadParameter.
    """
    from asrlib.attention.kinds import attention_kind
    from asrlib.measuring.recipes import RECIPES
    from asrlib.models.loading import resolve_model

    with refused():
        if values.get("model") and not values.get("architecture"):
            resolve_model(values["model"])
        if values.get("corpus"):
            _check_speech(values)
        attention_kind(values.get("attention", "mha"))
        _check_machine(values)
    if values.get("architecture"):
        if not values.get("baseline_epochs", True):
            raise BadParameter("'architecture' makes a new model, whose weights are random: give 'baseline_epochs' too")
        _new_config(values)
    method, convert_to = values.get("method"), values.get("convert_to", "mla")
    if method is not None and method not in (grouping_methods() if convert_to == "gqa" else latent_methods()):
        raise BadParameter(f"'method' is {method}, which cannot convert to {convert_to}")
    if method is not None and convert_to == "mla":
        with refused():
            check_layout_of(method, values.get("layout", "joint"))
            if values.get("sequential"):
                check_follows(method)
    for name in values.get("analysis_methods", []):
        if name not in RECIPES:
            choices = nearest(str(name), RECIPES) or f": choose from {'; '.join(RECIPES)}"
            raise BadParameter(f"'analysis_methods' holds {name!r}{choices}")
    weights = [values.get(name) for name in ("ctc_weight", "kl_weight", "hidden_weight")]
    if None not in weights and not any(weights):
        raise BadParameter("'ctc_weight', 'kl_weight' and 'hidden_weight' are all 0: there is nothing to learn from")
    if values.get("control") and values.get("trainable") == "latent":
        raise BadParameter("'control' trains the unconverted model, which has no latent: use trainable: attention")
    if values.get("learning_rate", 1) is None and not values.get("learning_rates"):
        raise BadParameter("'learning_rate' and 'learning_rates' are both null: give one of them")
    if values.get("chosen_by") == "divergence" and weights[1] == 0:
        raise BadParameter("'chosen_by' is divergence, that from a teacher: give 'kl_weight', or choose by wer")
    if values.get("on_policy") and not any(weights[1:]):
        raise BadParameter("'on_policy' asks a teacher about what the model writes: give 'kl_weight' too")


def _check_speech(values: Mapping[str, Any]) -> None:
    """The corpus has the splits; the message names the parameter that asks for a missing one."""
    from asrlib.data.corpus import NoSuchSplit
    from asrlib.data.opening import check_splits

    asked = {name: [values[name]] for name in ("train_split", "validation_split") if values.get(name)}
    asked |= {"eval_splits": values.get("eval_splits", [])}
    try:
        check_splits(values["corpus"], [split for splits in asked.values() for split in splits])
    except NoSuchSplit as error:
        names = [name for name, splits in asked.items() if error.split in "+".join(splits).split("+")]
        raise BadParameter(f"{' and '.join(names)}: {error}") from None


def _check_machine(values: Mapping[str, Any]) -> None:
    """This machine has the device, and all that is asked of the device."""
    import torch

    from asrlib.models.inference import choose_device

    device = values.get("device", "auto")
    chosen = choose_device(device)
    if values.get("benchmark_compiled"):
        from asrlib.measuring.speed import check_compiler

        check_compiler(chosen)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
    for name in ("precision", "baseline_precision"):
        if values.get(name) == "fp16" and not gpus:
            raise BadParameter(f"{name!r} is fp16, which needs a CUDA device: use bf16 or fp32")
    _check_processes(values, gpus)


def check_model(values: Mapping[str, Any], steps: Iterable[str]) -> None:
    """Refuse a model folder that lacks something, and a model with which `steps` cannot run. Raises BadParameter."""
    from transformers import AutoConfig

    from asrlib.models.loading import check_folder, resolve_model
    from asrlib.models.registry import family_of

    if values.get("architecture"):
        config, named = _new_config(values), f"'architecture' is {values['architecture']}"
    elif not values.get("model") or not (folder := Path(resolve_model(values["model"]))).is_dir():
        return
    else:
        named = f"'model' is {values['model']}"
        with refused():
            check_folder(folder)
            config = AutoConfig.from_pretrained(folder)
            family_of(config)
    with refused(named):
        if "01_convert" in steps:
            _check_conversion(values, config, named)
        if "04_evaluate" in steps and values.get("stream_chunks_ms"):
            family_of(config).check_streaming(config)
        if "05_benchmark" in steps:
            _check_benchmark(values, config)


def _check_conversion(values: Mapping[str, Any], config, named: str) -> None:
    from asrlib.conversion.sequential import check_one_stack
    from asrlib.conversion.statistics import check_calibration
    from asrlib.models.families.whisper import check_shared
    from asrlib.models.registry import chosen_parts, family_of

    family = family_of(config)
    if family.is_latent(config):
        raise BadParameter(f"{named}, which is latent already: give the one it was converted from")
    if values.get("convert_to") == "gqa" and family.to_grouped is None:
        raise BadParameter(f"'convert_to' is gqa, which a {config.model_type} cannot be made: use mla")
    family.check_layout(config, values.get("layout", "joint"))
    parts = chosen_parts(config, values.get("parts"))
    if values.get("shared"):
        check_shared(parts, values.get("layout", "joint"))
    if values.get("sequential") or values.get("reestimate_batch_norm"):
        check_one_stack(config)
    watches = METHODS[values.get("method", "svd")].needs_statistics or values.get("ranks") == "sensitivity"
    if watches and values.get("train_split"):
        with refused("'train_split'"):
            check_calibration(values["train_split"])


def _check_benchmark(values: Mapping[str, Any], config) -> None:
    from asrlib.measuring.lengths import check_lengths
    from asrlib.measuring.random_models import size_of
    from asrlib.measuring.speed import check_compiled

    if values.get("benchmark_seconds"):
        check_lengths(config)
    if values.get("benchmark_compiled"):
        check_compiled(config)
    if values.get("benchmark_left_seconds") and values.get("benchmark_stream_size") is None:
        size_of(config)


def _check_processes(values: Mapping[str, Any], gpus: int) -> None:
    """`gpus`: how many of them training may use; 0 on the CPU."""
    count, config = values.get("training_processes", 1), values.get("accelerate_config")
    if config is not None and not resolve(config).is_file():
        raise BadParameter(f"'accelerate_config' is {config}, which is not a file: `accelerate config` writes one")
    if config is not None and count > 1:
        raise BadParameter(
            f"'training_processes' is {count}, but 'accelerate_config' gives their number too: give one of the two"
        )
    if 0 < gpus < count:
        raise BadParameter(f"'training_processes' is {count}, but each needs a GPU, and this machine has {gpus}")
    if values.get("training_strategy") != "fsdp":
        return
    if not gpus or (count == 1 and config is None):
        raise BadParameter("'training_strategy' is fsdp, which needs GPUs and 'training_processes' above 1: use ddp")
    if "fp16" in (values.get("precision"), values.get("baseline_precision")):
        raise BadParameter("'training_strategy' is fsdp, which cannot train in fp16: use bf16 or fp32")


def _new_config(values: Mapping[str, Any]):
    """The config of the new model. Raises BadParameter where there cannot be such a model."""
    from huggingface_hub.errors import StrictDataclassError

    from asrlib.models.scratch import SIZES, new_config, new_processor

    features = {name: values[name] for name in ("mel_bins", "frame_shift_ms", "window_seconds") if name in values}
    sizes = {size: values[name] for size, name in SIZES.items() if name in values}
    try:
        return new_config(values["architecture"], new_processor(values["architecture"], **features), **sizes)
    except (ValueError, StrictDataclassError) as error:
        reason = re.sub(r"\b(latent_dim|kv_heads)\b", r"new_\1", str(error))  # as the parameters are called
        raise BadParameter(f"there cannot be such a model: {reason}") from None
