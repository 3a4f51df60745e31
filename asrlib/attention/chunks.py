"""Which frames each frame attends to: in chunks of a stream, and under the masks of transformers.

Shapes: B batch, n queries, T keys.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunks:
    """Every `size` frames are a chunk. Its frames attend to the chunk and to the `left` frames before it.

    `left` None means all frames before it. The chunk also attends to `lookahead` frames after it. These are computed
    for this chunk alone and attend no further than it does, so that the lookahead does not add up over layers (Shi et
    al. 2021, "Emformer", arXiv 2010.10759, 2.3). All are counted in encoder frames.
    """

    size: int
    left: int | None = None
    lookahead: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a chunk of {self.size} frames holds nothing: give 1 or more")
        if self.lookahead < 0 or (self.left is not None and self.left < 0):
            raise ValueError(f"left is {self.left} and lookahead {self.lookahead}: both must be 0 frames or more")

    @property
    def block(self) -> int:
        """Frames that are computed at once."""
        return self.size + self.lookahead

    def visible(self, start: int, stop: int, frames: int, device=None) -> torch.Tensor:
        """bool [n, T]: which of `frames` keys the queries start … stop−1 attend to, without a lookahead."""
        begin_n1 = (torch.arange(start, stop, device=device) // self.size * self.size)[:, None]
        key_T = torch.arange(frames, device=device)
        visible_nT = key_T < begin_n1 + self.size
        return visible_nT if self.left is None else visible_nT & (key_T >= begin_n1 - self.left)


def speech(mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, T]: which frames are speech, by a padding mask [B, T] or transformers' form of it, [B, 1, T, T]."""
    if mask is None or mask.dim() == 2:
        return mask if mask is None else mask.bool()
    row_BT = mask[:, 0, 0]
    return row_BT if row_BT.dtype == torch.bool else row_BT == 0


def heard(mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, 1, T, T]: which keys each query attends to, by a mask of transformers (eager attention: 0 and −∞)."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0
