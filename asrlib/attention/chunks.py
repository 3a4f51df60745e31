"""Who hears whom: where speech is worked chunk by chunk, and by the masks that transformers makes.

Shapes: B batch, n queries, T keys.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunks:
    """Every `size` frames are one chunk, whose frames attend to the chunk and to `left` frames before it.

    `left` None means all of them. `lookahead` frames behind the chunk are attended to as well; they are worked on for
    this chunk alone, hearing no further than it does, so that what is heard ahead does not add up over layers (Shi et
    al. 2021, "Emformer", arXiv 2010.10759, 2.3). All are counted in encoder frames.
    """

    size: int
    left: int | None = None
    lookahead: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a chunk of {self.size} frames holds nothing: give 1 or more")
        if self.lookahead < 0 or (self.left is not None and self.left < 0):
            raise ValueError(f"left ({self.left}) and lookahead ({self.lookahead}) are numbers of frames, 0 or more")

    @property
    def block(self) -> int:
        """Frames that are worked on at once."""
        return self.size + self.lookahead

    def visible(self, start: int, stop: int, frames: int, device=None) -> torch.Tensor:
        """bool [n, T]: which of `frames` keys the queries start … stop−1 attend to. A lookahead has no such mask."""
        begin_n1 = (torch.arange(start, stop, device=device) // self.size * self.size)[:, None]
        key_T = torch.arange(frames, device=device)
        visible_nT = key_T < begin_n1 + self.size
        return visible_nT if self.left is None else visible_nT & (key_T >= begin_n1 - self.left)


def speech(mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, T] of a padding mask, given as that or as transformers makes it: [B, 1, T, T], all rows alike."""
    if mask is None or mask.dim() == 2:
        return mask if mask is None else mask.bool()
    row_BT = mask[:, 0, 0]
    return row_BT if row_BT.dtype == torch.bool else row_BT == 0


def heard(mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, 1, T, T]: who hears whom, of a mask as transformers makes it, for eager attention of 0 and −∞."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0
