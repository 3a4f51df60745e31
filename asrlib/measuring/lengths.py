"""The growth of time and memory of one pass with the length of the audio, for several systems side by side.

    python -m asrlib lengths --size published --seconds 10 60

times recognisers with random weights: multi-head attention by transformers, the same in blocks by `attention.relative`,
and latents. This separates the gain by blocks from the gain by latents.

Shapes: S samples of audio, or frames of features.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from asrlib.attention.names import attends_across
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus
from asrlib.measuring.names import LONG_PASS, PROFILED_AUDIO
from asrlib.measuring.random_models import RECOGNISER_SIZES, noise, random_recognisers
from asrlib.measuring.timing import (
    best_symbols,
    inputs_of_each,
    interleaved,
    measured_on,
    peak_memory_bytes,
    processor_of_each,
    take_turns,
)
from asrlib.models.inference import choose_device, inference
from asrlib.models.loading import load
from asrlib.models.out_of_memory import is_out_of_memory
from asrlib.runs import write_json


def benchmark_lengths(
    systems: dict[str, nn.Module],
    processors,
    corpus: Corpus,
    seconds: list[float],
    repeats: int = 3,
    device: str | None = None,
    precision: str = "fp32",
    budget_seconds: float | None = None,
) -> dict:
    """Measures every system on audio of every length, shortest first, systems interleaved.

    {seconds: lengths in rising order, systems: {name: {ms: [one a length], peak_memory_bytes: [one a length],
    stopped}}, budget_seconds, device, threads, dtype}

    Utterances of `corpus` are joined end to end, from the first on and again from the start, to make audio of each
    length. All systems share `processors`, or it is {name: processor}; their work is not timed. `ms` is the median of
    `repeats` passes after a warm-up pass. A warm-up longer than LONG_PASS is itself the measurement.
    `peak_memory_bytes` is the memory of a pass, without weights and input. It is None where the device cannot tell, and
    on the CPU for a long pass over more than PROFILED_AUDIO.

    A system that runs out of memory, or takes longer than `budget_seconds` for one pass, is not tried at longer
    lengths: its lists continue with None, and `stopped` is {"seconds": that length, "reason": "memory" | "time"}.
    `stopped` is None for a system that was measured at every length. `device`: see `models.inference.choose_device`.
    Raises ValueError where there is nothing to measure, or a system has no processor.
    """
    if not systems or not len(corpus) or not seconds or repeats < 1:
        raise ValueError("a benchmark needs at least one system, one utterance, one length and one repeat")
    lengths = sorted(set(seconds))
    if not lengths[0] * SAMPLE_RATE >= 1:
        raise ValueError(f"a length must be a positive number of seconds, not {lengths[0]}")
    for model in systems.values():
        check_lengths(model.config)
    device = choose_device(device, next(iter(systems.values())))
    audio_S, processors = joined(corpus, lengths[-1]), processor_of_each(systems, processors)
    rows = {name: {"ms": [], "peak_memory_bytes": [], "stopped": None} for name in systems}
    with inference(*systems.values(), device=device, precision=precision):
        for turn, length in enumerate(tqdm(lengths, desc="benchmark", unit="length")):
            running = {name: model for name, model in systems.items() if rows[name]["stopped"] is None}
            inputs = inputs_of_each(running, processors, audio_S[: round(length * SAMPLE_RATE)], device)
            passes = {name: partial(best_symbols, running[name], processors[name], inputs[name]) for name in running}
            measured = _measure(passes, length, turn, repeats, device)
            for name, row in rows.items():
                ms, peak = measured.get(name, (None, None))
                row["ms"].append(ms)
                row["peak_memory_bytes"].append(peak)
                if name in running and ms is None:
                    row["stopped"] = {"seconds": length, "reason": "memory"}
                elif ms is not None and budget_seconds is not None and ms > 1000 * budget_seconds:
                    row["stopped"] = {"seconds": length, "reason": "time"}
    return {"seconds": lengths, "systems": rows, "budget_seconds": budget_seconds, **measured_on(device, precision)}


def check_lengths(config) -> None:
    """Raises ValueError for a model that hears all audio in windows of one length."""
    if attends_across(config):
        raise ValueError(f"benchmark_seconds times lengths of audio, and {config.model_type} has one: leave it out")


def joined(corpus: Corpus, seconds: float) -> np.ndarray:
    """float32 [S] of that length: utterances end to end, from the first on and again from the start."""
    missing = wanted = round(seconds * SAMPLE_RATE)
    pieces = []
    for utterance in itertools.cycle(corpus):
        pieces.append(utterance.audio())
        missing -= len(pieces[-1])
        if missing <= 0:
            return np.concatenate(pieces)[:wanted]


def _measure(
    work: dict[str, Callable[[], object]], length: float, turn: int, repeats: int, device: torch.device
) -> dict[str, tuple[float, int | None]]:
    """{name: (milliseconds, bytes)} at one length, without the systems that ran out of memory."""
    exhausted: set[str] = set()

    def attempt(name: str) -> None:
        if name in exhausted:
            return
        try:
            work[name]()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            exhausted.add(name)

    passes = {name: partial(attempt, name) for name in work}
    times = take_turns(passes, turn, device)
    short = [name for name, ms in times.items() if ms <= 1000 * LONG_PASS and name not in exhausted]
    repeated = interleaved([{name: passes[name] for name in short}], repeats, device, turn + 1)
    times |= {name: float(np.median(ms_R1)) for name, ms_R1 in repeated.items()}

    peaks: dict[str, int | None] = {}
    for name in times:
        profiled = device.type != "cpu" or length <= PROFILED_AUDIO or name in short
        peaks[name] = peak_memory_bytes(passes[name], device) if profiled and name not in exhausted else None
    return {name: (ms, peaks[name]) for name, ms in times.items() if name not in exhausted}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib lengths", description="Times full passes of recognisers with random weights."
    )
    parser.add_argument("--size", choices=RECOGNISER_SIZES, default="shipped")
    parser.add_argument("--latents", type=int, nargs="*", default=[2, 4, 8], help="a half, a fourth, … of the width")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 30, 60], help="lengths of audio")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="a .json")
    args = parser.parse_args(argv)
    systems = random_recognisers(args.size, args.latents)
    corpus = noise(max(args.seconds))
    processor = load("synthetic-conformer")[1]
    measured = benchmark_lengths(systems, processor, corpus, args.seconds, args.repeats, args.device)
    if args.out:
        write_json(args.out.absolute(), measured)
    rows = [
        {
            "seconds": seconds,
            "system": name,
            "ms": row["ms"][i],
            "speed": (measured["systems"]["MHA by transformers"]["ms"][i] or math.nan) / (row["ms"][i] or math.nan),
            "peak MiB": (row["peak_memory_bytes"][i] or math.nan) / 2**20,
        }
        for i, seconds in enumerate(measured["seconds"])
        for name, row in measured["systems"].items()
    ]
    table = pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format)
    sys.stdout.write(f"{args.size}, {measured['device']}, {measured['threads']} threads\n{table}\n")
    return 0
