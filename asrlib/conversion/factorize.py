"""Low-rank factorisations of key and value projections: pure linear algebra, closed form, float64.

Names: D width, R latent width. Weights are [out, in] as nn.Linear holds them, so a factorisation of a
weight W [D, D] is W ≈ up @ down with down [R, D] and up [D, R]; the other order is another matrix.
"""

from dataclasses import dataclass

import torch

METHODS = ("svd",)


@dataclass(frozen=True)
class Factors:
    """K ≈ up_k (down_k x), V ≈ up_v (down_v x), float64. In a joint layout down_k is down_v."""

    down_k: torch.Tensor  # [R_k, D]
    down_v: torch.Tensor  # [R_v, D]
    up_k: torch.Tensor  # [D, R_k]
    up_v: torch.Tensor  # [D, R_v]

    @property
    def key_weight(self) -> torch.Tensor:
        return self.up_k @ self.down_k

    @property
    def value_weight(self) -> torch.Tensor:
        return self.up_v @ self.down_v


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition M = U diag(S) Vh of a projection [out, in], kept to be cut at any rank."""

    left: torch.Tensor  # U [out, n]
    values: torch.Tensor  # S [n], descending
    right: torch.Tensor  # Vh [n, in]

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Spectrum":
        return cls(*torch.linalg.svd(matrix.double(), full_matrices=False))

    def cut(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [rank, in], up [out, rank]) of the best rank-`rank` approximation (Eckart and Young 1936).

        √S goes to either side, so that both train at the same scale. A rank above the matrix's own is filled
        with zeros: the latent is then as wide as asked, and exact.
        """
        kept = min(rank, len(self.values))
        root = self.values[:kept].sqrt()
        down = torch.zeros(rank, self.right.shape[1], dtype=torch.float64)
        up = torch.zeros(self.left.shape[0], rank, dtype=torch.float64)
        down[:kept] = root[:, None] * self.right[:kept]
        up[:, :kept] = self.left[:, :kept] * root
        return down, up


@dataclass(frozen=True)
class KeyValueSpectrum:
    """Decomposition of one layer's key and value projections: computed once, cut at many widths.

    joint: one SVD of [W_k / ‖W_k‖; W_v / ‖W_v‖] [2D, D], each scaled to unit Frobenius norm so that the
    larger of the two does not take all of the latent; the scales are undone in the ups.
    split: one SVD each.
    """

    layout: str
    spectra: tuple[Spectrum, ...]  # joint: one; split: keys, values
    scales: tuple[float, float] = (1.0, 1.0)  # joint: ‖W_k‖, ‖W_v‖

    @classmethod
    def of(cls, key_weight: torch.Tensor, value_weight: torch.Tensor, layout: str) -> "KeyValueSpectrum":
        """From weights [D, D]; raises ValueError where they hold NaN or infinity."""
        for name, weight in (("key", key_weight), ("value", value_weight)):
            if not torch.isfinite(weight).all():
                raise ValueError(f"the {name} weight holds NaN or infinity: the checkpoint is damaged")
        if layout == "split":
            return cls(layout, (Spectrum.of(key_weight), Spectrum.of(value_weight)))
        weights = [weight.double() for weight in (key_weight, value_weight)]
        scales = tuple(max(weight.norm().item(), torch.finfo(torch.float64).tiny) for weight in weights)
        stacked = torch.cat([weight / scale for weight, scale in zip(weights, scales, strict=True)])
        return cls(layout, (Spectrum.of(stacked),), scales)

    def cut(self, rank_k: int, rank_v: int) -> Factors:
        """The factors at these ranks; a joint latent has one rank, given twice."""
        if self.layout == "split":
            (down_k, up_k), (down_v, up_v) = (
                spectrum.cut(rank) for spectrum, rank in zip(self.spectra, (rank_k, rank_v), strict=True)
            )
            return Factors(down_k, down_v, up_k, up_v)
        down, up = self.spectra[0].cut(rank_k)
        width = up.shape[0] // 2
        return Factors(down, down, up[:width] * self.scales[0], up[width:] * self.scales[1])


def factorize(
    key_weight: torch.Tensor, value_weight: torch.Tensor, rank_k: int, rank_v: int, layout: str, method: str = "svd"
) -> Factors:
    """Factors of W_k and W_v [D, D] at the given ranks (see `KeyValueSpectrum`)."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    return KeyValueSpectrum.of(key_weight, value_weight, layout).cut(rank_k, rank_v)
