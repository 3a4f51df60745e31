"""The loss of a transducer: the probability of a text, summed over all alignments with the frames.

A path through the lattice begins at frame 0 without a label. At each point it either emits the next label and stays at
its frame, or emits the blank and moves on to the next frame (Graves 2012, arXiv 1211.3711, 2.3).

Shapes: B batch, T frames, U labels, V vocabulary.
"""

import torch
from torch import nn

IMPOSSIBLE = -1e30  # log probability: the gradient of logaddexp(−∞, −∞) would be NaN


def transducer_loss(
    log_probs_BTUV: torch.Tensor,
    targets_BU: torch.Tensor,
    frames_B: torch.Tensor,
    lengths_B: torch.Tensor,
    blank: int,
) -> torch.Tensor:
    """−log p(text) of each utterance [B], differentiable.

    Takes log probabilities [B, T, U+1, V] at each frame after each number of labels, labels [B, U], and the numbers of
    frames and labels of each utterance; padding does not count. Raises ValueError where an utterance has no frame.
    """
    if (frames_B < 1).any():
        raise ValueError("an utterance of the batch is shorter than one frame of the encoder: leave it out")
    batch, frames, points, _ = log_probs_BTUV.shape
    device = log_probs_BTUV.device
    blank_BTU = log_probs_BTUV[..., blank]
    index_BTU1 = targets_BU.clamp(min=0)[:, None, :, None].expand(-1, frames, -1, -1)  # padded with −100, maybe
    label_BTU = log_probs_BTUV[:, :, : points - 1].gather(3, index_BTU1)[..., 0]

    # The points of a diagonal t + u depend on the diagonal before it alone, so all of them are computed at once.
    blank_BNU = _by_diagonal(blank_BTU)  # [B, T+U, U+1]
    label_BNU = _by_diagonal(label_BTU)
    start_BU = torch.where(torch.arange(points, device=device) == 0, 0.0, IMPOSSIBLE).to(log_probs_BTUV.dtype)
    alpha_BU = start_BU.expand(batch, -1)
    reached = [alpha_BU]
    for diagonal in range(frames + points - 2):
        waited_BU = alpha_BU + blank_BNU[:, diagonal]
        said_BU = nn.functional.pad(alpha_BU[:, :-1] + label_BNU[:, diagonal, : points - 1], (1, 0), value=IMPOSSIBLE)
        alpha_BU = torch.logaddexp(waited_BU, said_BU).clamp(min=IMPOSSIBLE)
        reached.append(alpha_BU)
    alpha_BNU = torch.stack(reached, dim=1)

    utterance_B = torch.arange(batch, device=device)
    last_B, said_B = frames_B.to(device) - 1, lengths_B.to(device)
    end_B = last_B + said_B
    return -(alpha_BNU[utterance_B, end_B, said_B] + blank_BTU[utterance_B, last_B, said_B])


def _by_diagonal(scores_BTU: torch.Tensor) -> torch.Tensor:
    """[B, T, M] → [B, T + M, M]: row n holds the points t + u = n; points outside the lattice are impossible."""
    frames, points = scores_BTU.shape[1:]
    rows = frames + points
    t_NU = torch.arange(rows, device=scores_BTU.device)[:, None] - torch.arange(points, device=scores_BTU.device)
    inside_NU = (t_NU >= 0) & (t_NU < frames)
    index_BNU = t_NU.clamp(0, frames - 1).expand(len(scores_BTU), -1, -1)
    return scores_BTU.gather(1, index_BNU).masked_fill(~inside_NU, IMPOSSIBLE)
