"""The error of attention in a latent model: keys, values, scores, attention weights and outputs, layer by layer.

Names: B batch, S samples of audio or frames of features, T queries, U keys, D width, H heads; 1: one utterance at a
time. Queries are frames in an encoder and tokens in a decoder.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from asrlib.attention.chunks import heard
from asrlib.attention.names import attends_across, call_arguments, projections
from asrlib.models.inference import attention_weights, choose_device, inference
from asrlib.models.registry import (
    attention_parts,
    chosen_parts,
    family_of,
    frame_counts,
    is_latent,
    latent_modules,
    run,
)

# Limits of the relative error of the attention output, from measured word errors: below GOOD, 2 of 98 conversions were
# significantly worse than their baseline, by 0.28 and 1.03 points (LOG.md).
EXCELLENT = 0.10
GOOD = 0.25


def analyze_compression_quality(
    mha: PreTrainedModel, mla: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> pd.DataFrame:
    """The error of each layer of `mla` against the layer of `mha` it came from, one row per layer.

    `inputs` is one batch of the collator: the models' input [B, S, ...] by its name, attention_mask [B, S] where it is
    padded, and labels for an encoder-decoder. Each utterance runs through `mha` alone, without padding. Every latent
    layer of `mla` gets the input of the same layer of `mha`, so that errors of earlier layers do not count. Layers are
    compared in float64 on the device of `mha`, whatever the models' precision; both models stay unchanged.

    Columns: part (for an encoder-decoder), layer (in the part), latent_dim, and
    key_error, value_error, output_error: ‖ours − theirs‖ / ‖theirs‖ over all frames;
    score_error: the same of the attention scores, positions included. Each row is centred over its keys, because
      softmax cancels what is added to all scores of a query;
    attention_tv: total variation ½ Σ_j |ours_ij − theirs_ij| of attention weights (0 to 1), mean over queries, heads;
    output_cosine: cosine of the angle between the attention outputs, mean over frames.

    Raises ValueError where the two are not a standard and a latent model, or no utterance is as long as a frame.
    """
    if is_latent(mha.config) or not is_latent(mla.config):
        latent = ["latent" if is_latent(model.config) else "not latent" for model in (mha, mla)]
        raise ValueError(
            f"the models are {latent[0]} ({mha.config.model_type}) and {latent[1]} ({mla.config.model_type}): give "
            "first the one with standard attention, then the latent one that was converted from it"
        )
    parts = {
        part: attention_parts(mha)[part] for part in chosen_parts(mha.config, getattr(mla.config, "latent_parts", None))
    }
    names = [
        {"part": part} | {"layer": layer} if attends_across(mha.config) else {"layer": layer}
        for part, modules in parts.items()
        for layer in range(len(modules))
    ]
    modules = [module for of_part in parts.values() for module in of_part]
    device = choose_device(None, mha)
    # A decoder's tokens attend to no later ones. Only eager attention gets this as a mask.
    asked = attention_weights(*([mha] if attends_across(mha.config) else []))
    with inference(mha, device=device), asked, _recorded_calls(modules) as calls:
        for utterance in _utterances(mha, inputs):
            run(mha, {name: _as_read(values, device, mha.dtype) for name, values in utterance.items()})
    rows = [
        name | {"latent_dim": width} | _layer_quality(theirs, ours, of_module)
        for name, width, theirs, ours, of_module in zip(
            names, mla.config.latent_dim, modules, latent_modules(mla), calls, strict=True
        )
    ]
    return pd.DataFrame(rows)


def _as_read(values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return values.to(device, dtype) if values.is_floating_point() else values.to(device)


def by_name(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `analyze_compression_quality` with the part in the layers' names, where there are several parts."""
    if "part" not in table:
        return table
    return table.assign(layer=table["part"] + " " + table["layer"].astype(str)).drop(columns="part")


def summarise_quality(table: pd.DataFrame) -> dict[str, float | str]:
    """A table of `analyze_compression_quality` in one row: the root mean square over layers of each relative error, the
    means of attention_tv and output_cosine, and the `verdict` on the output error."""
    errors = table.filter(regex="_error$").pow(2).mean().pow(0.5).to_dict()
    means = table[["attention_tv", "output_cosine"]].mean().to_dict()
    return {**errors, **means, "verdict": verdict(errors["output_error"])}


def verdict(output_error: float) -> str:
    """A relative error of the attention output, a fraction, in words."""
    if output_error < EXCELLENT:
        return "excellent"
    return "good" if output_error < GOOD else "needs fine-tuning"


# ---- what the layers read ----------------------------------------------------------------------------------


