"""What a run would take on this machine, before anything starts: `run_all.py NAME --estimate`.

A step that ran here before, with the same parameters and needing the same steps, is expected to take as long again. Of
others a function below says how much they do, and cost_measurements.py how long a little of that takes. What changes
the sum by less than some 10 % is left out. Nothing is downloaded, and metrics/estimate.json is all that is written: the
index page sets it beside what the run took.
"""

import io
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import torch
from transformers import AutoConfig, AutoModelForCTC, Wav2Vec2ConformerConfig

from asrlib.attention.cache import cached_widths, kv_cache_bytes
from asrlib.attention.names import encoder_config
from asrlib.conversion.convert import latent_dim_for
from asrlib.conversion.methods import METHODS, latent_methods
from asrlib.conversion.ranks import PROBED_SHARES
from asrlib.conversion.statistics import SAMPLE_FRAMES
from asrlib.data.corpus import HUB_ID, Corpus
from asrlib.data.opening import open_corpus
from asrlib.measuring.names import LONG_PASS
from asrlib.measuring.random_models import PUBLISHED, noise
from asrlib.measuring.recipes import RECIPES
from asrlib.measuring.speed import spread_over_durations
from asrlib.measuring.timing import DTYPES, measured_on
from asrlib.models.inference import choose_device
from asrlib.models.loading import load, resolve_model
from asrlib.models.registry import FAMILIES, family_of, frames_of, frames_per_second
from asrlib.models.scratch import SIZES, WHISPER, new_model, new_processor
from asrlib.reporting.estimated import UNCHANGED
from asrlib.reporting.numbers import duration
from asrlib.running import cost_measurements as measure
from asrlib.running.cost_card import BEFORE, Cost, in_all, summed
from asrlib.running.cost_measurements import Rate, batches_of, padded
from asrlib.running.parameters import Schema
from asrlib.running.pipeline import pending, plan, seconds_before
from asrlib.running.sweeps import Member, Sweep
from asrlib.runs import BadParameter, resolve
from asrlib.streaming.streams import chunks_of
from asrlib.training.training import TrainingSettings

PUBLISHED_CONFIGS = {"facebook/wav2vec2-conformer-rel-pos-large-960h-ft": PUBLISHED}  # of models not here yet
NOISE = {"seconds": 12.0, "count": 64}  # where there is no speech: about LibriSpeech's mean length
ANALYSED_WIDTHS = 7  # of every recipe with uniform ranks, in 02_analyze_svd_error
CACHE_FRAMES = 1000


# ---- each notebook: amounts × rates ------------------------------------------------------------------------


def _baseline(work: "Workload") -> list[Cost]:
    p, costs = work.p, []
    if p.baseline_epochs:
        names = ("epochs", "batch_seconds", "gradient_checkpointing", "precision")
        given = {name: getattr(p, f"baseline_{name}") for name in names}
        settings = TrainingSettings(trainable="all", speeds=tuple(p.speeds), device=p.device, **given)
        speech = work.speech(p.train_split, p.baseline_samples), work.speech(p.validation_split)
        costs = work.training("00_baseline", work.baseline, *speech, settings)
    passes = work.passes("test splits, with attention and without", work.baseline, *work.tests, times=2)
    return [*costs, work.opening(*work.tests), passes]


def _convert(work: "Workload") -> list[Cost]:
    p, probed = work.p, work.p.ranks == "sensitivity" and work.p.convert_to == "mla"
    costs = work.statistics(p.method) if METHODS[p.method].needs_statistics or probed else []
    return [*costs, work.conversions(p.method, p.layout, p.method, 1, probed)]  # at full width nothing is searched


