"""Low-rank factorisations of key and value projections: pure linear algebra, closed form, float64.

Names: D width, R latent width, H heads, d_h = D / H. Weights are [out, in] as nn.Linear holds them, so a factorisation
of a weight W [D, D] is W ≈ up @ down with down [R, D] and up [D, R]; the other order is another matrix.

All methods do the same: they choose R directions of the *input*, project on them, and keep the weights. Let S be a
square root of the assumed covariance of the input (the identity, or Σ of calibration speech), and A_h a metric on the
output of each head. Then

    G = S (Σ_h W_hᵀ A_h W_h) S = U diag(λ) Uᵀ,      down = U_Rᵀ S⁻¹,      up = W S U_R,

minimises E‖A^½ (W − up·down)(x − μ)‖² over all factors of rank R (Eckart and Young 1936, applied to A^½ W S). The bias
b + (W − up·down) μ removes the mean error. Behind layers that are converted already, the input is x̂ instead of x: W
then stands for its regression on x̂ (`Target.of`) and Σ for the covariance of x̂, so that the result is the reduced-rank
regression of W x on x̂ (Izenman 1975).

    method      S       A for keys                    A for values             minimises the error of
    svd         I       I                             I                        the weights
    whitened    Σ^½     I                             I                        keys and values
    two_sided   Σ^½     Q_h = E[(q_h+u)(q_h+u)ᵀ]      W_o,hᵀ W_o,h             scores, and what leaves the layer

Scores do not depend on the mean: softmax cancels what shifts all scores of a query alike. In a joint latent the two G
are summed, each divided by its trace (the values' times `balance`²), so that scale does not give either all of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from asrlib.attention.names import projections

SMALL = 512  # below this width one thread is faster than several, above all on a busy machine
DRAFT = 10  # steps of a search that tell which balance will be best, and which layer needs more numbers


@dataclass(frozen=True)
class LayerWeights:
    """Weights [D, D] and biases [D] of one attention layer, and its number of heads."""

    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    heads: int
    query: torch.Tensor | None = None  # [D, D]

    @classmethod
    def of(cls, attention: torch.nn.Module) -> "LayerWeights":
        """Those of a module with linear keys and values, float64, on the CPU; missing biases are zero."""
        linears = projections(attention)
        weights = [linear.weight.detach().double().cpu() for linear in (linears.key, linears.value, linears.output)]
        biases = [
            weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().cpu()
            for linear, weight in zip((linears.key, linears.value), weights[:2], strict=True)
        ]
        return cls(*weights, *biases, linears.heads, linears.query.weight.detach().double().cpu())


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of a projection's input over calibration speech, float64.

    Behind layers that are converted already, the input is x̂ and should be x. Then `mean` and `covariance` are those of
    x̂, and `wanted_mean` and `cross` relate it to x.
    """

    mean: torch.Tensor  # μ [D]
    covariance: torch.Tensor  # Σ [D, D], around the mean, not singular
    wanted_mean: torch.Tensor | None = None  # of x [D]
    cross: torch.Tensor | None = None  # E[(x − μ_x)(x̂ − μ)ᵀ] [D, D]


@dataclass(frozen=True)
class Moments:
    """Moments of one layer over calibration speech, float64. Keys and values share an input, unless positions are
    rotary."""

    key: InputMoments
    value: InputMoments
    query: torch.Tensor  # Q_h [H, d_h, d_h], around zero, of q_h + u
    attended_key: InputMoments | None = None  # of the keys' input, weighed by attention: see attended.py
    attended_values: tuple[InputMoments, ...] | None = None  # for each head, of the mean inputs under attention
    device: torch.device | str = "cpu"  # where the speech was heard, and where a search may run


@dataclass(frozen=True)
class Target:
    """The output that a projection should give for its input x: weight (x − mean) + bias."""

    weight: torch.Tensor  # [D, D]
    bias: torch.Tensor  # [D]
    mean: torch.Tensor  # [D]

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor, moments: InputMoments | None) -> "Target":
        """W x + b, or its regression on x̂: W E[(x − μ_x)(x̂ − μ)ᵀ] Σ⁻¹ (x̂ − μ) + W μ_x + b."""
        weight, bias = weight.double(), bias.double()
        if moments is None:
            return cls(weight, bias, torch.zeros_like(bias))
        if moments.cross is None:
            return cls(weight, bias + weight @ moments.mean, moments.mean)
        regressed = torch.linalg.solve(moments.covariance, (weight @ moments.cross).T).T
        return cls(regressed, bias + weight @ moments.wanted_mean, moments.mean)


