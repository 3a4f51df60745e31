"""Decompositions of attention layers by the name of a method."""

from collections.abc import Sequence

import torch

from asrlib.conversion.factorize import Decomposition, LayerWeights, Moments, decompose_objective, decompose_together
from asrlib.conversion.methods import Method, check_method, latent_methods


def decompose_layer(
    weights: LayerWeights, layout: str, method: str = "svd", moments: Moments | None = None, balance: float = 1.0
) -> Decomposition:
    """The directions of one layer. In a joint latent, `balance` weighs the values' error against the keys'.

    Raises ValueError for an unknown method, for missing statistics, and for weights that hold NaN or infinity.
    """
    chosen = check_method(method, latent_methods())
    _check_given(chosen, weights, moments)
    if chosen.decompose:
        return chosen.decompose([(weights, moments)], layout, balance)[0]
    return decompose_objective(chosen.objective(weights, moments), layout, balance)


def decompose_shared(
    layers: Sequence[LayerWeights], method: str, moments: Sequence[Moments | None], balance: float = 1.0
) -> list[Decomposition]:
    """The directions of one joint latent that all `layers` share, which read the same input. See `decompose_layer`."""
    chosen = check_method(method, latent_methods())
    pairs = list(zip(layers, moments, strict=True))
    for pair in pairs:
        _check_given(chosen, *pair)
    if chosen.decompose:
        return chosen.decompose(pairs, "joint", balance)
    return decompose_together([chosen.objective(*pair) for pair in pairs], balance)


def _check_given(method: Method, weights: LayerWeights, moments: Moments | None) -> None:
    if method.needs_statistics and moments is None:
        raise ValueError(
            f"method {method.name!r} needs statistics of calibration speech: see asrlib.collect_statistics"
        )
    for name in ("key", "value"):
        if not torch.isfinite(getattr(weights, name)).all():
            raise ValueError(f"the {name} weight holds NaN or infinity: the checkpoint is damaged")
