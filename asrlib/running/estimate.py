"""What a run would take on this machine, before anything starts: `run_all.py NAME --estimate`.

A step that ran here before, with the same parameters, is expected to take as long again. Of other steps, training and
passes over speech are measured on a batch. The rest is unknown, and the sum is then a lower bound. Nothing is
downloaded, and nothing but metrics/estimate.json is written. Times are seconds, memory is in bytes.
"""

import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import huggingface_hub.constants
import torch

from asrlib.attention.cache import cached_widths, kv_cache_bytes
from asrlib.attention.names import encoder_config
from asrlib.conversion.convert import latent_dim_for
from asrlib.data.corpus import Corpus
from asrlib.data.opening import open_corpus
from asrlib.measuring.timing import DTYPES, measured_on
from asrlib.models.inference import choose_device
from asrlib.models.loading import load
from asrlib.models.registry import family_of, frames_of
from asrlib.models.scratch import SIZES, new_model, new_processor
from asrlib.reporting.estimated import UNCHANGED
from asrlib.reporting.numbers import change, duration, size
from asrlib.running import cost_measurements as measure
from asrlib.running.pipeline import pending, seconds_before
from asrlib.running.sweeps import Member
from asrlib.training.rates import SHARE
from asrlib.training.training import TrainingSettings

CACHE_FRAMES = 1000


class Cost(NamedTuple):
    """A part of a step, its time, and the source of that time."""

    what: str
    seconds: float | None = None  # None: unknown
    source: str = "unknown: never timed here"