@dataclass(frozen=True)
class Factors:
    """K ≈ up_k (down_k x) + key_bias, V ≈ up_v (down_v x) + value_bias, float64. If joint, down_k is down_v."""

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

    def cut(self, rank_k: int, rank_v: int, steps: int | None = None) -> Factors:
        """The factors at these ranks; a joint latent has one rank, given twice. `steps`: where they are found by a
        search, after so many (None: all)."""
        down_k, up_k = self.directions[0].cut(self.key.weight, rank_k)
        down_v, up_v = self.directions[-1].cut(self.value.weight, rank_v)
        key_bias = self.key.bias - up_k @ (down_k @ self.key.mean)
        value_bias = self.value.bias - up_v @ (down_v @ self.value.mean)
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)


@contextmanager
def threads_for(width: int) -> Iterator[None]:
    """Inside, matrices of this width are worked on by as many threads as are of use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if width < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """What a method minimises in one layer: the keys and values to reproduce, with Σ_h W_hᵀ A_h W_h and S of each."""

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
        """With S from `moments` and the metrics A [H, d_h, d_h]; None means the identity."""
        key_inputs, value_inputs = (moments.key, moments.value) if moments else (None, None)
        keys = Target.of(weights.key, weights.key_bias, key_inputs)
        values = Target.of(weights.value, weights.value_bias, value_inputs)
        key_root = key_inputs and symmetric_root(key_inputs.covariance)
        shared = value_inputs is key_inputs
        return cls(
            (keys, values),
            (gram(keys.weight, key_metric), gram(values.weight, value_metric)),
            (key_root, key_root if shared else symmetric_root(value_inputs.covariance)),
        )


def svd(weights: LayerWeights, moments: Moments | None) -> Objective:
    return Objective.of(weights)


def whitened(weights: LayerWeights, moments: Moments) -> Objective:
    return Objective.of(weights, moments)


def two_sided(weights: LayerWeights, moments: Moments) -> Objective:
    return Objective.of(weights, moments, moments.query, output_metric(weights))


def decompose_objectives(objectives: Sequence[Objective], layout: str, balance: float = 1.0) -> list[Decomposition]:
    """The directions that minimise the objective of one layer, or of several that read the same input: these share one
    joint latent. Their G are summed, each divided by its trace. See `layers.decompose_layer`."""
    if layout == "split":
        return [
            Decomposition(layout, tuple(map(Directions.of, one.grams, one.roots)), *one.targets) for one in objectives
        ]
    root = objectives[0].roots[0]
    total = sum(
        keys / _energy(keys, root) + balance**2 * values / _energy(values, root)
        for keys, values in (objective.grams for objective in objectives)
    )
    directions = Directions.of(total, root)
    return [Decomposition(layout, (directions,), *objective.targets) for objective in objectives]


def output_metric(weights: LayerWeights) -> torch.Tensor:
    """W_o,hᵀ W_o,h [H, d_h, d_h]: the weight of an error of a head's values after the output projection."""
    output = weights.output.double().unflatten(1, (weights.heads, -1))  # [D, H, d_h]
    return torch.einsum("ohi,ohj->hij", output, output)


def _energy(gram: torch.Tensor, root: torch.Tensor | None) -> float:
    energy = torch.trace(gram) if root is None else torch.sum((root @ root) * gram)  # trace(S G S)
    return max(energy.item(), torch.finfo(torch.float64).tiny)


# ---- heads in groups ---------------------------------------------------------------------------------------


def average(weights: LayerWeights, kv_heads: int) -> Factors:
    """Each group's keys are the mean of its heads' keys, and so are its values."""
    size = len(weights.key) // weights.heads  # d_h
    group_of_head = torch.arange(weights.heads) // (weights.heads // kv_heads)
    member = torch.nn.functional.one_hot(group_of_head, kv_heads).to(weights.key)  # [H, G]
    copy = torch.kron(member, torch.eye(size).to(member))  # [D, G·d_h]: to each head, what its group holds
    mean = copy.T * kv_heads / weights.heads
    biases = (copy @ (mean @ bias) for bias in (weights.key_bias, weights.value_bias))
    return Factors(mean @ weights.key, mean @ weights.value, copy, copy, *biases)
