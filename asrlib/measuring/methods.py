"""The cost of each way to convert a recogniser at each cut of its cache, and the deepest cut that costs nothing.

A row holds, for one recipe at one cut on one split, the difference of the logits from the baseline's (relative error,
KL divergence), word errors with intervals and significance, and the seconds of the conversion. A folder keeps the rows;
the same measurement, begun again, measures the missing ones alone:

    settings.json  what was measured           rows.jsonl            one row a line
    table.csv      the numbers, for figures    predictions/*.jsonl   transcripts

Names: N utterances, T frames, V tokens of the vocabulary. `asrlib.reporting.method_tables` shows rows to people.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import asrlib
from asrlib.attention.cache import cached_numbers
from asrlib.attention.names import attends_across, encoder_config
from asrlib.conversion.convert import convert, decompose
from asrlib.conversion.methods import METHODS
from asrlib.conversion.quality import analyze_compression_quality, by_name
from asrlib.conversion.statistics import Statistics, collect_statistics
from asrlib.data.corpus import Corpus
from asrlib.data.text import label_ids
from asrlib.measuring.recipes import RECIPES, Recipe, percents, reachable
from asrlib.measuring.resampling import interval, resample_sums
from asrlib.measuring.rows import (
    BASELINE,
    ZEROED,
    Row,
    as_frame,
    check_settings,
    read_rows,
    write_row,
)
from asrlib.measuring.significance import paired_bootstrap
from asrlib.measuring.transcribing import transcribe
from asrlib.measuring.word_errors import EvaluationResult, score
from asrlib.models.heard_once import weights_fingerprint
from asrlib.models.inference import choose_device, zero_attention
from asrlib.models.registry import chosen_parts, latent_modules
from asrlib.runs import atomic_write, resolve
from asrlib.runs.fingerprints import fingerprint

CUTS = (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)  # of the cache: each step halves it
ROOMS = ("attention", "conversion", "models")  # the code that decides a row's numbers


# ---- measuring ---------------------------------------------------------------------------------------------


def errors_by_width(model, batch: Mapping, recipe: Recipe, statistics: Statistics, parts=None) -> pd.DataFrame:
    """`analyze_compression_quality` of `recipe` on `batch`, at widths from d/32 to d, one row a layer and width."""
    settings = {"layout": recipe.layout, "method": recipe.method, "statistics": statistics, "parts": parts}
    settings |= {"shared": recipe.shared}
    decomposition = decompose(model, **settings)
    width = encoder_config(model.config).hidden_size
    tables = []
    for share in (32, 16, 8, 4, 2, 4 / 3, 1):
        latent = convert(model, max(2, int(width / share)), decomposition=decomposition, **settings)
        tables.append(by_name(analyze_compression_quality(model, latent, batch)))
    return pd.concat(tables, ignore_index=True).assign(method=recipe.name, layout=recipe.layout)


def benchmark(
    model: PreTrainedModel,
    processor,
    calibration: Corpus,
    corpora: Mapping[str, Corpus],
    cuts: Sequence[float] = CUTS,
    recipes: Iterable[Recipe] = tuple(RECIPES.values()),
    calibration_seconds: float = 600.0,
    out: str | Path | None = None,
    batch_seconds: float | None = None,
    device: str | None = None,
    statistics: Statistics | None = None,
    parts: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yields the rows of every recipe at every cut, on every corpus of `corpora` (by split), once each is measured.

    First come the baseline (cut 0) and, for context, the model with its attention set to zero (cut 1). Then each recipe
    follows, from its shallowest cut to its deepest. A warning names the cuts that a recipe cannot reach; they have no
    rows. `out` is a folder that keeps the rows; rows that are there already are not measured again. The baseline's
    logits stay in memory, about 25 MB an hour of speech for 32 tokens. `device`: see `models.inference.choose_device`.
    `statistics` are collected from the calibration speech if they are not given, for `parts` (see `convert`).

    Raises ValueError before the first measurement where no recipe reaches a cut, where the calibration speech is unfit
    (see `collect_statistics`), or where `out` holds rows of another model, other speech or other settings.
    """
    parts = list(statistics.parts) if statistics else chosen_parts(model.config, parts)
    plan = reachable(model.config, recipes, cuts, parts)
    for recipe, reached in plan.items():
        if missing := [cut for cut in sorted(cuts) if cut not in reached]:
            reason = recipe.obstacle(model.config, missing[0], parts)
            warnings.warn(f"no row for {recipe.name!r} at a cut of {percents(missing)}: {reason}", stacklevel=2)
    rows: dict[tuple[str, float, str], Row] = {}
    if out is not None:
        speech = {f"speech of {split}": corpus.fingerprint() for split, corpus in corpora.items()}
        ways = {f"recipe {recipe.name!r}": dataclasses.asdict(recipe) for recipe in plan}
        settings = {
            "weights of the model": weights_fingerprint(model),
            "calibration speech": f"{calibration.split} {calibration.fingerprint()}",
            "calibration_seconds": calibration_seconds,
            "parts": ", ".join(parts),
            "device": choose_device(device, model).type,
            "code of asrlib": _code_fingerprint(),
        }
        check_settings(resolve(out), settings | speech | ways)
        rows = read_rows(resolve(out))
    asked = [(recipe.name, cut, split) for recipe, reached in plan.items() for cut in reached for split in corpora]
    if statistics is None and any(key not in rows for key in asked):
        attention = any(METHODS[recipe.method].needs_attention for recipe in plan)
        statistics = collect_statistics(
            model,
            processor,
            calibration,
            calibration_seconds,
            60.0 if batch_seconds is None else batch_seconds,
            device,
            attention,
            parts,
        )
    settings = {"processor": processor, "batch_seconds": batch_seconds, "device": device}
    references = {split: _Reference(model, corpus, settings) for split, corpus in corpora.items()}
    total = len(corpora) * (2 + sum(map(len, plan.values())))
    progress = tqdm(_measurements(model, statistics, references, plan), "benchmark", total, unit="row")
    return _rows(progress, rows, None if out is None else resolve(out))


