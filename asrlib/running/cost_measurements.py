"""The rates that an estimate is made of, measured on this machine: a little of the work, through the code of a run.

Times are seconds, audio is in seconds with the padding of its batches. What would take longer than LONGEST is measured
on less audio.
"""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from transformers import TrainerCallback

from asrlib.attention.chunks import Chunks
from asrlib.attention.names import encoder_config
from asrlib.conversion.convert import convert, decompose
from asrlib.conversion.methods import METHODS
from asrlib.conversion.statistics import collect_statistics
from asrlib.data.batches import BucketBatchSampler
from asrlib.data.corpus import Corpus
from asrlib.measuring.lengths import benchmark_lengths
from asrlib.measuring.timing import peak_memory_bytes
from asrlib.measuring.transcribing import transcribe
from asrlib.models.inference import choose_device
from asrlib.models.registry import family_of, frames_of, frames_per_second
from asrlib.runs import project_root
from asrlib.training.training import TrainingSettings, train

LONGEST = 8.0  # seconds of work that one measurement may take, as far as that can be foreseen
PASSES_OF_A_STEP = 5  # a training step costs at most: forward, backward as two, checkpoints recomputed, the teacher
STEPS = 4  # of training that are timed; the first one is to warm up
IMPORTS = ("ipykernel.kernelapp", "asrlib.reporting.comparison", "asrlib.training.training", "asrlib.measuring.methods")
LENGTHS = (5.0, 30.0)  # seconds of audio whose passes tell how time grows with the length


@dataclass(frozen=True)
class Rate:
    """So many seconds of work on so much audio."""

    seconds: float
    audio: float

    @property
    def per_second(self) -> float:
        return self.seconds / self.audio


def warm(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what `work` gives, the seconds that takes): the less of two times, as the first warms up, and others disturb."""
    times = []
    for _ in range(2):
        begin = perf_counter()
        made = work()
        times.append(perf_counter() - begin)
    return made, min(times)


@cache
def start_of_a_kernel() -> float:
    """Of a new Python with what most notebooks import."""
    command = [sys.executable, "-c", f"import {', '.join(IMPORTS)}"]
    return warm(lambda: subprocess.run(command, cwd=project_root(), capture_output=True, check=True))[1]


def batches_of(corpus: Corpus, batch_seconds: float) -> list[Corpus]:
    """Longest utterances first."""
    sampler = BucketBatchSampler([one.seconds for one in corpus], batch_seconds, shuffle=False)
    return [replace(corpus, utterances=tuple(corpus[i] for i in batch)) for batch in sampler]


def padded(*batches: Corpus) -> float:
    """The audio in them."""
    return sum(len(batch) * max(one.seconds for one in batch) for batch in batches)


def up_to(corpus: Corpus, seconds: float) -> Corpus:
    """Its utterances that are no longer; the shortest alone where none is so short."""
    short = [one for one in corpus if one.seconds <= seconds] or [min(corpus, key=lambda one: one.seconds)]
    return replace(corpus, utterances=tuple(short))


def decoding(corpus: Corpus, model, processor) -> Rate:
    """Of reading and checking the audio, as `open_usable` does."""
    some = corpus.excerpt(60.0)
    return Rate(warm(lambda: some.usable(processor, frames_of(model)))[1], some.seconds)


def passes(
    corpus: Corpus, model, processor, batch_seconds: float, device: str, precision: str, chunks: Chunks | None = None
) -> Rate:
    """Of transcribing: of a typical batch if that is quick enough."""

    def run(batch_seconds: float) -> Rate:
        batches = batches_of(up_to(corpus, batch_seconds), batch_seconds)
        batch, how = batches[(len(batches) - 1) // 2], {"device": device, "precision": precision, "chunks": chunks}
        return Rate(warm(lambda: transcribe(model, processor, batch, batch_seconds, **how))[1], padded(batch))

    one = run(min(one.seconds for one in corpus))
    return run(min(batch_seconds, max(one.audio, LONGEST / one.per_second)))


def growth_of_passes(corpus: Corpus, model, processor, device: str, precision: str) -> tuple[float, float]:
    """(a, b): a pass over L seconds of audio, alone, takes a·L + b·L² seconds, by those of LENGTHS."""
    found = benchmark_lengths({"it": model}, processor, corpus, LENGTHS, 1, device, precision)
    (short, long), (at_short, at_long) = LENGTHS, [ms / 1000 for ms in found["systems"]["it"]["ms"]]
    b = max(0.0, (at_long / long - at_short / short) / (long - short))
    return max(0.0, at_long / long - b * long), b


class _Stopwatch(TrainerCallback):
    """When each step ended. Nothing is validated or saved in between."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(perf_counter())
        control.should_evaluate = control.should_save = False


