"""Keys and values from one small latent: the layer that multi-head latent attention adds.

Shapes: B batch, T frames, D width, R latent width. What a streaming cache would hold per frame is the
latent alone, R numbers instead of the 2·D of keys and values (DeepSeek-V2, arXiv 2405.04434, section 2.1).
"""

import torch
from torch import nn

LAYOUTS = ("joint", "split")


def check_latent_dim(latent_dim: int, width: int, layout: str) -> None:
    """Raises ValueError unless a latent of `latent_dim` numbers can serve keys and values of `width`.

    Keys and values are `width` numbers each, so a latent wider than both together saves nothing; a split
    latent needs one number for either half.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
    least = 2 if layout == "split" else 1
    if not least <= latent_dim <= 2 * width:
        raise ValueError(
            f"latent_dim is {latent_dim}, but a {layout} latent of a model of width {width} has between {least} "
            f"and {2 * width} numbers per frame (2 x {width} is what keys and values take uncompressed)"
        )


def split_ranks(latent_dim: int) -> tuple[int, int]:
    """(rank for keys, rank for values) of a split latent; an odd number is the value's."""
    return latent_dim // 2, latent_dim - latent_dim // 2


class LatentKV(nn.Module):
    """Keys and values [B, T, D] of inputs [B, T, D] through what is cached, a latent [B, T, R].

    joint: one latent serves both, K = up_k(down(x)), V = up_v(down(x)).
    split: two latents, of ranks `split_ranks(R)`, for keys and values that read different inputs.

    The product to compare with the weight it replaces is `up_k.weight @ down.weight`: nn.Linear holds
    [out, in].
    """

    def __init__(self, width: int, latent_dim: int, layout: str = "joint"):
        super().__init__()
        check_latent_dim(latent_dim, width, layout)
        self.layout = layout
        rank_k, rank_v = (latent_dim, latent_dim) if layout == "joint" else split_ranks(latent_dim)
        if layout == "joint":
            self.down = nn.Linear(width, latent_dim, bias=False)
        else:
            self.down_k = nn.Linear(width, rank_k, bias=False)
            self.down_v = nn.Linear(width, rank_v, bias=False)
        self.up_k = nn.Linear(rank_k, width)
        self.up_v = nn.Linear(rank_v, width)

    def keys(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up_k((self.down if self.layout == "joint" else self.down_k)(x_BTD))

    def values(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up_v((self.down if self.layout == "joint" else self.down_v)(x_BTD))

    def extra_repr(self) -> str:
        return f"layout={self.layout}"
