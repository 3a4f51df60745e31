"""Rotating the coordinates of what is cached. The rotation is folded into weights, so it costs nothing at run time.

Any orthogonal Q may rotate a latent c = A x: the keys (U_k Qᵀ)(Q c) stay equal. A head's keys may be rotated with its
queries and positions, and its values with the output's weights. A random rotation makes the numbers of a frame similar
in size, which suits a format with one scale a frame (Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456). Keys and values
are rotated within each head, while all heads share a scale.

Shapes: D width, H heads, G key/value heads, E numbers of a head, R latent width.
"""

import copy

import torch
from torch import nn

from asrlib.attention.kinds import LinearAttention
from asrlib.models.registry import attention_modules, family_of, is_latent, latent_modules


def rotated(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of `model` with the same logits, whose cache is rotated by random orthogonal matrices.

    Raises ValueError where attention is linear, whose sums a rotation would change, or cannot stream.
    """
    return rotate_latents(model, seed) if is_latent(model.config) else rotate_heads(model, seed)


def rotate_heads(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a `model` that caches keys and values. Those of each head are rotated by a matrix [E, E] of its own."""
    family = family_of(model.config)
    family.check_streaming(model.config)
    turned = family.work_in_blocks(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attention in attention_modules(turned):
            if isinstance(attention, LinearAttention):
                raise ValueError("linear attention keeps sums over φ(k), which a rotation of k would change")
            size, heads = attention.head_size, attention.num_heads
            groups = attention.linear_k.out_features // size
            turn_k_GEE, turn_v_GEE = (
                torch.stack([random_rotation(size, generator) for _ in range(groups)]) for _ in range(2)
            )
            turn_k_HEE, turn_v_HEE = (turn.repeat_interleave(heads // groups, 0) for turn in (turn_k_GEE, turn_v_GEE))
            _turn_outputs(attention.linear_k, turn_k_GEE)
            _turn_outputs(attention.linear_v, turn_v_GEE)
            _turn_outputs(attention.linear_q, turn_k_HEE)
            _turn_outputs(attention.linear_pos, turn_k_HEE)
            for bias_HE in (attention.pos_bias_u, attention.pos_bias_v):
                bias_HE.copy_((turn_k_HEE @ bias_HE.cpu().double()[..., None])[..., 0])
            out_DHE = attention.linear_out.weight.cpu().double().unflatten(1, (heads, size))
            attention.linear_out.weight.copy_(torch.einsum("dhe,hfe->dhf", out_DHE, turn_v_HEE).flatten(1))
    return turned


def _turn_outputs(linear: nn.Linear, turn_HEE: torch.Tensor) -> None:
    for parameter in linear.parameters():
        by_head = parameter.cpu().double().reshape(len(turn_HEE), turn_HEE.shape[1], -1)
        parameter.copy_((turn_HEE @ by_head).reshape(parameter.shape))


def rotate_latents(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a latent `model` with the same logits, whose latents are rotated by random orthogonal matrices.

    Raises ValueError where there are no latents.
    """
    if not is_latent(model.config):
        raise ValueError("the model keeps keys and values as they are: convert it to latent attention first")
    turned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attention in latent_modules(turned):
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
    """[R, R] orthogonal, float64, uniform: QR of normal numbers, with the signs of R's diagonal moved into Q."""
    q_RR, r_RR = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q_RR * r_RR.diagonal().sign()