class Workload:
    """The models and the speech of one run, and what its steps cost."""

    def __init__(self, values: Mapping[str, Any], known: dict):
        """`values` of every parameter; `known`: what was measured for other members of a sweep."""
        self.p, self.known = SimpleNamespace(**values), known
        self.missing: dict[str, None] = {}  # what the estimate lacks, in words
        self.memory: dict[str, int] = {}  # the peak of each step that trains

    def costs(self, step: str) -> list[Cost]:
        """What `step` costs, as far as it can be foreseen; `missing` then says what cannot."""
        try:
            return list(self._foreseen(step))
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            self.missing[str(error).splitlines()[0]] = None
            return [Cost("the notebook", None, "unknown: see below")]

    def _foreseen(self, step: str) -> Iterator[Cost]:
        p = self.p
        if step == "00_baseline":
            if p.baseline_epochs:
                names = ("epochs", "batch_seconds", "gradient_checkpointing", "precision")
                given = {name: getattr(p, f"baseline_{name}") for name in names}
                settings = TrainingSettings(trainable="all", speeds=tuple(p.speeds), device=p.device, **given)
                yield self._training(step, self.baseline, settings, p.baseline_samples)
            yield self._passes("the test splits, with attention and without", self.baseline, 2, *self._tests())
        elif step == "02_analyze_svd_error":
            systems = 2 + len(p.analysis_methods) * len(set(p.analysis_cuts))
            speech = self._speech(p.validation_split, p.analysis_eval_samples)
            yield self._passes(f"word errors of {systems} systems", self.baseline, systems, speech)
            yield Cost("their conversions, errors inside the layers")
        elif step == "03_finetune":
            names = TrainingSettings.__dataclass_fields__.keys() - {"speeds", "parts"}
            settings = TrainingSettings(**{name: getattr(p, name) for name in names})
            teacher = self.baseline if p.kl_weight or p.hidden_weight else None
            yield self._training(step, self.converted, settings, p.train_samples, teacher)
            if p.control:
                yield self._training(step, self.baseline, settings, p.train_samples, teacher)
            if p.learning_rates:
                tried = replace(settings, epochs=SHARE * settings.epochs * len(p.learning_rates))
                yield self._training(step, self.converted, tried, p.train_samples, teacher)
        elif step == "04_evaluate":
            yield self._passes("the test splits, converted and fine-tuned", self.converted, 2, *self._tests())
            if p.stream_chunks_ms:
                yield Cost("recognition in chunks")
        else:
            yield Cost("the notebook")

    def _passes(self, what: str, model, times: int, *speech: Corpus) -> Cost:
        p = self.p
        rate = self._rate(measure.passes, speech[0], model, p.batch_seconds, p.device, p.precision)
        return Cost(f"{what}: {times} passes", times * rate * _audio(p.batch_seconds, *speech), "measured on a batch")

    def _training(self, step: str, model, settings: TrainingSettings, samples: int | None, teacher=None) -> Cost:
        """All epochs, without their validation; the memory is kept under the name of the step."""
        p, batch_seconds, speech = self.p, settings.batch_seconds, self._speech(self.p.train_split, samples)
        passing = self._rate(measure.passes, speech, model, batch_seconds, settings.device, settings.precision)
        rate, self.memory[step] = self._rate(measure.training, speech, model, settings, teacher, passing)
        processes = p.training_processes if torch.cuda.is_available() else 1  # on a CPU they share its cores
        times = settings.epochs * sum(1 / speed for speed in settings.speeds) / processes
        seconds = times * rate * _audio(batch_seconds, speech)
        return Cost(f"{settings.epochs:g} epochs at most", seconds, "measured on a few steps")

    def _rate(self, measurement: Callable, speech: Corpus, model, *settings: Any) -> Any:
        """What a function of cost_measurements.py says of `model`, measured once for all models of its size."""
        sizes = {name: value for name, value in model.config.to_dict().items() if not name.startswith("ctc_")}
        key = (measurement, self.p.corpus, str(sizes), *settings)
        if key not in self.known:
            self.known[key] = measurement(speech, model, self.processor, *settings)
        return self.known[key]

    def _tests(self) -> list[Corpus]:
        return [self._speech(split, self.p.eval_samples) for split in self.p.eval_splits]

    def _speech(self, split: str, samples: int | None) -> Corpus:
        """What a run opens, judged by the headers of its audio."""
        sample = open_corpus(self.p.corpus, split).sample(samples, self.p.seed)
        return sample.usable(self.processor, frames_of(self.baseline), check_audio=False)

    @property
    def baseline(self):
        return self._loaded[0]

    @property
    def processor(self):
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple:
        p = self.p
        if p.architecture is None:
            model, processor = load(p.model, p.revision)
        else:
            processor = new_processor(p.architecture, p.mel_bins, p.frame_shift_ms)
            model = new_model(p.architecture, processor, p.seed, **{of: getattr(p, name) for of, name in SIZES.items()})
        if family_of(model.config).head.reads_labels:
            written = model.config.model_type
            raise ValueError(f"there is no estimate for {written}, since its time depends on the text that it writes")
        return model, processor

    @cached_property
    def converted(self):
        """A model as the conversion makes it, but with random weights."""
        config, p = self.baseline.config, self.p
        family = family_of(config)
        if p.convert_to == "gqa":
            return family.standard_model(family.to_grouped(config, p.kv_heads)).eval()
        by_cut = p.cache_cut is not None
        width = latent_dim_for(p.cache_cut, encoder_config(config).hidden_size) if by_cut else p.latent_dim
        widths = [width] * len(cached_widths(config))
        latent = family.to_latent(config, latent_dim=widths, latent_layout=p.layout, latent_key_dim=[])
        return family.latent_model(latent).eval()

    def cache(self, model) -> dict:
        """The cache of one stream by the formula, beside that of the same encoder with multi-head attention."""
        dtype, mha = DTYPES[self.p.precision], family_of(model.config).to_standard(self.baseline.config)
        cached, of_mha = (kv_cache_bytes(config, CACHE_FRAMES, dtype) for config in (model.config, mha))
        return {"frames": CACHE_FRAMES, "dtype": dtype, "bytes": cached, "mha_bytes": of_mha}


def _audio(batch_seconds: float, *speech: Corpus) -> float:
    """Seconds of all of `speech`, padded as in batches."""
    return sum(measure.padded(*measure.batches_of(corpus, batch_seconds)) for corpus in speech)


