"""What torch.compile makes of models: each beside itself, compiled, taking turns in one run.

Shapes: L lengths, R rounds.
"""

import os
import shutil
import warnings
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import nn

from asrlib.data.corpus import Corpus
from asrlib.measuring.speed import spread_over_durations
from asrlib.measuring.timing import best_symbols, inputs_of_each, interleaved, measured_on, processor_of_each
from asrlib.models.inference import choose_device, inference
from asrlib.models.registry import family_of

COMPILED = ", compiled"
LENGTHS = 2  # utterances: the shortest and the longest
ROUNDS = 9


def compiled_beside_eager(
    systems: dict[str, nn.Module],
    processors,
    corpus: Corpus,
    rounds: int = ROUNDS,
    device: str | None = None,
    precision: str = "fp32",
    backend: str = "inductor",
) -> dict:
    """Times every system as it is and compiled, one utterance at a time, of LENGTHS durations.

    {backend, seconds: [L], systems: {name: {eager_ms, compiled_ms: [L], medians over `rounds`; ratio (compiled to
    eager, the time of all lengths, the median over rounds), ratio_range: [least, greatest], compiling_seconds,
    largest_difference (of logits)}}, device, threads, dtype}

    Each length is compiled for itself; `compiling_seconds` are those of the first passes, one for each. `processors` is
    everyone's, or {name: processor}. Raises OSError where the CPU's code cannot be compiled, ValueError where there is
    nothing to measure.
    """
    if not systems or not len(corpus) or rounds < 1:
        raise ValueError("a benchmark needs at least one system, one utterance and one round")
    device = choose_device(device, next(iter(systems.values())))
    check_compiler(device, backend)
    for model in systems.values():
        check_compiled(model.config)
    processors = processor_of_each(systems, processors)
    speech = spread_over_durations(corpus, LENGTHS)
    inputs = [inputs_of_each(systems, processors, utterance.audio(), device) for utterance in speech]
    compiled = {name: torch.compile(model, dynamic=False, backend=backend) for name, model in systems.items()}
    found = {}
    with inference(*systems.values(), device=device, precision=precision):
        for name, model in systems.items():
            started = perf_counter()
            with warnings.catch_warnings(action="ignore"):  # of caches in transformers that the compiler looks through
                said = [compiled[name](one[name].to(model.dtype)).logits for one in inputs]
            found[name] = {"compiling_seconds": perf_counter() - started}
            wanted = [model(one[name].to(model.dtype)).logits for one in inputs]
            pairs = zip(said, wanted, strict=True)
            found[name]["largest_difference"] = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        every = systems | {name + COMPILED: model for name, model in compiled.items()}
        plain = {name: name.removesuffix(COMPILED) for name in every}
        passes_L = [
            {name: partial(best_symbols, every[name], processors[of], read[of]) for name, of in plain.items()}
            for read in inputs
        ]
        ms = interleaved(passes_L, rounds, device, desc="compiled", unit="utt")
    for name, row in found.items():
        row |= _beside(ms[name], ms[name + COMPILED])
    seconds = [utterance.seconds for utterance in speech]
    return {"backend": backend, "seconds": seconds, "systems": found, **measured_on(device, precision)}


def _beside(eager_RL: np.ndarray, compiled_RL: np.ndarray) -> dict:
    ratios_R = compiled_RL.sum(1) / eager_RL.sum(1)
    return {
        "eager_ms": np.median(eager_RL, axis=0).tolist(),
        "compiled_ms": np.median(compiled_RL, axis=0).tolist(),
        "ratio": float(np.median(ratios_R)),
        "ratio_range": [float(ratios_R.min()), float(ratios_R.max())],
    }


def check_compiled(config) -> None:
    """Raises ValueError where a model is not timed compiled: it writes token by token, in passes of its own."""
    if family_of(config).head.reads_labels:
        raise ValueError(f"benchmark_compiled times models with CTC, and a {config.model_type} is none: leave it out")


def check_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Raises OSError where torch.compile would find no compiler for the code it writes for the CPU."""
    known = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if device.type == "cpu" and backend == "inductor" and not any(map(shutil.which, known)):
        raise OSError(
            "benchmark_compiled needs a C++ compiler for the CPU, and there is none on PATH: install g++ or set it to "
            "false"
        )
