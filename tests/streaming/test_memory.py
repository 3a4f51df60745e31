"""What a stream holds is what the formula says, to the byte, and no more after an hour than after a minute."""

import pytest
import tiny
import torch
from torch import nn

from asrlib import kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import FORMATS, cache_format
from asrlib.attention.relative import sinusoids
from asrlib.models.registry import attention_modules, family_of
from asrlib.streaming.memory import SideBySide, StreamMemory, Window
from asrlib.streaming.streams import Streams

VARIANTS = tiny.variants()
MODELS = {name: lambda changes=changes: tiny.encoder(**changes) for name, changes in VARIANTS.items()} | {
    "branchformer": lambda: tiny.encoder("branchformer", causal=True),
    "wav2vec2": tiny.conformer,
    "wav2vec2 joint": lambda: tiny.latent_conformer("joint"),
    "wav2vec2 split": lambda: tiny.latent_conformer("split"),
}
FRAME_NUMBERS = {  # that the layers keep of a frame
    "mha": [[16, 16]] * 2, "mla": [[5], [8]], "mla split": [[4, 5], [5, 1]], "mla_simple": [[5], [8]],
    "mla_simple split": [[4, 5], [5, 1]], "gqa": [[8, 8]] * 2, "linear": [[]] * 2, "branchformer": [[16, 16]] * 2,
    "wav2vec2": [[16, 16]] * 2, "wav2vec2 joint": [[11], [7]], "wav2vec2 split": [[9, 9], [4, 5]],
}  # fmt: skip
LINEAR_SUMS = 4 * 4 * 5  # H·d_h·(d_h + 1), float32


