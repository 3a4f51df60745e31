"""What a run asks for that this model, this speech or this machine cannot give: refused before anything starts."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asrlib.attention.widths import check_latent_dim
from asrlib.conversion.methods import grouping_methods, latent_methods
from asrlib.running.parameters import Schema, known_step
from asrlib.runs import BadParameter, nearest, read_json, resolve


def merged(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all `layers` (where given, values), later ones going before, and by name where each was given.

    latent_dim and cache_cut are two ways to say one thing: giving one takes back the other of earlier layers.
    """
    values, origin = {}, {}
    for where, given in layers:
        for one, other in (("latent_dim", "cache_cut"), ("cache_cut", "latent_dim")):
            if given.get(one) is not None:
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
    try:
        if cache_cut is not None:
            from asrlib.conversion.convert import latent_dim_for

            latent_dim = latent_dim_for(cache_cut, hidden_size)
        check_latent_dim(latent_dim, hidden_size, values.get("layout") or "joint")
    except ValueError as error:
        raise BadParameter(str(error)) from None


def check_whose_width(values: Mapping[str, Any], steps: Iterable[str]) -> None:
    """Refuse a width of the conversion, among `values` that were given, where a new model is made and none converted:
    it would do nothing."""
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
        found = read_json(config)
        found = found.get("encoder_config") or found
        return found.get("hidden_size", found.get("d_model"))
    except (ValueError, AttributeError):  # damaged, as `check_model` will say
        return None


def check_surroundings(values: dict[str, Any]) -> None:
    """Refuses what would fail in the middle of a run for what this machine has: model, splits, device, precision.

    Reads no audio and no weights, and nothing from a network but the names of the files where the corpus is a URL: a
    hub id is taken on trust. Raises BadParameter.
    """
    import torch

    from asrlib.attention.kinds import attention_kind
    from asrlib.data.opening import check_splits
    from asrlib.measuring.recipes import RECIPES
    from asrlib.models.inference import choose_device
    from asrlib.models.loading import resolve_model

    unknown = f": choose from {'; '.join(RECIPES)}"
    asked: dict[str, list[str]] = {}
    try:
        if values.get("model") and not values.get("architecture"):
            resolve_model(values["model"])
        if values.get("corpus"):
            asked = {"eval_splits": values.get("eval_splits", [])}
            asked |= {name: [values[name]] for name in ("train_split", "validation_split") if values.get(name)}
            check_splits(values["corpus"], [split for splits in asked.values() for split in splits])
        attention_kind(values.get("attention", "mha"))
        chosen = choose_device(values.get("device", "auto"))
        if values.get("benchmark_compiled"):
            from asrlib.measuring.speed import check_compiler

            check_compiler(chosen)
    except (OSError, ValueError) as error:
        missing = re.search(r"no split '([^']*)'", str(error))
        whose = [name for name, splits in asked.items() if missing and missing[1] in "+".join(splits).split("+")]
        raise BadParameter(f"{' and '.join(whose)}: {error}" if whose else str(error)) from None
    device, cuda = values.get("device", "auto"), torch.cuda.is_available()
    for name in ("precision", "baseline_precision"):
        if values.get(name) == "fp16" and (device == "cpu" or not cuda):
            raise BadParameter(f"{name!r} is fp16, which needs a CUDA device: use bf16 or fp32")
    _check_processes(values, torch.cuda.device_count() if cuda and device != "cpu" else 0)
    if values.get("architecture") and not values.get("baseline_epochs", True):
        raise BadParameter("'architecture' asks for a new model, whose weights are random: say 'baseline_epochs' too")
    if values.get("architecture"):
        _check_new_model(values)
    method, convert_to = values.get("method"), values.get("convert_to", "mla")
    if method is not None and method not in (grouping_methods() if convert_to == "gqa" else latent_methods()):
        raise BadParameter(f"'method' is {method}, which cannot convert to {convert_to}")
    for seconds in values.get("benchmark_seconds", []):
        if not isinstance(seconds, float | int) or seconds <= 0:
            raise BadParameter(f"'benchmark_seconds' holds {seconds!r}: each should be a number of seconds above 0")
    for cut in values.get("analysis_cuts", []):
        if not isinstance(cut, float) or not 0 < cut < 1:
            raise BadParameter(f"'analysis_cuts' holds {cut!r}: a cut lies between 0 and 1 (0.75 keeps a quarter)")
    for name in values.get("analysis_methods", []):
        if name not in RECIPES:
            raise BadParameter(f"'analysis_methods' holds {name!r}{nearest(str(name), RECIPES) or unknown}")
    weights = [values.get(name) for name in ("ctc_weight", "kl_weight", "hidden_weight")]
    if None not in weights and not any(weights):
        raise BadParameter("'ctc_weight', 'kl_weight' and 'hidden_weight' are all 0: there is nothing to learn from")


