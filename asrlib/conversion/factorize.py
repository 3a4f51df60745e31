"""Low-rank factorisations of key and value projections: pure linear algebra, closed form, float64.

Names: D width, R latent width, H heads, d_h = D / H. Weights are [out, in] as nn.Linear holds them, so a factorisation
of a weight W [D, D] is W ≈ up @ down with down [R, D] and up [D, R]; the other order is another matrix.

All methods are one: choose R directions of the *input*, project on them, leave the weights as they are. With a square
root S of what the input is taken to be distributed like (the identity, or the covariance Σ of calibration speech), and
a metric A_h per head on what comes out,

    G = S (Σ_h W_hᵀ A_h W_h) S = U diag(λ) Uᵀ,      down = U_Rᵀ S⁻¹,      up = W S U_R,

minimises E‖A^½ (W − up·down)(x − μ)‖² over all factors of rank R (Eckart and Young 1936, applied to A^½ W S). The bias
that goes with it, b + (W − up·down) μ, takes the mean error out. Behind layers that are converted already, what is read
is no longer x but x̂: there W stands for its regression on x̂ (`Target.of`) and Σ for the covariance of x̂, which makes it
the reduced-rank regression of W x on x̂ (Izenman 1975).

    method      S       A for keys                    A for values             minimises the error of
    svd         I       I                             I                        the weights
    whitened    Σ^½     I                             I                        keys and values
    two_sided   Σ^½     Q_h = E[(q_h+u)(q_h+u)ᵀ]      W_o,hᵀ W_o,h             scores, and what leaves the layer

Scores need no care for the mean: softmax cancels what shifts a row alike. In a joint latent the two G are summed, each
divided by its trace (and `balance`² times the values'), so that neither takes all of the latent by its scale.
"""

from dataclasses import dataclass

import torch

from asrlib.attention.names import projections
from asrlib.conversion.methods import Method, check_method, latent_methods, sharing_methods


