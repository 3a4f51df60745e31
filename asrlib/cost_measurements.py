"""What a pass, a training step and a conversion take on this machine: a little of each, through the code of a run.

Times are seconds of work, lengths seconds of audio. What would take longer than LONGEST is measured on less audio.
"""

import copy
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from asrlib.attention.chunks import Chunks
from asrlib.benchmark import benchmark, peak_memory_bytes, spread_over_durations
from asrlib.conversion.convert import convert, decompose
from asrlib.conversion.grouped import group_heads
from asrlib.conversion.quality import analyze_compression_quality
from asrlib.conversion.statistics import Statistics, collect_statistics
from asrlib.data.batches import BucketBatchSampler, CTCCollator, CTCDataset
from asrlib.data.corpus import SAMPLE_RATE, Corpus, Utterance
from asrlib.evaluation import transcribe
from asrlib.length_benchmark import benchmark_lengths
from asrlib.models.families import family_of, frames_of, frames_per_second
from asrlib.training import (
    CTCTrainer,
    TrainingSettings,
    frozen_batch_norm,
    own_precision,
    select_trainable,
    training_arguments,
)

LONGEST = 8.0  # seconds of work that one measurement may take, as far as that can be foreseen
PASSES_OF_A_STEP = 5  # a training step costs at most: forward, backward as two, checkpoints recomputed, the teacher
PRINT_WHAT_IT_TOOK = "print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
LENGTHS = (15.0, 60.0)  # audio whose passes tell how time grows with the length


@dataclass(frozen=True)
class Rate:
    """So much work on so much audio, padding included."""

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


def timed(work: Callable[[], object]) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


def start_of_a_kernel(imports: str, folder: Path) -> tuple[float, int]:
    """(seconds, bytes of resident memory) of a new Python in `folder` that runs `imports`.

    One that waited, for the disk perhaps, is started again: the files are in memory then.
    """
    code = f"import ipykernel.kernelapp, resource, time\n{imports}\n{PRINT_WHAT_IT_TOOK}"
    command, times = [sys.executable, "-c", code], []
    while True:
        begin = perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        times.append(perf_counter() - begin)
        worked, memory = done.stdout.split()[-2:]
        if len(times) == 2 or times[0] < 1.5 * float(worked):
            break
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return min(times), unit * int(memory)


# ---- speech ------------------------------------------------------------------------------------------------


def noise(split: str, longest: float, count: int = 64) -> Corpus:
    """In place of a split that is not here, of many lengths: it takes a model as long whatever is in the audio."""
    samples_S = np.random.default_rng(0).normal(scale=0.1, size=round(longest * SAMPLE_RATE)).astype(np.float32)

    def source(seconds: float) -> io.BytesIO:
        file = io.BytesIO()
        soundfile.write(file, samples_S[: round(seconds * SAMPLE_RATE)], SAMPLE_RATE, format="WAV", subtype="FLOAT")
        file.seek(0)
        return file

    lengths = np.linspace(longest / 10, longest, count).round(2).tolist()
    rows = [Utterance(f"{split}-{i}", "A", "", s, "memory", partial(source, s)) for i, s in enumerate(lengths)]
    return Corpus("noise", split, tuple(rows))


def padded(seconds: Sequence[float], batches: Sequence[Sequence[int]]) -> float:
    """Audio in all batches, each utterance as long as the longest beside it."""
    return sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)


