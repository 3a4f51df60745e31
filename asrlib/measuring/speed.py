"""How fast models are, how much memory they take, and how large their key/value caches are.

Systems are measured in one interleaved run, so that whatever else the machine does meets all of them alike.
Shapes: N utterances, R resamples, S what a system reads of an utterance (samples of audio, or frames of features).
"""

from dataclasses import replace
from functools import partial

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
from asrlib.models.inference import choose_device, inference
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import frames_per_second


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
    """Total time of the baseline over that of this system, both on the same resampled utterances."""
    sums_R2 = resample_sums(np.stack([baseline_ms_N, ms_N], axis=1))
    return {
        "speed_ratio": float(baseline_ms_N.sum() / ms_N.sum()),
        "speed_ratio_interval": list(interval(sums_R2[:, 0] / sums_R2[:, 1])),
    }


def cache_bytes_per_second(config, dtype: str = "float32") -> int:
    """By which the key/value state of a stream grows with each second of audio; 0 where its size is fixed."""
    growth = kv_cache_bytes(config, 2000, dtype) - kv_cache_bytes(config, 1000, dtype)
    return round(growth * frames_per_second(config) / 1000)