def _analyse(work: "Workload") -> list[Cost]:
    p, costs, rows, analysed = work.p, work.statistics("attended"), 2, 0
    for one in (RECIPES[name] for name in p.analysis_methods):
        layout, ranks = getattr(one, "layout", "joint"), getattr(one, "ranks", None)  # GQA has neither
        widths = ANALYSED_WIDTHS * (ranks == "uniform")
        cuts = sum(not one.obstacle(work.baseline.config, cut) for cut in set(p.analysis_cuts))
        rows, analysed = rows + cuts, analysed + widths
        costs.append(work.conversions(one.name, layout, one.method, cuts + widths, ranks == "sensitivity"))
    few, more = (work.speech(p.validation_split, count) for count in (p.analysis_samples, p.analysis_eval_samples))
    for what, speech, times in (("errors inside", few, 2 * analysed), ("word errors of", more, rows)):
        costs.append(work.passes(f"{what} systems", work.baseline, speech, times=times, precision="fp32"))
    return costs


def _finetune(work: "Workload") -> list[Cost]:
    p, names = work.p, TrainingSettings.__dataclass_fields__.keys() - {"speeds"}
    settings = TrainingSettings(**{name: getattr(p, name) for name in names})
    teacher = work.baseline if p.kl_weight or p.hidden_weight else None
    speech = work.speech(p.train_split, p.train_samples), work.speech(p.validation_split, p.validation_samples)
    return work.training("03_finetune", work.converted, *speech, settings, teacher)


def _evaluate(work: "Workload") -> list[Cost]:
    p, lefts = work.p, work.p.stream_left_seconds
    costs = [work.passes("test splits, converted and fine-tuned", work.converted, *work.tests, times=2)]
    formats = len(p.stream_caches) + sum(name.startswith("int") for name in p.stream_caches)  # these turned, too
    for chunk in filter(None, p.stream_chunks_ms):
        chunks = chunks_of(work.baseline.config, chunk, max(lefts), p.stream_lookahead_ms)
        how = {"times": 2 * (len(lefts) - 1 + formats), "batch_seconds": p.batch_seconds / 2, "chunks": chunks}
        costs.append(work.passes(f"chunks of {chunk:g} ms", work.converted, work.tests[0], **how))
    return [work.opening(*work.tests), *costs]


def _benchmark(work: "Workload") -> list[Cost]:
    costs = [one.timings(name, getattr(one, which)) for name, one, which in work.systems]
    streams = [Cost("chunks of streams", None, "unknown: not foreseen")] if work.p.benchmark_left_seconds else []
    compiled = [Cost("compiled models", None, "unknown: not foreseen")] if work.p.benchmark_compiled else []
    return costs + compiled + streams


STEPS: dict[str, Callable[["Workload"], list[Cost]]] = {
    "00_baseline": _baseline,
    "01_convert": _convert,
    "02_analyze_svd_error": _analyse,
    "03_finetune": _finetune,
    "04_evaluate": _evaluate,
    "05_benchmark": _benchmark,
    "06_compare": lambda work: [],
}


# ---- what a run works on, as far as it is here -------------------------------------------------------------


