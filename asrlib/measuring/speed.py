"""The speed of models, their memory, and the size of their key/value caches; their speed under torch.compile.

Systems are measured in one interleaved run, so that other work of the machine affects all of them alike.
Shapes: N utterances, L lengths, R resamples or rounds, S samples of audio or frames of features.
"""

import os
import shutil
import warnings
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import nn

from asrlib.attention.cache import kv_cache_bytes
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus
from asrlib.measuring.resampling import interval, resample_sums
from asrlib.measuring.timing import (
    DTYPES,
    best_symbols,
    inputs_of_each,
    interleaved,
    measured_on,
    peak_memory_bytes,
    processor_of_each,
)
from asrlib.models.heard_once import KEPT
from asrlib.models.inference import choose_device, inference
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import family_of, frames_per_second

COMPILED = ", compiled"
COMPILED_LENGTHS = 2  # utterances: the shortest and the longest
ROUNDS = 9


def spread_over_durations(corpus: Corpus, n: int | None) -> Corpus:
    """`n` utterances evenly spaced over the sorted durations of the corpus, from the shortest to the longest.

    All of them where n is None or not smaller than the corpus; n = 1 is the longest. Raises ValueError for n < 1.
    """
    if n is not None and n < 1:
        raise ValueError(f"a benchmark needs at least one utterance, not {n}; None means all")
    by_duration = sorted(corpus, key=lambda utterance: utterance.seconds)
    count = len(by_duration) if n is None else min(n, len(by_duration))
    from_longest = np.linspace(len(by_duration) - 1, 0, count).round().astype(int)
    return replace(corpus, utterances=tuple(by_duration[i] for i in from_longest[::-1]))


def benchmark_speed(
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

    All systems share `processor`, or it is {name: processor}. The latency of an utterance is the median of `repeats`
    passes from the processor's output (normalised samples, or features) to token ids. `rtfx` is seconds of audio per
    second of computation. `speed_ratio` is the speed relative to the first of `systems`, on the same utterances.
    `peak_memory_bytes` is the memory of one pass over the longest utterance, without weights and input; None where the
    device cannot tell.

    All of `corpus` is measured: see `spread_over_durations`. `device`: see `models.inference.choose_device`.
    Raises ValueError where there is nothing to measure, or a system has no processor.
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
            return best_symbols(systems[name], processors[name], inputs[i][name], corpus[i].seconds)

    with KEPT.paused(), inference(*systems.values(), device=device, precision=precision):
        for name in list(systems) * warmup:
            transcribe(name, longest)
        passes_N = [{name: partial(transcribe, name, i) for name in systems} for i in range(len(corpus))]
        ms = interleaved(passes_N, repeats, device, desc="benchmark", unit="utt")
        latencies = {name: np.median(ms_RN, axis=0) for name, ms_RN in ms.items()}
        peaks = {name: peak_memory_bytes(partial(transcribe, name, longest), device) for name in systems}

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
                "cache_bytes_per_second": cache_bytes_per_second(model.config, DTYPES[precision]),
                "cache_bytes_1000_frames": kv_cache_bytes(model.config, 1000, DTYPES[precision]),
            }
            for name, model in systems.items()
        },
        "latencies": {name: ms_N.tolist() for name, ms_N in latencies.items()},
    }


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
    """Total time of the baseline divided by that of this system, both on the same resampled utterances."""
    sums_R2 = resample_sums(np.stack([baseline_ms_N, ms_N], axis=1))
    return {
        "speed_ratio": float(baseline_ms_N.sum() / ms_N.sum()),
        "speed_ratio_interval": list(interval(sums_R2[:, 0] / sums_R2[:, 1])),
    }


def cache_bytes_per_second(config, dtype: str = "float32") -> int:
    """The growth of a stream's key/value cache with each second of audio; 0 where its size is fixed."""
    growth = kv_cache_bytes(config, 2000, dtype) - kv_cache_bytes(config, 1000, dtype)
    return round(growth * frames_per_second(config) / 1000)


