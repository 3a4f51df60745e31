"""Attention with relative positions, in blocks of queries. Without gradients, memory grows with T, not with T².

    score(i, j) = ((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h        (Transformer-XL, arXiv 1901.02860, 3.3)

Shapes: B batch, H heads, T frames, n queries of a block, E = d_h numbers a head, D width.
"""

import math

import torch
from torch import nn

from asrlib.attention.chunks import Chunks

BLOCK_SCORES = 1 << 18  # of a head at once: 1 MB in float32, which fits a processor's cache
SMALLEST_BLOCK = 64  # queries


def sinusoids(frames: int, width: int, device=None, dtype=None, ahead: int | None = None) -> torch.Tensor:
    """Encodings [1, P, D] of the distances T−1 … −`ahead` between frames, in this order; `ahead` is T−1 by default.

    sin(distance · ω_m) and cos(distance · ω_m) alternate, with ω_m = 10000^(−2m/D) (arXiv 1706.03762, 3.5).
    """
    last = frames - 1 if ahead is None else ahead
    distances = torch.arange(frames - 1, -last - 1, -1, dtype=torch.float32, device=device)
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(1e4) / width))
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :width].to(dtype)


def queries_per_block(frames: int) -> int:
    return max(SMALLEST_BLOCK, BLOCK_SCORES // max(frames, 1))


def position_scores(query_BHnE: torch.Tensor, positions_HPE: torch.Tensor, start: int, frames: int) -> torch.Tensor:
    """(q_i + v)·p_{i−j} for the queries i = start … start+n−1 and all keys j: [B, H, n, T].

    `positions_HPE` holds the projected encodings of all distances that these queries need, T−1 first. Row r of the
    block begins at column n−1−r of q·pᵀ: a view with rows one shorter aligns the matrix without a copy.
    """
    rows = query_BHnE.shape[2]
    near_HPE = positions_HPE[:, frames - start - rows : 2 * frames - 1 - start]
    length = frames + rows - 2
    if torch.compiler.is_exporting():  # a graph must serve one row too: one more distance keeps the view long enough
        near_HPE, length = nn.functional.pad(near_HPE, (0, 0, 0, 1)), length + 1
    scores_BHnP = query_BHnE @ near_HPE.transpose(1, 2)
    if length < frames:  # one row is aligned already
        return scores_BHnP
    shifted = scores_BHnP.flatten(2)[..., rows - 1 : rows - 1 + rows * length]
    return shifted.unflatten(2, (rows, length))[..., :frames]


def relative_attention(
    query_BHnE: torch.Tensor,
    key_BGTE: torch.Tensor,
    value_BGTE: torch.Tensor,
    positions_HPE: torch.Tensor,
    bias_u_HE: torch.Tensor,
    bias_v_HE: torch.Tensor,
    kept_BT: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
    start: int = 0,
    chunks: Chunks | None = None,
    absorbed_HER: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(output [B, H, n, E], weights [B, H, n, T] where asked for).

    Keys and values are those of T frames, and the queries those of the frames start … start+n−1 among them. Each of the
    G keys and values serves H / G neighbouring heads. `positions_HPE` are the projected encodings of the distances from
    T−1 on. `kept_BT` says which frames are speech, and `chunks` which frames a query may attend to; `kept_BT` of shape
    [B, n, T] says both. `dropout` is applied to the weights.

    With `absorbed_HER`, keys are latents of width R, and the queries of each head are projected to that width. Values
    may then have any width, and the output has the same (DeepSeek-V2, arXiv 2405.04434, 2.1.2).
    """
    frames, groups, scale = key_BGTE.shape[2], key_BGTE.shape[1], query_BHnE.shape[3] ** -0.5
    queries = query_BHnE.shape[2]
    # An exported graph serves any length and has no loop: all queries are one block.
    rows = queries if torch.compiler.is_exporting() else queries_per_block(frames)
    outputs, weights = [], []
    for first in [0] if torch.compiler.is_exporting() else range(0, queries, rows):
        block = query_BHnE[:, :, first : first + rows]
        begin, end = start + first, start + first + block.shape[2]
        bias = position_scores(block + bias_v_HE[:, None], positions_HPE, begin, frames) * scale
        if chunks is not None:
            bias = _only(bias, chunks.visible(begin, end, frames, bias.device))
        if kept_BT is not None:
            kept = kept_BT[:, None] if kept_BT.dim() == 2 else kept_BT[:, first : first + rows]
            bias = _only(bias, kept[:, None])
        block = block + bias_u_HE[:, None]
        if absorbed_HER is not None:
            block = block @ absorbed_HER
        block, bias = _by_group(block, groups), _by_group(bias, groups)
        if return_weights:
            weights.append(_by_head((block @ key_BGTE.transpose(2, 3) * scale + bias).softmax(-1), end - begin))
            outputs.append(_by_group(nn.functional.dropout(weights[-1], dropout), groups) @ value_BGTE)
        else:
            outputs.append(
                nn.functional.scaled_dot_product_attention(
                    block, key_BGTE, value_BGTE, attn_mask=bias, dropout_p=dropout, scale=scale
                )
            )
        outputs[-1] = _by_head(outputs[-1], end - begin)
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if return_weights else None


def _by_group(x_BHnN: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, n, N] → [B, G, H / G · n, N]: the heads of a group read their shared keys and values once."""
    return x_BHnN.unflatten(1, (groups, -1)).flatten(2, 3)


def _by_head(x_BGmN: torch.Tensor, queries: int) -> torch.Tensor:
    return x_BGmN.unflatten(2, (-1, queries)).flatten(1, 2)


def _only(scores_BHnT: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
    # Not −∞: an utterance without a frame would become NaN.
    return scores_BHnT.masked_fill(~heard, torch.finfo(scores_BHnT.dtype).min)