class Workload:
    """The models and the speech of one run, and what work with them costs."""

    def __init__(self, values: Mapping[str, Any], known: dict, say: Callable[[str], None] = lambda text: None):
        """`values` of every parameter; `known`: what was measured for other members of a sweep; `say`: what is."""
        self.p, self.known, self.say = SimpleNamespace(**values), known, say
        self.missing: dict[str, None] = {}  # what the estimate had to do without, in words
        self.memory: dict[str, dict] = {}  # of steps that train: {bytes, source}
        self.systems = [(name, self, "converted") for name in ("converted", "finetuned")]
        self.systems.insert(0, ("baseline", self, "baseline"))
        self.baseline, self.processor = self._load()

    def rate(self, measurement: Callable, speech: Corpus, model, *how: Any) -> Any:
        """What a function of cost_measurements.py says of `model`, once for all models of its size."""
        sizes = [f"{name}={value}" for name, value in model.config.to_dict().items() if not name.startswith("ctc_")]
        key = (measurement.__name__, self.p.corpus, *sizes, *how)
        if key not in self.known:
            self.say(measurement.__name__.replace("_", " "))
            self.known[key] = measurement(speech, model, self.processor, *how)
        return self.known[key]

    def _load(self) -> tuple:
        """(baseline, its processor); with random weights where there are none here."""
        p = self.p
        if p.architecture == WHISPER:
            _refuse(WHISPER)
        if p.architecture is not None:
            processor = new_processor(p.architecture, p.mel_bins, p.frame_shift_ms)
            sizes = {size: getattr(p, name) for size, name in SIZES.items()}
            return new_model(p.architecture, processor, p.seed, **sizes), processor
        try:
            config = AutoConfig.from_pretrained(resolve_model(p.model), revision=p.revision or "main")
        except (OSError, ValueError):  # told below
            config = None
        if config is not None and config.model_type in FAMILIES and family_of(config).head.reads_labels:
            _refuse(config.model_type)
        try:
            return load(p.model, p.revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
        self.missing[f"weights: random ones of the same size took their place, since {reason}"] = None
        if config is None:
            if p.model not in PUBLISHED_CONFIGS:
                raise BadParameter(f"{reason}. To estimate, its config.json at least must be here") from None
            config = Wav2Vec2ConformerConfig(**PUBLISHED_CONFIGS[p.model])
        return AutoModelForCTC.from_config(config).eval(), new_processor()

    @cached_property
    def converted(self):
        """A model as the conversion makes it, but with random weights."""
        config, p = self.baseline.config, self.p
        family = family_of(config)
        if p.convert_to == "gqa":
            return family.standard_model(family.to_grouped(config, p.kv_heads)).eval()
        width = (
            latent_dim_for(p.cache_cut, encoder_config(config).hidden_size) if p.cache_cut is not None else p.latent_dim
        )
        widths = [width] * len(cached_widths(config))
        latent = family.to_latent(config, latent_dim=widths, latent_layout=p.layout, latent_key_dim=[])
        return family.latent_model(latent).eval()

    def cache(self, model) -> dict:
        """What a stream keeps, by the formula, beside the same encoder with multi-head attention; bytes."""
        dtype, mha = DTYPES[self.p.precision], family_of(model.config).to_standard(self.baseline.config)
        kept, of_mha = (kv_cache_bytes(config, CACHE_FRAMES, dtype) for config in (model.config, mha))
        return {"frames": CACHE_FRAMES, "dtype": dtype, "bytes": kept, "mha_bytes": of_mha}

    def speech(self, split: str, samples: int | None = None, seconds: float = math.inf) -> Corpus:
        """As `open_usable` gives it, by the headers of the audio; noise in place of what is not here."""
        p = self.p
        whole = _open(p.corpus, split)
        if whole.name == "noise":
            where = "the run downloads it; to know its hours now, give a folder that holds it: --set corpus=DIR"
            self.missing[f"{p.corpus} {split} is not on this machine: {where}"] = None
            return whole
        some = whole.sample(samples, p.seed).excerpt(seconds, p.seed)
        return some.usable(self.processor, frames_of(self.baseline), check_audio=False)

    @cached_property
    def tests(self) -> list[Corpus]:
        return [self.speech(split, self.p.eval_samples) for split in self.p.eval_splits]

    @cached_property
    def calibration(self) -> Corpus:
        return self.speech(self.p.train_split, seconds=self.p.calibration_seconds)

    def heard(self, what: str, rate: Rate, *speech: Corpus, times: float = 1, batch_seconds: float = 0) -> Cost:
        """`rate` on all of `speech` so many times, padded as in batches; with 0, as it is."""
        if any(one.name == "noise" for one in speech):
            hour = duration(3600 * times * rate.per_second)
            return Cost(what, None, f"unknown: an hour of speech takes {hour}")
        audio = [padded(*batches_of(one, batch_seconds)) if batch_seconds else one.seconds for one in speech]
        return Cost(what, times * sum(audio) * rate.per_second, f"scaled from {rate.audio:.0f} s of audio")

    def opening(self, *speech: Corpus) -> Cost:
        rate = self.rate(measure.decoding, speech[0], self.baseline)
        return self.heard(f"opening {', '.join(dict.fromkeys(one.split for one in speech))}", rate, *speech)

    def passes(self, what: str, model, *speech: Corpus, times: float, **how) -> Cost:
        """Transcribing so many times."""
        rate, batch_seconds = self.pass_rate(model, **how), how.get("batch_seconds", self.p.batch_seconds)
        return self.heard(f"{what}: {times} passes", rate, *speech, times=times, batch_seconds=batch_seconds)

    def pass_rate(self, model, **how) -> Rate:
        how = {name: getattr(self.p, name) for name in ("batch_seconds", "device", "precision")} | how
        return self.rate(measure.passes, self.tests[0], model, *how.values())

    def training(self, step: str, model, speech: Corpus, validation: Corpus, settings, teacher=None) -> list[Cost]:
        how = {"batch_seconds": settings.batch_seconds, "precision": settings.precision}
        audio_per_second = 1 / self.pass_rate(model, **how).per_second
        rate, n_bytes, source = self.rate(measure.training, speech, model, settings, teacher, audio_per_second)
        if n_bytes is not None:
            self.memory[step] = {"bytes": n_bytes, "source": source}
        processes = self.p.training_processes if torch.cuda.is_available() else 1  # on a CPU they share its cores
        times = settings.epochs * sum(1 / speed for speed in settings.speeds) / processes
        epochs, evaluations = settings.epochs, 1 + math.ceil(settings.epochs * settings.evaluations_per_epoch)
        return [
            self.opening(speech, validation),
            self.heard(f"{epochs:g} epochs at most", rate, speech, times=times, batch_seconds=settings.batch_seconds),
            self.passes("validation", model, validation, times=evaluations, **how),
        ]

    def layer(self, layout: str, method: str) -> tuple[Rate, float, float]:
        if not METHODS[method].makes_latents:
            method = latent_methods()[0]  # the mean is GQA's, and as quick
        how = self.p.device, layout, method
        return self.rate(measure.one_layer, self.calibration, self.baseline, *how)

    def statistics(self, method: str) -> list[Cost]:
        layer, layers = self.layer("joint", method)[0], encoder_config(self.baseline.config).num_hidden_layers
        passing = self.pass_rate(self.baseline, precision="fp32").per_second
        rate = Rate(passing * layer.audio + layers * layer.seconds, layer.audio)
        return [self.opening(self.calibration), self.heard("statistics of calibration speech", rate, self.calibration)]

    def conversions(self, name: str, layout: str, method: str, count: int, probed: bool) -> Cost:
        """Of every layer; where it is `probed` for its sensitivity, once more for each rank, with a pass on the CPU."""
        config, probes = self.baseline.config, len(PROBED_SHARES) * probed
        _, decomposing, converting = self.layer(layout, method)
        seconds = decomposing + (count + probes) * converting
        if probed:
            rate = self.pass_rate(self.baseline, precision="fp32", device="cpu")
            seconds += probes * rate.per_second * SAMPLE_FRAMES / frames_per_second(config)
        what = f"{name}: {count + probes} conversions"
        return Cost(what, encoder_config(config).num_hidden_layers * seconds, "scaled from one layer")

    def timings(self, name: str, model) -> Cost:
        """What the benchmark takes for one model: one utterance at a time, then lengths of audio."""
        p, speech = self.p, self.speech(self.p.eval_splits[0])
        a, b = self.rate(measure.growth_of_passes, speech, model, p.device, p.precision)
        lengths = [one.seconds for one in spread_over_durations(speech, p.benchmark_samples)]
        once = [a * s + b * s**2 for s in [*3 * lengths, *4 * [max(lengths)]]]  # repeats; to warm up, for the memory
        each = [a * s + b * s**2 for s in p.benchmark_seconds]
        repeated = sum(one * (5 if one <= LONG_PASS else 1) for one in each if one <= p.benchmark_pass_seconds)
        return Cost(f"{name}: single passes", sum(once) + repeated, "scaled from passes over 5 and 30 s of audio")


def _refuse(model_type: str) -> None:
    raise BadParameter(
        f"no estimate for a {model_type}: it takes as long as what it writes, which random weights, in place of those "
        "to come, cannot tell"
    )


@cache
def _open(source: str, split: str) -> Corpus:
    """The split if it is on this machine, noise if it is a hub's. Raises BadParameter for what cannot be opened."""
    try:
        return open_corpus(source, split)
    except (FileNotFoundError, ValueError) as error:
        if resolve(source).exists() or not re.fullmatch(HUB_ID, str(source)):
            raise BadParameter(str(error)) from None
    return noise(**NOISE, split=split)


# ---- runs and sweeps ---------------------------------------------------------------------------------------


def estimate(
    root: Path,
    schema: Schema,
    runs: list[Member],
    redo: list[str],
    sweep: Sweep | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Of each of `runs`, and of what compares them as `sweep` asks; of `redo`, steps that run again even if unchanged.
    `say` is told what is measured.

    Each is kept in its run's metrics/estimate.json: {run, made, load (processes that wished to work, over a minute),
    device, threads, dtype, seconds, whole, steps, memory, cache, missing}, in seconds and bytes; `whole` is false where
    the sum lacks something, which `missing` names. Raises BadParameter where a run could not begin.
    """
    known: dict = {}
    with _offline():
        works = [Workload(schema.defaults | planned.values, known, say) for planned in runs]
        estimates = [_estimate_one(root, planned, redo, work) for planned, work in zip(runs, works, strict=True)]
        if sweep is not None:
            finished = {planned.name: planned.fingerprint_for(sweep.comparing) for planned in runs}  # as they will be
            steps = plan(root, sweep.run, schema, sweep.values, sweep.comparing, finished)
            work = Workload(schema.defaults | sweep.values, known, say)
            work.systems = [(one.name, each, _last(one)) for one, each in zip(runs, works, strict=True)]
            estimates.append(_estimate_one(root, Member(sweep.run, sweep.values, steps), redo, work))
    return estimates


def _last(planned: Member) -> str:
    """The last model that it makes, as Workload calls it."""
    return "converted" if "01_convert" in [step.name for step in planned.steps] else "baseline"


def _estimate_one(root: Path, planned: Member, redo: list[str], work: Workload) -> dict:
    waiting, steps = pending(planned.run, planned.steps, redo), {}
    for index, step in enumerate(planned.steps):
        if step not in waiting:
            costs = [Cost("nothing to do", 0.0, UNCHANGED)]
        elif (seconds := seconds_before(root, planned.steps[: index + 1])) is not None:
            costs = [Cost("the notebook", seconds, BEFORE)]
        else:
            costs = [Cost("start of its kernel, imports", measure.start_of_a_kernel()), *_costs(step.name, work)]
        steps[step.name] = {"fingerprint": step.fingerprint, **summed(costs)}
    makes_models = {"00_baseline", "01_convert"} & {step.name for step in waiting}
    found = {
        "run": planned.run.path.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load": os.getloadavg()[0],
        **measured_on(choose_device(work.p.device, None), work.p.precision),
        **in_all(steps.values()),
        "steps": steps,
        "memory": work.memory,
        "cache": work.cache(getattr(work, _last(planned))) if makes_models else None,
        "missing": list(work.missing),
    }
    planned.run.write_metrics("estimate", found)
    return found


def _costs(step: str, work: Workload) -> list[Cost]:
    if step not in STEPS:
        return [Cost("the notebook", None, "unknown: never timed")]
    try:
        return STEPS[step](work)
    except ValueError as error:
        raise BadParameter(f"{step} cannot run: {error}") from error
    except torch.OutOfMemoryError as error:
        work.missing[f"memory for {step}: {error}"] = None
        return [Cost("the notebook", None, "unknown: it does not fit into memory")]


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries look at what is on this machine alone; no progress bars, no warnings of what is small."""
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
