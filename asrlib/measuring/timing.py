"""The base of every benchmark: systems take turns at the same inputs, and every pass is timed in the same way.

Other work of the machine then affects all systems alike. A benchmark chooses its device, warms every system up, lets
them take turns, and reports medians, some of them with quartiles.

Shapes: S samples of audio or frames of features, R repeats, N inputs.
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

from asrlib.attention.names import attends_across
from asrlib.data.audio import SAMPLE_RATE
from asrlib.models.heads import FEATURES_PER_SECOND
from asrlib.models.registry import family_of, frame_counts

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def best_symbols(model: nn.Module, processor, inputs_1S: torch.Tensor, seconds: float | None = None) -> torch.Tensor:
    """The work that is timed: a model's input [1, S, ...] → token ids, one a frame [1, T] or as it writes them.

    `seconds` of speech in a window that is padded; without it, the whole window counts."""
    head, inputs_1S = family_of(model.config).head, inputs_1S.to(model.dtype)
    if not head.reads_labels:
        return model(inputs_1S).logits.argmax(-1)
    frames_1 = frame_counts(model, torch.tensor([inputs_1S.shape[1]], device=inputs_1S.device))
    batch = {model.main_input_name: inputs_1S}
    if seconds is not None and attends_across(model.config):
        heard_S = torch.arange(inputs_1S.shape[-1], device=inputs_1S.device) < round(seconds * FEATURES_PER_SECOND)
        batch["attention_mask"] = heard_S[None].long()
    return head.recognised(model, processor, batch, None, frames_1)


def processor_of_each(systems: dict[str, nn.Module], processor) -> dict:
    """{name: its processor}. All share `processor`, or it is {name: processor}. ValueError where one is missing."""
    processors = processor if isinstance(processor, dict) else dict.fromkeys(systems, processor)
    if missing := systems.keys() - processors.keys():
        raise ValueError(f"no processor for {', '.join(sorted(missing))}: give one to each system")
    return processors


def inputs_of_each(
    systems: dict[str, nn.Module], processor, samples_S: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor]:
    """{name: the system's input [1, S, ...]} of 16 kHz audio, on `device`; each processor runs once.

    `processor`: see `processor_of_each`.
    """
    processors = processor_of_each(systems, processor)
    distinct = {id(processors[name]): processors[name] for name in systems}
    inputs = {
        key: extract(samples_S, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device)
        for key, extract in distinct.items()
    }
    return {name: inputs[id(processors[name])][model.main_input_name] for name, model in systems.items()}


def measured_on(device: torch.device, precision: str) -> dict:
    """The circumstances of a measurement: {device, threads, dtype}."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": DTYPES[precision],
    }


def take_turns(passes: dict[str, Callable[[], object]], turn: int, device: torch.device) -> dict[str, float]:
    """{name: milliseconds of one pass}. The order rotates with `turn`, because each system finds the processor's caches
    as the one before it left them."""
    names = list(passes)
    first = turn % max(1, len(names))
    return {name: milliseconds(passes[name], device) for name in names[first:] + names[:first]}


def interleaved(
    passes_N: Sequence[dict[str, Callable[[], object]]], repeats: int, device: torch.device, turn: int = 0, **progress
) -> dict[str, np.ndarray]:
    """{name: milliseconds [R, N]}: `repeats` times over all inputs, and the systems take turns at each input.

    `passes_N` has {name: pass} for each input; `progress` are settings of a tqdm bar, without which there is none.
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
    """Milliseconds of steps that take turns, one row a round and one column a system, after a warm-up round."""
    take_turns(steps, turn, device)
    ms = interleaved([steps], repeats, device, turn, **progress)
    return pd.DataFrame({name: ms_R1[:, 0] for name, ms_R1 in ms.items()})


def quartiles(ms: pd.Series) -> dict[str, float]:
    """{ms, ms_low, ms_high}: the median and the quartiles of all rounds."""
    return {"ms": float(ms.median()), "ms_low": float(ms.quantile(0.25)), "ms_high": float(ms.quantile(0.75))}


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one pass, by the clock of the device."""
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
    """Multiplications in products of matrices. Fused attention counts as two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def peak_memory_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes of tensors of `work` that are alive at once; None on devices that cannot tell.

    On the CPU it is counted from the allocations that torch's profiler reports, which are exact and the same every
    time, unlike the resident size of the process. Scratch space inside BLAS and oneDNN does not count.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler writes to stderr
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu_only, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([0] + [event.nbytes() for event in events])))