def typical_batch(seconds: Sequence[float], batch_seconds: float) -> list[int]:
    """Which utterances make a batch of middling length that is no longer; the shortest alone where none is."""
    fitting = [i for i, length in enumerate(seconds) if length <= batch_seconds]
    if not fitting:
        return [min(range(len(seconds)), key=seconds.__getitem__)]
    batches = list(BucketBatchSampler([seconds[i] for i in fitting], batch_seconds, shuffle=False))
    return [fitting[i] for i in batches[(len(batches) - 1) // 2]]


def chosen(corpus: Corpus, indices: Sequence[int]) -> Corpus:
    return replace(corpus, utterances=tuple(corpus[i] for i in indices))


def decoding(corpus: Corpus, processor, model) -> Rate:
    """Of reading and checking the audio, as `open_usable` does."""
    some = corpus.excerpt(60.0)
    return Rate(timed(lambda: some.usable(processor, frames_of(model))), some.seconds)


# ---- passes ------------------------------------------------------------------------------------------------


def passes(
    model, processor, corpus: Corpus, batch_seconds: float, device: str, precision: str, chunks: Chunks | None = None
) -> Rate:
    """Of transcribing: of a whole batch where that takes no longer than LONGEST, else of what does."""
    lengths = [utterance.seconds for utterance in corpus]

    def run(batch: list[int]) -> Rate:
        speech, how = chosen(corpus, batch), (batch_seconds, device, precision)
        return Rate(timed(lambda: transcribe(model, processor, speech, *how, chunks=chunks)), padded(lengths, [batch]))

    with quietly():
        batch = typical_batch(lengths, 0.0)
        run(batch)  # to warm up
        while True:
            rate = run(batch)
            batch = typical_batch(lengths, min(batch_seconds, LONGEST / rate.per_second))
            if padded(lengths, [batch]) < 1.5 * rate.audio:
                return rate


def single_passes(model, processor, corpus: Corpus, rate: Rate, device: str, precision: str) -> Rate:
    """Of utterances one at a time, as the benchmark has them; `rate` tells how long they may be."""
    room = LONGEST / 3 / rate.per_second
    some = chosen(
        corpus,
        [i for i, u in enumerate(corpus) if u.seconds <= room] or typical_batch([u.seconds for u in corpus], 0.0),
    )
    with quietly():
        spread = spread_over_durations(some, 3)
        found = benchmark({"it": model}, processor, spread, warmup=1, repeats=1, device=device, precision=precision)
    return Rate(sum(found["latencies"]["it"]) / 1000, found["seconds_audio"])


def growth_of_passes(model, processor, corpus: Corpus, device: str, precision: str) -> tuple[float, float]:
    """(a, b): a pass over L seconds of audio takes about a·L + b·L², by those of LENGTHS."""
    with quietly():
        found = benchmark_lengths({"it": model}, processor, corpus, LENGTHS, 1, device, precision)
    (short, long), (at_short, at_long) = LENGTHS, [ms / 1000 for ms in found["systems"]["it"]["ms"]]
    b = max(0.0, (at_long / long - at_short / short) / (long - short))
    return max(0.0, at_long / long - b * long), b


# ---- training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCost:
    """Of training: batches, one optimizer step each, and the memory of one."""

    batch: Rate
    weights_bytes: int  # of the model and its teacher
    optimizer_bytes: int  # its two moments of every trainable number
    step_bytes: int | None  # what a step makes besides; None where the device cannot tell
    step_audio: float  # the audio of that step, padding included
    whole: bool  # is it as long as any of the training?
    device: str  # cpu or cuda


class _GivenBatches(CTCTrainer):
    """Trains on the batches that it is given, in their order."""

    def __init__(self, *args, batches: list[list[int]], **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = batches

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)


class _StepEnds(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.times.append(perf_counter())


def training(
    model, processor, corpus: Corpus, settings: TrainingSettings, teacher, audio_per_second: float
) -> TrainingCost:
    """Steps on a typical batch for their time, one on the longest for its memory; smaller ones where they take long.

    `audio_per_second`: how much audio a second of inference passes over. The model is left as so few steps with next to
    no learning rate leave it.
    """
    dataset = CTCDataset(corpus, processor, settings.speeds)
    room = LONGEST * audio_per_second / PASSES_OF_A_STEP
    typical = typical_batch(dataset.seconds, min(settings.batch_seconds, room))
    longest, whole = typical, room >= settings.batch_seconds
    if whole:
        with quietly():
            longest = next(iter(BucketBatchSampler(dataset.seconds, settings.batch_seconds, shuffle=False)))
    gentle = replace(settings, learning_rate=1e-9, gradient_accumulation=1, scheduler="constant")
    model.config.ctc_zero_infinity, model.config.ctc_loss_reduction = True, "mean"
    trainable = select_trainable(model, settings.trainable)
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    with quietly():
        model.to(device)
        peak = peak_memory_bytes(lambda: _train(model, processor, dataset, [typical, longest], gentle, teacher), device)
        ends = _train(model, processor, dataset, [typical] * 3, gentle, teacher)
    optimizer = 2 * 4 * trainable
    return TrainingCost(
        batch=Rate((ends[2] - ends[0]) / 2, padded(dataset.seconds, [typical])),
        weights_bytes=weights_bytes(model) + (weights_bytes(teacher) if teacher else 0),
        optimizer_bytes=optimizer,
        step_bytes=None if peak is None else max(0, peak - optimizer),
        step_audio=padded(dataset.seconds, [longest]),
        whole=whole,
        device=device.type,
    )


def _train(model, processor, dataset, batches: list[list[int]], settings, teacher) -> list[float]:
    """When each step ended, seconds."""
    ends = _StepEnds()
    with tempfile.TemporaryDirectory() as folder:
        arguments = replace(
            training_arguments(Path(folder), settings, len(batches), afresh=False),
            max_steps=len(batches),
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to=[],
        )
        trainer = _GivenBatches(
            model=model,
            args=arguments,
            data_collator=CTCCollator(processor, named=True),
            train_dataset=dataset,
            callbacks=[ends],
            settings=settings,
            processor=processor,
            teacher=teacher,
            batches=batches,
        )
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        with frozen_batch_norm(model), own_precision(model, trainer):
            trainer.train()
    model.eval()
    return ends.times


def weights_bytes(model) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


# ---- conversion --------------------------------------------------------------------------------------------


class OneLayer:
    """What conversion does to a layer, on a twin of the model that has no other, with random weights.

    `corpus`: calibration speech, more than the model is wide in frames. Every method gives seconds for one layer.
    """

    def __init__(self, model, processor, corpus: Corpus, device: str):
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = 1
        self.model = family_of(config).standard_model(config).eval()
        self.processor, self.device = processor, device
        self.corpus = corpus.excerpt(max(10.0, 1.2 * config.hidden_size / frames_per_second(config)))

    @cache  # noqa: B019  an OneLayer lives as long as an estimate
    def _statistics(self, attention: bool) -> tuple[Statistics, float]:
        def collect() -> Statistics:
            speech, seconds = self.corpus, self.corpus.seconds
            return collect_statistics(
                self.model, self.processor, speech, seconds, device=self.device, attention=attention
            )

        with quietly():
            begin = perf_counter()
            return collect(), perf_counter() - begin

    @cache  # noqa: B019
    def _pass(self) -> float:
        with quietly():
            return timed(lambda: transcribe(self.model, self.processor, self.corpus, device=self.device))

    def statistics(self, attention: bool) -> Rate:
        """On top of a pass."""
        self._pass()  # to warm up
        self._statistics(attention)
        return Rate(max(0.0, self._statistics(attention)[1] - self._pass()), self.corpus.seconds)

    @cache  # noqa: B019
    def conditions(self, attention: bool) -> float:
        """Of the condition number of the covariance."""
        return timed(lambda: self._statistics(attention)[0].condition_numbers)

    @cache  # noqa: B019
    def conversion(self, layout: str, method: str, attention: bool) -> tuple[float, float, float]:
        """(of its decomposition, of a conversion by it, of the analysis of that, a second of audio)."""
        statistics, width = self._statistics(attention)[0], self.model.config.hidden_size
        with quietly():
            begin = perf_counter()
            made = decompose(self.model, layout, method, statistics)
            decomposed = perf_counter()
            how = {"layout": layout, "method": method, "statistics": statistics, "decomposition": made}
            latent = convert(self.model, width, **how)
            converted = perf_counter()
            some = chosen(self.corpus, [0])
            batch = CTCCollator(self.processor)(list(CTCDataset(some, self.processor)))
            analyze_compression_quality(self.model, latent, {k: v for k, v in batch.items() if k != "labels"})
        seconds = perf_counter() - converted
        return decomposed - begin, converted - decomposed, seconds / some.seconds

    @cache  # noqa: B019
    def grouping(self, kv_heads: int, method: str, attention: bool) -> float:
        with quietly():
            return timed(lambda: group_heads(self.model, kv_heads, method, self._statistics(attention)[0]))
