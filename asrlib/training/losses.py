"""What a student learns from a teacher.

Shapes: N frames or tokens, V tokens of the vocabulary, D width.
"""

import torch


def posterior_divergence(logits_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) of the posteriors over N frames, nats per frame (Hinton et al. 2015, temperature 1)."""
    ours, theirs = (values.float().log_softmax(-1) for values in (logits_NV, teacher_NV))
    return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def relative_squared_error(ours_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
    """‖ours − theirs‖² / ‖theirs‖², which does not depend on a layer's scale; 1 for an output of zeros."""
    return (ours_ND.float() - theirs_ND.float()).square().sum() / theirs_ND.float().square().sum()
