"""Number formats that a cache can be held in.

Shapes: B streams, t frames, N numbers of a frame.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

Stored = tuple[torch.Tensor, ...]  # [B, t, ...] each, frames along the second axis


class Format(ABC):
    """How numbers [B, t, N] are stored and restored."""

    @abstractmethod
    def store(self, x_BtN: torch.Tensor) -> Stored: ...

    @abstractmethod
    def restore(self, stored: Stored, numbers: int, dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def frame_bytes(self, numbers: int) -> int:
        """Bytes of one frame of `numbers` numbers."""

    def rounded(self, x_BtN: torch.Tensor) -> torch.Tensor:
        """The numbers after a cache has stored and restored them."""
        return self.restore(self.store(x_BtN), x_BtN.shape[-1], x_BtN.dtype)


@dataclass(frozen=True)
class Floating(Format):
    dtype: torch.dtype

    def store(self, x_BtN: torch.Tensor) -> Stored:
        finite = torch.finfo(self.dtype)
        return (x_BtN.to(self.dtype).clamp(finite.min, finite.max),)

    def restore(self, stored: Stored, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        return stored[0].to(dtype)

    def frame_bytes(self, numbers: int) -> int:
        return self.dtype.itemsize * numbers


@dataclass(frozen=True)
class Integers(Format):
    """Integers of `bits` bits (four-bit ones two to a byte), with a float16 scale a frame: the frame's largest number
    divided by the largest integer. Steps are uniform, so zero stays zero."""

    bits: int

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def store(self, x_BtN: torch.Tensor) -> Stored:
        largest_Bt1 = x_BtN.abs().amax(-1, keepdim=True).float()
        scale_Bt1 = (largest_Bt1 / self.largest).clamp(2**-24, torch.finfo(torch.float16).max).half()  # float16's range
        steps_BtN = (x_BtN / scale_Bt1.to(x_BtN.dtype)).round().clamp(-self.largest, self.largest).to(torch.int8)
        return (steps_BtN if self.bits == 8 else _packed(steps_BtN)), scale_Bt1

    def restore(self, stored: Stored, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        steps_BtN, scale_Bt1 = stored
        steps_BtN = steps_BtN if self.bits == 8 else _unpacked(steps_BtN)[..., :numbers]
        return steps_BtN.to(dtype) * scale_Bt1.to(dtype)

    def frame_bytes(self, numbers: int) -> int:
        return -(-numbers * self.bits // 8) + torch.float16.itemsize


def _packed(steps_BtN: torch.Tensor) -> torch.Tensor:
    """int8 from −8 to 7 → uint8 [B, t, ⌈N / 2⌉], the first of two in the low half."""
    even_BtN = torch.nn.functional.pad(steps_BtN, (0, steps_BtN.shape[-1] % 2)).to(torch.uint8) & 0x0F
    return even_BtN[..., ::2] | (even_BtN[..., 1::2] << 4)


def _unpacked(bytes_BtM: torch.Tensor) -> torch.Tensor:
    halves_BtM2 = torch.stack([bytes_BtM & 0x0F, bytes_BtM >> 4], dim=-1).to(torch.int8)
    return (((halves_BtM2 + 8) % 16) - 8).flatten(-2)


FORMATS: dict[str, Format] = {
    "float32": Floating(torch.float32),
    "bfloat16": Floating(torch.bfloat16),
    "float16": Floating(torch.float16),
    "int8": Integers(8),
    "int4": Integers(4),
}


def cache_format(name: str) -> Format:
    """Raises ValueError, which names the known formats."""
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no number format of a cache: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
