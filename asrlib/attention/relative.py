"""Attention with relative positions, in blocks of queries: without gradients, memory grows with T, not with T².

    score(i, j) = ((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h        (Transformer-XL, arXiv 1901.02860, 3.3)

Shapes: B batch, H heads, T frames, n queries of a block, E = d_h numbers a head, D width.
"""

import math

import torch
from torch import nn

BLOCK_SCORES = 1 << 18  # of a head at once: some 1 MB in float32, which processor caches hold
SMALLEST_BLOCK = 64  # queries


def sinusoids(frames: int, width: int, device=None, dtype=None) -> torch.Tensor:
    """Encodings of the distances T−1 … −(T−1) between frames, in this order: [1, 2T−1, D].

    sin(distance · ω_m) and cos(distance · ω_m) take turns, with ω_m = 10000^(−2m/D) (arXiv 1706.03762, 3.5).
    """
    distances = torch.arange(frames - 1, -frames, -1, dtype=torch.float32, device=device)
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(1e4) / width))
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :width].to(dtype)


def queries_per_block(frames: int) -> int:
    return max(SMALLEST_BLOCK, BLOCK_SCORES // max(frames, 1))


def position_scores(query_BHnE: torch.Tensor, positions_HPE: torch.Tensor, start: int, frames: int) -> torch.Tensor:
    """(q_i + v)·p_{i−j} for the queries i = start … start+n−1 and all keys j: [B, H, n, T].

    `positions_HPE` holds the projected encodings of all P = 2T−1 distances, T−1 first. Row r of the block begins at
    column n−1−r of q·pᵀ: read with rows one shorter, the matrix is aligned, and nothing is copied.
    """
    rows = query_BHnE.shape[2]
    near_HPE = positions_HPE[:, frames - start - rows : 2 * frames - 1 - start]
    scores_BHnP = query_BHnE @ near_HPE.transpose(1, 2)
    if rows == 1:  # aligned as it is, and rows one shorter would lack a key
        return scores_BHnP
    shifted = scores_BHnP.flatten(2)[..., rows - 1 : rows - 1 + rows * (frames + rows - 2)]
    return shifted.unflatten(2, (rows, frames + rows - 2))[..., :frames]


def relative_attention(
    query_BHTE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTE: torch.Tensor,
    positions_HPE: torch.Tensor,
    bias_u_HE: torch.Tensor,
    bias_v_HE: torch.Tensor,
    kept_BT: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(output [B, H, T, E], weights [B, H, T, T] where asked for).

    `kept_BT` says which frames are speech: no query attends to the others. `dropout` is applied to the weights.
    """
    frames, scale = query_BHTE.shape[2], query_BHTE.shape[3] ** -0.5
    rows = queries_per_block(frames)
    outputs, weights = [], []
    for start in range(0, frames, rows):
        block = query_BHTE[:, :, start : start + rows]
        bias = position_scores(block + bias_v_HE[:, None], positions_HPE, start, frames) * scale
        block = block + bias_u_HE[:, None]
        if return_weights:
            scores = _only_speech((block @ key_BHTE.transpose(2, 3)) * scale + bias, kept_BT)
            weights.append(scores.softmax(-1))
            outputs.append(nn.functional.dropout(weights[-1], dropout) @ value_BHTE)
        else:
            bias = _only_speech(bias, kept_BT)
            outputs.append(
                nn.functional.scaled_dot_product_attention(
                    block, key_BHTE, value_BHTE, attn_mask=bias, dropout_p=dropout, scale=scale
                )
            )
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if return_weights else None


def _only_speech(scores_BHnT: torch.Tensor, kept_BT: torch.Tensor | None) -> torch.Tensor:
    if kept_BT is None:
        return scores_BHnT
    # Not −∞, with which an utterance without a single frame would be no number.
    return scores_BHnT.masked_fill(~kept_BT[:, None, None], torch.finfo(scores_BHnT.dtype).min)