Key = tuple[str, float, str]  # of a row: recipe, cut, split


def _measurements(model, statistics, references: "dict[str, _Reference]", plan) -> Iterator[tuple[Key, Callable]]:
    """The keys of all rows, each with a function that measures the row's other fields. What several rows share is
    computed when the first of them is measured."""
    for split, reference in references.items():
        yield (BASELINE, 0.0, split), reference.itself
        yield (ZEROED, 1.0, split), reference.without_attention
    for recipe, cuts in plan.items():
        prepare = functools.cache(functools.partial(_timed, recipe.converter, model, statistics))
        for cut in cuts:
            convert_once = functools.cache(functools.partial(_converted, prepare, cut, statistics))
            for split, reference in references.items():
                yield (recipe.name, cut, split), functools.partial(reference.compare, convert_once)


def _rows(measurements: tqdm, rows: dict[Key, Row], out: Path | None) -> Iterator[Row]:
    """The rows in order. A row that `rows` lacks is measured, and kept in `out`."""
    yielded = []
    try:
        for (name, cut, split), measure in measurements:
            measurements.set_postfix_str(f"{name}, {percents([cut])}")
            if (name, cut, split) not in rows:
                row = rows[name, cut, split] = Row(name, cut, split=split, **measure())
                if out is not None:
                    write_row(out, row)
            yielded.append(rows[name, cut, split])
            yield yielded[-1]
    finally:  # also after an interruption
        if out is not None and yielded:
            with atomic_write(out / "table.csv") as file:
                as_frame(yielded).to_csv(file, index=False)


def _timed(function: Callable, *arguments) -> tuple[Any, float]:
    """(what the function returns, seconds)"""
    started = perf_counter()
    return function(*arguments), perf_counter() - started


def _converted(prepare: Callable, cut: float, statistics: Statistics) -> tuple[PreTrainedModel, float, float]:
    """(latent model, error of its attention outputs, seconds that this cut takes alone)"""
    convert_to, shared_seconds = prepare()
    latent, seconds = _timed(convert_to, cut)
    return latent, _output_error(latent, statistics), shared_seconds + seconds


@torch.no_grad()
def _output_error(latent: PreTrainedModel, statistics: Statistics) -> float:
    """Relative error of the attention outputs on calibration speech, root mean square over layers."""
    pairs = zip(latent_modules(latent), statistics.layers, strict=True)
    errors = [layer.sample.error(attention) / layer.sample.size for attention, layer in pairs]
    return float(np.sqrt(np.mean(np.square(errors))))


