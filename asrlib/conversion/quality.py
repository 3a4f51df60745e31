"""What attention loses in a latent model: keys, values, scores, attention weights and outputs, layer by layer.

Names: B batch, S what a model reads (samples of audio, or frames of features), T frames, D width, H heads; 1: one
utterance at a time.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from asrlib.attention.kinds import heard
from asrlib.attention.names import call_arguments, projections
from asrlib.models.families import attention_modules, family_of, frame_counts, is_latent
from asrlib.models.inference import choose_device, inference

# Relative error of the attention output. The first system's limits were 0.05 and 0.10; measured word errors allow more:
# below GOOD 2 of 98 conversions were significantly worse than their baseline, by 0.28 and 1.03 points (LOG.md).
EXCELLENT = 0.10
GOOD = 0.25


def analyze_compression_quality(
    mha: PreTrainedModel, mla: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> pd.DataFrame:
    """How far each layer of `mla` is from the layer of `mha` it came from, one row per layer.

    `inputs` is one batch as the collator makes it: what the models read [B, S, ...], by its name, and, where it is
    padded, attention_mask [B, S]. Each utterance runs through `mha` alone, without its padding, and every layer of
    `mla` is given what that layer of `mha` reads, so that its error is its own and not its predecessors'. Layers are
    compared in float64, whatever the models' precision, on the device of `mha`; both models stay as they are.

    Columns: layer, latent_dim, and
    key_error, value_error, output_error: ‖ours − theirs‖ / ‖theirs‖ over all frames;
    score_error: the same of the attention scores, positions included. What is added to all scores of a query
      alike is left out, since softmax cancels it: each row is centred over the keys that it may attend to;
    attention_tv: total variation ½ Σ_j |ours_ij − theirs_ij| of attention weights (0 to 1), mean over queries, heads;
    output_cosine: cosine of the angle between the attention outputs, mean over frames.

    Raises ValueError where the two are not a standard and a latent model, or no utterance is a frame long.
    """
    if is_latent(mha.config) or not is_latent(mla.config):
        latent = ["latent" if is_latent(model.config) else "not latent" for model in (mha, mla)]
        raise ValueError(
            f"the models are {latent[0]} ({mha.config.model_type}) and {latent[1]} ({mla.config.model_type}): give "
            "first the one with standard attention, then the latent one that was converted from it"
        )
    modules = attention_modules(mha)
    device = choose_device(None, mha)
    with inference(mha, device=device), _recorded_calls(modules) as calls:
        for utterance_1S in _utterances(mha, inputs):
            family_of(mha.config).encode(mha, {mha.main_input_name: utterance_1S.to(device, mha.dtype)})
    rows = [
        {"layer": index, "latent_dim": mla.config.latent_dim[index]} | _layer_quality(theirs, ours, calls[index])
        for index, (theirs, ours) in enumerate(zip(modules, attention_modules(mla), strict=True))
    ]
    return pd.DataFrame(rows)


def summarise_quality(table: pd.DataFrame) -> dict[str, float | str]:
    """The whole model in one row: of a table of `analyze_compression_quality`, the root mean square over layers of
    each relative error, the mean of attention_tv and output_cosine, and the `verdict` on the output error."""
    errors = table.filter(regex="_error$").pow(2).mean().pow(0.5).to_dict()
    means = table[["attention_tv", "output_cosine"]].mean().to_dict()
    return {**errors, **means, "verdict": verdict(errors["output_error"])}


def verdict(output_error: float) -> str:
    """A relative error of the attention output, a fraction, in the words of the first system."""
    if output_error < EXCELLENT:
        return "excellent"
    return "good" if output_error < GOOD else "needs fine-tuning"


# ---- what the layers read ----------------------------------------------------------------------------------


def _utterances(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The utterances of a batch without their padding, [1, S, ...] each; those too short for a frame are left out."""
    padded_BS = inputs[model.main_input_name]
    mask_BS = inputs.get("attention_mask")
    lengths_B = torch.full((len(padded_BS),), padded_BS.shape[1]) if mask_BS is None else mask_BS.sum(-1).cpu()
    utterances = [
        row_S[None, :length]
        for row_S, length, frames in zip(padded_BS, lengths_B, frame_counts(model, lengths_B), strict=True)
        if frames > 0
    ]
    if not utterances:
        raise ValueError(f"no utterance of the batch (lengths {lengths_B.tolist()}) is a frame long: give longer ones")
    return utterances


