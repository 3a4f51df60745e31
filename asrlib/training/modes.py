"""Which parts of a model are trained, and states of a model during its training."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import Trainer

from asrlib.attention.latent import LatentKV
from asrlib.models.registry import attention_modules


@contextmanager
def frozen_batch_norm(model) -> Iterator[None]:
    """Keeps BatchNorm layers with frozen weights in evaluation mode.

    Otherwise their running statistics drift towards the fine-tuning batches, although they are not trained.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    frozen = [norm for norm in norms if not norm.weight.requires_grad]
    for norm in frozen:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # Trainer calls model.train() each step
    try:
        yield
    finally:
        for norm in frozen:
            del norm.train


@contextmanager
def use_cache_kept(model) -> Iterator[None]:
    """Trainer switches the cache of a decoder off in the config, which is saved."""
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


@contextmanager
def own_precision(model, trainer: Trainer) -> Iterator[None]:
    """Afterwards `model` computes in its own precision again, whatever the precision of the training.

    Trainer leaves autocast wrapped around the forward, and transformers' Conformer keeps the rounded table of positions
    of its last call.
    """
    tables = [(module, name) for module in model.modules() for name in module._non_persistent_buffers_set]
    unrounded = [getattr(*table) for table in tables]
    try:
        yield
    finally:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for table, values in zip(tables, unrounded, strict=True):
            setattr(*table, values)


@contextmanager
def every_layer(model) -> Iterator[None]:
    """Switches layerdrop off. A dropped layer cannot be compared with the teacher's, and a process that drops a layer
    lets others wait for its gradients."""
    holders = [model.config, *model.modules()]  # some families ask the config, some a module
    dropping = [(holder, holder.layerdrop) for holder in holders if getattr(holder, "layerdrop", None) is not None]
    for holder, _ in dropping:
        holder.layerdrop = 0.0
    try:
        yield
    finally:
        for holder, layerdrop in dropping:
            holder.layerdrop = layerdrop


@contextmanager
def updated_once(model) -> Iterator[None]:
    """Makes BatchNorm's running statistics move by the right amount in a step, although gradient checkpointing runs
    each layer twice on the same batch: the momentum m becomes m' with (1 − m')² = 1 − m."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1 - math.sqrt(1 - norm.momentum)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def select_trainable(model, which: str, parts: Sequence[str] | None = None) -> int:
    """Freezes all parameters except the chosen ones; returns how many numbers remain to train.

    `attention` means every parameter of the attention modules, of some `parts` of the model if given, `latent` only the
    factors of keys and values, `all` everything.
    """
    chosen = {
        "all": lambda: [model],
        "attention": lambda: attention_modules(model, parts),
        "latent": lambda: [m for m in model.modules() if isinstance(m, LatentKV)],
    }
    if which not in chosen:
        raise ValueError(f"trainable is {which!r}: choose one of {', '.join(chosen)}")
    modules = chosen[which]()
    if not modules:
        raise ValueError(f"trainable={which!r}, but {type(model).__name__} has no such parameters: convert it first")
    model.requires_grad_(False)
    if hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()  # otherwise transformers computes gradients down to the audio
    for module in modules:
        module.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
