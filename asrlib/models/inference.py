"""Running a model without gradients: device, precision, and padding that does not leak.

Shapes: B batch, T frames, C channels.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from asrlib.attention.names import attends_across
from asrlib.models.heard_once import KEPT
from asrlib.models.registry import attention_modules, family_of, frame_counts, layer_frame_counts

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str | None, model: nn.Module | None = None) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU; None is the model's present device.

    Raises ValueError where this machine has no such device.
    """
    if device is None:
        return next(model.parameters()).device
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"'device' is {device}, which is no device: use auto, cpu, mps, cuda or cuda:N") from None
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(chosen.type, 1)
    if (chosen.index or 0) >= found:
        few = f"{found} CUDA devices" if found else f"no {chosen.type.upper()} device"
        raise ValueError(f"'device' is {device}, but torch finds {few} here: use auto or cpu")
    return chosen


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """Moves `model` to the CPU, and afterwards back."""
    home = choose_device(None, model)
    model.to("cpu")
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def inference(*models: nn.Module, device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Evaluation mode, on `device`, without gradients. Afterwards the models are in their old mode, and on `device`.

    `precision` is fp32, bf16 or fp16, by autocast; anything else raises ValueError.
    """
    if precision not in AUTOCAST:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(AUTOCAST)}")
    for model in models:
        model.to(device)
    modules = [module for model in models for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    # transformers' Conformer rounds its table of positions to the dtype of a call and keeps the rounded table.
    # Without the old table, every fp32 call after a bf16 call would be inexact.
    buffers = [(module, *buffer) for module in modules for buffer in module.named_buffers(recurse=False)]
    for model in models:
        model.eval()
    dtype = AUTOCAST[precision]
    try:
        # no_grad, not inference_mode: a model whose position tables were cached under the latter cannot be trained.
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None), ExitStack() as around:
            for model in models:
                around.enter_context(KEPT.of(model))
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, value in buffers:
            setattr(module, name, value)


@contextmanager
def padding_silenced(model: nn.Module, frames_B: torch.Tensor) -> Iterator[None]:
    """Zeroes the padding of each utterance before every convolution over encoder frames.

    transformers' Conformer masks padding in its attention only. Its depthwise convolutions read the padding, so that
    the last frames of an utterance depend on its neighbours in the batch. A convolution over an utterance alone reads
    zeros there.
    """
    longest = int(frames_B.max())
    beyond_BT = torch.arange(longest, device=frames_B.device) >= frames_B[:, None]

    def silence(convolution: nn.Conv1d, inputs: tuple) -> tuple:
        x_BCT, *others = inputs
        if x_BCT.shape[-1] == longest:  # other convolutions, as in the feature encoder, have another rate
            x_BCT = x_BCT.masked_fill(beyond_BT[:, None], 0)
        return x_BCT, *others

    wide = [m for m in model.modules() if isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1]
    handles = [m.register_forward_pre_hook(silence) for m in wide if beyond_BT.any()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spoken_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits [N, V] of each utterance, as if each were recognised alone: without padding, and independent of the batch.

    `inputs` are those of `model` for a batch, on its device: with attention_mask, and with labels where the posteriors
    are those of a given text. N are the utterance's frames, or what heads.py says.
    """
    head, lengths_B = family_of(model.config).head, inputs["attention_mask"].sum(-1)
    if not head.reads_labels:  # with labels the model would compute a loss
        inputs = {name: values for name, values in inputs.items() if name != "labels"}
    no_cache = {"use_cache": False} if attends_across(model.config) else {}
    with padding_silenced(model, layer_frame_counts(model, lengths_B)):
        output = head.forward(model, inputs, **no_cache)
    return head.spoken(inputs, output, frame_counts(model, lengths_B))


def modules_before(model: nn.Module, attention: nn.Module) -> list[nn.Module]:
    """What runs before the block of `attention`: the blocks before it, and an encoder before a decoder."""
    for stack in model.modules():
        for place, block in enumerate(stack if isinstance(stack, nn.ModuleList) else []):
            if attention in block.modules():
                find = family_of(model.config).encoder
                encoders = [find(model)] if find else []
                return [encoder for encoder in encoders if attention not in encoder.modules()] + list(stack[:place])
    return []


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Outputs of modules in their last call inside."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.update({module: output}))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, modules give the outputs that are given, and compute nothing. Nobody else may have replaced `forward`."""
    try:
        for module, output in outputs.items():
            assert "forward" not in vars(module)
            module.forward = lambda *args, output=output, **named: output
        yield
    finally:
        for module in outputs:
            vars(module).pop("forward", None)


def recognise(model: nn.Module, processor, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The text of each utterance, for heads that write token by token; `inputs` as in `spoken_logits`."""
    head, frames_B = family_of(model.config).head, frame_counts(model, inputs["attention_mask"].sum(-1))
    with padding_silenced(model, layer_frame_counts(model, inputs["attention_mask"].sum(-1))):
        return head.texts(processor, head.recognised(model, processor, inputs, None, frames_B).tolist())


def without_padding(logits_BTV: torch.Tensor, frames_B: torch.Tensor) -> list[torch.Tensor]:
    return [logits_TV[:frames] for logits_TV, frames in zip(logits_BTV, frames_B.tolist(), strict=True)]


@contextmanager
def attention_weights(*models: nn.Module) -> Iterator[None]:
    """Makes attention modules return their weights, by transformers' eager implementation."""
    implementations = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, implementation in zip(models, implementations, strict=True):
            model.set_attn_implementation(implementation)


def attention_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Attention weights [H, T, T] of every layer over one utterance, in the order of `attention_modules`, on the CPU.

    `inputs` is a batch of the collator with that utterance alone. Rows are queries. In an encoder-decoder the decoder's
    rows are tokens of the labels, and the columns of cross-attention are frames.
    """
    weights, modules = {}, attention_modules(model)

    def record(module, args, output) -> None:
        weights[module] = output[1][0].float().cpu()

    handles = [module.register_forward_hook(record) for module in modules]
    device, head = choose_device(None, model), family_of(model.config).head
    try:
        with inference(model, device=device), attention_weights(model):
            told = {name: inputs[name] for name in ("attention_mask", "labels") if head.reads_labels}
            heard = {model.main_input_name: inputs[model.main_input_name].to(model.dtype), **told}
            head.forward(model, {name: values.to(device) for name, values in heard.items()})
    finally:
        for handle in handles:
            handle.remove()
    return [weights[module] for module in modules]


@contextmanager
def zero_attention(model: nn.Module) -> Iterator[None]:
    """Replaces the output of every attention module by zeros: the model without attention."""

    def zeros(module, inputs, output):
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    handles = [module.register_forward_hook(zeros) for module in attention_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
