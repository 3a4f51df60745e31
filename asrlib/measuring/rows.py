"""The rows of `asrlib.measuring.methods`: kept in a folder, shown in tables, and their break points."""

import contextlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from asrlib.data.text import as_counted
from asrlib.measuring.names import SIGNIFICANT
from asrlib.measuring.word_errors import load_predictions, score, write_predictions
from asrlib.runs import atomic_write, read_json, write_json

BASELINE, ZEROED = "baseline", "attention zeroed"  # rows that are no recipe's


@dataclass(frozen=True)
class Row:
    """One system on one split; intervals are 95 % over utterances, shares and error rates fractions."""

    recipe: str
    cut: float  # of the cache, as asked for
    cut_reached: float  # the real cut
    latent_dim: tuple[int, ...]  # numbers cached per frame, one a layer
    split: str
    output_error: float  # of attention outputs on calibration speech, RMS over layers: ‖ours − theirs‖ / ‖theirs‖
    logit_error: float  # ‖ours − theirs‖ / ‖theirs‖ of the logits, over all unpadded frames
    kl: float  # KL(baseline ‖ ours) of the CTC output, nats per frame
    kl_interval: tuple[float, float]
    wer: float
    wer_interval: tuple[float, float]
    wer_difference: float  # from the baseline
    difference_interval: tuple[float, float]
    p: float  # two-sided, against no difference: see significance.paired_bootstrap
    seconds: float  # of the conversion, with decomposition, without statistics
    utterances: int
    words: int  # in the references
    predictions: list[dict] = field(repr=False)  # the transcripts of `transcribing.transcribe`


# ---- in a folder ------------------------------------------------------------------------------------------


def check_settings(out: Path, settings: dict) -> None:
    """Raises ValueError where `out` was begun with other settings. Adds new ones, such as those of another split."""
    path = out / "settings.json"
    known = read_json(path) if path.is_file() else {}
    if differing := [name for name in settings if name in known and known[name] != settings[name]]:
        changes = [
            f"{name} ({known[name]} there, {settings[name]} now)" if len(str(settings[name])) < 20 else name
            for name in differing
        ]
        raise ValueError(
            f"{out} holds rows of another benchmark, which differs in {', '.join(changes)}: give another folder, or "
            "delete this one to begin anew"
        )
    if settings.keys() - known.keys():
        write_json(path, known | settings)


def read_rows(out: Path) -> dict[tuple[str, float, str], Row]:
    """(recipe, cut, split) → row, for all rows whose transcripts are there."""
    rows = {}
    for values in _whole_lines(out / "rows.jsonl"):
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        key = values["recipe"], values["cut"], values["split"]
        transcripts = _predictions_path(out, *key)
        if transcripts.is_file():
            rows[key] = Row(**values, predictions=load_predictions(transcripts))
    return rows


def _whole_lines(path: Path) -> list[dict]:
    """The complete JSON lines of a file. A kill or a full disk may cut a line short; its row is then missing."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def write_row(out: Path, row: Row) -> None:
    write_predictions(_predictions_path(out, row.recipe, row.cut, row.split), row.predictions)
    values = {name: value for name, value in vars(row).items() if name != "predictions"}
    lines = [*_whole_lines(out / "rows.jsonl"), values]
    with atomic_write(out / "rows.jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _predictions_path(out: Path, recipe: str, cut: float, split: str) -> Path:
    name = re.sub(r"[^\w.+-]+", "-", f"{recipe}_{100 * cut:.6g}_{split}")
    return out / "predictions" / f"{name}.jsonl"


# ---- tables ------------------------------------------------------------------------------------------------


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By split, then cut, then recipe; splits and recipes in the order of their first rows."""
    rows = list(rows)
    splits, recipes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("split", "recipe"))
    return sorted(rows, key=lambda row: (splits.index(row.split), row.cut, recipes.index(row.recipe)))


def as_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The numbers of all rows, as fractions: a column for each field, and _low and _high for an interval's ends."""
    table = []
    for row in in_order(rows):
        values = {name: value for name, value in vars(row).items() if name != "predictions"}
        values["latent_dim"] = " ".join(map(str, row.latent_dim))
        for name in ("kl", "wer", "difference"):
            values[f"{name}_low"], values[f"{name}_high"] = values.pop(f"{name}_interval")
        table.append(values)
    return pd.DataFrame(table)


def break_point(rows: Iterable[Row]) -> pd.DataFrame:
    """For each split and recipe, how far the cache can be cut before word errors rise.

    `broken_at` is the shallowest cut whose WER is significantly above the baseline's (a difference above 0 with
    p < 0.05), and `cut` the one before it, or 0; deeper cuts do not count. `cache` is the share of the baseline's cache
    that is left at `cut`. If no cut is significantly worse, `broken_at` is NaN and `deepest_tried` is true: the break
    lies deeper than all measured cuts.
    """
    ways: dict[tuple[str, str], list[Row]] = {}
    for row in in_order(rows):
        if row.recipe not in (BASELINE, ZEROED):
            ways.setdefault((row.split, row.recipe), []).append(row)
    table = []
    for (split, recipe), steps in ways.items():
        risen = [row.wer_difference > 0 and row.p < SIGNIFICANT for row in steps]
        first = risen.index(True) if any(risen) else len(steps)
        cut, reached = (steps[first - 1].cut, steps[first - 1].cut_reached) if first else (0.0, 0.0)
        broken_at = steps[first].cut if first < len(steps) else float("nan")
        values = {"split": split, "recipe": recipe, "cut": cut, "cut_reached": reached, "cache": 1 - reached}
        table.append(values | {"broken_at": broken_at, "deepest_tried": first == len(steps)})
    return pd.DataFrame(table)


def first_broken(rows: Iterable[Row], recipe: str) -> list[tuple[str, dict]]:
    """The utterance that a recipe breaks first: (system, transcript) from the baseline on, one cut deeper at a time.

    Among the utterances that the baseline recognises without an error, it is the one with most errors at the shallowest
    cut that makes any. Empty where no cut makes an error in them.
    """
    baseline, *steps = [row for row in in_order(rows) if row.recipe in (BASELINE, recipe)]
    steps = [row for row in steps if row.split == baseline.split]
    errors = [_rate(prediction) for prediction in baseline.predictions]
    for row in steps:
        harm = [_rate(p) if before == 0 else 0.0 for p, before in zip(row.predictions, errors, strict=True)]
        if max(harm) > 0:
            worst = harm.index(max(harm))
            labels = ["baseline", *(f"{100 * step.cut:.4g} %" for step in steps)]
            return list(zip(labels, [row.predictions[worst] for row in (baseline, *steps)], strict=True))
    return []


def _rate(prediction: dict) -> float:
    """WER of one transcript; infinite where no word of its reference counts, as of "um" in English."""
    return score([prediction]).wer if as_counted(prediction, "reference") else math.inf
