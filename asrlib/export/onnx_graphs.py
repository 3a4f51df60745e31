"""Writing ONNX graphs of a model.

Shapes: B batch, S samples or frames of features.
"""

import logging
import warnings
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

from asrlib.attention.chunks import Chunks
from asrlib.attention.names import encoder_config
from asrlib.export.graphs import OfflineGraph, StreamGraph
from asrlib.models.registry import frame_counts

OPSET = 18
BATCH, LENGTH = {0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}
LARGEST_FILE = 1 << 30  # bytes of weights; more go into a second file, as protobuf files must stay below 2 GiB


@dataclass(frozen=True)
class Window:
    """How inputs become frames: frame i reads inputs i·hop … i·hop + reach − 1."""

    hop: int
    reach: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Window":
        def frames(length: int) -> int:
            return int(frame_counts(model, torch.tensor(length)))

        reach, second = (1 + bisect_left(range(1, 1 << 20), count, key=frames) for count in (1, 2))
        return cls(second - reach, reach)

    def length(self, frames: int) -> int:
        return (frames - 1) * self.hop + self.reach


# ---- writing -----------------------------------------------------------------------------------------------


def write_offline(model: PreTrainedModel, path: Path) -> dict:
    """Writes the graph of whole utterances: inputs and attention_mask of the processor → logits and frames. Changes
    `model`; returns the facts for export.json."""
    graph = OfflineGraph(model).eval()
    inputs, mask_BS = _example(model, batch=1 if graph.one_at_a_time else 2, length=Window.of(model).length(30))
    names = [model.main_input_name, "attention_mask"]
    free = LENGTH if graph.one_at_a_time else LENGTH | BATCH
    _write(graph, (inputs, mask_BS), names, ["logits", "frames"], [free] * 2, path)
    return {"inputs": names, "outputs": ["logits", "frames"], "one_at_a_time": graph.one_at_a_time, **_size(path)}


def write_streaming(model: PreTrainedModel, chunks: Chunks, path: Path) -> dict:
    """Writes the graph of a step of streams: inputs of a chunk and its lookahead, and kept tensors → logits, frames,
    and the tensors to keep. Changes `model`; returns the facts for export.json. ValueError where it cannot stream."""
    window, graph = Window.of(model), StreamGraph(model, chunks).eval()
    inputs, mask_BS = _example(model, batch=2, length=window.length(max(chunks.block, 2)))
    state = graph.first_state(inputs, mask_BS)
    past = {name: _some_past(name, tensor, chunks.left) for name, tensor in state.items()}
    length, batch, kept = Dim.DYNAMIC, Dim("batch", min=1), Dim("past", min=0)
    free = [{0: batch, 1: length}] * 2 + [{0: batch} | ({1: kept} if _grows(name) else {}) for name in past]
    names = [model.main_input_name, "attention_mask", *(f"past_{name}" for name in past)]
    outputs = ["logits", "frames", *(f"present_{name}" for name in past)]
    _write(graph, (inputs, mask_BS, *past.values()), names, outputs, free, path)
    shapes = {f"past_{name}": ["batch", *tensor.shape[1:]] for name, tensor in state.items()}
    return {
        "inputs": names,
        "outputs": outputs,
        "first_state": shapes,
        "chunk_frames": chunks.size,
        "lookahead_frames": chunks.lookahead,
        "left_frames": chunks.left,
        "hop": window.hop,
        "reach": window.reach,
        **_size(path),
    }


def _grows(name: str) -> bool:
    return "_frames" in name


def _some_past(name: str, tensor: torch.Tensor, left: int | None) -> torch.Tensor:
    """The kept tensor of a stream that has begun, for tracing."""
    if not _grows(name) or left == 0:
        return tensor
    frames = 5 if left is None else min(5, left)
    return tensor.new_zeros(tensor.shape[0], frames, *tensor.shape[2:])


def _example(model: PreTrainedModel, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    bins = _bins(model.config) if model.main_input_name == "input_features" else ()
    return torch.randn(batch, length, *bins), torch.ones(batch, length, dtype=torch.bool)


def _bins(config) -> tuple[int]:
    """(numbers of a frame of features,)"""
    names = ("num_mel_bins", "feature_projection_input_dim")
    sizes = (getattr(part, name, None) for name in names for part in (encoder_config(config), config))
    return (next(filter(None, sizes)),)


def _write(
    graph: nn.Module, tensors: tuple, names: list[str], outputs: list[str], free: list[dict], path: Path
) -> None:
    """`free` are the axes of each tensor that may have any length; equal lengths share a name."""
    shapes = (*free[:2], tuple(free[2:])) if len(free) > 2 else tuple(free)  # kept tensors are one argument, *state
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # otherwise it warns that torchvision is missing
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # about names that equal axes share
        program = torch.onnx.export(
            graph, tensors, dynamo=True, input_names=names, output_names=outputs, dynamic_shapes=shapes,
            opset_version=OPSET, verbose=False,
        )  # fmt: skip
    weights = sum(parameter.nbytes for parameter in graph.parameters())
    program.save(path, external_data=weights > LARGEST_FILE)


def _size(path: Path) -> dict:
    return {"opset": OPSET, "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))}


def write_int8(path: Path, quantised: Path) -> dict:
    """The same graph with the weights of its matrix products in 8 bits; activations are rounded at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    return _size(quantised)
