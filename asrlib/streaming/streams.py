"""Recognition of speech as it comes in, chunk by chunk, with a real cache of the past.

    python -m asrlib stream FILE.wav --model PATH --chunk 320
    python -m asrlib stream FILE.wav --model synthetic-conformer --chunk 640 --lookahead 640

A chunk of frames attends to itself, to some frames before it and, if wished, to some after it; convolutions read the
same frames. Tensors hold what layers need of earlier chunks (`streaming.memory`). The result equals that of a full pass
under the same restriction, `chunked_pass`.

Shapes: B streams, S samples, n frames of a step, T frames, D width, V tokens, K chunks.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from asrlib.attention.cache import kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import cache_format
from asrlib.data.audio import SAMPLE_RATE, UnusableAudio, read_pieces
from asrlib.models.loading import check_loaded, load
from asrlib.models.registry import attention_modules, family_of, frame_counts, frames_of, frames_per_second
from asrlib.streaming.memory import LayerMemory, SideBySide, StreamMemory
from asrlib.streaming.normalising import RunningNormaliser

CHUNK_MS = 320.0
LEFT_SECONDS = 10.0


def chunks_of(
    config, chunk_ms: float = CHUNK_MS, left_seconds: float | None = LEFT_SECONDS, lookahead_ms: float = 0.0
) -> Chunks:
    """The chunks in encoder frames; a chunk has at least one. `left_seconds` None means everything so far.

    Raises ValueError for an impossible time.
    """
    if not 0 < chunk_ms < math.inf:
        raise ValueError(f"chunk_ms is {chunk_ms}: it must be greater than 0")
    if left_seconds is not None and not left_seconds >= 0:
        raise ValueError(f"left_seconds is {left_seconds}: give 0 or more, or inf for everything")
    if not 0 <= lookahead_ms < math.inf:
        raise ValueError(f"lookahead_ms is {lookahead_ms}: it must be 0 or more")
    rate = frames_per_second(config)
    left = None if left_seconds in (None, math.inf) else round(left_seconds * rate)
    return Chunks(max(1, round(chunk_ms / 1000 * rate)), left, round(lookahead_ms / 1000 * rate))


# ---- layers ------------------------------------------------------------------------------------------------


def prepared(model: nn.Module) -> nn.Module:
    """`model` itself, working in blocks. Raises ValueError where it cannot stream, or is in training mode."""
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before it streams")
    family = family_of(model.config)
    family.check_streaming(model.config)
    return family.work_in_blocks(model)


def through_layers(model: nn.Module, x_BnD: torch.Tensor, kept_Bn: torch.Tensor, memories: list[LayerMemory]):
    """The last layer's output [B, n, D]. The past comes from `memories`, which keep the new frames."""
    layers = family_of(model.config).layers(model)
    for layer, attention, memory in zip(layers, attention_modules(model), memories, strict=True):
        with _remembering(layer, attention, memory, kept_Bn):
            x_BnD = layer(x_BnD, attention_mask=kept_Bn)
    return x_BnD


