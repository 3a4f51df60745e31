"""What a layer keeps of a stream, as tensors: keys and values, latents or sums, and the last frames of convolutions.

Shapes: B streams, n frames worked on at once (of which `central` are of the chunk, and the others heard ahead),
t frames kept, T = t + n, N numbers of a frame, C channels, H heads, E numbers of a head, K chunks.

There is a memory that fills as speech comes in, and one that finds what came before in the same tensor, where all
chunks of a recording are worked side by side. Layers do not know which they have.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import Format
from asrlib.attention.relative import sinusoids

Tensors = tuple[torch.Tensor, ...]


class LayerMemory(ABC):
    """Of one layer. `central` and `kept_Bn`, which of the frames are speech, are set before each step."""

    def __init__(self, chunks: Chunks, held_as: Format):
        self.chunks, self.held_as = chunks, held_as
        self.central, self.kept_Bn = chunks.size, None
        self._positions: torch.Tensor | None = None

    @abstractmethod
    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor | None]:
        """([B, T, N] with what is kept before what is new, which of the frames are speech [B, T]); keeps the new."""

    @abstractmethod
    def sums(self, central: Tensors) -> Tensors:
        """Linear attention's sums over all that came before; adds these."""

    @abstractmethod
    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        """The `reach` frames [B, C, reach] before those given; keeps these."""

    def positions(self, attention, frames: int) -> torch.Tensor:
        """[H, P, E]: projected encodings of the distances from T−1 on, for queries that are the last of T frames."""
        ahead = self.chunks.block - 1
        if self._positions is None or self._positions.shape[1] < frames + ahead:
            left = self.chunks.left
            most = frames + frames // 2 if left is None else left + self.chunks.block  # grows seldom, or never
            like = attention.linear_pos.weight
            table_1PD = sinusoids(most, like.shape[1], like.device, like.dtype, ahead)
            self._positions = attention.heads(attention.linear_pos(table_1PD))[0]
        return self._positions[:, self._positions.shape[1] - frames - ahead :]


class StreamMemory(LayerMemory):
    """Fills as speech comes in; holds `chunks.left` frames at most."""

    def __init__(self, chunks: Chunks, held_as: Format):
        super().__init__(chunks, held_as)
        self.held: list[Tensors] = []  # of each tensor that attention remembers, as the format stores it
        self.total: Tensors = ()
        self.convolved: dict[nn.Module, torch.Tensor] = {}

    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor | None]:
        held = self.held or [self.held_as.store(x_BnN[:, :0]) for x_BnN in new]
        past = [
            self.held_as.restore(stored, x_BnN.shape[2], x_BnN.dtype) for stored, x_BnN in zip(held, new, strict=True)
        ]
        stored = [self.held_as.store(x_BnN[:, : self.central]) for x_BnN in new]
        self.held = [
            tuple(_last(old, one, self.chunks.left) for old, one in zip(before, after, strict=True))
            for before, after in zip(held, stored, strict=True)
        ]
        kept_BT = self.kept_Bn
        if kept_BT is not None:
            kept_BT = nn.functional.pad(kept_BT, (past[0].shape[1], 0), value=True)
        with torch.autocast(new[0].device.type, enabled=False):  # both have one type already
            return tuple(torch.cat(pair, dim=1) for pair in zip(past, new, strict=True)), kept_BT

    def sums(self, central: Tensors) -> Tensors:
        before = self.total or tuple(torch.zeros_like(one) for one in central)
        self.total = tuple(earlier + one for earlier, one in zip(before, central, strict=True))
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
        """All that attention keeps."""
        return [tensor for stored in self.held for tensor in stored] + list(self.total)

    @property
    def attention_bytes(self) -> int:
        """Of the memory that is really taken, whatever a tensor shows of it."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    @property
    def convolution_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.convolved.values())


def _last(old_BtN: torch.Tensor, new_BnN: torch.Tensor, most: int | None) -> torch.Tensor:
    """The last `most` frames of both, in memory of their own."""
    count = old_BtN.shape[1] + new_BnN.shape[1]
    surplus = 0 if most is None else max(0, count - most)
    return torch.cat([old_BtN[:, surplus:], new_BnN[:, max(0, surplus - old_BtN.shape[1]) :]], dim=1)


class SideBySide(LayerMemory):
    """All chunks of a recording at once, each a row of the batch: [B·K, n, N]. What a stream would have kept of earlier
    chunks is found in their rows."""

    def __init__(self, chunks: Chunks, held_as: Format, count: int):
        super().__init__(chunks, held_as)
        self.count = count

    def _before(self, x_RnN: torch.Tensor, most: int) -> torch.Tensor:
        """[B·K, n, N] → [B·K, most, N]: the frames before each chunk, with zeros before the first."""
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
        return tuple(torch.cat(pair, dim=1) for pair in zip(past, new, strict=True)), torch.cat(
            [there_Rt, self.kept_Bn], dim=1
        )

    def sums(self, central: Tensors) -> Tensors:
        by_chunk = [one.unflatten(0, (-1, self.count)) for one in central]
        return tuple((one.cumsum(1) - one).flatten(0, 1) for one in by_chunk)

    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        return self._before(x_BCn.transpose(1, 2), reach).transpose(1, 2)