def _utterances(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The input of `model` for each utterance of a batch, [1, S, ...], without padding. Utterances too short for a
    frame are left out."""
    name, family = model.main_input_name, family_of(model.config)
    reads_labels = family.head.reads_labels and not family.encode  # a transducer's layers run without a text
    padded_BS = inputs[name]
    mask_BS = inputs.get("attention_mask")
    lengths_B = torch.full((len(padded_BS),), padded_BS.shape[1]) if mask_BS is None else mask_BS.sum(-1).cpu()
    utterances = []
    for row, (length, frames) in enumerate(zip(lengths_B.tolist(), frame_counts(model, lengths_B), strict=True)):
        if frames > 0:
            end = None if attends_across(model.config) else length  # Whisper's encoder always reads a whole window
            names = [name, "attention_mask"] if reads_labels and mask_BS is not None else [name]
            utterances.append({key: inputs[key][row : row + 1, :end] for key in names})
            if reads_labels:
                labels_1L = inputs["labels"][row : row + 1]
                utterances[-1]["labels"] = labels_1L[:, labels_1L[0] >= 0]
    if not utterances:
        raise ValueError(f"every utterance of the batch is shorter than a frame (lengths {lengths_B.tolist()})")
    return utterances


@contextmanager
def _recorded_calls(modules: list[nn.Module]) -> Iterator[list[list[dict]]]:
    """The arguments of all calls of each module, by name, in order of `modules`."""
    calls: list[list[dict]] = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, recorded=recorded: recorded.append(call_arguments(args, kwargs)), with_kwargs=True
        )
        for module, recorded in zip(modules, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


# ---- one layer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _layer_quality(theirs: nn.Module, ours: nn.Module, calls: list[dict]) -> dict[str, float]:
    device = calls[0]["hidden_states"].device
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    theirs, ours = _float64_copy(theirs, device), _float64_copy(ours, device)
    fractions: dict[str, torch.Tensor] = {}
    for call in calls:
        call = {name: _as_float64(value, device) for name, value in call.items()}
        for name, fraction_2 in _fractions(theirs, ours, call).items():
            fractions[name] = fractions.get(name, 0) + fraction_2
    ratios = {name: (above / below).item() for name, (above, below) in fractions.items()}
    return {name: ratio**0.5 if name.endswith("_error") else ratio for name, ratio in ratios.items()}


def _as_float64(value, device: torch.device):
    """`value`, if a tensor, on `device` in float64; boolean masks keep their type."""
    if not torch.is_tensor(value):
        return value
    return value.to(device).double() if value.is_floating_point() else value.to(device)


def _float64_copy(attention: nn.Module, device: torch.device) -> nn.Module:
    """A copy with its own config, set to eager attention, which returns the weights.

    In float32 weights underflow where scores are 104 apart, in float64 where they are 745 apart.
    """
    twin = copy.deepcopy(attention).to(device).double().eval()
    twin.config._attn_implementation = "eager"
    return twin


def _fractions(theirs: nn.Module, ours: nn.Module, call: dict) -> dict[str, torch.Tensor]:
    """(numerator, denominator) [2] of each column for one utterance, to be added up. Errors are still squared."""
    x_1TD, read_by_keys = call["hidden_states"], []  # of queries, and mostly of keys
    our, their = projections(ours), projections(theirs)
    hook = their.key.register_forward_pre_hook(lambda _, args: read_by_keys.append(args[0]))
    their_output_1TD, their_weights_1HTU = theirs(**call)
    our_output_1TD, our_weights_1HTU = ours(**call)
    hook.remove()
    (turned_1UD,) = read_by_keys  # rotated, where positions are rotary
    read_1UD = x_1TD if call.get("key_value_states") is None else call["key_value_states"]
    seen = _seen(call.get("attention_mask"))
    return {
        "key_error": _squares(our.key(turned_1UD), their.key(turned_1UD)),
        "value_error": _squares(our.value(read_1UD), their.value(read_1UD)),
        "score_error": _squares(_centred_scores(our_weights_1HTU, seen), _centred_scores(their_weights_1HTU, seen)),
        "attention_tv": _count((our_weights_1HTU - their_weights_1HTU).abs().sum(-1) / 2),
        "output_error": _squares(our_output_1TD, their_output_1TD),
        "output_cosine": _count(nn.functional.cosine_similarity(our_output_1TD, their_output_1TD, dim=-1)),
    }


def _squares(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return torch.stack([(ours - theirs).square().sum(), theirs.square().sum()])


def _count(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.sum(), values.new_tensor(values.numel())])


def _seen(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which keys [1, 1, T, U] each query may attend to under this mask; None: all."""
    seen = heard(mask) if mask is not None and mask.dim() == 4 else None
    return None if seen is None or seen.all() else seen


def _centred_scores(weights_1HTU: torch.Tensor, seen_11TU: torch.Tensor | None) -> torch.Tensor:
    """Scores minus their mean over keys, from the weights: their logarithm is the score, shifted for each query."""
    tiny = torch.finfo(weights_1HTU.dtype).tiny  # an underflow counts as 708 below the largest
    scores_1HTU = weights_1HTU.clamp(min=tiny).log()
    if seen_11TU is None:
        return scores_1HTU - scores_1HTU.mean(-1, keepdim=True)
    means_1HT1 = (scores_1HTU * seen_11TU).sum(-1, keepdim=True) / seen_11TU.sum(-1, keepdim=True)
    return (scores_1HTU - means_1HT1) * seen_11TU
