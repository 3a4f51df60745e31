"""What a run would take on this machine, before anything starts: `run_all.py NAME --estimate`.

A step that ran here before, with the same parameters and after the same steps, is expected to take as long again. Of
others a function below says how much they do, and cost_measurements.py how long a little of that takes. What changes
the sum by less than some 10 % is left out. Nothing is downloaded, and metrics/estimate.json is all that is written: the
index page sets it beside what the run took.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, Wav2Vec2ConformerConfig

from asrlib import cost_measurements as measure
from asrlib.attention.cache import kv_cache_bytes
from asrlib.benchmark import DTYPES, measured_on, spread_over_durations
from asrlib.conversion.convert import latent_dim_for
from asrlib.conversion.factorize import METHODS, NEEDS_STATISTICS
from asrlib.conversion.ranks import PROBED_SHARES
from asrlib.conversion.recipes import RECIPES
from asrlib.conversion.statistics import SAMPLE_FRAMES
from asrlib.cost_card import BEFORE, UNCHANGED, Cost, in_all, summed
from asrlib.cost_measurements import Rate
from asrlib.data.corpus import HUB_ID, Corpus, open_corpus
from asrlib.figures import duration
from asrlib.length_benchmark import LONG_PASS, PUBLISHED, noise
from asrlib.models.families import family_of, frames_of, frames_per_second, load, resolve_model
from asrlib.models.inference import choose_device
from asrlib.models.scratch import SIZES, new_model, new_processor
from asrlib.parameters import BadParameter, Schema
from asrlib.pipeline import Step, first_to_run, plan, seconds_before
from asrlib.runs import Run, resolve
from asrlib.streaming import chunks_of
from asrlib.sweeps import Sweep
from asrlib.training import TrainingSettings

PUBLISHED_CONFIGS = {"facebook/wav2vec2-conformer-rel-pos-large-960h-ft": PUBLISHED}  # of models not here yet
NOISE = {"seconds": 12.0, "count": 64}  # where there is no speech: about LibriSpeech's mean length
ANALYSED_WIDTHS = 7  # of every recipe with uniform ranks, in 02_analyze_svd_error
CACHE_FRAMES = 1000


# ---- runs and sweeps ---------------------------------------------------------------------------------------


def estimate_run(
    root: Path, run: Run, schema: Schema, values: Mapping[str, Any], steps: list[Step], redo: list[str]
) -> dict:
    """Of the planned `steps`, of which `redo` run again even if unchanged; written to metrics/estimate.json too.

    {run, made, device, threads, dtype, seconds, whole, steps, memory, cache, missing}: seconds, bytes; `whole` is false
    where the sum lacks something, which `missing` names. Raises BadParameter where the run could not begin.
    """
    work = Workload(schema, values, {})
    return _kept(run, work, _of_run(root, run, steps, redo, work))


def estimate_sweep(sweep: Sweep, redo: list[str]) -> dict:
    """Of all members together, and of the steps that compare them; under `members` that of each."""
    known, members, works = {}, {}, {}
    for member in sweep.members:
        works[member.name] = work = Workload(sweep.schema, member.values, known)
        members[member.name] = _of_run(sweep.root, member.run, member.steps, redo, work)
    finished = {member.name: member.steps[-1].fingerprint for member in sweep.members}  # as they will be
    comparison = plan(sweep.root, sweep.run, sweep.schema, sweep.values, sweep.comparing, finished)

    def benchmark(_) -> list[Cost]:
        return [cost for name, work in works.items() for cost in work.timings(name, work.last)]

    steps = _of_steps(sweep.root, sweep.run, comparison, redo, work, STEPS | {"05_benchmark": benchmark})
    missing = dict.fromkeys(reason for each in works.values() for reason in each.missing)
    found = {"steps": steps, "members": members, "missing": list(missing), **in_all(members | steps)}
    return _kept(sweep.run, work, found)


def _kept(run: Run, work: "Workload", found: dict) -> dict:
    estimate = {"run": run.path.name, "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    estimate |= measured_on(choose_device(work.p.device, torch.nn.Linear(1, 1)), work.p.precision) | found
    run.write_metrics("estimate", estimate)
    return estimate


def _of_run(root: Path, run: Run, steps: list[Step], redo: list[str], work: "Workload") -> dict:
    work.converts = "01_convert" in [step.name for step in steps]
    found = _of_steps(root, run, steps, redo, work, STEPS)
    changed = any(step["source"] != UNCHANGED for step in found.values())
    cache = work.cache if changed else None
    return {"steps": found, "memory": work.memory, "cache": cache, "missing": list(work.missing), **in_all(found)}


def _of_steps(root: Path, run: Run, steps: list[Step], redo: list[str], work: "Workload", functions: Mapping) -> dict:
    names, found = [step.name for step in steps], {}
    start = min([first_to_run(run, steps), *(names.index(name) for name in redo if name in names)])
    for index, step in enumerate(steps):
        if index < start:
            costs = [Cost("nothing to do", 0.0, UNCHANGED)]
        elif (seconds := seconds_before(root, steps[: index + 1])) is not None:
            costs = [Cost("the notebook", seconds, BEFORE)]
        else:
            costs = [Cost("start of its kernel, imports", work.start), *_costs(step.name, work, functions)]
        found[step.name] = {"fingerprint": step.fingerprint, **summed(costs)}
    return found


def _costs(step: str, work: "Workload", functions: Mapping[str, Callable]) -> list[Cost]:
    if step not in functions:
        return [Cost("the notebook", None, "unknown: never timed, and nothing that can be measured")]
    try:
        return functions[step](work)
    except ValueError as error:
        raise BadParameter(f"{step} cannot run: {error}") from error
    except torch.OutOfMemoryError as error:
        work.missing[f"memory for {step}: {error}"] = None
        return [Cost("the notebook", None, "unknown: it does not fit into memory")]


# ---- what a run works on, as far as it is here -------------------------------------------------------------


class Workload:
    """The models and the speech of one run, and what work with them costs."""

    def __init__(self, schema: Schema, values: Mapping[str, Any], known: dict):
        """`known`: what was measured, or opened, for other members of a sweep."""
        both = schema.defaults | dict(values)
        self.p = SimpleNamespace(**both | ({"latent_dim": None} if both["cache_cut"] is not None else {}))
        self.known = known
        self.converts = True  # does the run have 01_convert?
        self.missing: dict[str, None] = {}  # what the estimate had to do without, in words
        self.memory: dict[str, dict] = {}  # of steps that train: {bytes, source}

    def _once(self, key: tuple, work: Callable[..., Any], *given: Any) -> Any:
        if key not in self.known:
            self.known[key] = work(*given)
        return self.known[key]

    def rate(self, measurement: Callable, speech: Corpus, model, *how: Any) -> Any:
        """What a function of cost_measurements.py says of `model`, once for all models of its size."""
        sizes = [f"{name}={value}" for name, value in model.config.to_dict().items() if not name.startswith("ctc_")]
        key = (measurement.__name__, self.p.corpus, *sizes, *how)
        return self._once(key, measurement, speech, model, self.processor, *how)

    @property
    def start(self) -> float:
        return self._once(("start",), measure.start_of_a_kernel)

    @cached_property
    def _loaded(self) -> tuple:
        p = self.p
        if p.architecture is None:
            return self._from_here(p.model, p.revision)
        processor = new_processor(p.architecture, p.mel_bins, p.frame_shift_ms)
        return new_model(p.architecture, processor, p.seed, **{name: getattr(p, name) for name in SIZES}), processor

    def _from_here(self, source: str, revision: str | None) -> tuple:
        """(model, processor); with random weights where there are none here, of its config."""
        try:
            with offline(), measure.quietly():
                return load(source, revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
        here = {"revision": revision or "main", "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(resolve_model(source), **here)
        except (OSError, ValueError):
            if source not in PUBLISHED_CONFIGS:
                raise BadParameter(f"{reason}. To estimate, its config.json at least must be here") from None
            config = Wav2Vec2ConformerConfig(**PUBLISHED_CONFIGS[source])
        self.missing[f"weights: random ones of the same size took their place, since {reason}"] = None
        try:
            processor = AutoProcessor.from_pretrained(resolve_model(source), **here)
        except (OSError, ValueError):
            processor = new_processor()
        return AutoModelForCTC.from_config(config), processor

    @property
    def baseline(self):
        return self._loaded[0].eval()

    @property
    def processor(self):
        return self._loaded[1]

    @cached_property
    def converted(self):
        """A model as the conversion makes it, but with random weights."""
        config, p = self.baseline.config, self.p
        family = family_of(config)
        if p.convert_to == "gqa" and family.to_grouped is not None:
            return family.standard_model(family.to_grouped(config, p.kv_heads)).eval()
        width = p.latent_dim if p.cache_cut is None else latent_dim_for(p.cache_cut, config.hidden_size)
        widths = [max(1, width // p.rank_multiple * p.rank_multiple)] * config.num_hidden_layers
        latent = family.to_latent(config, latent_dim=widths, latent_layout=p.layout, latent_key_dim=[])
        return family.latent_model(latent).eval()

    @property
    def last(self):
        return self.converted if self.converts else self.baseline

    @property
    def cache(self) -> dict:
        """What a stream keeps, by the formula, beside the same encoder with multi-head attention."""
        dtype = DTYPES[self.p.precision]
        mha = family_of(self.baseline.config).to_standard(self.baseline.config)
        kept = {"bytes": self.last.config, "mha_bytes": mha}
        sizes = {name: kv_cache_bytes(config, CACHE_FRAMES, dtype) for name, config in kept.items()}
        return {"frames": CACHE_FRAMES, "dtype": dtype, **sizes}

    def speech(self, split: str, samples: int | None = None, seconds: float | None = None) -> Corpus:
        """As `open_usable` gives it, by the headers of the audio; noise in place of what is not here."""
        p = self.p
        whole = self._once(("open", p.corpus, split), open_here, p.corpus, split)
        if whole.name == "noise":
            where = "the run downloads it; to know its hours now, give a folder that holds it: --set corpus=DIR"
            self.missing[f"{p.corpus} {split} is not on this machine: {where}"] = None
            return whole
        some = whole.sample(samples, p.seed)
        some = some if seconds is None else some.excerpt(seconds, p.seed)
        with measure.quietly():
            return some.usable(self.processor, frames_of(self.baseline), check_audio=False)

    @cached_property
    def tests(self) -> list[Corpus]:
        return [self.speech(split, self.p.eval_samples) for split in self.p.eval_splits]

    @cached_property
    def calibration(self) -> Corpus:
        return self.speech(self.p.train_split, seconds=self.p.calibration_seconds)

    # ---- amounts × rates -------------------------------------------------------------------------------------

    def heard(self, what: str, rate: Rate, *speech: Corpus, times: float = 1, batch_seconds: float = math.inf) -> Cost:
        """`rate` on all of `speech` so many times, padded as in batches, or as it is."""
        if any(one.name == "noise" for one in speech):
            hour = duration(3600 * times * rate.per_second)
            return Cost(what, None, f"unknown: an hour of speech takes {hour}")
        alone = math.isinf(batch_seconds)
        audio = times * sum(one.seconds if alone else measure.padded(one, batch_seconds) for one in speech)
        return Cost(what, audio * rate.per_second, f"scaled from {rate.audio:.0f} s of audio")

    def opening(self, *speech: Corpus) -> Cost:
        rate = self.rate(measure.decoding, speech[0], self.baseline)
        return self.heard(f"opening {', '.join(dict.fromkeys(one.split for one in speech))}", rate, *speech)

    def passes(self, what: str, model, *speech: Corpus, times: float = 1, **how) -> Cost:
        """Transcribing."""
        batch_seconds = how.get("batch_seconds", self.p.batch_seconds)
        return self.heard(what, self.pass_rate(model, **how), *speech, times=times, batch_seconds=batch_seconds)

    def pass_rate(self, model, **how) -> Rate:
        how = {name: getattr(self.p, name) for name in ("batch_seconds", "device", "precision")} | how
        return self.rate(measure.passes, self.tests[0], model, *how.values())

    def training(self, step: str, model, speech: Corpus, validation: Corpus, settings, teacher=None) -> list[Cost]:
        how = {"batch_seconds": settings.batch_seconds, "precision": settings.precision}
        quick = 1 / self.pass_rate(model, **how).per_second
        cost = self.rate(measure.training, speech, model, settings, teacher, quick)
        if cost.batch_bytes is not None:
            scale = measure.batch_of(speech, settings.batch_seconds, longest=True)[1] / cost.batch_audio
            source = "measured" if scale == 1 else f"scaled from a batch of {cost.batch_audio:.0f} s of audio"
            self.memory[step] = {"bytes": cost.kept_bytes + round(scale * cost.batch_bytes), "source": source}
        processes = self.p.training_processes if torch.cuda.is_available() else 1  # on a CPU they share its cores
        times = settings.epochs * sum(1 / speed for speed in settings.speeds) / processes
        epochs, evaluations = (
            f"{settings.epochs:g} epochs",
            1 + math.ceil(settings.epochs * settings.evaluations_per_epoch),
        )
        return [
            self.opening(speech, validation),
            self.heard(f"{epochs} at most", cost.batch, speech, times=times, batch_seconds=settings.batch_seconds),
            self.passes(f"{evaluations} validations", model, validation, times=evaluations, **how),
        ]

    def _layer(self, layout: str, method: str) -> measure.LayerCost:
        method = method if method in METHODS else "svd"  # GQA's own
        return self.rate(measure.one_layer, self.calibration, self.baseline, self.p.device, layout, method)

    def statistics(self, method: str) -> list[Cost]:
        """Of calibration speech, opened for it."""
        layer, layers = self._layer("joint", method).statistics, self.baseline.config.num_hidden_layers
        passing = self.pass_rate(self.baseline, precision="fp32").per_second
        rate = Rate(passing * layer.audio + layers * layer.seconds, layer.audio)
        return [self.opening(self.calibration), self.heard("statistics of calibration speech", rate, self.calibration)]

    def conversions(self, name: str, layout: str, method: str, count: int) -> Cost:
        """One decomposition of every layer, cut `count` times."""
        layer = self._layer(layout, method)
        seconds = self.baseline.config.num_hidden_layers * (layer.decomposition + count * layer.cut)
        return Cost(f"{name}: {count} conversions", seconds, "scaled from one layer")

    def sensitivities(self, layout: str) -> Cost:
        """Passes of the whole model over a few utterances, on the CPU, for every layer and probed rank."""
        config = self.baseline.config
        count = 1 + config.num_hidden_layers * len(PROBED_SHARES) * (1 if layout == "joint" else 2)
        rate = self.pass_rate(self.baseline, precision="fp32", device="cpu")
        seconds = count * rate.per_second * SAMPLE_FRAMES / frames_per_second(config)
        return Cost(f"sensitivities, {count} passes", seconds, f"scaled from {rate.audio:.0f} s of audio")

    def timings(self, name: str, model) -> list[Cost]:
        """What the benchmark takes for one model: one utterance at a time, then lengths of audio."""
        p, speech = self.p, self.speech(self.p.eval_splits[0])
        a, b = self.rate(measure.growth_of_passes, speech, model, p.device, p.precision)
        source = "scaled from passes over {:g} and {:g} s of audio".format(*measure.LENGTHS)
        lengths = [one.seconds for one in spread_over_durations(speech, p.benchmark_samples)]
        lengths = 3 * lengths + 4 * [max(lengths)]  # repeats; to warm up, and for the memory
        costs = [Cost(f"{name}: utterances", sum(a * s + b * s**2 for s in lengths), source)]
        seconds = [a * s + b * s**2 for s in sorted(p.benchmark_seconds)]
        if seconds := [one for one, before in zip(seconds, [0, *seconds]) if before <= p.benchmark_pass_seconds]:
            times = sum(one * (5 if one <= LONG_PASS else 1) for one in seconds)  # a long pass is not repeated
            costs.append(Cost(f"{name}: lengths of audio", times, source))
        return costs


def open_here(source: str, split: str) -> Corpus:
    """The split if it is on this machine, noise if it is a hub's. Raises BadParameter for what cannot be opened."""
    try:
        with offline(), measure.quietly():
            return open_corpus(source, split)
    except (FileNotFoundError, ValueError) as error:
        if resolve(source).exists() or not re.fullmatch(HUB_ID, str(source)):
            raise BadParameter(str(error)) from None
    return noise(**NOISE, split=split)