@contextmanager
def _recorded_calls(modules: list[nn.Module]) -> Iterator[list[list[dict]]]:
    """The arguments of all calls of each module, by name, in order of `modules`."""
    calls: list[list[dict]] = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, of=of: of.append(call_arguments(args, kwargs)), with_kwargs=True
        )
        for module, of in zip(modules, calls, strict=True)
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
    if device.type == "mps":  # knows no float64
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
    """Tensors go to `device`; those of booleans, like masks, keep their meaning."""
    if not torch.is_tensor(value):
        return value
    return value.to(device).double() if value.is_floating_point() else value.to(device)


def _float64_copy(attention: nn.Module, device: torch.device) -> nn.Module:
    """A copy with a config of its own, which asks for eager attention: the one that returns its weights.

    In float32 weights underflow where scores are 104 apart, in float64 where they are 745 apart.
    """
    twin = copy.deepcopy(attention).to(device).double().eval()
    twin.config._attn_implementation = "eager"
    return twin


def _fractions(theirs: nn.Module, ours: nn.Module, call: dict) -> dict[str, torch.Tensor]:
    """One utterance's (numerator, denominator) [2] of each column, to be added up; of errors, still squared."""
    x_1TD, read_by_keys = call["hidden_states"], []
    our, their = projections(ours), projections(theirs)
    hook = their.key.register_forward_pre_hook(lambda _, args: read_by_keys.append(args[0]))
    their_output_1TD, their_weights_1HTT = theirs(**call)
    our_output_1TD, our_weights_1HTT = ours(**call)
    hook.remove()
    (turned_1TD,) = read_by_keys  # rotary positions turn it
    mask = call.get("attention_mask")
    heard_1HTT = heard(mask) if mask is not None and mask.dim() == 4 else None
    return {
        "key_error": _squares(our.key(turned_1TD), their.key(turned_1TD)),
        "value_error": _squares(our.value(x_1TD), their.value(x_1TD)),
        "score_error": _squares(
            _centred_scores(our_weights_1HTT, heard_1HTT), _centred_scores(their_weights_1HTT, heard_1HTT)
        ),
        "attention_tv": _count((our_weights_1HTT - their_weights_1HTT).abs().sum(-1) / 2),
        "output_error": _squares(our_output_1TD, their_output_1TD),
        "output_cosine": _count(nn.functional.cosine_similarity(our_output_1TD, their_output_1TD, dim=-1)),
    }


def _squares(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return torch.stack([(ours - theirs).square().sum(), theirs.square().sum()])


def _count(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.sum(), values.new_tensor(values.numel())])


def _centred_scores(weights_1HTT: torch.Tensor, heard_1HTT: torch.Tensor | None) -> torch.Tensor:
    """Scores less their mean over keys, from the weights whose logarithm they are but for a shift per query; 0 where
    they may not be attended to."""
    tiny = torch.finfo(weights_1HTT.dtype).tiny  # what underflowed counts as 708 below the largest
    scores_1HTT = weights_1HTT.clamp(min=tiny).log()
    if heard_1HTT is None:
        return scores_1HTT - scores_1HTT.mean(-1, keepdim=True)
    mean_1HT1 = (scores_1HTT * heard_1HTT).sum(-1, keepdim=True) / heard_1HTT.sum(-1, keepdim=True)
    return (scores_1HTT - mean_1HT1) * heard_1HTT
