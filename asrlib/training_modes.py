"""What holds of a model while it is trained, and no longer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def every_layer(model) -> Iterator[None]:
    """Switches layerdrop off: it would leave a teacher's layers without one to be compared with, and of several
    processes each waiting for the gradients of layers that another has dropped."""
    layerdrop = getattr(model.config, "layerdrop", None)
    if layerdrop is not None:
        model.config.layerdrop = 0.0
    try:
        yield
    finally:
        if layerdrop is not None:
            model.config.layerdrop = layerdrop


@contextmanager
def updated_once(model) -> Iterator[None]:
    """BatchNorm's running statistics move as far in a step as they should, though gradient checkpointing runs each
    layer twice on the same batch: with the momentum m', (1 − m')² = 1 − m."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1 - math.sqrt(1 - norm.momentum)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