@contextmanager
def offline() -> Iterator[None]:
    """The hub's libraries look at what is on this machine, and at nothing else."""
    import datasets
    import huggingface_hub.constants

    places = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


# ---- what each notebook does -------------------------------------------------------------------------------


def _baseline(work: Workload) -> list[Cost]:
    p, costs = work.p, []
    if p.baseline_epochs:
        settings = TrainingSettings(
            trainable="all",
            epochs=p.baseline_epochs,
            batch_seconds=p.baseline_batch_seconds,
            gradient_checkpointing=p.baseline_gradient_checkpointing,
            speeds=tuple(p.speeds),
            precision=p.baseline_precision,
            device=p.device,
        )
        speech = work.speech(p.train_split, p.baseline_samples), work.speech(p.validation_split)
        costs = work.training("00_baseline", work.baseline, *speech, settings)
    passes = work.passes("test splits, with attention and without", work.baseline, *work.tests, times=2)
    return [*costs, work.opening(*work.tests), passes]


def _convert(work: Workload) -> list[Cost]:
    p, costs = work.p, []
    if p.method in NEEDS_STATISTICS or p.ranks == "sensitivity" or p.reestimate_batch_norm:
        costs = work.statistics(p.method)
    costs.append(work.conversions(p.method, p.layout, p.method, 2))
    if p.ranks == "sensitivity" and p.convert_to == "mla":
        costs.append(work.sensitivities(p.layout))
    if again := 4 * p.sequential + 2 * p.reestimate_batch_norm:
        costs.append(work.passes("layer after layer", work.baseline, work.calibration, times=again))
    return costs