@dataclass(frozen=True)
class LayerWeights:
    """What one attention layer brings: weights [D, D] and biases [D] of nn.Linear, and its heads."""

    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    heads: int

    @classmethod
    def of(cls, attention: torch.nn.Module) -> "LayerWeights":
        """Of a module with keys and values of its own, float64, on the CPU. Where it has no biases they are zero."""
        of = projections(attention)
        weights = [one.weight.detach().double().cpu() for one in (of.key, of.value, of.output)]
        biases = [
            torch.zeros(len(one.weight), dtype=torch.float64) if one.bias is None else one.bias.detach().double().cpu()
            for one in (of.key, of.value)
        ]
        return cls(*weights, *biases, of.heads)


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of what a projection reads over calibration speech, float64.

    Behind layers that are converted already it reads x̂ where it should read x: then `mean` and `covariance` are those
    of x̂, and `wanted_mean` and `cross` say what is known of x.
    """

    mean: torch.Tensor  # μ [D]
    covariance: torch.Tensor  # Σ [D, D], around the mean, not singular
    wanted_mean: torch.Tensor | None = None  # of x [D]
    cross: torch.Tensor | None = None  # E[(x − μ_x)(x̂ − μ)ᵀ] [D, D]


@dataclass(frozen=True)
class Moments:
    """Of one layer, over calibration speech, float64. Keys and values read the same, but for rotary positions."""

    key: InputMoments
    value: InputMoments
    query: torch.Tensor  # Q_h [H, d_h, d_h], around zero, of q_h + u
    attended_key: InputMoments | None = None  # of what keys read, as attention weighs it: see attended.py
    attended_values: tuple[InputMoments, ...] | None = None  # for each head, of what attention makes of the inputs


@dataclass(frozen=True)
class Target:
    """What a projection should give, in terms of what it reads: weight (x − mean) + bias."""

    weight: torch.Tensor  # [D, D]
    bias: torch.Tensor  # [D]
    mean: torch.Tensor  # [D]

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor, moments: InputMoments | None) -> "Target":
        """W x + b, or the best guess at it from x̂: W E[(x − μ_x)(x̂ − μ)ᵀ] Σ⁻¹ (x̂ − μ) + W μ_x + b."""
        weight, bias = weight.double(), bias.double()
        if moments is None:
            return cls(weight, bias, torch.zeros_like(bias))
        if moments.cross is None:
            return cls(weight, bias + weight @ moments.mean, moments.mean)
        regressed = torch.linalg.solve(moments.covariance, (weight @ moments.cross).T).T
        return cls(regressed, bias + weight @ moments.wanted_mean, moments.mean)


@dataclass(frozen=True)
class Factors:
    """K ≈ up_k (down_k x) + key_bias, V ≈ up_v (down_v x) + value_bias, float64. Joint: down_k is down_v."""

    down_k: torch.Tensor  # [R_k, D]
    down_v: torch.Tensor  # [R_v, D]
    up_k: torch.Tensor  # [D, R_k]
    up_v: torch.Tensor  # [D, R_v]
    key_bias: torch.Tensor  # [D]
    value_bias: torch.Tensor  # [D]

    @property
    def key_weight(self) -> torch.Tensor:
        return self.up_k @ self.down_k

    @property
    def value_weight(self) -> torch.Tensor:
        return self.up_v @ self.down_v


@dataclass(frozen=True)
class Directions:
    """All D directions of an input, the most important first; the first R of them make a latent of width R."""

    encode: torch.Tensor  # Uᵀ S⁻¹ [D, D]
    decode: torch.Tensor  # S U [D, D]
    values: torch.Tensor  # √λ [D], descending: singular values of A^½ W S

    @classmethod
    def of(cls, gram: torch.Tensor, root: torch.Tensor | None) -> "Directions":
        """From Σ_h W_hᵀ A_h W_h [D, D] and S [D, D], symmetric (None: the identity)."""
        eigenvalues, vectors = torch.linalg.eigh(gram if root is None else root @ gram @ root)
        vectors = vectors.flip(1)
        encode = vectors.T if root is None else torch.linalg.solve(root, vectors).T
        decode = vectors if root is None else root @ vectors
        return cls(encode, decode, eigenvalues.flip(0).clamp(min=0).sqrt())

    def cut(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [rank, D], up [D, rank]) for `weight` [D, D]; directions beyond D are zero, and change nothing."""
        missing = max(0, rank - len(self.values))
        down, up = self.encode[:rank], weight @ self.decode[:, :rank]
        return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))


