"""Every number format of a cache gives back what it was given, to within half a step, and takes the bytes it says."""

import pytest
import torch

from asrlib.attention.formats import FORMATS, _packed, _unpacked, cache_format

WIDTHS = [1, 2, 5, 8, 33]
STEPS = {"int8": 127, "int4": 7}  # from zero to the largest number of a frame
PRECISION = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a number, relative: half of its last bit


def frames(width: int, dtype: torch.dtype = torch.float32, count: int = 6) -> torch.Tensor:
    """[2, t, N], each frame of a size of its own."""
    x_BtN = torch.randn(2, count, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return (x_BtN * 10.0 ** torch.arange(-1, count - 1)[:, None]).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PRECISION)
def test_a_float_is_off_by_half_of_its_last_bit(name, width):
    x_BtN = frames(width)
    held_as = cache_format(name)
    error_BtN = (held_as.restore(held_as.store(x_BtN), width, torch.float32) - x_BtN).abs()
    assert (error_BtN <= PRECISION[name] * x_BtN.abs()).all()
    assert name == "float32" or width == 1 or error_BtN.any()
    assert torch.equal(held_as.rounded(x_BtN), held_as.restore(held_as.store(x_BtN), width, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STEPS)
def test_an_integer_is_off_by_half_a_step(name, width, dtype):
    x_BtN = frames(width, dtype)
    step_Bt1 = x_BtN.abs().amax(-1, keepdim=True) / STEPS[name]
    held_as = cache_format(name)
    rounded_BtN = held_as.rounded(x_BtN)
    assert rounded_BtN.dtype == dtype and rounded_BtN.shape == x_BtN.shape
    assert ((rounded_BtN - x_BtN).abs() <= step_Bt1 * (0.5 + 2.0**-11 * STEPS[name])).all()  # the scale is rounded too
    for frame in range(x_BtN.shape[1]):  # and by no neighbour
        assert torch.equal(held_as.rounded(x_BtN[:1, frame : frame + 1]), rounded_BtN[:1, frame : frame + 1])


@pytest.mark.parametrize("name", STEPS)
def test_whole_steps_are_exact_up_to_both_ends(name):
    most = STEPS[name]
    x_1tN = torch.arange(-most, most + 1.0)[None, None] * 0.25
    assert torch.equal(cache_format(name).rounded(x_1tN), x_1tN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_models_of_half_precision_can_be_held_in_any_format(name, dtype):
    x_BtN = frames(8, torch.float32, count=3).to(dtype)
    rounded_BtN = cache_format(name).rounded(x_BtN)
    assert rounded_BtN.dtype == dtype and torch.isfinite(rounded_BtN).all()
    step_Bt1 = x_BtN.float().abs().amax(-1, keepdim=True) / STEPS.get(name, 127)
    assert ((rounded_BtN - x_BtN).float().abs() <= 0.6 * step_Bt1 + 2.0**-7 * x_BtN.float().abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero_and_no_size_is_no_number(name, dtype):
    held_as = cache_format(name)
    assert not held_as.rounded(torch.zeros(1, 3, 5, dtype=dtype)).any()
    for size in (1e-30, 1e-8, 1e-3, 1.0, 6e4):
        x_11N = size * torch.tensor([[[1.0, -0.5, 0.0, 0.25]]], dtype=dtype)
        rounded_11N = held_as.rounded(x_11N)
        assert torch.isfinite(rounded_11N).all() and rounded_11N[0, 0, 2] == 0
        half_a_step = 0.5 * max(size / STEPS.get(name, 127), 2.0**-24)
        assert ((rounded_11N - x_11N).abs() <= half_a_step + 2.0**-8 * x_11N.abs()).all(), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_cannot_hold_is_its_largest_number(name, dtype):
    """And not infinite, with which no later frame would be a number."""
    x_11N = torch.tensor([[[1e30, -1e30, 0.0]]], dtype=dtype)
    rounded_11N = cache_format(name).rounded(x_11N)
    assert torch.isfinite(rounded_11N).all()
    assert rounded_11N[0, 0, 0] > 6e4 and rounded_11N[0, 0, 1] == -rounded_11N[0, 0, 0] and rounded_11N[0, 0, 2] == 0


@pytest.mark.parametrize("width", [*range(1, 18), 33])
def test_every_half_byte_comes_back_from_either_half(width):
    values = torch.arange(-8, 8, dtype=torch.int8)
    for shift in range(16):
        steps_1tN = values.roll(shift).repeat(5)[: 2 * width].view(1, 2, width)
        bytes_1tM = _packed(steps_1tN)
        assert bytes_1tM.dtype == torch.uint8 and bytes_1tM.shape == (1, 2, (width + 1) // 2)
        unpacked_1tN = _unpacked(bytes_1tM)[..., :width]
        assert unpacked_1tN.dtype == torch.int8 and torch.equal(unpacked_1tN, steps_1tN)
    assert _packed(torch.tensor([[[1, -1]]], dtype=torch.int8)).item() == 0xF1  # the first in the low half


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_what_is_stored(name, width, count):
    held_as = cache_format(name)
    stored = held_as.store(frames(width)[:, :1].expand(2, count, width))
    assert all(tensor.shape[:2] == (2, count) for tensor in stored)  # frames can be cut off, and joined
    assert sum(tensor.nbytes for tensor in stored) == 2 * count * held_as.frame_bytes(width)
    assert held_as.restore(stored, width, torch.float32).shape == (2, count, width)


def test_bytes_of_a_frame_of_five():
    assert {name: held_as.frame_bytes(5) for name, held_as in FORMATS.items()} == dict(
        float32=20, bfloat16=10, float16=10, int8=5 + 2, int4=3 + 2
    )


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_stored_one_by_one(name):
    """What is stored in two parts is what is stored at once."""
    x_BtN = frames(7)
    held_as = cache_format(name)
    parts = zip(held_as.store(x_BtN[:, :2]), held_as.store(x_BtN[:, 2:]), strict=True)
    for joined, whole in zip((torch.cat(pair, dim=1) for pair in parts), held_as.store(x_BtN), strict=True):
        assert torch.equal(joined, whole)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'int3' is no number format of a cache: choose one of float32, bfloat16, flo"):
        cache_format("int3")
