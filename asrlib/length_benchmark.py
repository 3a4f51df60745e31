"""How time and memory of one pass grow with the length of the audio, for several systems side by side.

Shapes: S samples of audio, or what a system reads of them.
"""

import itertools
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from asrlib.benchmark import best_symbols, inputs_of_each, measured_on, peak_memory_bytes, take_turns
from asrlib.data.corpus import SAMPLE_RATE, Corpus
from asrlib.models.inference import choose_device, inference

LONG_PASS = 5.0  # seconds: one such pass is enough, whatever disturbs it weighs little
PROFILED_AUDIO = 60.0  # seconds: the memory of longer audio is not worth another long pass, under the CPU's profiler


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

    Audio of a length is utterances of `corpus` joined end to end, from its first on, over and over where it is too
    short. `processors` is everyone's, or {name: processor}; what they do is not timed. `ms` is the median of `repeats`
    passes after one to warm up; where that one takes longer than LONG_PASS, it is the measurement.
    `peak_memory_bytes` is what a pass takes on top of weights and input; None where the device cannot tell, and for a
    long pass over more than PROFILED_AUDIO on the CPU.

    A system that runs out of memory, or one pass of which takes longer than `budget_seconds`, is not tried at longer
    lengths: its lists go on with None, and `stopped` is {"seconds": the length at which it was, "reason": "memory" |
    "time"}. `stopped` is None for one that was measured at every length. `device`: see
    `models.inference.choose_device`. Raises ValueError where there is nothing to measure, or no processor for a system.
    """
    if not systems or not len(corpus) or not seconds or repeats < 1:
        raise ValueError("a benchmark needs at least one system, one utterance, one length and one repeat")
    lengths = sorted(set(seconds))
    if not lengths[0] * SAMPLE_RATE >= 1:
        raise ValueError(f"a length must be a positive number of seconds, not {lengths[0]}")
    device = choose_device(device, next(iter(systems.values())))
    audio_S = joined(corpus, lengths[-1])
    rows = {name: {"ms": [], "peak_memory_bytes": [], "stopped": None} for name in systems}
    with inference(*systems.values(), device=device, precision=precision):
        for turn, length in enumerate(tqdm(lengths, desc="benchmark", unit="length")):
            running = {name: model for name, model in systems.items() if rows[name]["stopped"] is None}
            inputs = inputs_of_each(running, processors, audio_S[: round(length * SAMPLE_RATE)], device)
            measured = _measure(running, inputs, length, turn, repeats, device)
            for name, row in rows.items():
                ms, peak = measured.get(name, (None, None))
                row["ms"].append(ms)
                row["peak_memory_bytes"].append(peak)
                if name in running and ms is None:
                    row["stopped"] = {"seconds": length, "reason": "memory"}
                elif ms is not None and budget_seconds is not None and ms > 1000 * budget_seconds:
                    row["stopped"] = {"seconds": length, "reason": "time"}
    return {"seconds": lengths, "systems": rows, "budget_seconds": budget_seconds, **measured_on(device, precision)}


def joined(corpus: Corpus, seconds: float) -> np.ndarray:
    """float32 [S] of that length: utterances end to end, from the first on, and over again where they are too short."""
    missing = wanted = round(seconds * SAMPLE_RATE)
    pieces = []
    for utterance in itertools.cycle(corpus):
        pieces.append(utterance.audio())
        missing -= len(pieces[-1])
        if missing <= 0:
            return np.concatenate(pieces)[:wanted]


def _measure(
    systems: dict[str, nn.Module],
    inputs: dict[str, torch.Tensor],
    length: float,
    turn: int,
    repeats: int,
    device: torch.device,
) -> dict[str, tuple[float, int | None]]:
    """{name: (milliseconds, bytes)} at one length; those that ran out of memory are not among them."""
    exhausted: set[str] = set()

    def attempt(name: str) -> None:
        try:
            best_symbols(systems[name], inputs[name])
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not _is_out_of_memory(error):
                raise
            exhausted.add(name)

    def round_of(names: list[str], turn: int) -> dict[str, float]:
        passes = {name: partial(attempt, name) for name in names if name not in exhausted}
        times = take_turns(passes, turn, device) if passes else {}
        return {name: ms for name, ms in times.items() if name not in exhausted}

    times = round_of(list(systems), turn)
    short = [name for name, ms in times.items() if ms <= 1000 * LONG_PASS]
    rounds = [round_of(short, turn + 1 + repeat) for repeat in range(repeats)]
    times |= {name: float(np.median([one[name] for one in rounds])) for name in short if name not in exhausted}

    peaks: dict[str, int | None] = {}
    for name in times:
        told = device.type != "cpu" or length <= PROFILED_AUDIO or name in short
        peaks[name] = peak_memory_bytes(partial(attempt, name), device) if told and name not in exhausted else None
    return {name: (ms, peaks[name]) for name, ms in times.items() if name not in exhausted}


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the latter on the CPU
