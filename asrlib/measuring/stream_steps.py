"""The cost of a stream: the bytes it keeps, the time for a chunk, and the number of streams a machine can follow.

    python -m asrlib steps --size published --chunk 160 640 --left 10 60 --out steps.csv

Times encoders of one size that differ in their attention alone, on ready frames: the front end is the same for all.
Time does not depend on weights or on the content of the audio, so weights are random and shared, and the past is noise.

Shapes: B streams, n frames of a chunk, t frames kept, D width, N numbers of a frame.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from asrlib.attention.cache import held_bytes, kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import cache_format
from asrlib.attention.kinds import KINDS, LinearAttention, absorbing_pays
from asrlib.attention.relative import sinusoids
from asrlib.measuring.random_models import ENCODER_SIZES, random_encoders, window_models
from asrlib.measuring.timing import measured_on, multiplications, peak_memory_bytes, quartiles, rounds_of
from asrlib.models.encoder import SpeechEncoderConfig
from asrlib.models.inference import choose_device, inference
from asrlib.models.registry import attention_modules, family_of, frames_per_second
from asrlib.streaming.memory import StreamMemory
from asrlib.streaming.streams import Streams, chunks_of

RECOMPUTED = "MHA, recomputed"  # without a cache: every chunk computes the whole past again


# ---- one chunk ---------------------------------------------------------------------------------------------


def filled(model: nn.Module, chunks: Chunks, cache: str = "float32", streams: int = 1) -> Streams:
    """Streams that have heard `chunks.left` frames of noise, all the same."""
    running = Streams(model, chunks, cache)
    like = next(model.parameters())
    for attention, memory in zip(attention_modules(model), running.memories, strict=True):
        with torch.no_grad():
            remembered = attention.remembered(like.new_zeros(1, 1, model.config.hidden_size))
        if isinstance(attention, LinearAttention):
            continue  # its sums do not grow
        memory.central, memory.kept_Bn = chunks.left, None
        widths = [kept_1tN.shape[2] for kept_1tN in remembered]
        noise = [torch.randn(1, chunks.left, width, device=like.device, dtype=like.dtype) for width in widths]
        memory.frames(tuple(x_1tN.expand(streams, -1, -1) for x_1tN in noise))
    running.frames = chunks.left
    return running


def recomputed(model: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
    """Logits of `x_BTD` as a whole: the work for each chunk where there is no cache."""
    kept_BT = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool)
    positions = sinusoids(x_BTD.shape[1], x_BTD.shape[2], x_BTD.device, x_BTD.dtype)
    family = family_of(model.config)
    for layer in family.layers(model):
        x_BTD = layer(x_BTD, attention_mask=kept_BT, relative_position_embeddings=positions)
    return family.logits(model, x_BTD)


def benchmark_steps(
    systems: dict[str, nn.Module],
    chunk_ms: Sequence[float],
    left_seconds: Sequence[float],
    repeats: int = 5,
    device: str | None = None,
    cache: str = "float32",
    streams: int = 1,
    recompute_seconds: float = 60.0,
    lookahead_ms: float = 0.0,
    precision: str = "fp32",
) -> pd.DataFrame:
    """One row per length of chunk, length of left context, and system. The systems take turns.

    Columns: chunk_ms and left_seconds (of whole frames), system, streams, cache, ms (median time of one step of all
    streams), ms_low and ms_high (the quartiles), rtfx (seconds of audio per second of computation, all streams),
    multiplications (of a step, counted by torch), cache_bytes and convolution_bytes (counted, of one stream),
    formula_bytes, reserved_bytes (with spare room), cache_bytes_per_second (of audio kept), position_bytes (of a model,
    for all its streams), peak_memory_bytes (of one step, without weights and cache). A step that moves the cache, one
    in `left` / 8 frames, takes up to one layer's cache more, and its time is not in the median.

    The first of `systems` is timed once more without a cache, as RECOMPUTED, up to `recompute_seconds` of left context.
    Chunks with the same number of frames are one setting. Each has a lookahead of `lookahead_ms`, which the next chunk
    computes again. `precision` is fp32, bf16 or fp16, by autocast.
    """
    if not systems or repeats < 1:
        raise ValueError("a benchmark needs at least one system and one repeat")
    first = next(iter(systems.values()))
    device = choose_device(device, first)
    rows = []
    pairs = [(chunk, left) for left in left_seconds for chunk in chunk_ms]
    if math.inf in left_seconds:
        raise ValueError("a benchmark needs left contexts that have an end")
    settings = list(dict.fromkeys(chunks_of(first.config, *pair, lookahead_ms) for pair in pairs))
    with inference(*systems.values(), device=device, precision=precision):
        for turn, chunks in enumerate(tqdm(settings, desc="chunks", unit="setting")):
            running = {name: filled(model, chunks, cache, streams) for name, model in systems.items()}
            x_BnD = torch.randn(streams, chunks.block, first.config.hidden_size, device=device)
            steps = {name: partial(of_system.step, x_BnD) for name, of_system in running.items()}
            if chunks.left <= recompute_seconds * frames_per_second(first.config):
                window_BTD = torch.randn(streams, chunks.left + chunks.block, x_BnD.shape[2], device=device)
                steps[RECOMPUTED] = partial(recomputed, first, window_BTD)
            rounds = rounds_of(steps, repeats, device, turn)
            for name, step in steps.items():
                rows.append(
                    {
                        **_row(running.get(name), chunks, first, streams, rounds[name]),
                        "system": name,
                        "streams": streams,
                        "cache": cache,
                        "peak_memory_bytes": peak_memory_bytes(step, device),
                        "multiplications": multiplications(step),
                    }
                )
            del running, steps
    table = pd.DataFrame(rows)
    table.attrs.update(measured_on(device, precision))
    return table


def _row(running: Streams | None, chunks: Chunks, model: nn.Module, streams: int, ms: pd.Series) -> dict:
    rate = frames_per_second(model.config)
    kept = sum(running.attention_bytes) // streams if running else 0
    return {
        "chunk_ms": 1000 * chunks.size / rate,
        "left_seconds": chunks.left / rate,
        "lookahead_ms": 1000 * chunks.lookahead / rate,
        **quartiles(ms),
        "rtfx": streams * 1000 * chunks.size / rate / float(ms.median()),
        "cache_bytes": kept,
        "formula_bytes": running.formula_bytes if running else 0,
        "reserved_bytes": sum(running.reserved_bytes) // streams if running else 0,
        "convolution_bytes": sum(running.convolution_bytes) // streams if running else 0,
        "cache_bytes_per_second": kept / (chunks.left / rate) if chunks.left else float("nan"),
        "position_bytes": running.position_bytes if running else 0,
    }


# ---- many streams ------------------------------------------------------------------------------------------


def streams_in_real_time(
    systems: dict[str, nn.Module],
    chunk_ms: float,
    left_seconds: float,
    memory_bytes: int,
    most: int = 1024,
    device: str | None = None,
    cache: str = "float32",
    precision: str = "fp32",
) -> pd.DataFrame:
    """How many streams a machine follows at once: one row per system.

    in_memory: the streams whose caches, spare room included, fit into `memory_bytes`. in_real_time: the largest number
    of streams, to a tenth, whose step takes no longer than the chunk, limited by `most` and by in_memory; ms is the
    time of that step.
    """
    settings = {"cache": cache, "recompute_seconds": -1.0, "precision": precision}
    rows = []
    for name, model in systems.items():
        follows, lags, in_memory, ms = 0, most + 1, most, float("nan")
        while lags - follows > max(1, follows // 10):
            count = min(2 * follows or 1, (follows + lags) // 2)
            table = benchmark_steps({name: model}, [chunk_ms], [left_seconds], 3, device, streams=count, **settings)
            row = table.iloc[0]
            in_memory = memory_bytes // max(1, int(row["reserved_bytes"] + row["convolution_bytes"]))
            if row["ms"] <= row["chunk_ms"] and count <= in_memory:
                follows, ms = count, row["ms"]
                lags = min(lags, in_memory + 1)
            else:
                lags = count
        rows.append({"system": name, "in_memory": in_memory, "in_real_time": follows, "ms": ms})
    return pd.DataFrame(rows)


# ---- absorbed or expanded ----------------------------------------------------------------------------------


def benchmark_forms(
    hidden_size: int,
    num_attention_heads: int,
    queries: Sequence[int] = (1, 4, 8, 16, 32, 64, 128),
    frames: Sequence[int] = (50, 500, 3000),
    repeats: int = 15,
    device: str | None = None,
    **others,
) -> pd.DataFrame:
    """Both forms of one latent layer, taking turns: one row per rank, number of kept frames, and number of queries.

    Columns: rank, frames, queries, expanded_ms, absorbed_ms (medians), multiplications (of the absorbed form, relative
    to the expanded one), chosen (by `absorbing_pays`), loss (extra time of the chosen form over the faster one, a
    fraction).
    """
    rows = []
    for rank in (hidden_size // 2, hidden_size // 4, hidden_size // 8):
        config = SpeechEncoderConfig(
            attention="mla_simple", hidden_size=hidden_size, num_attention_heads=num_attention_heads,
            num_hidden_layers=1, latent_dim=[rank],
        )  # fmt: skip
        attention = KINDS["mla_simple"](config, 0).eval()
        where = choose_device(device, attention)
        attention.to(where)
        for kept in frames:
            for count in queries:
                memory = StreamMemory(Chunks(count, kept), cache_format("float32"))
                memory.central = kept
                memory.frames((torch.randn(1, kept, rank, device=where),))
                memory.central = count
                rows.append(_forms_row(attention, memory, rank, repeats, where))
    return pd.DataFrame(rows)


@torch.no_grad()
def _forms_row(attention: nn.Module, memory: StreamMemory, rank: int, repeats: int, device: torch.device) -> dict:
    kept, count = memory.chunks.left, memory.chunks.size
    x_1nD = torch.randn(1, count, attention.config.hidden_size, device=device)

    def run(form: str) -> None:
        attention.form = form
        attention(x_1nD, past=memory)

    steps = {form: partial(run, form) for form in ("expanded", "absorbed")}
    ms = rounds_of(steps, repeats, device).median()
    heads, width, total = attention.num_heads, attention.config.hidden_size, kept + count
    absorbed, expanded = 2 * rank * count * (width + total * heads), total * width * 2 * (rank + count)
    chosen = absorbing_pays(count, total, heads, attention.head_size, (rank, rank))
    return {
        "rank": rank,
        "frames": kept,
        "queries": count,
        "expanded_ms": ms["expanded"],
        "absorbed_ms": ms["absorbed"],
        "multiplications": absorbed / expanded,
        "chosen": "absorbed" if chosen else "expanded",
        "loss": ms["absorbed" if chosen else "expanded"] / ms.min() - 1,
    }


# ---- the window of a Nemotron ------------------------------------------------------------------------------


def benchmark_windows(
    models: dict[str, PreTrainedModel],
    lookaheads: Sequence[int] = (0, 1, 6, 13),
    repeats: int = 15,
    device: str | None = None,
) -> pd.DataFrame:
    """One row per lookahead, in encoder frames, and model. The models take turns, and their windows are full.

    Columns: lookahead, chunk_ms, system, window_bytes (counted, of one stream), formula_bytes, reserved_bytes (of the
    whole tensors, of which the window is a part), millions (of multiplications of one chunk in the first layer), ms
    (its median time), ratio (of ms to that of the first model in the same round, median).
    """
    device = choose_device(device, next(iter(models.values())))
    rows = []
    with inference(*models.values(), device=device):
        for turn, ahead in enumerate(lookaheads):
            streams = {name: full_window(model, ahead) for name, model in models.items()}
            steps = {name: step for name, (step, _) in streams.items()}
            rounds = rounds_of(steps, repeats, device, turn)
            for name, model in models.items():
                window = streams[name][1]
                tensors = [tensor for layer in window.layers for tensor in (layer.keys, layer.values)]
                rows.append(
                    {
                        "lookahead": ahead,
                        "chunk_ms": 1000 * (ahead + 1) / frames_per_second(model.config),
                        "system": name,
                        "window_bytes": held_bytes(window),
                        "formula_bytes": kv_cache_bytes(model.config, model.config.encoder_config.sliding_window - 1),
                        "reserved_bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
                        "millions": multiplications(steps[name]) / 1e6,
                        "ms": rounds[name].median(),
                        "ratio": (rounds[name] / rounds[next(iter(models))]).median(),
                    }
                )
    table = pd.DataFrame(rows)
    table.attrs.update(measured_on(device, "fp32"))
    return table


@torch.no_grad()
def full_window(model: PreTrainedModel, ahead: int) -> tuple[Callable[[], object], DynamicCache]:
    """(a chunk's pass through the first layer of a stream whose window is full of noise, the window)"""
    encoder, config, call = model.encoder, model.config.encoder_config, {}
    hook = encoder.layers[0].register_forward_pre_hook(
        lambda layer, args, arguments: call.update(args=args, arguments=arguments), with_kwargs=True
    )
    caches = {"past_key_values": None, "padding_cache": None}
    frames = 1 + config.subsampling_factor * ahead  # of features: the first chunk is shorter
    full = config.sliding_window + ahead + 1  # frames: the window is full before the last chunk
    try:
        while caches["past_key_values"] is None or caches["past_key_values"].get_seq_length() < full:
            noise_1SF = torch.randn(1, frames, config.num_mel_bins, device=model.device)
            output = encoder(noise_1SF, use_cache=True, num_lookahead_tokens=ahead, **caches)
            caches = {name: output[name] for name in caches}
            frames = config.subsampling_factor * (ahead + 1)
    finally:
        hook.remove()
    return partial(encoder.layers[0], *call["args"], **call["arguments"]), caches["past_key_values"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib steps", description="Times a chunk of a stream, for kinds of attention."
    )
    parser.add_argument("--size", choices=ENCODER_SIZES, default="shipped")
    parser.add_argument("--chunk", type=float, nargs="+", default=[160, 640], metavar="MS")
    parser.add_argument("--left", type=float, nargs="+", default=[10, 60], metavar="SECONDS")
    parser.add_argument("--lookahead", type=float, default=0.0, metavar="MS")
    parser.add_argument("--cache", default="float32", help="float32, bfloat16, float16, int8 or int4")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16, by autocast")
    parser.add_argument(
        "--recompute", type=float, default=60.0, metavar="SECONDS", help="the longest left context without a cache"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--forms", action="store_true", help="time absorbed and expanded latents instead")
    parser.add_argument("--windows", action="store_true", help="time a layer of Nemotron, with its window, instead")
    parser.add_argument("--out", type=Path, help="a .csv")
    args = parser.parse_args(argv)
    size, settings = ENCODER_SIZES[args.size], {"repeats": args.repeats, "device": args.device}
    if args.forms:
        table = benchmark_forms(**size, **settings)
    elif args.windows:
        table = benchmark_windows(window_models(), **settings)
    else:
        settings |= {"cache": args.cache, "precision": args.precision}
        settings |= {"recompute_seconds": args.recompute, "lookahead_ms": args.lookahead}
        table = benchmark_steps(random_encoders(**size), args.chunk, args.left, **settings)
    if args.out:
        table.to_csv(args.out, index=False)
    if args.forms or args.windows:
        sys.stdout.write(table.to_string(index=False, float_format="{:.3f}".format) + "\n")
        return 0
    table["millions"] = table["multiplications"] / 1e6
    columns = ["chunk_ms", "left_seconds", "system", "ms", "ms_low", "ms_high", "rtfx", "millions", "cache_bytes"]
    text = table[[*columns, "position_bytes", "peak_memory_bytes"]].to_string(index=False, float_format="{:.1f}".format)
    sys.stdout.write(f"{args.size}, {table.attrs}\n{text}\n")
    return 0