@dataclass(frozen=True)
class Decomposition:
    """One layer's directions, computed once and cut at any width. Joint: one set serves keys and values."""

    layout: str
    directions: tuple[Directions, ...]  # joint: one; split: keys, values
    key: Target
    value: Target

    def cut(self, rank_k: int, rank_v: int) -> Factors:
        """The factors at these ranks; a joint latent has one rank, given twice."""
        down_k, up_k = self.directions[0].cut(self.key.weight, rank_k)
        down_v, up_v = self.directions[-1].cut(self.value.weight, rank_v)
        key_bias = self.key.bias - up_k @ (down_k @ self.key.mean)
        value_bias = self.value.bias - up_v @ (down_v @ self.value.mean)
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Σ^½ [D, D] of a positive definite Σ; ValueError where it is not."""
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    if not eigenvalues[0] > 0:
        raise ValueError("the input's covariance is singular: take more calibration speech")
    return (vectors * eigenvalues.sqrt()) @ vectors.T


def gram(weight: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """Σ_h W_hᵀ A_h W_h [D, D] of a weight [D, D] whose rows are heads of d_h, and A [H, d_h, d_h] (None: identity)."""
    if metric is None:
        return weight.T @ weight
    by_head = weight.unflatten(0, (len(metric), -1))  # [H, d_h, D]
    return torch.einsum("hid,hij,hje->de", by_head, metric, by_head)


@dataclass(frozen=True)
class Objective:
    """What a method minimises in one layer: keys and values to reproduce, Σ_h W_hᵀ A_h W_h and S of each."""

    targets: tuple[Target, Target]  # of keys, of values
    grams: tuple[torch.Tensor, torch.Tensor]  # [D, D]
    roots: tuple[torch.Tensor | None, torch.Tensor | None]  # [D, D]; None: the identity

    @classmethod
    def of(
        cls,
        weights: LayerWeights,
        moments: Moments | None = None,
        key_metric: torch.Tensor | None = None,
        value_metric: torch.Tensor | None = None,
    ) -> "Objective":
        """With S of `moments` and the metrics A [H, d_h, d_h]; each is the identity where it is None."""
        key_inputs, value_inputs = (moments.key, moments.value) if moments else (None, None)
        keys = Target.of(weights.key, weights.key_bias, key_inputs)
        values = Target.of(weights.value, weights.value_bias, value_inputs)
        return cls(
            (keys, values),
            (gram(keys.weight, key_metric), gram(values.weight, value_metric)),
            tuple(inputs and symmetric_root(inputs.covariance) for inputs in (key_inputs, value_inputs)),
        )


def svd(weights: LayerWeights, moments: Moments | None) -> Objective:
    return Objective.of(weights)


def whitened(weights: LayerWeights, moments: Moments) -> Objective:
    return Objective.of(weights, moments)


def two_sided(weights: LayerWeights, moments: Moments) -> Objective:
    return Objective.of(weights, moments, moments.query, output_metric(weights))


def decompose_layer(
    weights: LayerWeights, layout: str, method: str = "svd", moments: Moments | None = None, balance: float = 1.0
) -> Decomposition:
    """The directions of one layer. `balance` weighs the values' error against the keys', in a joint latent.

    Raises ValueError for an unknown method, for one that needs statistics and has none, and for weights that hold NaN
    or infinity.
    """
    chosen = check_method(method, latent_methods())
    _check_given(chosen, weights, moments)
    if chosen.decompose:
        return chosen.decompose(weights, layout, moments, balance)
    objective = chosen.objective(weights, moments)
    if layout == "joint":
        return _joint([objective], balance)[0]
    directions = [Directions.of(g, root) for g, root in zip(objective.grams, objective.roots, strict=True)]
    return Decomposition(layout, tuple(directions), *objective.targets)


def decompose_shared(
    layers: list[LayerWeights], method: str, moments: list[Moments | None], balance: float = 1.0
) -> list[Decomposition]:
    """The directions of one joint latent for all `layers`, which read the same: their G are summed, each divided by its
    trace. See `decompose_layer`; of each layer the same directions, with its own keys and values."""
    chosen = check_method(method, sharing_methods())
    objectives = []
    for layer, layer_moments in zip(layers, moments, strict=True):
        _check_given(chosen, layer, layer_moments)
        objectives.append(chosen.objective(layer, layer_moments))
    return _joint(objectives, balance)


def _joint(objectives: list[Objective], balance: float) -> list[Decomposition]:
    root = objectives[0].roots[0]  # of what all read
    grams = [objective.grams for objective in objectives]
    weighed = [(keys / _energy(keys, root), values / _energy(values, root)) for keys, values in grams]
    directions = Directions.of(sum(keys + balance**2 * values for keys, values in weighed), root)
    return [Decomposition("joint", (directions,), *objective.targets) for objective in objectives]


def _check_given(method: Method, weights: LayerWeights, moments: Moments | None) -> None:
    if method.needs_statistics and moments is None:
        raise ValueError(
            f"method {method.name!r} needs statistics of calibration speech: see asrlib.collect_statistics"
        )
    for name in ("key", "value"):
        if not torch.isfinite(getattr(weights, name)).all():
            raise ValueError(f"the {name} weight holds NaN or infinity: the checkpoint is damaged")


def output_metric(weights: LayerWeights) -> torch.Tensor:
    """W_o,hᵀ W_o,h [H, d_h, d_h]: what an error of a head's values becomes behind the output projection."""
    output = weights.output.double().unflatten(1, (weights.heads, -1))  # [D, H, d_h]
    return torch.einsum("ohi,ohj->hij", output, output)


def _energy(gram: torch.Tensor, root: torch.Tensor | None) -> float:
    energy = torch.trace(gram) if root is None else torch.sum((root @ root) * gram)  # trace(S G S)
    return max(energy.item(), torch.finfo(torch.float64).tiny)
