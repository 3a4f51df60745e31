"""The rates that an estimate is made of, measured on this machine: a little of the work, through the code of a run.

Times are seconds, audio is in seconds with the padding of its batches. What would take longer than LONGEST is measured
on less audio.
"""

import copy
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from transformers import TrainerCallback

from asrlib.attention.chunks import Chunks
from asrlib.benchmark import peak_memory_bytes
from asrlib.conversion.convert import convert, decompose
from asrlib.conversion.statistics import collect_statistics
from asrlib.data.batches import BucketBatchSampler
from asrlib.data.corpus import Corpus
from asrlib.evaluation import transcribe
from asrlib.length_benchmark import benchmark_lengths
from asrlib.models.families import family_of, frames_of, frames_per_second
from asrlib.models.inference import choose_device
from asrlib.runs import project_root
from asrlib.training import TrainingSettings, train

LONGEST = 8.0  # seconds of work that one measurement may take, as far as that can be foreseen
PASSES_OF_A_STEP = 5  # a training step costs at most: forward, backward as two, checkpoints recomputed, the teacher
STEPS = 4  # of training that are timed; the first one is to warm up
IMPORTS = ("ipykernel.kernelapp", "asrlib.report", "asrlib.training", "asrlib.conversion.benchmark")
LENGTHS = (5.0, 30.0)  # seconds of audio whose passes tell how time grows with the length


@dataclass(frozen=True)
class Rate:
    """So many seconds of work on so much audio."""

    seconds: float
    audio: float

    @property
    def per_second(self) -> float:
        return self.seconds / self.audio


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, and warnings of things that are small on purpose."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def warm(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what `work` gives, the seconds that takes), done twice: the first time warms up."""
    work()
    begin = perf_counter()
    return work(), perf_counter() - begin


def start_of_a_kernel() -> float:
    """Of a new Python with what most notebooks import."""
    command = [sys.executable, "-c", f"import {', '.join(IMPORTS)}"]
    return warm(lambda: subprocess.run(command, cwd=project_root(), capture_output=True, check=True))[1]


# ---- speech ------------------------------------------------------------------------------------------------


def padded(corpus: Corpus, batch_seconds: float) -> float:
    """The audio of all its batches."""
    seconds = [one.seconds for one in corpus]
    with quietly():
        batches = list(BucketBatchSampler(seconds, batch_seconds, shuffle=False))
    return sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)