def estimate(root: Path, defaults: Mapping[str, Any], runs: list[Member], redo: list[str]) -> list[dict]:
    """The estimate of each of `runs`, to the values of which `defaults` are added.

    `redo`: steps that run again even if unchanged. Each estimate is written to its run's metrics/estimate.json: {run,
    made, device, threads, dtype, seconds, whole, steps, memory, cache, missing}; `whole` is false where the sum lacks
    something.
    """
    known: dict = {}
    with _offline(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # of what is small, and progress bars
        warnings.simplefilter("ignore")
        return [_estimate_run(root, run, redo, Workload(defaults | run.values, known)) for run in runs]


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries look at what is on this machine alone."""
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _estimate_run(root: Path, planned: Member, redo: list[str], work: Workload) -> dict:
    waiting, steps = pending(planned.run, planned.steps, redo), {}
    for index, step in enumerate(planned.steps):
        if step not in waiting:
            costs = [Cost("nothing to do", 0.0, UNCHANGED)]
        elif (seconds := seconds_before(root, planned.steps[: index + 1])) is not None:
            costs = [Cost("the notebook", seconds, "timed before")]
        else:
            costs = work.costs(step.name)
        sources = dict.fromkeys(cost.source for cost in costs if cost.seconds is not None)
        known = {"seconds": sum(cost.seconds or 0.0 for cost in costs), "source": " and ".join(sources) or "unknown"}
        whole = all(cost.seconds is not None for cost in costs)
        costs = [cost._asdict() for cost in costs]
        steps[step.name] = {"fingerprint": step.fingerprint, **known, "whole": whole, "costs": costs}
    makes_models = {"00_baseline", "01_convert"} & {step.name for step in waiting} and not work.missing
    estimated = {
        "run": planned.run.path.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **measured_on(choose_device(work.p.device, None), work.p.precision),
        **_in_all(steps.values()),
        "steps": steps,
        "memory": work.memory,
        "cache": work.cache(work.converted if "01_convert" in steps else work.baseline) if makes_models else None,
        "missing": list(work.missing),
    }
    planned.run.write_metrics("estimate", estimated)
    return estimated


def _in_all(parts: Iterable[dict]) -> dict:
    parts = list(parts)
    return {"seconds": sum(part["seconds"] for part in parts), "whole": all(part["whole"] for part in parts)}


def as_text(estimates: list[dict]) -> str:
    """The card that `run_all.py --estimate` prints: of a run, or of all members of a sweep and of their comparison."""
    lines = ["what is expected on {device}, threads: {threads}; nothing has been run".format(**estimates[0])]
    for estimated in estimates:
        lines += ["", _line(estimated["run"], estimated), *_lines(estimated)]
    lines += ["", _line("in all", _in_all(estimates))] if len(estimates) > 1 else []
    reasons = dict.fromkeys(reason for estimated in estimates for reason in estimated["missing"])
    return "\n".join([*lines, *(f"missing: {reason}" for reason in reasons)])


def _lines(estimated: dict) -> Iterator[str]:
    for name, step in estimated["steps"].items():
        yield _line(f"  {name}", step)
        for cost in step["costs"]:
            yield _line(f"    {cost['what']}", cost)
    for name, n_bytes in estimated["memory"].items():
        yield _row(f"  peak memory, {name}", "unknown" if n_bytes is None else size(n_bytes))
    if cache := estimated["cache"]:
        saved = f"{change(cache['bytes'], cache['mha_bytes'])} of MHA's {size(cache['mha_bytes'])}, by the formula"
        yield _row(f"  cache of {cache['frames']} frames, {cache['dtype']}", size(cache["bytes"]), saved)


def _line(what: str, part: dict) -> str:
    whole = part.get("whole", part["seconds"] is not None)
    amount = duration(part["seconds"]) if part["seconds"] or whole else "?"
    return _row(what, amount if whole or amount == "?" else f"> {amount}", part.get("source", ""))


def _row(what: str, amount: str, source: str = "") -> str:
    return f"{what:<56}{amount:>14}  {source}".rstrip()
