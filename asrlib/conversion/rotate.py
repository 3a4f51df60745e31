"""Latents in other coordinates, which cost nothing: what is folded into the factors is not there at run time.

A latent c = A x may be turned by any orthogonal Q: keys (U_k Qᵀ)(Q c) are what they were. Turned at random, a latent's
numbers are of like size, which is what a format with one scale a frame wants (Ashkboos et al. 2024, "QuaRot",
arXiv 2404.00456).
"""

import copy

import torch
from torch import nn

from asrlib.models.families import attention_modules, is_latent


def rotate_latents(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a latent `model` whose latents are turned by random orthogonal matrices; it gives the same logits.

    Raises ValueError where there are no latents.
    """
    if not is_latent(model.config):
        raise ValueError("the model keeps keys and values as they are: convert it to latent attention first")
    turned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attention in attention_modules(turned):
            latent = attention.latent_kv
            if latent.layout == "joint":
                pairs = [(latent.down, (latent.up_k, latent.up_v))]
            else:
                pairs = [(latent.down_k, (latent.up_k,)), (latent.down_v, (latent.up_v,))]
            for down, ups in pairs:
                turn_RR = random_rotation(down.out_features, generator)
                down.weight.copy_(turn_RR @ down.weight.cpu().double())
                for up in ups:
                    up.weight.copy_(up.weight.cpu().double() @ turn_RR.T)
    return turned


def random_rotation(width: int, generator: torch.Generator) -> torch.Tensor:
    """[R, R] orthogonal, float64, uniform over all: QR of normal numbers with the signs of R's diagonal taken in."""
    q_RR, r_RR = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q_RR * r_RR.diagonal().sign()
