"""Decompositions of attention layers by the name of a method."""

from collections.abc import Sequence

import torch

from asrlib.conversion.factorize import Decomposition, LayerWeights, Moments, decompose_objectives, threads_for
from asrlib.conversion.methods import Method, check_method, latent_methods


def decompose_layer(
    weights: LayerWeights, layout: str, method: str = "svd", moments: Moments | None = None, balance: float = 1.0
) -> Decomposition:
    """The directions of one layer. In a joint latent, `balance` weighs the values' error against the keys'.

    Raises ValueError for an unknown method, for missing statistics, and for weights that hold NaN or infinity.
    """
    return decompose_latent([weights], layout, method, [moments], [balance])[0][0]


def decompose_latent(
    layers: Sequence[LayerWeights],
    layout: str,
    method: str,
    moments: Sequence[Moments | None],
    balances: Sequence[float],
) -> list[tuple[Decomposition, ...]]:
    """Of each layer, its directions for each of `balances`: of one layer, or of several that read the same input and
    share one joint latent. See `decompose_layer`."""
    chosen = check_method(method, latent_methods())
    pairs = list(zip(layers, moments, strict=True))
    for pair in pairs:
        _check_given(chosen, *pair)
    with threads_for(len(layers[0].key)):
        if chosen.decompose:
            return chosen.decompose(pairs, layout, balances)
        objectives = [chosen.objective(*pair) for pair in pairs]
        return list(zip(*(decompose_objectives(objectives, layout, balance) for balance in balances), strict=True))


def _check_given(method: Method, weights: LayerWeights, moments: Moments | None) -> None:
    if method.needs_statistics and moments is None:
        raise ValueError(
            f"method {method.name!r} needs statistics of calibration speech: see asrlib.collect_statistics"
        )
    for name in ("key", "value"):
        if not torch.isfinite(getattr(weights, name)).all():
            raise ValueError(f"the {name} weight holds NaN or infinity: the checkpoint is damaged")
