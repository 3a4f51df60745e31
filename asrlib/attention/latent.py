"""Keys and values from one small latent: the layer that multi-head latent attention adds.

Shapes: B batch, T frames, D width, R latent width. A streaming cache holds the latent alone: R numbers a frame instead
of the 2·D of keys and values (DeepSeek-V2, arXiv 2405.04434, section 2.1).
"""

import torch
from torch import nn

from asrlib.attention.names import attends_across, encoder_config, latent_count
from asrlib.attention.widths import check_latent_dim, split_ranks


def check_latent_widths(config) -> None:
    """Raises ValueError unless `config.latent_dim` and `latent_key_dim` (if given) have a possible width for each
    attention module with a latent. A layer has one such module, except in an encoder-decoder."""
    for name in ("latent_dim", "latent_key_dim") if config.latent_key_dim else ("latent_dim",):
        given, modules = len(getattr(config, name)), latent_count(config)
        if given != modules:
            what = "attention module" if attends_across(config) else "layer"
            raise ValueError(f"{name} has {given} widths for {modules} {what}s: give one a {what}")
    for layer, width in enumerate(config.latent_dim):
        check_latent_dim(width, encoder_config(config).hidden_size, config.latent_layout, config.key_dim(layer))


class LatentKV(nn.Module):
    """Keys and values [B, T, D] of inputs [B, T, D], through a latent [B, T, R] that is cached.

    joint: one latent serves both, K = up_k(down(x)), V = up_v(down(x)).
    split: two latents, R_k + R_v = R, for keys and values that read different inputs, or need unequal ranks.
    `key_dim` is R_k; None: the half of `split_ranks`.

    `up_k.weight @ down.weight` stands for the key weight that it replaces: nn.Linear holds [out, in].
    """

    def __init__(self, width: int, latent_dim: int, layout: str = "joint", key_dim: int | None = None):
        super().__init__()
        check_latent_dim(latent_dim, width, layout, key_dim)
        self.layout = layout
        if layout == "joint":
            rank_k = rank_v = latent_dim
            self.down = nn.Linear(width, latent_dim, bias=False)
        else:
            rank_k = split_ranks(latent_dim)[0] if key_dim is None else key_dim
            rank_v = latent_dim - rank_k
            self.down_k = nn.Linear(width, rank_k, bias=False)
            self.down_v = nn.Linear(width, rank_v, bias=False)
        self.up_k = nn.Linear(rank_k, width)
        self.up_v = nn.Linear(rank_v, width)

    @property
    def ranks(self) -> tuple[int, int]:
        """(R_k, R_v); a joint latent gives its one rank twice."""
        return self.up_k.in_features, self.up_v.in_features

    def latents(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The cached numbers of frames: the joint latent [B, T, R], or [B, T, R_k] and [B, T, R_v]."""
        return (self.down(x_BTD),) if self.layout == "joint" else (self.down_k(x_BTD), self.down_v(x_BTD))

    def expand(self, *latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of latents."""
        return self.up_k(latents[0]), self.up_v(latents[-1])

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values)"""
        return self.expand(*self.latents(x_BTD))

    def keys(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up_k((self.down if self.layout == "joint" else self.down_k)(x_BTD))

    def values(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up_v((self.down if self.layout == "joint" else self.down_v)(x_BTD))

    def extra_repr(self) -> str:
        return f"layout={self.layout}"
