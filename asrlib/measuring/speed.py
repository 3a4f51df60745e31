"""How fast models are, how much memory they take, and how large their key/value caches are.

Systems are measured in one interleaved run, so that whatever else the machine does meets all of them alike.
Shapes: N utterances, R resamples, S what a system reads of an utterance (samples of audio, or frames of features).
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from asrlib.attention.cache import kv_cache_bytes
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus
from asrlib.measuring.resampling import interval, resample_sums
from asrlib.models.inference import choose_device, inference
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import family_of, frame_counts, frames_per_second

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def spread_over_durations(corpus: Corpus, n: int | None) -> Corpus:
    """`n` utterances evenly spaced over the durations of the corpus, from the shortest to the longest.

    All of them where n is None or not smaller than the corpus; n = 1 is the longest. Raises ValueError for
    n < 1.
    """
    if n is not None and n < 1:
        raise ValueError(f"a benchmark needs at least one utterance, not {n}; None means all")
    by_duration = sorted(corpus, key=lambda utterance: utterance.seconds)
    count = len(by_duration) if n is None else min(n, len(by_duration))
    from_longest = np.linspace(len(by_duration) - 1, 0, count).round().astype(int)
    return replace(corpus, utterances=tuple(by_duration[i] for i in from_longest[::-1]))


def benchmark(
    systems: dict[str, nn.Module],
    processor,
    corpus: Corpus,
    warmup: int = 3,
    repeats: int = 3,
    device: str | None = None,
    precision: str = "fp32",
) -> dict:
    """Measures every system on every utterance, one at a time; metrics/benchmark.json holds the result.

    {device, threads, dtype, utterances, seconds_audio, latencies: {name: [ms per utterance]}, systems: {name:
    {parameters, parameter_bytes, latency_ms_mean, latency_ms_p50, latency_ms_p95, latency_ms_interval (95 %,
    of the mean), rtfx, speed_ratio, speed_ratio_interval, peak_memory_bytes, cache_bytes_per_second,
    cache_bytes_1000_frames}}}

    `processor` is everyone's, or {name: processor}, one a system. The latency of an utterance is the median of
    `repeats` passes from what the system's processor gives (normalised samples, or features) to token ids; `rtfx`
    is seconds of audio per second of computation; `speed_ratio` how many times as fast as the first system, a paired
    quantity. `peak_memory_bytes` is what one pass over the longest utterance takes on top of weights and input,
    None where the device cannot tell.

    `corpus` is measured whole: see `spread_over_durations`. `device`: see `models.inference.choose_device`.
    Raises ValueError where there is nothing to measure, or no processor for a system.
    """
    if not systems or not len(corpus) or repeats < 1:
        raise ValueError("a benchmark needs at least one system, one utterance and one repeat")
    first = next(iter(systems.values()))
    device = choose_device(device, first)
    audio = [utterance.audio() for utterance in corpus]
    longest = max(range(len(audio)), key=lambda i: len(audio[i]))
    seconds_audio = sum(map(len, audio)) / SAMPLE_RATE
    processors = processor_of_each(systems, processor)
    inputs = [inputs_of_each(systems, processors, samples_S, device) for samples_S in audio]

    def transcribe(name: str, i: int) -> torch.Tensor:
        utterance = (corpus[i].id, corpus[i].seconds)
        with out_of_memory_explained(f"the benchmark of {name}", [utterance], {"precision": precision}):
            return best_symbols(systems[name], processors[name], inputs[i][name])

    with inference(*systems.values(), device=device, precision=precision):
        for name in list(systems) * warmup:
            transcribe(name, longest)
        latencies = _interleaved(transcribe, list(systems), len(corpus), repeats, device)
        peaks = {name: peak_memory_bytes(lambda: transcribe(name, longest), device) for name in systems}  # noqa: B023

    baseline = next(iter(latencies.values()))
    return {
        **measured_on(device, precision),
        "utterances": len(corpus),
        "seconds_audio": seconds_audio,
        "systems": {
            name: {
                "parameters": sum(p.numel() for p in model.parameters()),
                "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                **_latency(latencies[name], seconds_audio),
                **_speed_ratio(baseline, latencies[name]),
                "peak_memory_bytes": peaks[name],
                **_cache(model.config, DTYPES[precision]),
            }
            for name, model in systems.items()
        },
        "latencies": {name: ms_N.tolist() for name, ms_N in latencies.items()},
    }


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


# ---- time --------------------------------------------------------------------------------------------------


def take_turns(passes: dict[str, Callable[[], object]], turn: int, device: torch.device) -> dict[str, float]:
    """{name: milliseconds of one pass}. Who goes first changes with `turn`, so that what one system leaves in the
    processor's caches for the next evens out."""
    names = list(passes)
    first = turn % len(names)
    return {name: _milliseconds(passes[name], device) for name in names[first:] + names[:first]}


def _interleaved(
    transcribe: Callable[[str, int], torch.Tensor],
    names: list[str],
    utterances: int,
    repeats: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Milliseconds of each system for each utterance [N], the median over `repeats`."""
    ms = {name: np.empty((repeats, utterances)) for name in names}
    with tqdm(total=repeats * utterances, desc="benchmark", unit="utt") as progress:
        for repeat in range(repeats):
            for i in range(utterances):
                passes = {name: functools.partial(transcribe, name, i) for name in names}
                for name, value in take_turns(passes, repeat + i, device).items():
                    ms[name][repeat, i] = value
                progress.update()
    return {name: np.median(values, axis=0) for name, values in ms.items()}


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
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


def _latency(ms_N: np.ndarray, seconds_audio: float) -> dict:
    means_R = resample_sums(ms_N[:, None])[:, 0] / len(ms_N)
    return {
        "latency_ms_mean": float(ms_N.mean()),
        "latency_ms_p50": float(np.percentile(ms_N, 50)),
        "latency_ms_p95": float(np.percentile(ms_N, 95)),
        "latency_ms_interval": list(interval(means_R)),
        "rtfx": seconds_audio / (float(ms_N.sum()) / 1000),
    }


def _speed_ratio(baseline_ms_N: np.ndarray, ms_N: np.ndarray) -> dict:
    """Total time of the baseline over that of this system, both on the same resampled utterances."""
    sums_R2 = resample_sums(np.stack([baseline_ms_N, ms_N], axis=1))
    return {
        "speed_ratio": float(baseline_ms_N.sum() / ms_N.sum()),
        "speed_ratio_interval": list(interval(sums_R2[:, 0] / sums_R2[:, 1])),
    }


def multiplications(work: Callable[[], object]) -> int:
    """Of matrices, each with its addition. Fused attention is counted as the two products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


# ---- memory ------------------------------------------------------------------------------------------------


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


def cache_bytes_per_second(config, dtype: str = "float32") -> int:
    """By which the key/value state of a stream grows with each second of audio; 0 where its size is fixed."""
    growth = kv_cache_bytes(config, 2000, dtype) - kv_cache_bytes(config, 1000, dtype)
    return round(growth * frames_per_second(config) / 1000)


def _cache(config, dtype: str) -> dict:
    """Key/value state under streaming: growth per second of audio, and size."""
    return {
        "cache_bytes_per_second": cache_bytes_per_second(config, dtype),
        "cache_bytes_1000_frames": kv_cache_bytes(config, 1000, dtype),
    }
