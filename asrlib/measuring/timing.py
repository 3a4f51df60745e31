"""What every benchmark stands on: systems take turns at the same inputs, and each pass is timed alike.

Whatever else the machine does so meets all systems alike. A benchmark chooses its device, warms every system up, lets
them take turns, and reports medians, some of them with quartiles.

Shapes: S what a system reads of an utterance (samples of audio, or frames of features), R repeats, N inputs.
"""

import os
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from asrlib.data.audio import SAMPLE_RATE
from asrlib.models.registry import family_of, frame_counts

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def best_symbols(model: nn.Module, processor, inputs_1S: torch.Tensor) -> torch.Tensor:
    """The work that is timed: what a model reads [1, S, ...] → token ids, of its frames [1, T] or as it writes them."""
    head, inputs_1S = family_of(model.config).head, inputs_1S.to(model.dtype)
    if not head.reads_labels:
        return model(inputs_1S).logits.argmax(-1)
    frames_1 = frame_counts(model, torch.tensor([inputs_1S.shape[1]], device=inputs_1S.device))
    return head.recognised(model, processor, {model.main_input_name: inputs_1S}, None, frames_1)


def processor_of_each(systems: dict[str, nn.Module], processor) -> dict:
    """{name: its processor}. `processor` is everyone's, or {name: processor}; ValueError where one is missing."""
    processors = processor if isinstance(processor, dict) else dict.fromkeys(systems, processor)
    if missing := systems.keys() - processors.keys():
        raise ValueError(f"no processor for {', '.join(sorted(missing))}: give one to each system")
    return processors


def inputs_of_each(
    systems: dict[str, nn.Module], processor, samples_S: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor]:
    """{name: what that system reads [1, S, ...]} of 16 kHz audio, on `device`; made once for each processor.

    `processor` is everyone's, or {name: processor}; ValueError where one is missing.
    """
    processors = processor_of_each(systems, processor)
    distinct = {id(processors[name]): processors[name] for name in systems}
    made = {
        key: one(samples_S, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device) for key, one in distinct.items()
    }
    return {name: made[id(processors[name])][model.main_input_name] for name, model in systems.items()}


def measured_on(device: torch.device, precision: str) -> dict:
    """What a result says of the circumstances: {device, threads, dtype}."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": DTYPES[precision],
    }


def take_turns(passes: dict[str, Callable[[], object]], turn: int, device: torch.device) -> dict[str, float]:
    """{name: milliseconds of one pass}. Who goes first changes with `turn`, so that what one system leaves in the
    processor's caches for the next evens out."""
    names = list(passes)
    first = turn % max(1, len(names))
    return {name: milliseconds(passes[name], device) for name in names[first:] + names[:first]}


def interleaved(
    passes_N: Sequence[dict[str, Callable[[], object]]], repeats: int, device: torch.device, turn: int = 0, **progress
) -> dict[str, np.ndarray]:
    """{name: milliseconds [R, N]}: `repeats` times over all inputs, at each of which the systems take turns.

    `passes_N` has {name: pass} of each input; `progress` are settings of a tqdm bar, and without any there is none.
    """
    ms = {name: np.empty((repeats, len(passes_N))) for name in passes_N[0]}
    with tqdm(total=repeats * len(passes_N), disable=not progress, **progress) as bar:
        for repeat in range(repeats):
            for i, passes in enumerate(passes_N):
                for name, value in take_turns(passes, turn + repeat + i, device).items():
                    ms[name][repeat, i] = value
                bar.update()
    return ms


def rounds_of(
    steps: dict[str, Callable[[], object]], repeats: int, device: torch.device, turn: int = 0, **progress
) -> pd.DataFrame:
    """Milliseconds of steps that take turns, a row a round and a column a system, after one round to warm up."""
    take_turns(steps, turn, device)
    ms = interleaved([steps], repeats, device, turn, **progress)
    return pd.DataFrame({name: ms_R1[:, 0] for name, ms_R1 in ms.items()})


def quartiles(ms: pd.Series) -> dict[str, float]:
    """{ms, ms_low, ms_high}: the median, and what a quarter of all rounds took less and more than."""
    return {"ms": float(ms.median()), "ms_low": float(ms.quantile(0.25)), "ms_high": float(ms.quantile(0.75))}


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one pass, by the clock of the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    _synchronize(device)
    started = perf_counter()
    work()
    _synchronize(device)
    return 1000 * (perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def multiplications(work: Callable[[], object]) -> int:
    """Of matrices, each with its addition. Fused attention is counted as the two products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def peak_memory_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes of the tensors made by `work` alive at once; None on devices that cannot tell.

    On the CPU it is counted from torch's own allocations as its profiler reports them: exact and the same
    every time, unlike the resident size of the process. Scratch space inside BLAS and oneDNN is not among
    them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells stderr that it starts and stops
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu_only, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([0] + [event.nbytes() for event in events])))