def batch_of(corpus: Corpus, batch_seconds: float, longest: bool = False) -> tuple[Corpus, float]:
    """(a batch of typical, or of the longest, utterances; its audio). Where none is so short, the shortest alone."""
    fitting = [one for one in corpus if one.seconds <= batch_seconds] or [min(corpus, key=lambda one: one.seconds)]
    with quietly():
        batches = list(BucketBatchSampler([one.seconds for one in fitting], batch_seconds, shuffle=False))
    batch = [fitting[i] for i in batches[0 if longest else (len(batches) - 1) // 2]]
    return replace(corpus, utterances=tuple(batch)), len(batch) * max(one.seconds for one in batch)


def decoding(corpus: Corpus, model, processor) -> Rate:
    """Of reading and checking the audio, as `open_usable` does."""
    some = corpus.excerpt(60.0)
    with quietly():
        return Rate(warm(lambda: some.usable(processor, frames_of(model)))[1], some.seconds)


# ---- passes ------------------------------------------------------------------------------------------------


def passes(
    corpus: Corpus, model, processor, batch_seconds: float, device: str, precision: str, chunks: Chunks | None = None
) -> Rate:
    """Of transcribing: of a typical batch if that is quick enough."""

    def run(batch_seconds: float) -> Rate:
        batch, audio = batch_of(corpus, batch_seconds)
        how = {"device": device, "precision": precision, "chunks": chunks}
        return Rate(warm(lambda: transcribe(model, processor, batch, batch_seconds, **how))[1], audio)

    with quietly():
        one = run(min(one.seconds for one in corpus))
        return run(min(batch_seconds, max(one.audio, LONGEST / one.per_second)))


def growth_of_passes(corpus: Corpus, model, processor, device: str, precision: str) -> tuple[float, float]:
    """(a, b): a pass over L seconds of audio, alone, takes a·L + b·L² seconds, by those of LENGTHS."""
    with quietly():
        found = benchmark_lengths({"it": model}, processor, corpus, LENGTHS, 1, device, precision)
    (short, long), (at_short, at_long) = LENGTHS, [ms / 1000 for ms in found["systems"]["it"]["ms"]]
    b = max(0.0, (at_long / long - at_short / short) / (long - short))
    return max(0.0, at_long / long - b * long), b


# ---- training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCost:
    batch: Rate  # one training step each
    kept_bytes: int  # weights of the model and its teacher, gradients, two moments of every trainable number
    batch_bytes: int | None  # what the longest batch that was tried takes besides; None where the device cannot tell
    batch_audio: float  # of that batch


class _Stopwatch(TrainerCallback):
    """When each step ended. Nothing is validated or saved in between."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(perf_counter())
        control.should_evaluate = control.should_save = False
        return control


def training(
    corpus: Corpus, model, processor, settings: TrainingSettings, teacher, audio_per_second: float
) -> TrainingCost:
    """Steps on a typical batch for their time, on the longest for the memory.

    `audio_per_second`: how much audio a second of inference passes over. The learning rate is next to nothing, so that
    the model stays what it is. Raises torch.OutOfMemoryError, which names what to lower.
    """
    gentle = {"learning_rate": 1e-9, "scheduler": "constant", "gradient_accumulation": 1, "epochs": 1}
    settings = replace(settings, **gentle, evaluations_per_epoch=1, speeds=(1.0,), training_strategy="ddp")
    room = min(settings.batch_seconds, LONGEST * audio_per_second / PASSES_OF_A_STEP)
    device, models = choose_device(settings.device, model), [model, teacher] if teacher else [model]
    for one in models:
        one.to(device)

    def steps(batch: Corpus, audio: float) -> list[float]:
        stopwatch, validation = _Stopwatch(), batch[-1:]
        again = replace(batch, utterances=batch.utterances * STEPS)
        with tempfile.TemporaryDirectory() as folder:
            of_one = replace(settings, batch_seconds=audio)
            train(model, processor, again, validation, folder, of_one, teacher, [stopwatch])
        return stopwatch.ends

    with quietly():
        batch, audio = batch_of(corpus, room)
        ends = steps(batch, audio)
        longest, longest_audio = batch_of(corpus, room, longest=True)
        peak = peak_memory_bytes(lambda: steps(longest, longest_audio), device)
    trained = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for one in models for p in one.parameters())
    return TrainingCost(
        batch=Rate((ends[-1] - ends[0]) / (len(ends) - 1), audio),
        kept_bytes=weights + trained,
        batch_bytes=None if peak is None else max(0, peak - trained),
        batch_audio=longest_audio,
    )


# ---- conversion --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCost:
    """Of one layer."""

    statistics: Rate  # on top of a pass
    decomposition: float  # seconds
    cut: float  # seconds of converting it, once it is decomposed


def one_layer(corpus: Corpus, model, processor, device: str, layout: str, method: str) -> LayerCost:
    """What conversion does to a layer, on a twin of the model that has no other, with random weights.

    `corpus`: calibration speech, more than the model is wide in frames.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    twin = family_of(config).standard_model(config).eval()
    some = corpus.excerpt(max(10.0, 1.2 * config.hidden_size / frames_per_second(config)))
    how = {"device": device, "attention": method == "attended"}
    with quietly():
        _, passing = warm(lambda: transcribe(twin, processor, some, device=device))
        statistics, collecting = warm(lambda: collect_statistics(twin, processor, some, some.seconds, **how))
        made, decomposition = warm(lambda: decompose(twin, layout, method, statistics))
        how = {"layout": layout, "method": method, "statistics": statistics, "decomposition": made}
        _, cut = warm(lambda: convert(twin, cache_cut=0.75, **how))
    return LayerCost(Rate(max(0.0, collecting - passing), some.seconds), decomposition, cut)
