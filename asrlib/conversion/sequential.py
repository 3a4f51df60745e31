"""Conversion layer after layer, in step with the model it comes from.

The output of a converted layer differs from what the next layer was trained on. Sequential conversion therefore takes
the next layer's statistics on its real input (as GPTQ does, arXiv 2210.17323), and fits it to reproduce its output on
the right input. The running moments of BatchNorm, which are those of the unconverted model, are corrected likewise.

Shapes: B batch, T frames, C channels, D width. The CPU holds the input of the current layer for all calibration speech,
once for each model: frames × D numbers each, 120 MB for ten minutes at width 1024 in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from asrlib.attention.names import attends_across
from asrlib.conversion.statistics import CalibrationSpeech, observed, unpadded
from asrlib.conversion.sums import Kept, LayerStatistics, Reading
from asrlib.models.inference import attention_weights, inference
from asrlib.models.registry import family_of, layer_frame_counts, run


@dataclass
class _Batch:
    """The input of a layer, in the unconverted and in the converted model."""

    frames_B: torch.Tensor
    arguments: dict  # of the layer's call: masks and positions, the same for every layer
    wanted_BTD: torch.Tensor
    ours_BTD: torch.Tensor


def check_one_stack(config) -> None:
    """Raises ValueError where a model has another stack of layers beside the encoder's."""
    if attends_across(config):
        raise ValueError(
            "sequential and reestimate_batch_norm follow one stack of layers, and an encoder-decoder "
            f"({config.model_type}) has two: leave them out"
        )


def convert_in_sequence(
    model: PreTrainedModel,
    latent: PreTrainedModel,
    speech: CalibrationSpeech,
    fit: Callable[[int, LayerStatistics], None] | None,
    batch_norm: bool,
    attention: bool = False,
) -> None:
    """Fits the layers of `latent`, a twin of `model`, first layer first, and corrects its BatchNorm if `batch_norm`.

    `fit(index, statistics)` fills the attention of layer `index`; None leaves all layers unchanged. With `attention`,
    the statistics include attention weights. Both models end on the device of `speech`.
    """
    family = family_of(model.config)
    layers = list(zip(family.layers(latent), family.layers(model), strict=True))
    eager = [model, latent] if attention else []
    with inference(model, latent, device=speech.device), attention_weights(*eager):
        batches = [_encoder_input(model, batch) for batch in speech]
        for index, (ours, theirs) in enumerate(tqdm(layers, desc="in sequence", unit="layer", leave=False)):
            statistics = LayerStatistics.of(family.attention(theirs), attention)
            wanted = []
            for batch in batches:
                with unpadded(theirs, batch.frames_B) as kept_BT, _recorded(family.attention(theirs)) as expected:
                    wanted.append(_call(theirs, batch, batch.wanted_BTD))
                if fit:
                    with _recorded(family.attention(ours)) as actual:
                        _call(ours, batch, batch.ours_BTD)
                    statistics.add(*actual, Kept(kept_BT, kept_BT), *expected)
            if fit:
                fit(index, statistics)
            if batch_norm:
                match_batch_norm(ours, theirs, batches)
            for batch, wanted_BTD in zip(batches, wanted, strict=True):
                batch.ours_BTD, batch.wanted_BTD = _call(ours, batch, batch.ours_BTD), wanted_BTD


@contextmanager
def _recorded(attention: nn.Module) -> Iterator[list[Reading]]:
    readings: list[Reading] = []
    with observed(attention, readings.append):
        yield readings


class _Reached(Exception):
    """The pass has reached the first layer, and the rest need not run."""


def _encoder_input(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> _Batch:
    frames_B = layer_frame_counts(model, batch["attention_mask"].sum(-1))
    first, reached = family_of(model.config).layers(model)[0], {}

    def reach(module, args, arguments):
        reached.update(hidden_states=args[0], arguments=arguments)
        raise _Reached

    hook = first.register_forward_pre_hook(reach, with_kwargs=True)
    try:
        run(model, batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    hidden_BTD = reached["hidden_states"].cpu()
    return _Batch(frames_B, reached["arguments"], hidden_BTD, hidden_BTD)


def _call(layer: nn.Module, batch: _Batch, hidden_BTD: torch.Tensor) -> torch.Tensor:
    with unpadded(layer, batch.frames_B):
        return layer(hidden_BTD.to(batch.frames_B.device), **batch.arguments).cpu()


# ---- BatchNorm ---------------------------------------------------------------------------------------------


def match_batch_norm(ours: nn.Module, theirs: nn.Module, batches: list[_Batch]) -> None:
    """Gives the BatchNorms of `ours` running moments with which their output is distributed like that of `theirs`.

    With m, v the running moments of `theirs`, and μ, σ² (of ours μ', σ'²) measured on calibration speech:
    v' = v σ'²/σ², m' = μ' − (μ − m) σ'/σ. Where the layers are equal, the moments stay. Measuring them anew would
    change them, because training gathered them under dropout.
    """
    pairs = [
        (norm, wanted)
        for norm, wanted in zip(_batch_norms(ours), _batch_norms(theirs), strict=True)
        if norm.track_running_stats
    ]
    for norm, wanted in pairs:  # one after the other: each changes what the next one reads
        with _channels(norm) as our_sums, _channels(wanted) as their_sums:
            for batch in batches:
                our_sums.frames_B = their_sums.frames_B = batch.frames_B
                _call(ours, batch, batch.ours_BTD)
                _call(theirs, batch, batch.wanted_BTD)
        (mean, variance), (wanted_mean, wanted_variance) = our_sums.moments(), their_sums.moments()
        ratio = (variance + norm.eps) / (wanted_variance + norm.eps)  # 1 for channels that never vary
        norm.running_var.copy_(wanted.running_var * ratio)
        norm.running_mean.copy_(mean - (wanted_mean - wanted.running_mean) * ratio.sqrt())


def _batch_norms(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class _ChannelSums:
    """Sums over the unpadded frames of a BatchNorm's input [B, C, T], float64."""

    frames_B: torch.Tensor

    def __init__(self):
        self.frames, self.total, self.squares = 0, 0.0, 0.0

    def add(self, module, args) -> None:
        x_BCT = args[0].double()
        kept_BT = torch.arange(x_BCT.shape[-1], device=x_BCT.device) < self.frames_B[:, None]
        x_NC = x_BCT.transpose(1, 2)[kept_BT]
        self.frames += len(x_NC)
        self.total += x_NC.sum(0)
        self.squares += x_NC.square().sum(0)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.total / self.frames
        return mean, (self.squares / self.frames - mean.square()).clamp(min=0)


@contextmanager
def _channels(norm: nn.Module) -> Iterator[_ChannelSums]:
    sums = _ChannelSums()
    hook = norm.register_forward_pre_hook(sums.add)
    try:
        yield sums
    finally:
        hook.remove()
