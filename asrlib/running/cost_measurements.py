"""What an estimate measures on this machine: a batch is transcribed, a few steps are trained.

Times are seconds per second of audio, with the padding of its batches. What would take longer than LONGEST is measured
on less audio.
"""

import tempfile
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

import torch
from transformers import TrainerCallback

from asrlib.data.batches import BucketBatchSampler
from asrlib.data.corpus import Corpus
from asrlib.measuring.timing import peak_memory_bytes
from asrlib.measuring.transcribing import transcribe
from asrlib.models.inference import choose_device
from asrlib.training.training import TrainingSettings, train

LONGEST = 8.0  # seconds that one measurement may take, as far as that can be foreseen
PASSES_OF_A_STEP = 5  # a training step costs at most: forward, backward as two, checkpoints recomputed, the teacher
STEPS = 3  # of training that are timed; the first one warms up


def batches_of(corpus: Corpus, batch_seconds: float) -> list[Corpus]:
    """The batches in which a run works through the corpus, longest utterances first."""
    sampler = BucketBatchSampler([utterance.seconds for utterance in corpus], batch_seconds, shuffle=False)
    return [replace(corpus, utterances=tuple(corpus[i] for i in batch)) for batch in sampler]


def padded(*batches: Corpus) -> float:
    """Seconds of audio in `batches`, with their padding."""
    return sum(len(batch) * max(utterance.seconds for utterance in batch) for batch in batches)


def typical_batch(corpus: Corpus, batch_seconds: float) -> Corpus:
    """The middle one of all batches of utterances that fit into it; the shortest utterance where none fits."""
    fitting = [utterance for utterance in corpus if utterance.seconds <= batch_seconds]
    fitting = fitting or [min(corpus, key=lambda utterance: utterance.seconds)]
    batches = batches_of(replace(corpus, utterances=tuple(fitting)), batch_seconds)
    return batches[(len(batches) - 1) // 2]


def passes(corpus: Corpus, model, processor, batch_seconds: float, device: str, precision: str) -> float:
    """The time of transcribing a typical batch."""

    def measured(batch_seconds: float) -> float:
        batch, times = typical_batch(corpus, batch_seconds), []
        for _ in range(2):  # the first warms up
            begin = perf_counter()
            transcribe(model, processor, batch, batch_seconds, device=device, precision=precision)
            times.append(perf_counter() - begin)
        return min(times) / padded(batch)

    shortest = min(utterance.seconds for utterance in corpus)
    return measured(min(batch_seconds, max(shortest, LONGEST / measured(shortest))))


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
    corpus: Corpus, model, processor, settings: TrainingSettings, teacher, pass_time: float
) -> tuple[float, int | None]:
    """(the time of training steps on a typical batch, the peak memory of steps on the largest, in bytes).

    The memory includes weights and optimizer; it is None on a device that cannot tell. `pass_time`: what `passes` gave.
    The learning rate is next to nothing, so that the model stays what it is. Raises torch.OutOfMemoryError, which names
    what to lower.
    """
    gentle = {"learning_rate": 1e-9, "scheduler": "constant", "gradient_accumulation": 1, "epochs": 1}
    gentle |= {"evaluations_per_epoch": 1, "speeds": (1.0,), "training_strategy": "ddp"}
    device, models = choose_device(settings.device, model), [model, teacher] if teacher else [model]
    for loaded in models:
        loaded.to(device)  # what is there before is no part of the peak
    batch = typical_batch(corpus, min(settings.batch_seconds, LONGEST / (PASSES_OF_A_STEP * pass_time)))
    repeated = replace(batch, utterances=batch.utterances * STEPS)

    def step_seconds() -> float:
        stopwatch, measured = _Stopwatch(), replace(settings, **gentle, batch_seconds=padded(batch))
        with tempfile.TemporaryDirectory() as folder:
            train(model, processor, repeated, batch[-1:], folder, measured, teacher, [stopwatch])
        return min(after - before for before, after in pairwise(stopwatch.ends))

    time, peak = step_seconds() / padded(batch), peak_memory_bytes(step_seconds, device)
    if peak is None:
        return time, None
    weights = sum(p.numel() * p.element_size() for loaded in models for p in loaded.parameters())
    optimizer = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # gradients, two moments
    larger = max(map(padded, batches_of(corpus, settings.batch_seconds))) / padded(batch)
    return time, weights + optimizer + round(larger * max(0, peak - optimizer))
