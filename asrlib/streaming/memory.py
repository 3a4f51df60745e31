"""What a layer keeps of a stream, as tensors: keys and values, latents or sums, and the last frames of convolutions.

Shapes: B streams, n frames of a step (`central` frames of the chunk, then its lookahead), t frames kept, T = t + n,
N numbers of a frame, C channels, H heads, E numbers of a head, K chunks.

One kind of memory fills as speech comes in. The other serves a pass over all chunks of a recording side by side, and
finds the earlier frames in the same tensor. Layers work with either.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import Format

Tensors = tuple[torch.Tensor, ...]


class LayerMemory(ABC):
    """The memory of one layer. Before each step, `central` and `kept_Bn` (which frames are speech) are set."""

    def __init__(self, chunks: Chunks, held_as: Format):
        self.chunks, self.held_as = chunks, held_as
        self.central, self.kept_Bn = chunks.size, None

    @abstractmethod
    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor | None]:
        """Returns (kept frames and then the new ones [B, T, N], which are speech [B, T]), and keeps the new ones."""

    @abstractmethod
    def sums(self, central: Tensors) -> Tensors:
        """Returns linear attention's sums over all earlier frames, and adds these."""

    @abstractmethod
    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        """Returns the `reach` frames [B, C, reach] before these, and keeps these."""

    def positions(self, attention, frames: int) -> torch.Tensor:
        """[H, P, E]: projected encodings of the distances from T−1 on, for the last of T frames as queries."""
        most = 0 if self.chunks.left is None else self.chunks.left + self.chunks.block
        return attention.distances(frames, self.chunks.block - 1, most)


class Window:
    """The last `most` frames of a tensor [B, t, …], in memory with spare room after them.

    New frames go into the spare room. When it is full, all frames move to new memory with an eighth more room: on
    average eight old frames are copied for each new one, however many are kept.
    """

    def __init__(self, most: int | None, like_BnX: torch.Tensor):
        self.most, self.begin, self.end = most, 0, 0
        self.room_BrX = torch.empty_like(like_BnX[:, :0])

    @property
    def kept_BtX(self) -> torch.Tensor:
        return self.room_BrX[:, self.begin : self.end]

    def add(self, new_BnX: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the kept frames and then the new ones, as a view that is valid until the next call. Keeps the first
        `count` of the new ones."""
        kept_BtX, new = self.kept_BtX, new_BnX.shape[1]
        if self.end + new > self.room_BrX.shape[1]:
            both = kept_BtX.shape[1] + new
            self.room_BrX = new_BnX.new_empty(len(new_BnX), both + both // 8, *new_BnX.shape[2:])
            self.begin, self.end = 0, kept_BtX.shape[1]
            self.kept_BtX.copy_(kept_BtX)
        behind = self.end + new
        self.room_BrX[:, self.end : behind] = new_BnX
        both_BTX = self.room_BrX[:, self.begin : behind]
        self.end += count
        if self.most is not None:
            self.begin = max(self.begin, self.end - self.most)
        return both_BTX


class StreamMemory(LayerMemory):
    """Fills as speech comes in, and holds at most `chunks.left` frames."""

    def __init__(self, chunks: Chunks, held_as: Format):
        super().__init__(chunks, held_as)
        self.held: list[tuple[Window, ...]] = []  # of each tensor that attention keeps, as the format stores it
        self.total: Tensors = ()
        self.convolved: dict[nn.Module, torch.Tensor] = {}

    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor | None]:
        stored = [self.held_as.store(x_BnN) for x_BnN in new]
        if not self.held:
            self.held = [tuple(Window(self.chunks.left, part) for part in parts) for parts in stored]
        before = self.held[0][0].kept_BtX.shape[1]
        both = tuple(map(self._add, self.held, stored, new))
        kept_BT = self.kept_Bn
        if kept_BT is not None:
            kept_BT = nn.functional.pad(kept_BT, (before, 0), value=True)
        return both, kept_BT

    def _add(self, windows: tuple[Window, ...], stored: Tensors, new_BnN: torch.Tensor) -> torch.Tensor:
        if stored[0].dtype == new_BnN.dtype:  # stored without conversion
            return windows[0].add(stored[0], self.central)
        past = tuple(window.kept_BtX for window in windows)
        past_BtN = self.held_as.restore(past, new_BnN.shape[2], new_BnN.dtype)
        with torch.autocast(new_BnN.device.type, enabled=False):  # both have one type already
            both_BTN = torch.cat([past_BtN, new_BnN], dim=1)
        for window, part in zip(windows, stored, strict=True):
            window.add(part[:, : self.central], self.central)
        return both_BTN

    def sums(self, central: Tensors) -> Tensors:
        before = self.total or tuple(torch.zeros_like(chunk) for chunk in central)
        self.total = tuple(earlier + chunk for earlier, chunk in zip(before, central, strict=True))
        return before

    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        before_BCr = self.convolved.get(convolution)
        if before_BCr is None:
            before_BCr = x_BCn.new_zeros(*x_BCn.shape[:2], reach)
        kept_BCt = torch.cat([before_BCr, x_BCn[..., : self.central]], dim=2)
        self.convolved[convolution] = kept_BCt[..., kept_BCt.shape[2] - reach :].clone()
        return before_BCr

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that attention keeps."""
        return [window.kept_BtX for windows in self.held for window in windows] + list(self.total)

    @property
    def attention_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def reserved_bytes(self) -> int:
        """The memory of attention's cache, spare room included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    @property
    def convolution_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.convolved.values())


class SideBySide(LayerMemory):
    """All chunks of a recording at once, each a row of the batch: [B·K, n, N]. The frames that a stream would have kept
    are in the rows of earlier chunks."""

    def __init__(self, chunks: Chunks, held_as: Format, count: int):
        super().__init__(chunks, held_as)
        self.count = count

    def _before(self, x_RnN: torch.Tensor, most: int) -> torch.Tensor:
        """[B·K, n, N] → [B·K, most, N]: the frames before each chunk; zeros before the first."""
        central_BKnN = x_RnN[:, : self.central].unflatten(0, (-1, self.count))
        padded_BTN = nn.functional.pad(central_BKnN.flatten(1, 2), (0, 0, most, 0))
        return padded_BTN.unfold(1, most, self.central)[:, : self.count].flatten(0, 1).transpose(1, 2)

    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor]:
        most = (self.count - 1) * self.central
        most = most if self.chunks.left is None else min(most, self.chunks.left)
        if not most:
            return new, self.kept_Bn
        begins_K1 = torch.arange(self.count, device=new[0].device)[:, None] * self.central
        there_Kt = begins_K1 - most + torch.arange(most, device=new[0].device) >= 0
        there_Rt = there_Kt.repeat(len(new[0]) // self.count, 1)
        past = [self.held_as.rounded(self._before(x_RnN, most)) for x_RnN in new]
        both = tuple(torch.cat(pair, dim=1) for pair in zip(past, new, strict=True))
        return both, torch.cat([there_Rt, self.kept_Bn], dim=1)

    def sums(self, central: Tensors) -> Tensors:
        by_chunk = [sums.unflatten(0, (-1, self.count)) for sums in central]
        return tuple((sums.cumsum(1) - sums).flatten(0, 1) for sums in by_chunk)

    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        return self._before(x_BCn.transpose(1, 2), reach).transpose(1, 2)