@dataclass(frozen=True)
class _Reference:
    """The baseline on one split, with which every other system is compared. It is transcribed once it is needed."""

    model: PreTrainedModel
    corpus: Corpus
    settings: dict  # of `transcribe`
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # [T, V] of each utterance, unpadded, on the CPU

    @functools.cached_property
    def result(self) -> EvaluationResult:
        def remember(index: int, logits_TV: torch.Tensor) -> None:
            self.logits[index] = logits_TV.float().cpu()

        return score(transcribe(self.model, corpus=self.corpus, record=remember, told=self.told, **self.settings))

    @functools.cached_property
    def told(self) -> Corpus | None:
        """The texts whose posteriors are compared, of a model with a decoder: what the baseline writes, for it may find
        references in another case or punctuation unlikely from the first token on."""
        if not attends_across(self.model.config):
            return None
        texts = [row["hypothesis"] for row in transcribe(self.model, corpus=self.corpus, **self.settings)]
        longest, processor = self.model.config.max_target_positions, self.settings["processor"]
        fits = [text and len(label_ids(text, processor)) <= longest for text in texts]
        own = [replace(u, text=text) if fit else u for u, text, fit in zip(self.corpus, texts, fits, strict=True)]
        return replace(self.corpus, utterances=tuple(own))

    def itself(self) -> dict:
        no_error_N4 = np.tile([0.0, 1.0, 0.0, 1.0], (len(self.corpus), 1))
        return self._outcome(self.result, no_error_N4, _kept(self.model))

    def without_attention(self) -> dict:
        _ = self.result  # fills `logits`
        with zero_attention(self.model):
            result, sums_N4 = self._pass(self.model)
        return self._outcome(result, sums_N4, [0] * len(_kept(self.model)), output_error=1.0)

    def compare(self, converted: Callable[[], tuple[PreTrainedModel, float, float]]) -> dict:
        _ = self.result  # before the conversion: fills `logits`
        latent, output_error, seconds = converted()
        result, sums_N4 = self._pass(latent)
        return self._outcome(result, sums_N4, _kept(latent), output_error, seconds)

    def _pass(self, system: PreTrainedModel) -> tuple[EvaluationResult, np.ndarray]:
        """Word errors, and for each utterance: KL summed over frames, frames, ‖Δlogits‖², ‖logits‖² [N, 4]."""
        sums_N4 = np.zeros((len(self.corpus), 4))

        def compare(index: int, logits_TV: torch.Tensor) -> None:
            theirs, ours = self.logits[index].double(), logits_TV.cpu().double()
            log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
            kl, change = (log_p.exp() * (log_p - log_q)).sum(), (ours - theirs).square().sum()
            sums_N4[index] = kl.item(), len(ours), change.item(), theirs.square().sum().item()

        transcripts = transcribe(system, corpus=self.corpus, record=compare, told=self.told, **self.settings)
        return score(transcripts), sums_N4

    def _outcome(
        self,
        result: EvaluationResult,
        sums_N4: np.ndarray,
        widths: list[int],
        output_error: float = 0.0,
        seconds: float = 0.0,
    ) -> dict:
        """The fields of a Row."""
        kl, frames, change, size = sums_N4.sum(0).tolist()
        kl_R, frames_R = resample_sums(sums_N4[:, :2]).T
        paired = paired_bootstrap(self.result, result)
        return {
            "cut_reached": 1 - sum(widths) / sum(_kept(self.model)),
            "latent_dim": tuple(widths),
            "output_error": output_error,
            "logit_error": (change / size) ** 0.5,
            "kl": kl / frames,
            "kl_interval": interval(kl_R / frames_R),
            "wer": result.wer,
            "wer_interval": result.wer_interval,
            "wer_difference": paired["difference"],
            "difference_interval": tuple(paired["interval"]),
            "p": paired["p"],
            "seconds": seconds,
            "utterances": result.utterances,
            "words": result.words,
            "predictions": result.predictions,
        }


def _kept(model: PreTrainedModel) -> list[int]:
    """Numbers that each attention module keeps of a frame or, in a decoder, of a token."""
    return cached_numbers(model.config, frames=1, tokens=1)


def _code_fingerprint() -> str:
    root = Path(asrlib.__file__).parent
    files = sorted(file for room in ROOMS for file in (root / room).rglob("*.py"))
    return fingerprint({str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files})