def training(
    corpus: Corpus, model, processor, settings: TrainingSettings, teacher, audio_per_second: float
) -> tuple[Rate, int | None, str]:
    """(steps on a typical batch; bytes of one on the longest, weights and optimizer included; how those are known).

    None on a device that cannot tell. `audio_per_second`: how much a second of inference passes over. The learning rate
    is next to nothing: the model stays what it is. Raises torch.OutOfMemoryError, which names what to lower.
    """
    gentle = {"learning_rate": 1e-9, "scheduler": "constant", "gradient_accumulation": 1, "epochs": 1}
    gentle |= {"evaluations_per_epoch": 1, "speeds": (1.0,), "training_strategy": "ddp"}
    device, models = choose_device(settings.device, model), [model, teacher] if teacher else [model]
    for one in models:
        one.to(device)  # what is there before is no part of the peak

    def steps(batch: Corpus) -> float:
        """Seconds of the quickest but the first."""
        stopwatch, often = _Stopwatch(), replace(batch, utterances=batch.utterances * STEPS)
        with tempfile.TemporaryDirectory() as folder:
            of_one = replace(settings, **gentle, batch_seconds=padded(batch))
            train(model, processor, often, batch[-1:], folder, of_one, teacher, [stopwatch])
        return min(after - before for before, after in pairwise(stopwatch.ends))

    room = min(settings.batch_seconds, LONGEST * audio_per_second / PASSES_OF_A_STEP)
    batches = batches_of(up_to(corpus, room), room)
    typical = batches[(len(batches) - 1) // 2]
    rate, peak = Rate(steps(typical), padded(typical)), peak_memory_bytes(lambda: steps(batches[0]), device)
    if peak is None:
        return rate, None, ""
    weights = sum(p.numel() * p.element_size() for one in models for p in one.parameters())
    trained = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # gradients, two moments
    scale = padded(batches_of(corpus, settings.batch_seconds)[0]) / padded(batches[0])
    source = "measured" if scale == 1 else f"scaled from a batch of {padded(batches[0]):.0f} s of audio"
    return rate, weights + trained + round(scale * max(0, peak - trained)), source


def one_layer(corpus: Corpus, model, processor, device: str, layout: str, method: str) -> tuple[Rate, float, float]:
    """(statistics on top of a pass, seconds of its decomposition, of a conversion by that).

    Of a twin of the model that has no other layer, with random weights. `corpus`: calibration speech, more than the
    model is wide in frames.
    """
    config = copy.deepcopy(model.config)
    encoder_config(config).num_hidden_layers = 1
    twin = family_of(config).standard_model(config).eval()
    longest = max(one.seconds for one in corpus)  # by so much an excerpt may be shorter than what is asked for
    some = corpus.excerpt(max(10.0, 1.2 * encoder_config(config).hidden_size / frames_per_second(config)) + longest)
    how = {"device": device, "attention": METHODS[method].needs_attention}
    _, passing = warm(lambda: transcribe(twin, processor, some, device=device))
    statistics, collecting = warm(lambda: collect_statistics(twin, processor, some, some.seconds, **how))
    how = {"layout": layout, "method": method, "statistics": statistics}
    made, decomposing = warm(lambda: decompose(twin, **how))
    _, converting = warm(lambda: convert(twin, cache_cut=0.875, decomposition=made, **how))  # a middling one
    return Rate(max(0.0, collecting - passing), some.seconds), decomposing, converting