def _analyse(work: Workload) -> list[Cost]:
    p, model = work.p, work.baseline
    costs, rows, analysed = work.statistics("attended"), 2, 0
    for one in (RECIPES[name] for name in p.analysis_methods):
        cuts = sum(not one.obstacle(model.config, cut) for cut in set(p.analysis_cuts))
        widths = ANALYSED_WIDTHS if getattr(one, "ranks", None) == "uniform" else 0
        rows, analysed = rows + cuts, analysed + widths
        costs.append(work.conversions(one.name, getattr(one, "layout", "joint"), one.method, cuts + widths))
        if getattr(one, "ranks", None) == "sensitivity":
            costs.append(work.sensitivities(one.layout))
    few, more = (work.speech(p.validation_split, count) for count in (p.analysis_samples, p.analysis_eval_samples))
    costs.append(work.passes(f"errors inside {analysed} systems", model, few, times=2 * analysed, precision="fp32"))
    costs.append(work.passes(f"word errors of {rows} systems", model, more, times=rows, precision="fp32"))
    return costs


def _finetune(work: Workload) -> list[Cost]:
    p = work.p
    names = TrainingSettings.__dataclass_fields__.keys() - {"speeds"}
    settings = TrainingSettings(**{name: getattr(p, name) for name in names})
    teacher = work.baseline if p.kl_weight or p.hidden_weight else None
    speech = work.speech(p.train_split, p.train_samples), work.speech(p.validation_split, p.validation_samples)
    return work.training("03_finetune", work.converted, *speech, settings, teacher)