def check_model(values: Mapping[str, Any], steps: Iterable[str]) -> None:
    """Refuses a model folder in which something is missing or cut short, of which an estimate would take the config;
    and a model of which `steps` cannot be run. Raises BadParameter.
    """
    from transformers import AutoConfig

    from asrlib.models.loading import check_folder, resolve_model
    from asrlib.models.registry import family_of

    if values.get("architecture"):
        config, named = _new_config(values), f"'architecture' is {values['architecture']}"
    elif not values.get("model") or not (folder := Path(resolve_model(values["model"]))).is_dir():
        return
    else:
        named = f"'model' is {values['model']}"
        try:
            check_folder(folder)
            config = AutoConfig.from_pretrained(folder)
            family_of(config)
        except (OSError, ValueError) as error:
            raise BadParameter(str(error)) from None
    try:
        if "01_convert" in steps:
            _check_conversion(values, config, named)
        if "04_evaluate" in steps and values.get("stream_chunks_ms"):
            family_of(config).check_streaming(config)
        if "05_benchmark" in steps:
            _check_benchmark(values, config)
    except ValueError as error:
        raise error if isinstance(error, BadParameter) else BadParameter(f"{named}: {error}") from None


def _check_conversion(values: Mapping[str, Any], config, named: str) -> None:
    from asrlib.conversion.sequential import check_one_stack
    from asrlib.models.registry import chosen_parts, family_of

    family = family_of(config)
    if family.is_latent(config):
        raise BadParameter(f"{named}, which is latent already: give the one it was converted from")
    if values.get("convert_to") == "gqa" and family.to_grouped is None:
        raise BadParameter(f"'convert_to' is gqa, which a {config.model_type} cannot be made: use mla")
    family.check_layout(config, values.get("layout", "joint"))
    chosen_parts(config, values.get("parts"))
    if values.get("sequential") or values.get("reestimate_batch_norm"):
        check_one_stack(config)


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


def _check_processes(values: dict[str, Any], gpus: int) -> None:
    """`gpus` is how many of them training may use; 0: it runs on the CPU."""
    count, config = values.get("training_processes", 1), values.get("accelerate_config")
    if config is not None and not resolve(config).is_file():
        raise BadParameter(f"'accelerate_config' is {config}, which is no file: `accelerate config` writes one")
    if config is not None and count > 1:
        raise BadParameter(f"'training_processes' is {count}, but 'accelerate_config' says how many: give one of them")
    if 0 < gpus < count:
        raise BadParameter(f"'training_processes' is {count}, but each needs a GPU and here are {gpus}")
    if values.get("training_strategy") != "fsdp":
        return
    if not gpus or (count == 1 and config is None):
        raise BadParameter("'training_strategy' is fsdp, which needs GPUs and 'training_processes' above 1: use ddp")
    if "fp16" in (values.get("precision"), values.get("baseline_precision")):
        raise BadParameter("'training_strategy' is fsdp, which is not provided for fp16: use bf16 or fp32")


def _check_new_model(values: dict[str, Any]) -> None:
    speeds = values.get("speeds", [])
    if any(not isinstance(speed, float | int) or speed <= 0 for speed in speeds):
        raise BadParameter(f"'speeds' is {speeds!r}: each should be a number above 0 (1.1 is 10 % faster)")
    _new_config(values)


def _new_config(values: Mapping[str, Any]):
    """Of the new model that is asked for. Raises BadParameter where there can be none."""
    from huggingface_hub.errors import StrictDataclassError

    from asrlib.models.scratch import SIZES, new_config, new_processor

    features = {name: values[name] for name in ("mel_bins", "frame_shift_ms", "window_seconds") if name in values}
    sizes = {size: values[name] for size, name in SIZES.items() if name in values}
    try:
        return new_config(values["architecture"], new_processor(values["architecture"], **features), **sizes)
    except (ValueError, StrictDataclassError) as error:
        said = re.sub(r"\b(latent_dim|kv_heads)\b", r"new_\1", str(error))  # as the parameters are called
        raise BadParameter(f"no such model can be made: {said}") from None
