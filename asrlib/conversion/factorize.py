"""Low-rank factorisations of key and value projections: pure linear algebra, closed form, float64.

Names: D width, R latent width, H heads, d_h = D / H. Weights are [out, in] as nn.Linear holds them, so a factorisation
of a weight W [D, D] is W ≈ up @ down with down [R, D] and up [D, R]; the other order is another matrix.

All methods are one: choose R directions of the *input*, project on them, leave the weights as they are. With a square
root S of what the input is taken to be distributed like (the identity, or the covariance Σ of calibration speech), and
a metric A_h per head on what comes out,

    G = S (Σ_h W_hᵀ A_h W_h) S = U diag(λ) Uᵀ,      down = U_Rᵀ S⁻¹,      up = W S U_R,

minimises E‖A^½ (W − up·down)(x − μ)‖² over all factors of rank R (Eckart and Young 1936, applied to A^½ W S). The bias
that goes with it, b + (W − up·down) μ, takes the mean error out.

    method      S       A for keys                    A for values             minimises the error of
    svd         I       I                             I                        the weights
    whitened    Σ^½     I                             I                        keys and values
    two_sided   Σ^½     Q_h = E[(q_h+u)(q_h+u)ᵀ]      W_o,hᵀ W_o,h             scores, and what leaves the layer

Scores need no care for the mean: softmax cancels what shifts a row alike. In a joint latent the two G are summed, each
divided by its trace (and `balance`² times the values'), so that neither takes all of the latent by its scale.
"""

from dataclasses import dataclass

import torch

METHODS = ("svd", "whitened", "two_sided")
NEEDS_STATISTICS = ("whitened", "two_sided")


@dataclass(frozen=True)
class LayerWeights:
    """What one attention layer brings: weights [D, D] and biases [D] of nn.Linear, and its heads."""

    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    heads: int


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's inputs and queries over calibration speech, float64."""

    mean: torch.Tensor  # μ [D]
    covariance: torch.Tensor  # Σ [D, D], around the mean, not singular
    query: torch.Tensor  # Q_h [H, d_h, d_h], around zero, of q_h + u


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
        down, up = self.encode[:rank], weight.double() @ self.decode[:, :rank]
        return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))


@dataclass(frozen=True)
class Decomposition:
    """One layer's directions, computed once and cut at any width. Joint: one set serves keys and values."""

    weights: LayerWeights
    layout: str
    directions: tuple[Directions, ...]  # joint: one; split: keys, values
    mean: torch.Tensor | None  # μ [D], where it is known

    def cut(self, rank_k: int, rank_v: int) -> Factors:
        """The factors at these ranks; a joint latent has one rank, given twice."""
        weights = self.weights
        down_k, up_k = self.directions[0].cut(weights.key, rank_k)
        down_v, up_v = self.directions[-1].cut(weights.value, rank_v)
        key_bias, value_bias = weights.key_bias.double(), weights.value_bias.double()
        if self.mean is not None:
            key_bias = key_bias + (weights.key.double() - up_k @ down_k) @ self.mean
            value_bias = value_bias + (weights.value.double() - up_v @ down_v) @ self.mean
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Σ^½ [D, D] of a positive definite Σ; ValueError where it is not."""
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    if not eigenvalues[0] > 0:
        raise ValueError("the input's covariance is singular: take more calibration speech")
    return (vectors * eigenvalues.sqrt()) @ vectors.T


def gram(weight: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """Σ_h W_hᵀ A_h W_h [D, D] of a weight [D, D] whose rows are heads of d_h, and A [H, d_h, d_h] (None: identity)."""
    weight = weight.double()
    if metric is None:
        return weight.T @ weight
    by_head = weight.unflatten(0, (len(metric), -1))  # [H, d_h, D]
    return torch.einsum("hid,hij,hje->de", by_head, metric, by_head)


def decompose_layer(
    weights: LayerWeights, layout: str, method: str = "svd", moments: Moments | None = None, balance: float = 1.0
) -> Decomposition:
    """The directions of one layer. `balance` weighs the values' error against the keys', in a joint latent.

    Raises ValueError for an unknown method, for one that needs statistics and has none, and for weights that hold NaN
    or infinity.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    if method in NEEDS_STATISTICS and moments is None:
        raise ValueError(f"method {method!r} needs statistics of calibration speech: see asrlib.collect_statistics")
    for name in ("key", "value"):
        if not torch.isfinite(getattr(weights, name)).all():
            raise ValueError(f"the {name} weight holds NaN or infinity: the checkpoint is damaged")
    root = mean = key_metric = value_metric = None
    if method in NEEDS_STATISTICS:
        root, mean = symmetric_root(moments.covariance), moments.mean
    if method == "two_sided":
        output = weights.output.double().unflatten(1, (weights.heads, -1))  # [D, H, d_h]
        key_metric, value_metric = moments.query, torch.einsum("ohi,ohj->hij", output, output)
    grams = [gram(weights.key, key_metric), gram(weights.value, value_metric)]
    if layout == "joint":
        keys, values = (g / _energy(g, root) for g in grams)
        grams = [keys + balance**2 * values]
    return Decomposition(weights, layout, tuple(Directions.of(g, root) for g in grams), mean)


def _energy(gram: torch.Tensor, root: torch.Tensor | None) -> float:
    energy = torch.trace(gram) if root is None else torch.sum((root @ root) * gram)  # trace(S G S)
    return max(energy.item(), torch.finfo(torch.float64).tiny)