def _evaluate(work: Workload) -> list[Cost]:
    p = work.p
    costs = [work.passes("test splits, converted and fine-tuned", work.converted, *work.tests, times=2)]
    longest = max(p.stream_left_seconds, default=0)
    formats = len(p.stream_caches) + sum(name.startswith("int") for name in p.stream_caches)  # these turned, too
    for chunk in p.stream_chunks_ms:
        times = 2 if chunk is None else 2 * (len(p.stream_left_seconds) - 1 + formats)
        what = "full context" if chunk is None else f"chunks of {chunk:g} ms"
        chunks = chunk and chunks_of(work.baseline.config, chunk, longest, p.stream_lookahead_ms)
        how = {"batch_seconds": p.batch_seconds / 2, "chunks": chunks}
        costs.append(work.passes(f"{what}, {times} times", work.converted, work.tests[0], times=times, **how))
    return [work.opening(*work.tests), *costs]


def _benchmark(work: Workload) -> list[Cost]:
    models = {"baseline": work.baseline, "converted": work.converted, "finetuned": work.converted}
    costs = [cost for name, model in models.items() for cost in work.timings(name, model)]
    if work.p.benchmark_left_seconds:
        costs.append(Cost("chunks of streams", None, "unknown: this is not foreseen"))
    return costs


STEPS: dict[str, Callable[[Workload], list[Cost]]] = {
    "00_baseline": _baseline,
    "01_convert": _convert,
    "02_analyze_svd_error": _analyse,
    "03_finetune": _finetune,
    "04_evaluate": _evaluate,
    "05_benchmark": _benchmark,
    "06_compare": lambda work: [],
}
