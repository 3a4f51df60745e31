"""What each way to convert a recogniser costs at each cut of its cache, and down to where it costs nothing.

A row says of one recipe at one cut on one split how far the logits are from the baseline's (relative error, KL
divergence), the word errors with intervals and significance, and the seconds of the conversion. A folder keeps rows,
and the same measurement, begun again, measures only those that are missing:

    settings.json  what the rows belong to     rows.jsonl            one row a line
    table.csv      the numbers, for figures    predictions/*.jsonl   transcripts

Names: N utterances, T frames, V tokens of the vocabulary. `asrlib.reporting.method_tables` shows rows to people.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import asrlib
from asrlib.attention.cache import cached_numbers
from asrlib.attention.names import encoder_config
from asrlib.conversion.convert import convert, decompose
from asrlib.conversion.methods import METHODS
from asrlib.conversion.quality import analyze_compression_quality, by_name
from asrlib.conversion.statistics import Statistics, collect_statistics
from asrlib.data.corpus import Corpus
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
from asrlib.models.inference import choose_device, zero_attention
from asrlib.models.registry import chosen_parts, latent_modules
from asrlib.runs import atomic_write, resolve
from asrlib.runs.fingerprints import fingerprint

CUTS = (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)  # of the cache: it is halved at each step
ROOMS = ("attention", "conversion", "models")  # whose code decides what a row says …
NEUTRAL = ("benchmark.py", "recipes.py", "rows.py")  # … but for these: one more recipe must not outdate other rows


# ---- measuring ---------------------------------------------------------------------------------------------


def errors_by_width(model, batch: Mapping, recipe: Recipe, statistics: Statistics, parts=None) -> pd.DataFrame:
    """`analyze_compression_quality` on `batch` of `recipe` at the widths from d/32 to d, one row a layer and width."""
    settings = {"layout": recipe.layout, "method": recipe.method, "statistics": statistics, "parts": parts}
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
    batch_seconds: float = 60.0,
    device: str | None = None,
    statistics: Statistics | None = None,
) -> Iterator[Row]:
    """The rows of every recipe at every cut, on every corpus of `corpora` (by split), as soon as each is measured.

    First the baseline (cut 0) and, for context, the model with its attention set to zero (cut 1); then recipe by
    recipe, each from the shallowest cut to the deepest. A recipe has no row at a cut that it cannot reach, which a
    warning says. `out` is a folder that keeps the rows: those already there are not measured again. The baseline's
    logits stay in memory, about 25 MB an hour of speech for 32 tokens. `device`: see `models.inference.choose_device`.
    `statistics` are collected from the calibration speech where they are not given.

    Raises ValueError, before anything is measured, where a cut is out of reach for every recipe, where the calibration
    speech is unfit (see `collect_statistics`), or where `out` holds rows of another model, other speech or settings.
    """
    plan = reachable(model.config, recipes, cuts)
    for recipe, reached in plan.items():
        if missing := [cut for cut in sorted(cuts) if cut not in reached]:
            reason = recipe.obstacle(model.config, missing[0])
            warnings.warn(f"no row for {recipe.name!r} at a cut of {percents(missing)}: {reason}", stacklevel=2)
    kept: dict[tuple[str, float, str], Row] = {}
    if out is not None:
        speech = {f"speech of {split}": corpus.fingerprint() for split, corpus in corpora.items()}
        ways = {f"recipe {recipe.name!r}": dataclasses.asdict(recipe) for recipe in plan}
        settings = {
            "weights of the model": _weights_fingerprint(model),
            "calibration speech": f"{calibration.split} {calibration.fingerprint()}",
            "calibration_seconds": calibration_seconds,
            "parts": ", ".join(statistics.parts if statistics else chosen_parts(model.config, None)),
            "device": choose_device(device, model).type,
            "code of asrlib": _code_fingerprint(),
        }
        check_settings(resolve(out), settings | speech | ways)
        kept = read_rows(resolve(out))
    asked = [(recipe.name, cut, split) for recipe, reached in plan.items() for cut in reached for split in corpora]
    if statistics is None and any(key not in kept for key in asked):
        attention = any(METHODS[recipe.method].needs_attention for recipe in plan)
        statistics = collect_statistics(
            model, processor, calibration, calibration_seconds, batch_seconds, device, attention
        )
    how = {"processor": processor, "batch_seconds": batch_seconds, "device": device}
    return _rows(model, statistics, corpora, plan, kept, None if out is None else resolve(out), how)


def _rows(model, statistics, corpora, plan, kept, out: Path | None, how: dict) -> Iterator[Row]:
    given = []

    @functools.cache
    def reference(split: str) -> _Reference:
        return _Reference.of(model, corpora[split], how)

    def keep(name: str, cut: float, split: str, outcome: dict) -> None:
        kept[name, cut, split] = Row(name, cut, split=split, **outcome)
        if out is not None:
            write_row(out, kept[name, cut, split])

    def give(*key) -> Row:
        progress.update()
        given.append(kept[key])
        return kept[key]

    try:
        with tqdm(total=len(corpora) * (2 + sum(map(len, plan.values()))), desc="benchmark", unit="row") as progress:
            for split in corpora:
                if (BASELINE, 0.0, split) not in kept:
                    keep(BASELINE, 0.0, split, reference(split).itself())
                yield give(BASELINE, 0.0, split)
                if (ZEROED, 1.0, split) not in kept:
                    keep(ZEROED, 1.0, split, reference(split).without_attention())
                yield give(ZEROED, 1.0, split)
            for recipe, cuts in plan.items():
                converted = _converted(recipe, model, statistics)
                for cut in cuts:
                    progress.set_postfix_str(f"{recipe.name}, {percents([cut])}")
                    for split in corpora:
                        if (recipe.name, cut, split) not in kept:
                            keep(recipe.name, cut, split, reference(split).compare(*converted(cut)))
                        yield give(recipe.name, cut, split)
    finally:  # interrupted, too
        if out is not None and given:
            with atomic_write(out / "table.csv") as file:
                as_frame(given).to_csv(file, index=False)


def _converted(recipe: Recipe, model: PreTrainedModel, statistics: Statistics) -> Callable:
    """cut → (latent model, error of its attention outputs, seconds it takes alone).

    Nothing is computed before it is asked for, nor twice running.
    """

    def timed(function: Callable, *arguments) -> tuple:
        started = perf_counter()
        return function(*arguments), perf_counter() - started

    prepared = functools.cache(lambda: timed(recipe.converter, model, statistics))

    @functools.lru_cache(maxsize=1)  # one split after the other asks for the same
    def at(cut: float) -> tuple[PreTrainedModel, float, float]:
        convert_to, shared_seconds = prepared()
        latent, seconds = timed(convert_to, cut)
        return latent, _output_error(latent, statistics), shared_seconds + seconds

    return at


@torch.no_grad()
def _output_error(latent: PreTrainedModel, statistics: Statistics) -> float:
    """Relative error of the attention outputs on calibration speech, root mean square over layers."""
    pairs = zip(latent_modules(latent), statistics.layers, strict=True)
    errors = [layer.sample.error(attention) / layer.sample.size for attention, layer in pairs]
    return float(np.sqrt(np.mean(np.square(errors))))


@dataclass(frozen=True)
class _Reference:
    """The baseline on one split: what every other system is compared with."""

    model: PreTrainedModel
    corpus: Corpus
    how: dict  # to transcribe
    logits: dict[int, torch.Tensor]  # [T, V] of each utterance, unpadded, on the CPU
    result: EvaluationResult

    @classmethod
    def of(cls, model: PreTrainedModel, corpus: Corpus, how: dict) -> "_Reference":
        logits: dict[int, torch.Tensor] = {}

        def remember(index: int, logits_TV: torch.Tensor) -> None:
            logits[index] = logits_TV.float().cpu()

        result = score(transcribe(model, corpus=corpus, record=remember, **how))
        return cls(model, corpus, how, logits, result)

    def itself(self) -> dict:
        no_error_N4 = np.tile([0.0, 1.0, 0.0, 1.0], (len(self.corpus), 1))
        return self._outcome(self.result, no_error_N4, _kept(self.model))

    def without_attention(self) -> dict:
        with zero_attention(self.model):
            result, sums_N4 = self._pass(self.model)
        return self._outcome(result, sums_N4, [0] * len(_kept(self.model)), output_error=1.0)

    def compare(self, latent: PreTrainedModel, output_error: float, seconds: float) -> dict:
        result, sums_N4 = self._pass(latent)
        return self._outcome(result, sums_N4, _kept(latent), output_error, seconds)

    def _pass(self, system: PreTrainedModel) -> tuple[EvaluationResult, np.ndarray]:
        """Word errors, and of each utterance: KL summed over frames, frames, ‖Δlogits‖², ‖logits‖² [N, 4]."""
        sums_N4 = np.zeros((len(self.corpus), 4))

        def compare(index: int, logits_TV: torch.Tensor) -> None:
            theirs, ours = self.logits[index].double(), logits_TV.cpu().double()
            log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
            kl, change = (log_p.exp() * (log_p - log_q)).sum(), (ours - theirs).square().sum()
            sums_N4[index] = kl.item(), len(ours), change.item(), theirs.square().sum().item()

        return score(transcribe(system, corpus=self.corpus, record=compare, **self.how)), sums_N4

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
    """Numbers that each attention module keeps of a frame, or of a token where it reads these."""
    return cached_numbers(model.config, frames=1, tokens=1)


def _code_fingerprint() -> str:
    root = Path(asrlib.__file__).parent
    files = sorted(file for room in ROOMS for file in (root / room).rglob("*.py") if file.name not in NEUTRAL)
    return fingerprint({str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files})


def _weights_fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