def frames(model, count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """What the layers of `model` read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, model.config.hidden_size, generator=generator)


def held_tensors(streams: Streams) -> list[torch.Tensor]:
    """Every tensor that streams refer to, wherever."""
    found, waiting = [], [streams.memories]
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, StreamMemory | Window):
            waiting += vars(one).values()
    return found


# ---- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_formula(name, cache):
    model = MODELS[name]()
    for chunks, batch in ((Chunks(3, 7, 2), 1), (Chunks(2, None), 3), (Chunks(4, 0), 2), (Chunks(5, 4, 1), 2)):
        streams = Streams(model, chunks, cache)
        assert streams.attention_bytes == [0, 0] and streams.formula_bytes == 0
        for step in range(1, 6):
            streams.step(frames(model, chunks.block, batch, seed=step))
            seen = step * chunks.size
            held = seen if chunks.left is None else min(seen, chunks.left)
            assert streams.held_frames == held
            expected = [held * sum(cache_format(cache).frame_bytes(n) for n in layer) for layer in FRAME_NUMBERS[name]]
            if name == "linear":
                expected = [4 * LINEAR_SUMS] * 2
            assert streams.attention_bytes == [batch * one for one in expected]
            assert streams.formula_bytes == kv_cache_bytes(model.config, held, cache) == sum(expected)


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize("name", ["mha", "mla split", "linear", "wav2vec2 joint"])
def test_nothing_else_is_held_of_a_stream(name, cache):
    """But the room for new frames."""
    model, chunks = MODELS[name](), Chunks(3, 70, 2)
    streams = Streams(model, chunks, cache)
    for step in range(60):
        streams.step(frames(model, chunks.block, batch=2, seed=step))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held_tensors(streams)
    }
    reserved, held = sum(streams.reserved_bytes), sum(streams.attention_bytes)
    assert sum(storages.values()) == reserved + sum(streams.convolution_bytes)
    if name == "linear":
        assert reserved == held
    else:
        assert held < reserved <= held * (70 + 5) * 9 / 8 / 70


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: tiny.encoder(), 16 * 2),  # width · (kernel − 1) / 2
        (lambda: tiny.encoder(causal=True), 16 * 4),
        (lambda: tiny.encoder("branchformer"), 24 * 2),
        (lambda: tiny.encoder("branchformer", causal=True), 24 * 4),
        (lambda: tiny.encoder(conv_depthwise_kernel_size=1), 0),
        (tiny.conformer, 16 * 3),
    ],
)
def test_convolutions_hold_the_frames_that_they_reach(make, numbers):
    model = make()
    streams = Streams(model, Chunks(1, 2, 1), "int8")
    for step in range(6):
        streams.step(frames(model, 2, batch=3, seed=step))
        assert streams.convolution_bytes == [3 * 4 * numbers] * 2  # float32, whatever the format of the cache


@pytest.mark.parametrize("most", [None, 0, 1, 5, 40])
@pytest.mark.parametrize(("new", "kept"), [(1, 1), (4, 4), (7, 3), (30, 20)])
def test_a_window_holds_the_last_frames_and_moves_them_seldom(most, new, kept):
    x_BTN = torch.randn(2, 600, 3, generator=torch.Generator().manual_seed(0))
    window, copied, moves = Window(most, x_BTN), 0, 0
    for first in range(0, 570, kept):
        before = 0 if most is None else max(0, first - most)
        assert torch.equal(window.kept_BtX, x_BTN[:, before:first])
        room_BrX = window.room_BrX
        both_BTN = window.add(x_BTN[:, first : first + new], kept)
        assert torch.equal(both_BTN, x_BTN[:, before : first + new])
        assert window.room_BrX.shape[1] <= both_BTN.shape[1] * 9 // 8 or window.room_BrX is room_BrX
        if window.room_BrX is not room_BrX:
            copied, moves = copied + first - before, moves + 1
    assert moves and copied <= 8 * 570 * new / kept


def test_streams_of_a_model_share_one_table_of_positions():
    model, chunks = tiny.conformer(), Chunks(3, 7, 2)
    streams = [Streams(model, chunks), Streams(model, Chunks(2, 4)), Streams(model, chunks, "int8")]
    attention, sizes = attention_modules(model)[1], []
    for _ in range(4):
        for one in streams:
            one.step(frames(model, one.chunks.block))
            table_HPE = attention._distances[-1]
            sizes.append(table_HPE.shape[1])
            assert attention_modules(model)[1]._distances[-1] is table_HPE
    assert sizes == sorted(sizes) and sizes[-1] == 7 + 5 + 4  # as many as any of them can need, but not before
    assert sizes[0] < 12 and streams[0].position_bytes == 2 * 16 * 16 * 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["mha", "mla", "wav2vec2", "wav2vec2 split"])
def test_the_table_of_positions_is_what_projection_gives(name):
    model = MODELS[name]()
    attention = attention_modules(family_of(model.config).work_in_blocks(model))[0]
    width = attention.linear_pos.in_features
    for frames_, ahead, most in ((4, 0, 0), (9, 2, 12), (12, 2, 12), (13, 1, 12), (5, 6, 0), (40, 3, 0)):
        exact_1PD = sinusoids(frames_, width, dtype=torch.float32, ahead=ahead)
        expected_HPE = attention.heads(attention.linear_pos(exact_1PD))[0]
        got_HPE = attention.distances(frames_, ahead, most)[:, : expected_HPE.shape[1]]
        torch.testing.assert_close(got_HPE, expected_HPE, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.distances(4, 0).dtype == torch.bfloat16
    assert attention.distances(4, 0).dtype == torch.float32
    attention.linear_pos.weight.mul_(2)
    torch.testing.assert_close(attention.distances(40, 3)[:, : got_HPE.shape[1]], 2 * got_HPE)


def test_half_precision_is_the_models_own_where_it_is_asked_for():
    model = tiny.encoder().bfloat16()
    streams = Streams(model, Chunks(3, 7), "bfloat16")
    for step in range(4):
        streams.step(frames(model, 3, seed=step).bfloat16())
    assert sum(streams.attention_bytes) == streams.formula_bytes == 2 * 7 * 32 * 2


# ---- memories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize("left", [None, 0, 2, 7])
def test_frames_come_back_oldest_first_with_the_new_ones_behind(left, cache):
    """And what is heard ahead is not kept."""
    chunks = Chunks(3, left, 2)
    x_BTN = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    held_as = cache_format(cache)
    memory = StreamMemory(chunks, held_as)
    for first in range(0, 18, 3):
        new = x_BTN[:, first : first + 5]
        memory.kept_Bn = torch.tensor([[True] * 5, [True, False] * 2 + [False]])[:, : new.shape[1]]
        (both_BTN, twice_BTN), kept_BT = memory.frames((new, 2 * new))
        past = x_BTN[:, 0 if left is None else max(0, first - left) : first]
        expected_BTN = torch.cat([held_as.rounded(past), new], dim=1)
        assert torch.equal(both_BTN, expected_BTN) and torch.equal(twice_BTN[:, past.shape[1] :], 2 * new)
        assert kept_BT[:, : past.shape[1]].all() and torch.equal(kept_BT[:, past.shape[1] :], memory.kept_Bn)


def rows(x_BTN: torch.Tensor, chunks: Chunks, count: int) -> torch.Tensor:
    """Every chunk and its lookahead as a row, with zeros behind the end."""
    long = torch.cat(
        [x_BTN, x_BTN.new_zeros(len(x_BTN), count * chunks.size + chunks.lookahead - x_BTN.shape[1], 3)], 1
    )
    return torch.stack([long[b, k * chunks.size :][: chunks.block] for b in range(len(x_BTN)) for k in range(count)])


@pytest.mark.parametrize(
    "chunks", [Chunks(3, 4, 2), Chunks(2), Chunks(4, 0, 1), Chunks(1, 3), Chunks(20, 5, 3)], ids=str
)
def test_side_by_side_and_in_turn_the_past_is_the_same(chunks):
    frames, count = 11, -(-11 // chunks.size)
    x_BTN = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(0))
    rows_RnN = rows(x_BTN, chunks, count)
    convolution = nn.Conv1d(3, 3, 5)
    sums = torch.randn(2 * count, 2, 2, generator=torch.Generator().manual_seed(1))
    held_as = cache_format("int8")
    aside = SideBySide(chunks, held_as, count)
    aside.kept_Bn = torch.ones(rows_RnN.shape[:2], dtype=torch.bool)
    (all_RTN,), kept_RT = aside.frames((rows_RnN,))
    before_RCr = aside.before(convolution, rows_RnN.transpose(1, 2), 2)
    (sums_before,) = aside.sums((sums,))
    for stream in range(2):
        memory = StreamMemory(chunks, held_as)
        for chunk in range(count):
            row = stream * count + chunk
            new_1nN = rows_RnN[row, None]
            (both_1TN,), _ = memory.frames((new_1nN,))
            torch.testing.assert_close(all_RTN[row][kept_RT[row]], both_1TN[0], rtol=0, atol=0)
            assert torch.equal(before_RCr[row], memory.before(convolution, new_1nN.transpose(1, 2), 2)[0])
            (total,) = memory.sums((sums[row, None],))
            torch.testing.assert_close(sums_before[row], total[0])


# ---- hours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "minutes", "ms_a_frame", "size", "left"), [("mla_simple", 60, 40, 50, 60), ("wav2vec2", 5, 20, 100, 40)]
)
def test_an_hour_takes_no_more_than_a_minute(name, minutes, ms_a_frame, size, left):
    """And is heard as it would be by a stream that began where the last chunk's hearing ends."""
    model, chunks = MODELS[name](), Chunks(size, left)
    streams, filled = Streams(model, chunks), None
    recording_1TD = frames(model, 7 * size + 3)  # over and over, so that chunks are not soon alike
    count = minutes * 60_000 // ms_a_frame // size
    taken = [torch.arange(step * size, (step + 1) * size) % recording_1TD.shape[1] for step in range(count)]
    for here in taken:
        logits_1cV = streams.step(recording_1TD[:, here])
        everything = sum(tensor.nbytes for tensor in streams.memories[0].tensors) + sum(streams.convolution_bytes)
        if streams.frames >= left:
            filled = filled or everything
            assert everything == filled
            assert sum(streams.reserved_bytes) <= sum(streams.attention_bytes) * (left + size) * 9 / 8 / left
    assert streams.frames == minutes * 60_000 // ms_a_frame and streams.held_frames == left
    assert sum(streams.attention_bytes) == streams.formula_bytes == kv_cache_bytes(model.config, left)
    first = 0  # of the frames that matter, counted from the last chunk
    for reach in [3, left] * tiny.LAYERS:  # of convolution and attention, which hear from the start of a chunk on
        first = (first - reach) // size * size
    fresh, late = Streams(model, chunks), Streams(model, chunks)
    for here in taken[first // size - 1 :]:
        again_1cV = fresh.step(recording_1TD[:, here])
    torch.testing.assert_close(logits_1cV, again_1cV, rtol=0, atol=2e-5)
    for here in taken[-2:]:
        again_1cV = late.step(recording_1TD[:, here])
    assert (logits_1cV - again_1cV).abs().max() > 1e-3  # it does hear what was before


def test_five_minutes_of_sums_take_no_more_than_a_chunk():
    model, sizes = tiny.encoder(attention="linear"), set()
    streams = Streams(model, Chunks(50, 250))
    for step in range(150):
        logits_1cV = streams.step(frames(model, 50, seed=step))
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in held_tensors(streams)))
    assert len(sizes) == 1 and torch.isfinite(logits_1cV).all()
    assert streams.attention_bytes == [4 * LINEAR_SUMS] * 2


def test_without_a_bound_the_cache_grows_by_every_frame():
    model = tiny.encoder()
    streams, held = Streams(model, Chunks(4, None)), []
    for step in range(40):
        streams.step(frames(model, 4, seed=step))
        held.append(sum(streams.attention_bytes))
    assert held == [4 * (step + 1) * 2 * 32 * 4 for step in range(40)]
