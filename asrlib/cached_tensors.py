"""What a stream would keep of each attention layer, counted on the tensors that a pass really makes.

There is no streaming cache to measure: `attention.cache` has the formula. Here one utterance is run, and the tensors
that a stream would have to keep are caught where they are made: keys and values, latents, or linear attention's sums.

Shapes: B batch, S samples of audio or what a model reads of them, T frames, P = 2T − 1 distances between frames.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asrlib.attention.cache import kv_cache_bytes
from asrlib.attention.kinds import LinearAttention
from asrlib.attention.latent import LatentKV
from asrlib.models.families import attention_modules, frame_counts
from asrlib.models.inference import choose_device, inference


def cached_tensors(model: nn.Module, inputs_1S: torch.Tensor) -> dict:
    """{frames, bytes, formula_bytes, tensors: {name: [shape in the first layer]}} of one pass over what `model` reads.

    `bytes` are those of all layers; `formula_bytes` what `kv_cache_bytes` says of as many frames of such numbers.
    Runs where the model is, in its own precision. Raises ValueError where the number of frames cannot be told from a
    width of the layers, which a slightly longer utterance would change.
    """
    device = choose_device(None, model)
    frames = int(frame_counts(model, torch.tensor([inputs_1S.shape[1]])))
    modules = attention_modules(model)
    with inference(model, device=device), _caught(modules, frames) as layers:
        model(inputs_1S.to(device, model.dtype))
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "frames": frames,
        "bytes": sum(tensor.nbytes for layer in layers for tensor in layer.values()),
        "formula_bytes": kv_cache_bytes(model.config, frames, dtype),
        "tensors": {name: list(tensor.shape) for name, tensor in layers[0].items()},
    }


@contextmanager
def _caught(modules: list[nn.Module], frames: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """A mapping for each attention layer: name of a tensor that a stream keeps → that tensor, once it was made."""
    layers: list[dict[str, torch.Tensor]] = [{} for _ in modules]
    handles = []
    for attention, caught in zip(modules, layers, strict=True):
        if isinstance(attention, LinearAttention):
            handles += _catch_sums(attention, frames, caught)
            continue
        latent = getattr(attention, "latent_kv", None)
        makers = ("down", "down_k", "down_v") if isinstance(latent, LatentKV) else ("linear_k", "linear_v")
        for name, module in (latent if isinstance(latent, LatentKV) else attention).named_children():
            if name in makers:
                handles.append(module.register_forward_hook(_keep(name, caught)))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _keep(name: str, caught: dict[str, torch.Tensor]):
    def hook(module, inputs, output):
        caught[name] = output

    return hook


def _catch_sums(attention: LinearAttention, frames: int, caught: dict[str, torch.Tensor]) -> list:
    """Hooks under which the layer's sums over frames are caught."""
    sizes = {attention.head_size, attention.num_heads, attention.config.hidden_size, attention.head_size + 1}
    if frames in sizes:
        raise ValueError(f"{frames} frames are as many as a width of the layer: take a slightly longer utterance")
    watch = _SumsOverFrames(frames, caught)

    def begin(module, inputs):
        watch.__enter__()

    def end(module, inputs, output):
        watch.__exit__(None, None, None)

    return [attention.register_forward_pre_hook(begin), attention.register_forward_hook(end, always_call=True)]


class _SumsOverFrames(TorchDispatchMode):
    """Catches what is made of tensors that have an axis of `frames`, and has none itself."""

    def __init__(self, frames: int, caught: dict[str, torch.Tensor]):
        super().__init__()
        self.frames, self.caught = frames, caught

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        over_frames = any(isinstance(a, torch.Tensor) and self.frames in a.shape for a in args)
        if isinstance(output, torch.Tensor) and over_frames and self.frames not in output.shape:
            self.caught[f"sum {len(self.caught) + 1}"] = output
        return output
