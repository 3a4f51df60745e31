"""What each notebook of a run does, as a list of costs: so many passes, training steps, conversions."""

import math
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from asrlib import cost_measurements as measure
from asrlib.benchmark import spread_over_durations
from asrlib.conversion.factorize import NEEDS_STATISTICS
from asrlib.conversion.ranks import PROBED_SHARES
from asrlib.conversion.recipes import RECIPES, Recipe
from asrlib.conversion.statistics import SAMPLE_FRAMES
from asrlib.cost_card import MEASURED, Cost
from asrlib.cost_materials import Materials, Speech
from asrlib.cost_measurements import OneLayer, Rate
from asrlib.data.batches import BucketBatchSampler
from asrlib.figures import duration
from asrlib.length_benchmark import LONG_PASS
from asrlib.models.families import frames_per_second
from asrlib.parameters import BadParameter
from asrlib.streaming import chunks_of
from asrlib.training import TrainingSettings, training_arguments

LOADS = {"01_convert": 2, "02_analyze_svd_error": 2, "03_finetune": 2, "04_evaluate": 3, "05_benchmark": 3}  # of models
ONE_LAYER = "scaled from one layer"
ANALYSED_WIDTHS = 7  # of every recipe with uniform ranks, in 02_analyze_svd_error


class StepCosts(Materials):
    """The costs of one run's steps."""

    def __init__(self, values: dict[str, Any], known: dict):
        super().__init__(values, known)
        self.memory: dict[str, dict] = {}  # of steps that train: {bytes, parts, source}

    def of(self, step: str) -> list[Cost]:
        """What the step does after its kernel's start. Raises BadParameter where it is sure to fail."""
        steps = {
            "00_baseline": self.baseline_costs,
            "01_convert": self.convert_costs,
            "02_analyze_svd_error": self.analysis_costs,
            "03_finetune": self.finetune_costs,
            "04_evaluate": self.evaluation_costs,
            "05_benchmark": self.benchmark_costs,
            "06_compare": list,
        }
        if step not in steps:
            return [Cost("the notebook", None, "unknown: never timed, and nothing that can be measured")]
        try:
            costs = steps[step]()
        except ValueError as error:
            raise BadParameter(f"{step} cannot run: {error}") from error
        except torch.OutOfMemoryError as error:
            self.missing.append(f"memory for {step}: {error}")
            return [Cost("the notebook", None, "unknown: it does not fit into memory")]
        if step in LOADS:
            costs.insert(0, Cost(f"{LOADS[step]} models loaded", LOADS[step] * self.loading))
        return costs

    def trains(self, step: str) -> bool:
        return step == "03_finetune" or (step == "00_baseline" and bool(self.p.baseline_epochs))

    def opened(self, *speech: Speech) -> Cost:
        """Headers read, audio decoded once."""
        what = f"opening {', '.join(dict.fromkeys(one.corpus.split for one in speech))}"
        first = speech[0].corpus
        rate = self.once("decoding", self.p.corpus, work=lambda: measure.decoding(first, self.processor, self.baseline))
        decoded = self.heard(what, rate, speech, [one.corpus.seconds for one in speech])
        seconds = decoded.seconds
        return replace(decoded, seconds=None if seconds is None else seconds + sum(one.opening for one in speech))

    def heard(self, what: str, rate: Rate, speech: tuple[Speech, ...], audio: list[float], times: float = 1) -> Cost:
        """Work on so much audio of each `speech`, that many times over."""
        if missing := [one.missing for one in speech if one.missing]:
            hour = f"an hour of speech takes {duration(3600 * times * rate.per_second)}"
            return Cost(what, None, f"unknown: {missing[0]}; {hour}")
        whole = times * sum(audio)
        same = abs(whole - rate.audio) < 0.01 * rate.audio
        source = MEASURED if same else f"scaled from {rate.audio:.0f} s of audio"
        return Cost(what, whole * rate.per_second, source)

    def passes(self, what: str, model, *speech: Speech, times: float = 1, chunks=None, **how) -> Cost:
        """Transcribing."""
        rate = self.pass_rate(model, speech[0], chunks, **how)
        batch_seconds = how.get("batch_seconds", self.p.batch_seconds)
        return self.heard(what, rate, speech, [_padded(one.lengths, batch_seconds) for one in speech], times)

    def pass_rate(self, model, speech: Speech, chunks=None, **how) -> Rate:
        p = self.p
        how = {"batch_seconds": p.batch_seconds, "device": p.device, "precision": p.precision} | how
        return self.once(
            "passes", model.config, p.corpus, chunks, *how.values(),
            work=lambda: measure.passes(model, self.processor, speech.corpus, **how, chunks=chunks),
        )  # fmt: skip

    # ---- the steps -------------------------------------------------------------------------------------------

    def baseline_costs(self) -> list[Cost]:
        p, costs = self.p, [Cost("the model loaded or made", self.loading)]
        if p.baseline_epochs:
            training, validation = self.speech(p.train_split, p.baseline_samples), self.speech(p.validation_split)
            settings = TrainingSettings(
                trainable="all",
                epochs=p.baseline_epochs,
                batch_seconds=p.baseline_batch_seconds,
                gradient_checkpointing=p.baseline_gradient_checkpointing,
                speeds=tuple(p.speeds),
                precision=p.baseline_precision,
                device=p.device,
                seed=p.seed,
            )
            costs += self.trained("00_baseline", self.baseline, training, validation, settings)
        splits = [self.speech(split, p.eval_samples) for split in p.eval_splits]
        costs.append(self.opened(*splits))
        costs.append(self.passes("test splits, with attention and without", self.baseline, *splits, times=2))
        return costs

    def finetune_costs(self) -> list[Cost]:
        p = self.p
        training = self.speech(p.train_split, p.train_samples)
        validation = self.speech(p.validation_split, p.validation_samples)
        names = TrainingSettings.__dataclass_fields__.keys() - {"speeds"}
        settings = TrainingSettings(**{name: getattr(p, name) for name in names})
        teacher = self.baseline if p.kl_weight or p.hidden_weight else None
        return self.trained("03_finetune", self.converted, training, validation, settings, teacher)

    def trained(self, step: str, model, training: Speech, validation: Speech, settings, teacher=None) -> list[Cost]:
        costs = [self.opened(training, validation)]
        how = {"batch_seconds": settings.batch_seconds, "precision": settings.precision}
        rate = self.pass_rate(model, validation, **how)
        lengths = [seconds / speed for seconds in training.lengths for speed in settings.speeds]
        with measure.quietly():
            batches = list(BucketBatchSampler(lengths, settings.batch_seconds, settings.seed))
        steps_an_epoch = math.ceil(len(batches) / settings.gradient_accumulation)
        with tempfile.TemporaryDirectory() as folder:
            plan = training_arguments(Path(folder), settings, steps_an_epoch, afresh=True)
        passed = 1 / rate.per_second
        cost = self.once(
            "training", model.config, self.p.corpus, settings, teacher is None,
            work=lambda: measure.training(model, self.processor, training.corpus, settings, teacher, passed),
        )  # fmt: skip
        self._remember_memory(step, cost, max(settings.batch_seconds, *lengths))
        audio = measure.padded(lengths, batches) * plan.max_steps / steps_an_epoch
        steps = "training steps" if training.missing else f"{plan.max_steps:,} training steps at most"
        evaluations = 1 + math.ceil(plan.max_steps / plan.eval_steps)
        heard = "validations" if training.missing else f"{evaluations} validations"
        costs.append(self.heard(steps, cost.batch, (training,), [audio]))
        return [*costs, self.passes(heard, model, validation, times=evaluations, **how)]

    def _remember_memory(self, step: str, cost: measure.TrainingCost, longest: float) -> None:
        """`longest`: seconds of audio in the longest batch."""
        if cost.step_bytes is None:
            self.missing.append("the peak memory of a training step: this device does not tell")
            return
        scale = 1.0 if cost.whole else max(1.0, longest / cost.step_audio)
        source = MEASURED if cost.whole else f"scaled from a batch of {cost.step_audio:.0f} s of audio"
        parts = {"weights": cost.weights_bytes, "optimizer": cost.optimizer_bytes}
        parts["step"] = round(scale * cost.step_bytes)
        if cost.device == "cpu":
            parts["process"] = self.known["start"][1]
        self.memory[step] = {"bytes": sum(parts.values()), "parts": parts, "source": source}

    @cached_property
    def _one_layer(self) -> OneLayer:
        p = self.p
        speech = self.speech(p.train_split, seconds=p.calibration_seconds)
        return self.once(
            "one layer", self.baseline.config, p.corpus, p.train_split, p.calibration_seconds,
            work=lambda: OneLayer(self.baseline, self.processor, speech.corpus, p.device),
        )  # fmt: skip

    def statistics(self, attention: bool) -> list[Cost]:
        """Of calibration speech, opened for it."""
        speech = self.speech(self.p.train_split, seconds=self.p.calibration_seconds)
        rate, layer = self.pass_rate(self.baseline, speech, precision="fp32"), self._one_layer.statistics(attention)
        layers = self.baseline.config.num_hidden_layers
        both = Rate(rate.per_second * layer.audio + layers * layer.seconds, layer.audio)
        collected = self.heard("statistics of calibration speech", both, (speech,), [speech.corpus.seconds])
        return [self.opened(speech), collected]

    def conversions(self, what: str, layout: str, method: str, times: int, attention: bool) -> Cost:
        """One decomposition of every layer, cut `times` times."""
        decomposed, converted, _ = self._one_layer.conversion(layout, method, attention)
        layers = self.baseline.config.num_hidden_layers
        return Cost(what, layers * (decomposed + times * converted), ONE_LAYER)

    def sensitivities(self, layout: str) -> Cost:
        """Ranks by sensitivity: the whole model on a few utterances, on the CPU, for every layer and probed rank."""
        speech = self.speech(self.p.train_split, seconds=self.p.calibration_seconds)
        rate = self.pass_rate(self.baseline, speech, precision="fp32", device="cpu")
        config = self.baseline.config
        count = 1 + config.num_hidden_layers * len(PROBED_SHARES) * (1 if layout == "joint" else 2)
        seconds = count * rate.per_second * SAMPLE_FRAMES / frames_per_second(config)
        return Cost(f"sensitivities, {count} passes", seconds, f"scaled from {rate.audio:.0f} s of audio")

    def convert_costs(self) -> list[Cost]:
        p, costs = self.p, []
        attention, layers = p.method == "attended", self.baseline.config.num_hidden_layers
        ranked = not self._grouped and (p.ranks == "sensitivity" or p.reestimate_batch_norm)
        if p.method in NEEDS_STATISTICS or ranked:
            costs = self.statistics(attention)
            costs.append(Cost("condition numbers", layers * self._one_layer.conditions(attention), ONE_LAYER))
        if self._grouped:
            heads = (self.baseline.config.num_attention_heads, p.kv_heads)
            seconds = sum(self._one_layer.grouping(count, p.method, attention) for count in heads)
            return [*costs, Cost("heads grouped, twice", layers * seconds, ONE_LAYER)]
        costs.append(self.conversions("decomposition, two conversions", p.layout, p.method, 2, attention))
        if p.ranks == "sensitivity":
            costs.append(self.sensitivities(p.layout))
        if p.sequential or p.reestimate_batch_norm:
            speech = self.speech(p.train_split, seconds=p.calibration_seconds)
            again = 4 * p.sequential + 2 * p.reestimate_batch_norm
            costs.append(self.passes("layer after layer", self.baseline, speech, times=again, precision="fp32"))
        return costs

    def analysis_costs(self) -> list[Cost]:
        p, model = self.p, self.baseline
        layers, layout = model.config.num_hidden_layers, p.layout
        if model.config.position_embeddings_type == "rotary":
            layout = "split"
        recipes = [RECIPES[name] for name in p.analysis_methods]
        costs = self.statistics(attention=True)
        spectra = [self.conversions("", layout, method, 0, True).seconds for method in ("svd", "two_sided")]
        costs.append(Cost("spectra", sum(spectra), ONE_LAYER))
        few = self.speech(p.validation_split, p.analysis_samples)
        evaluation = self.speech(p.validation_split, p.analysis_eval_samples)
        for one in recipes:
            if isinstance(one, Recipe) and one.ranks == "uniform" and one.layout in ("split", layout):
                what = f"{one.name}: {ANALYSED_WIDTHS} conversions"
                costs.append(self.conversions(what, one.layout, one.method, ANALYSED_WIDTHS, True))
                rate = Rate(layers * self._one_layer.conversion(one.layout, one.method, True)[2], 1.0)
                what = f"{one.name}: errors of every layer"
                errors = self.heard(what, rate, (few,), [few.corpus.seconds], ANALYSED_WIDTHS)
                costs.append(errors if errors.seconds is None else replace(errors, source=ONE_LAYER))
        rows = 2
        for one in recipes:
            reached = [cut for cut in sorted(set(p.analysis_cuts)) if not one.obstacle(model.config, cut)]
            rows += len(reached)
            if not isinstance(one, Recipe):
                seconds = len(reached) * self._one_layer.grouping(model.config.num_attention_heads, one.method, True)
                costs.append(Cost(f"{one.name}: {len(reached)} cuts", layers * seconds, ONE_LAYER))
                continue
            what = f"{one.name}: {len(reached)} cuts"
            costs.append(self.conversions(what, one.layout, one.method, len(reached), True))
            if one.ranks == "sensitivity":
                costs.append(self.sensitivities(one.layout))
        costs.append(self.passes(f"word errors of {rows} systems", model, evaluation, times=rows, precision="fp32"))
        return costs

    def evaluation_costs(self) -> list[Cost]:
        p = self.p
        splits = [self.speech(split, p.eval_samples) for split in p.eval_splits]
        costs = [self.opened(*splits)]
        costs.append(self.passes("test splits, converted and fine-tuned", self.converted, *splits, times=2))
        lefts, longest = p.stream_left_seconds, max(p.stream_left_seconds, default=0)
        variants = len(p.stream_caches) + sum(name.startswith("int") for name in p.stream_caches)
        for chunk in p.stream_chunks_ms:
            times, chunks = 2, None
            if chunk is not None:
                times *= sum(variants if left == longest else 1 for left in lefts)
                chunks = chunks_of(self.baseline.config, chunk, longest, p.stream_lookahead_ms)
            what = "full context" if chunk is None else f"chunks of {chunk:g} ms"
            how = {"chunks": chunks, "batch_seconds": p.batch_seconds / 2}
            costs.append(self.passes(f"{what}, {times} passes", self.converted, splits[0], times=times, **how))
        return costs

    def benchmark_costs(self) -> list[Cost]:
        speech = self.speech(self.p.eval_splits[0])
        models = {"baseline": self.baseline, "converted": self.converted, "finetuned": self.converted}
        timings = [cost for name, model in models.items() for cost in self.timings(name, model)]
        if self.p.benchmark_seconds:
            timings += self.timings("MHA in blocks", self.baseline)[1:]
        if self.p.benchmark_left_seconds:
            timings.append(Cost("chunks of streams", None, "unknown: this cannot be foreseen"))
        return [self.opened(speech), *timings]

    def timings(self, name: str, model) -> list[Cost]:
        """What the benchmark takes for one model."""
        p, speech = self.p, self.speech(self.p.eval_splits[0])
        how = {"device": p.device, "precision": p.precision}
        of_batches = self.pass_rate(model, speech)
        rate = self.once(
            "single passes", model.config, p.corpus, *how.values(),
            work=lambda: measure.single_passes(model, self.processor, speech.corpus, of_batches, **how),
        )  # fmt: skip
        some = spread_over_durations(speech.corpus, p.benchmark_samples)
        longest = max(utterance.seconds for utterance in some)
        audio = 3 * some.seconds + 5 * longest  # repeats; warm-up, and a pass under the profiler
        costs = [self.heard(f"{name}: {len(some)} utterances", rate, (speech,), [audio])]
        if p.benchmark_seconds:
            growth = self.once(
                "growth of passes", model.config, p.corpus, *how.values(),
                work=lambda: measure.growth_of_passes(model, self.processor, speech.corpus, **how),
            )  # fmt: skip
            seconds = _passes_of_lengths(growth, sorted(set(p.benchmark_seconds)), p.benchmark_pass_seconds)
            source = "scaled from passes over {:g} and {:g} s of audio".format(*measure.LENGTHS)
            costs.append(Cost(f"{name}: {len(p.benchmark_seconds)} lengths of audio", seconds, source))
        return costs


def _padded(lengths: list[float], batch_seconds: float) -> float:
    with measure.quietly():
        return measure.padded(lengths, list(BucketBatchSampler(lengths, batch_seconds, shuffle=False)))


def _passes_of_lengths(growth: tuple[float, float], lengths: list[float], budget_seconds: float) -> float:
    """Of all passes that `benchmark_lengths` makes for one system."""
    total = 0.0
    for length in lengths:
        one = growth[0] * length + growth[1] * length**2
        total += one * (5 if one <= LONG_PASS else 1)  # warm-up, three repeats, the profiler's; a long one is enough
        if one > budget_seconds:
            break
    return total
