"""Latents of single heads, or of a few: what others have published, for comparison.

A group of heads makes n numbers of a frame, k = W x + b. It keeps R of them, k̂ = P (k − c) + c with P of rank R. Of all
such P,

    P = C^½ U_R U_Rᵀ C^-½,    C^½ A C^½ = U diag(λ) Uᵀ,    minimises E‖A^½ (k̂ − k)‖²    for C = E (k − c)(k − c)ᵀ

(Eckart and Young 1936, applied to A^½ C^½). A latent of a group costs R numbers, and all groups of a layer have the
same R, give or take one. So at the same cache a group of one of H heads has an H-th of a latent that all heads share.

    method    group     C for keys        A for keys      C for values      A for values      c
    clover    1 head    W_k W_kᵀ          W_q W_qᵀ        W_v W_vᵀ          W_oᵀ W_o          b
    kq_svd    1 head    E k kᵀ            E q qᵀ          E v vᵀ            W_oᵀ W_o          0
    palu      4 heads   Cov k             I               Cov v             I                 E k, E v

clover (Meng et al., ICML 2025) reads weights alone: the pairs W_qᵀ W_k and W_o W_v, cut by their singular values.
kq_svd (Lesens et al., AISTATS 2026) makes ‖K Qᵀ − K̂ Q̂ᵀ‖_F of each head as small as any rank R can over the calibration
speech. palu (Chang et al., ICLR 2025) whitens groups of heads; with all heads in one group it is `whitened`. Published,
it whitens around zero, and does not correct the mean: that is ours, and never adds to this error.

Names: D width, H heads, d_h = D / H, n rows of a group. All float64, split latents only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asrlib.conversion.factorize import Factors, InputMoments, LayerWeights, Moments, output_metric, symmetric_root

PALU_HEADS = 4  # of a group, or the most below that which divide the heads
FLOOR = 1e-12  # of C's mean variance: a head that is always zero has directions too


@dataclass(frozen=True)
class Group:
    """The directions of one group's numbers, the most important first."""

    weight: torch.Tensor  # W [n, D]
    bias: torch.Tensor  # b [n]
    centre: torch.Tensor  # c [n]
    encode: torch.Tensor  # Uᵀ C^-½ [n, n]
    decode: torch.Tensor  # C^½ U [n, n]
    values: torch.Tensor  # √λ [n], descending

    @classmethod
    def of(cls, weight, bias, centre, covariance: torch.Tensor, metric: torch.Tensor) -> "Group":
        """With C and A [n, n]."""
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        floor = FLOOR * torch.trace(covariance) / len(covariance) + torch.finfo(covariance.dtype).tiny
        root = symmetric_root(covariance + floor * identity)
        eigenvalues, vectors = torch.linalg.eigh(root @ metric @ root)
        vectors = vectors.flip(1)
        encode = torch.linalg.solve(root, vectors).T
        return cls(weight, bias, centre, encode, root @ vectors, eigenvalues.flip(0).clamp(min=0).sqrt())

    def cut(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(down [R, D], up [n, R], bias [n]); directions beyond n are zero, and change nothing."""
        missing = max(0, rank - len(self.values))
        encode, up = self.encode[:rank], self.decode[:, :rank]
        bias = self.centre + up @ (encode @ (self.bias - self.centre))
        down = torch.nn.functional.pad(encode @ self.weight, (0, 0, 0, missing))
        return down, torch.nn.functional.pad(up, (0, missing)), bias


@dataclass(frozen=True)
class Dealt:
    """Stands in for the `Directions` of keys or of values where only their importance is asked for: the groups take
    turns, and the mean of a turn is that of each of its numbers."""

    values: torch.Tensor  # [D], descending

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Dealt":
        turns = torch.stack([group.values for group in groups]).square().mean(0).sqrt()
        return cls(turns.repeat_interleave(len(groups)))


@dataclass(frozen=True)
class HeadsDecomposition:
    """Stands in for a `Decomposition`, of a split latent."""

    keys: tuple[Group, ...]
    values: tuple[Group, ...]
    layout: str = "split"

    @property
    def directions(self) -> "tuple[Dealt, ...]":
        return tuple(Dealt.of(groups) for groups in (self.keys, self.values))

    def cut(self, rank_k: int, rank_v: int, steps: int | None = None) -> Factors:
        """See `Decomposition.cut`. The first groups have one number more where a rank does not divide."""
        down_k, up_k, key_bias = _together(self.keys, rank_k)
        down_v, up_v, value_bias = _together(self.values, rank_v)
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)


def _together(groups: Sequence[Group], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    each, more = divmod(rank, len(groups))
    downs, ups, biases = zip(*(group.cut(each + (i < more)) for i, group in enumerate(groups)), strict=True)
    return torch.cat(downs), torch.block_diag(*ups), torch.cat(biases)


Layers = Sequence[tuple[LayerWeights, Moments | None]]


def decompose_clover(layers: Layers, layout: str, balances: Sequence[float]) -> list[tuple[HeadsDecomposition]]:
    """From the weights alone, head by head. See `methods.Method`."""
    decompositions = []
    for weights, _ in layers:
        queries = [query @ query.T for query in weights.query.chunk(weights.heads)]
        keys = _groups(weights.key, weights.key_bias, queries)
        values = _groups(weights.value, weights.value_bias, output_metric(weights))
        decompositions.append((HeadsDecomposition(keys, values),))
    return decompositions


def decompose_kq_svd(layers: Layers, layout: str, balances: Sequence[float]) -> list[tuple[HeadsDecomposition]]:
    """The least error of each head's scores, and of its values behind the output projection. See `methods.Method`."""
    decompositions = []
    for weights, moments in layers:
        keys = _groups(weights.key, weights.key_bias, moments.query, moments.key)
        values = _groups(weights.value, weights.value_bias, output_metric(weights), moments.value)
        decompositions.append((HeadsDecomposition(keys, values),))
    return decompositions


def decompose_palu(layers: Layers, layout: str, balances: Sequence[float]) -> list[tuple[HeadsDecomposition]]:
    """The least error of keys and values, in groups of heads. See `methods.Method`."""
    decompositions = []
    for weights, moments in layers:
        together = max(count for count in range(1, PALU_HEADS + 1) if weights.heads % count == 0)
        size = len(weights.key) * together // weights.heads
        equal = [torch.eye(size, dtype=weights.key.dtype)] * (weights.heads // together)
        keys = _groups(weights.key, weights.key_bias, equal, moments.key, centred=True)
        values = _groups(weights.value, weights.value_bias, equal, moments.value, centred=True)
        decompositions.append((HeadsDecomposition(keys, values),))
    return decompositions


def _groups(
    weight: torch.Tensor,
    bias: torch.Tensor,
    metrics: Sequence[torch.Tensor],
    inputs: InputMoments | None = None,
    centred: bool = False,
) -> tuple[Group, ...]:
    """The groups of the keys or of the values, as many as `metrics`."""
    groups = []
    for w, b, metric in zip(weight.chunk(len(metrics)), bias.chunk(len(metrics)), metrics, strict=True):
        if inputs is None:
            centre, covariance = b, w @ w.T
        else:
            mean, covariance = w @ inputs.mean + b, w @ inputs.covariance @ w.T
            centre = mean if centred else torch.zeros_like(mean)
            covariance = covariance if centred else covariance + torch.outer(mean, mean)
        groups.append(Group.of(w, b, centre, covariance, metric))
    return tuple(groups)