# ---- compiled ------------------------------------------------------------------------------------------------


def compiled_beside_eager(
    systems: dict[str, nn.Module],
    processors,
    corpus: Corpus,
    rounds: int = ROUNDS,
    device: str | None = None,
    precision: str = "fp32",
    backend: str = "inductor",
) -> dict:
    """Times every system eagerly and under torch.compile, taking turns, on utterances of COMPILED_LENGTHS durations.

    {backend, seconds: [L], systems: {name: {eager_ms, compiled_ms: [L], medians over `rounds`; ratio (compiled to
    eager, over the time of all lengths, median over rounds), ratio_range: [least, greatest], compiling_seconds,
    largest_difference (of logits)}}, device, threads, dtype}

    Each length is compiled separately; `compiling_seconds` is the time of the first pass over each. All systems share
    `processors`, or it is {name: processor}. Raises OSError where the CPU's code cannot be compiled, ValueError where
    there is nothing to measure.
    """
    if not systems or not len(corpus) or rounds < 1:
        raise ValueError("a benchmark needs at least one system, one utterance and one round")
    device = choose_device(device, next(iter(systems.values())))
    check_compiler(device, backend)
    for model in systems.values():
        check_compiled(model.config)
    processors = processor_of_each(systems, processors)
    speech = spread_over_durations(corpus, COMPILED_LENGTHS)
    inputs = [inputs_of_each(systems, processors, utterance.audio(), device) for utterance in speech]
    compiled = {name: torch.compile(model, dynamic=False, backend=backend) for name, model in systems.items()}
    rows = {}
    with inference(*systems.values(), device=device, precision=precision):
        for name, model in systems.items():
            inputs_L = [read[name].to(model.dtype) for read in inputs]
            started = perf_counter()
            with warnings.catch_warnings(action="ignore"):  # about caches in transformers that the compiler ignores
                ours_L = [compiled[name](inputs_1S).logits for inputs_1S in inputs_L]
            rows[name] = {"compiling_seconds": perf_counter() - started}
            pairs = zip(ours_L, (model(inputs_1S).logits for inputs_1S in inputs_L), strict=True)
            rows[name]["largest_difference"] = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        every = systems | {name + COMPILED: model for name, model in compiled.items()}
        plain = {name: name.removesuffix(COMPILED) for name in every}
        passes_L = [
            {name: partial(best_symbols, every[name], processors[of], read[of]) for name, of in plain.items()}
            for read in inputs
        ]
        ms = interleaved(passes_L, rounds, device, desc="compiled", unit="utt")
    for name, row in rows.items():
        row |= _compared_times(ms[name], ms[name + COMPILED])
    seconds = [utterance.seconds for utterance in speech]
    return {"backend": backend, "seconds": seconds, "systems": rows, **measured_on(device, precision)}


def _compared_times(eager_RL: np.ndarray, compiled_RL: np.ndarray) -> dict:
    ratios_R = compiled_RL.sum(1) / eager_RL.sum(1)
    return {
        "eager_ms": np.median(eager_RL, axis=0).tolist(),
        "compiled_ms": np.median(compiled_RL, axis=0).tolist(),
        "ratio": float(np.median(ratios_R)),
        "ratio_range": [float(ratios_R.min()), float(ratios_R.max())],
    }


def check_compiled(config) -> None:
    """Raises ValueError for a model that writes token by token, since its passes are not timed compiled."""
    if family_of(config).head.reads_labels:
        raise ValueError(f"benchmark_compiled times models with CTC, and {config.model_type} has none: leave it out")


def check_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Raises OSError where torch.compile would find no compiler for the code it writes for the CPU."""
    known = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if device.type == "cpu" and backend == "inductor" and not any(map(shutil.which, known)):
        raise OSError(
            "benchmark_compiled needs a C++ compiler for the CPU, and there is none on PATH: install g++, or set "
            "benchmark_compiled to false"
        )
