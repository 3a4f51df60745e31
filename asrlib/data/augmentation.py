"""SpecAugment: what a recogniser must do without while it is trained.

Shapes: B batch, M mel frames, F mel bins, N masks.
"""

import torch


def spec_augment(
    features_BMF: torch.Tensor,
    lengths_B: torch.Tensor,
    time_masks: int,
    time_mask_share: float,
    frequency_masks: int,
    frequency_mask_bins: int,
) -> torch.Tensor:
    """`features_BMF` with stretches of time and bands of frequency at 0, which is the mean of normalised features.

    Each utterance has `time_masks` stretches of at most `time_mask_share` of its own length and `frequency_masks` bands
    of at most `frequency_mask_bins`, uniform in width and place (Park et al. 2019 and 2020, arXiv 1904.08779 and
    1912.05533, without time warping).
    """
    _, frames, bins = features_BMF.shape
    longest_B = (time_mask_share * lengths_B).long()
    widest_B = torch.full_like(longest_B, min(frequency_mask_bins, bins))
    hidden_BM = _spans(time_masks, longest_B, lengths_B, frames)
    hidden_BF = _spans(frequency_masks, widest_B, torch.full_like(lengths_B, bins), bins)
    return features_BMF.masked_fill(hidden_BM[:, :, None] | hidden_BF[:, None, :], 0)


def _spans(count: int, widest_B: torch.Tensor, length_B: torch.Tensor, size: int) -> torch.Tensor:
    """Which of `size` places lie in one of `count` spans of at most `widest_B`, inside `length_B`: bool [B, size]."""
    draws_2BN = torch.rand(2, len(widest_B), count, device=widest_B.device)
    width_BN = (draws_2BN[0] * (widest_B[:, None] + 1)).long()
    start_BN = (draws_2BN[1] * (length_B[:, None] - width_BN + 1)).long()
    place_S = torch.arange(size, device=widest_B.device)
    inside_BNS = (place_S >= start_BN[..., None]) & (place_S < (start_BN + width_BN)[..., None])
    return inside_BNS.any(1)