@contextmanager
def _remembering(layer: nn.Module, attention: nn.Module, memory: LayerMemory, kept_Bn: torch.Tensor) -> Iterator[None]:
    """Makes attention and convolutions of `layer` continue from `memory`: they know nothing of streams."""

    def recall(module, args, kwargs):
        return args, {**kwargs, "past": memory}

    def hear_more(convolution, inputs):
        x_BCn, *others = inputs
        x_BCn = x_BCn.masked_fill(~kept_Bn[:, None], 0)
        earlier_BCr = memory.before(convolution, x_BCn, _reach(convolution))
        masks = [nn.functional.pad(mask, (earlier_BCr.shape[2], 0), value=True) for mask in others]
        return torch.cat([earlier_BCr, x_BCn], dim=2), *masks

    def drop_earlier(convolution, inputs, output):
        return output[..., _reach(convolution) :]

    convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1]
    handles = [attention.register_forward_pre_hook(recall, with_kwargs=True)]
    for convolution in convolutions:
        handles.append(convolution.register_forward_pre_hook(hear_more))
        handles.append(convolution.register_forward_hook(drop_earlier))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reach(convolution: nn.Conv1d) -> int:
    return getattr(convolution, "reach", convolution.kernel_size[0] // 2)


class Streams:
    """Streams that begin together and advance in steps: `step` takes frames and returns logits.

    transformers' attention modules in `model` become ours, with the same parameters. A model serves any number of
    streams, but one thread at a time. `cache` is the format of what attention keeps (`attention.formats`). Raises
    ValueError where the model cannot stream, or is in training mode.
    """

    def __init__(self, model: nn.Module, chunks: Chunks, cache: str = "float32"):
        self.model, self.chunks, self.cache = prepared(model), chunks, cache
        self.memories = [StreamMemory(chunks, cache_format(cache)) for _ in attention_modules(model)]
        self.frames = 0

    @torch.no_grad()
    def step(self, x_BnD: torch.Tensor, kept_Bn: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, c, V] of the chunk at the start of `x_BnD`: c = `chunks.size` frames, or fewer at the end.

        The frames after the chunk are its lookahead, and come again with the next chunk. `kept_Bn` says which frames
        are speech: a stream that has ended has none.
        """
        central = min(self.chunks.size, x_BnD.shape[1])
        for memory in self.memories:
            memory.central, memory.kept_Bn = central, kept_Bn
        if kept_Bn is None:
            kept_Bn = x_BnD.new_ones(x_BnD.shape[:2], dtype=torch.bool)
        x_BnD = through_layers(self.model, x_BnD, kept_Bn, self.memories)
        self.frames += central
        return family_of(self.model.config).logits(self.model, x_BnD[:, :central])

    @property
    def held_frames(self) -> int:
        return self.frames if self.chunks.left is None else min(self.frames, self.chunks.left)

    @property
    def attention_bytes(self) -> list[int]:
        """Bytes that each layer's attention holds, counted from the tensors, all streams together."""
        return [memory.attention_bytes for memory in self.memories]

    @property
    def reserved_bytes(self) -> list[int]:
        """Bytes of memory of each layer's cache, spare room included."""
        return [memory.reserved_bytes for memory in self.memories]

    @property
    def position_bytes(self) -> int:
        """Bytes of the projected positions, which all streams of a model share."""
        return sum(getattr(attention, "position_bytes", 0) for attention in attention_modules(self.model))

    @property
    def convolution_bytes(self) -> list[int]:
        return [memory.convolution_bytes for memory in self.memories]

    @property
    def formula_bytes(self) -> int:
        """Bytes that attention should hold for one stream, by formula."""
        return kv_cache_bytes(self.model.config, self.held_frames, self.cache) if self.frames else 0


@torch.no_grad()
def chunked_pass(
    model: nn.Module,
    inputs: torch.Tensor,
    chunks: Chunks,
    attention_mask: torch.Tensor | None = None,
    cache: str = "float32",
) -> torch.Tensor:
    """Logits [B, T, V] of a full pass in which each frame attends to the same frames as in a stream.

    `inputs` and `attention_mask` are those of the model. All chunks are computed side by side, so memory grows with
    T·(1 + left / size). Raises ValueError as `Streams` does.
    """
    family = family_of(prepared(model).config)
    x_BTD = family.frames(model, inputs)
    frames = x_BTD.shape[1]
    lengths_B = torch.full((len(inputs),), inputs.shape[1]) if attention_mask is None else attention_mask.sum(-1)
    frames_B = frame_counts(model, lengths_B.to(x_BTD.device))
    count = -(-frames // chunks.size)
    x_BTD = x_BTD.masked_fill(torch.arange(frames, device=x_BTD.device)[:, None] >= frames_B[:, None, None], 0)
    padded_BTD = nn.functional.pad(x_BTD, (0, 0, 0, count * chunks.size + chunks.lookahead - frames))
    place_T = torch.arange(padded_BTD.shape[1], device=x_BTD.device)
    x_RnD = padded_BTD.unfold(1, chunks.block, chunks.size).flatten(0, 1).transpose(1, 2)
    kept_Rn = (place_T < frames_B[:, None]).unfold(1, chunks.block, chunks.size).flatten(0, 1)
    memories = [SideBySide(chunks, cache_format(cache), count) for _ in attention_modules(model)]
    for memory in memories:
        memory.kept_Bn = kept_Rn
    central_RnD = through_layers(model, x_RnD, kept_Rn, memories)[:, : chunks.size]
    return family.logits(model, central_RnD.unflatten(0, (-1, count)).flatten(1, 2)[:, :frames])


# ---- audio -------------------------------------------------------------------------------------------------


class AudioFrames:
    """Pieces of 16 kHz audio, of any length → the layers' input frames, as soon as all their samples are there."""

    def __init__(self, model: nn.Module, processor):
        extractor = processor.feature_extractor
        self.model, self.extractor, self.frames_of = model, extractor, frames_of(model)
        normalises = getattr(extractor, "do_normalize", False)
        self.normalise = RunningNormaliser() if normalises else lambda samples_S: samples_S
        self.waiting_S = np.zeros(0, np.float32)  # samples from the first of the next frame on

    @torch.no_grad()
    def add(self, samples_S: np.ndarray) -> torch.Tensor:
        """The new frames [1, T, D], T ≥ 0. Raises UnusableAudio unless the samples are float [S] and finite."""
        samples_S = np.asarray(samples_S)
        if samples_S.ndim != 1 or samples_S.dtype.kind != "f":
            raise UnusableAudio(
                f"a piece of audio is {samples_S.dtype} {list(samples_S.shape)}: give floats from −1 to 1, [samples], "
                f"mono, {SAMPLE_RATE} a second"
            )
        if not np.isfinite(samples_S).all():
            raise UnusableAudio("a piece of audio holds NaN or infinite samples")
        self.waiting_S = np.concatenate([self.waiting_S, self.normalise(samples_S)])
        frames = self.frames_of(len(self.waiting_S))
        config, like = self.model.config, next(self.model.parameters())
        if not frames:
            return like.new_zeros(1, 0, config.hidden_size)
        if self.model.main_input_name == "input_values":
            inputs = torch.from_numpy(self.waiting_S)[None]
        else:
            features = self.extractor(self.waiting_S, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            inputs = features[self.model.main_input_name]
        x_1TD = family_of(config).frames(self.model, inputs.to(like.device, like.dtype))
        self.waiting_S = self.waiting_S[frames * config.inputs_to_logits_ratio :].copy()  # not a view of the whole
        return x_1TD[:, :frames]


class Transcript:
    """Greedy CTC as symbols come in; finished words are not decoded again."""

    def __init__(self, processor):
        self.tokenizer = processor.tokenizer
        self.delimiter = self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, "word_delimiter_token", "|"))
        self.words, self.tail, self.last = "", [], None

    def add(self, symbols: Iterable[int]) -> str:
        """The text so far."""
        for symbol in symbols:
            if symbol != self.last and symbol != self.tokenizer.pad_token_id:
                self.tail.append(symbol)
            self.last = symbol
            if symbol == self.delimiter and self.tail:
                self.words, self.tail = self._text(), []
        return self._text()

    def _text(self) -> str:
        return " ".join(filter(None, [self.words, self.tokenizer.decode(self.tail, group_tokens=False).strip()]))


class Recognition:
    """The recognition of one recording: call `hear` with each piece, then `finish`; `text` is the transcript so far."""

    def __init__(self, model: nn.Module, processor, chunks: Chunks, cache: str = "float32"):
        self.streams = Streams(model, chunks, cache)
        self.audio, self.transcript = AudioFrames(model, processor), Transcript(processor)
        self.waiting_1TD: torch.Tensor | None = None
        self.text = ""

    def hear(self, samples_S: np.ndarray) -> Iterator[str]:
        """Recognises each chunk that `samples_S` completes, and yields the text so far after it."""
        new_1TD = self.audio.add(samples_S)
        self.waiting_1TD = new_1TD if self.waiting_1TD is None else torch.cat([self.waiting_1TD, new_1TD], dim=1)
        while self.waiting_1TD.shape[1] >= self.streams.chunks.block:
            yield self._step()

    def finish(self) -> Iterator[str]:
        while self.waiting_1TD is not None and self.waiting_1TD.shape[1]:
            yield self._step()

    def _step(self) -> str:
        chunks = self.streams.chunks
        logits_1cV = self.streams.step(self.waiting_1TD[:, : chunks.block])
        self.waiting_1TD = self.waiting_1TD[:, chunks.size :]
        self.text = self.transcript.add(logits_1cV[0].argmax(-1).tolist())
        return self.text


def stream(
    model: nn.Module,
    processor,
    audio_chunks: Iterable[np.ndarray],
    chunk_ms: float = CHUNK_MS,
    left_seconds: float | None = LEFT_SECONDS,
    lookahead_ms: float = 0.0,
    cache: str = "float32",
) -> Iterator[str]:
    """Yields the transcript so far after every chunk.

    `audio_chunks` are pieces of 16 kHz mono audio of any length, float32 [S]. The model hears them in chunks of
    `chunk_ms`, each with `left_seconds` before it (None: everything) and `lookahead_ms` after it. `cache` is the number
    format of what attention keeps. Memory does not grow with the recording, unless `left_seconds` is None.
    Raises ValueError where the model cannot stream, UnusableAudio where a piece is not such audio.
    """
    check_loaded(model, processor)
    if isinstance(audio_chunks, str | PathLike):
        name = str(audio_chunks)
        raise TypeError(
            f"pieces of audio are wanted, not {name!r}: asrlib.data.audio.read_pieces reads them from files"
        )
    recognition = Recognition(model, processor, chunks_of(model.config, chunk_ms, left_seconds, lookahead_ms), cache)
    for samples_S in audio_chunks:
        yield from recognition.hear(samples_S)
    yield from recognition.finish()


def what_is_kept(model: nn.Module, processor, samples_S: np.ndarray, chunk_ms: float = 1000.0) -> dict:
    """{frames, bytes, formula_bytes, convolution_bytes, tensors} of a stream that keeps all of `samples_S`.

    `bytes` counts all layers' attention, `tensors` are the shapes in the first layer, and `formula_bytes` is the
    result of `kv_cache_bytes`.
    """
    recognition = Recognition(model, processor, chunks_of(model.config, chunk_ms, left_seconds=None))
    for _ in [*recognition.hear(samples_S), *recognition.finish()]:
        pass
    streams = recognition.streams
    return {
        "frames": streams.frames,
        "bytes": sum(streams.attention_bytes),
        "formula_bytes": streams.formula_bytes,
        "convolution_bytes": sum(streams.convolution_bytes),
        "tensors": [list(tensor.shape) for tensor in streams.memories[0].tensors],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asrlib stream", description="Recognises a recording in chunks.")
    parser.add_argument("file", metavar="FILE.wav", type=Path)
    parser.add_argument("--model", required=True, help="a folder, a hub id or a shipped model's name")
    parser.add_argument("--chunk", type=float, default=CHUNK_MS, metavar="MS")
    parser.add_argument("--left", type=float, default=LEFT_SECONDS, metavar="SECONDS", help="left context; inf: all")
    parser.add_argument("--lookahead", type=float, default=0.0, metavar="MS")
    parser.add_argument("--cache", default="float32", help="float32, bfloat16, float16, int8 or int4")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        raise FileNotFoundError(f"{args.file} is no file: give a recording")
    model, processor = load(args.model)
    chunks = chunks_of(model.config, args.chunk, args.left, args.lookahead)
    if not (chunks.lookahead or getattr(model.config, "causal", False)):
        sys.stderr.write("this model was not trained for streams: with --lookahead 640 it makes fewer errors\n")
    recognition = Recognition(model, processor, chunks, args.cache)
    heard, took, length, started = 0, [0.0], 0, perf_counter()
    try:
        for piece in read_pieces(partial(open, args.file, "rb"), args.chunk / 1000):
            heard, began = heard + len(piece), perf_counter()
            for text in recognition.hear(piece):
                length = _show(text, length)
            took.append(perf_counter() - began)
    except UnusableAudio as error:
        raise UnusableAudio(f"{args.file}: {error}") from error
    for text in recognition.finish():
        length = _show(text, length)
    seconds = perf_counter() - started
    sys.stdout.write(f"\n\n{_account(recognition.streams, heard / SAMPLE_RATE, seconds, max(took))}\n")
    return 0


def _show(text: str, length: int) -> int:
    """Writes `text` beyond its first `length` characters, and returns its new length."""
    sys.stdout.write(text[length:])
    sys.stdout.flush()
    return len(text)


def _account(streams: Streams, heard: float, seconds: float, slowest: float) -> str:
    chunks, held = streams.chunks, sum(streams.attention_bytes)
    standard = family_of(streams.model.config).to_standard(streams.model.config)
    times = kv_cache_bytes(standard, streams.held_frames) / held if held else 1.0
    rate = frames_per_second(streams.model.config)
    agrees = "as by the formula" if held == streams.formula_bytes else f"by the formula {streams.formula_bytes}"
    return (
        f"{heard:.1f} s of audio in {seconds:.1f} s, the slowest chunk {1000 * slowest:.0f} ms\n"
        f"chunks of {1000 * chunks.size / rate:.0f} ms, {1000 * chunks.lookahead / rate:.0f} ms ahead\n"
        f"cache of attention: {held} bytes ({agrees}) for {streams.held_frames} frames, "
        f"{streams.held_frames / rate:.1f} s, in {streams.cache}: 1/{times:.1f} of multi-head attention's in float32\n"
        f"cache of convolutions: {sum(streams.convolution_bytes)} bytes\n"
        f"projected positions, once for all streams: {streams.position_bytes} bytes"
    )
