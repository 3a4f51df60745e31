"""The comparison of a run's systems: one table, one sentence, a summary in plain text.

Everything is computed from the run's metrics/*.json. There error rates are fractions; shown, per cent.
"""

import math
import textwrap
from collections.abc import Callable

import pandas as pd

from asrlib.measuring.entries import entries_of
from asrlib.measuring.names import ATTENTION
from asrlib.reporting.figures import SYSTEMS, save_figure, system_name
from asrlib.reporting.members import entry_table, splits_of
from asrlib.reporting.notebook_pages import PAGES
from asrlib.reporting.numbers import (
    UNKNOWN,
    change,
    duration,
    p_value,
    percent,
    rate_interval,
    size,
    tested_points,
    verdict,
)
from asrlib.reporting.run_figures import figures_of_run
from asrlib.reporting.tables import cell, rate_cell, save_table, speed_cell
from asrlib.runs import Run, atomic_write

# What Sonawane, Gokhale and Tian (2025) said of another, larger model at half the cache, and did not measure.
CLAIMED = pd.DataFrame(
    {
        "claimed WER test-clean": ["2.3 %", "4–5 %", "2.4–2.6 %"],
        "claimed cache": ["1.0", "0.5", "0.5"],
        "claimed speed": ["1.0", "1.1", "1.1–1.15"],
        "claimed memory": ["1.0", "−25–30 %", "−25–30 %"],
    },
    index=pd.Index([SYSTEMS[name] for name in ("baseline", "converted", "finetuned")], name="claimed of"),
)


CLAIMS_INTRODUCTION = """\
## Beside what is claimed

These figures were *claimed* for a far larger model at half the cache, on another corpus; nobody measured them."""


# ---- the comparison ----------------------------------------------------------------------------------------

BEFORE_ERRORS = ["attention", "cache_bytes_per_second", "cache_bytes_1000_frames", "cache_cut", "parameters"]
AFTER_ERRORS = [
    *("latency_ms", "latency_ms_p50", "latency_ms_p95", "rtfx"),
    *("speed_ratio", "speed_ratio_low", "speed_ratio_high", "peak_memory_bytes"),
]


def comparison_table(run: Run) -> pd.DataFrame:
    """One row per system measured so far (baseline, control, converted, finetuned), from metrics/*.json alone.

    Columns: attention, cache_bytes_per_second (of audio), cache_bytes_1000_frames, cache_cut (fraction),
    parameters; wer_<split>, its 95 % interval wer_<split>_low and _high, cer_<split> (all fractions);
    latency_ms (mean per utterance), latency_ms_p50, latency_ms_p95, rtfx, speed_ratio (to the baseline) with
    speed_ratio_low and _high, peak_memory_bytes. NaN: unknown.
    """
    benchmark, convert = run.metrics_so_far("benchmark"), run.metrics_so_far("convert")
    entries = entries_of(run, [])
    measured = [entry for entry in entries if entry.scores() or entry.name in benchmark.get("systems", {})]
    if not measured:
        return pd.DataFrame().rename_axis("system")
    table = entry_table(measured, benchmark).rename_axis("system")
    converted = ~table.index.isin(["baseline", "control"])
    attention = table["attention"].map(lambda name: ATTENTION.get(name, name))
    table["attention"] = attention.mask(converted, convert.get("attention", "MLA"))
    cache = table["cache_bytes_per_second"]
    asked_cut = pd.Series(0.0, table.index).mask(converted, convert.get("cache_cut", math.nan))
    table["cache_cut"] = (1 - cache / cache.get("baseline", math.nan)).fillna(asked_cut)
    errors = [column for column in table if column.startswith(("wer_", "cer_"))]
    return table[[*BEFORE_ERRORS, *errors, *AFTER_ERRORS]]


def readable_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """`comparison_table` to read: a column per system, a row per measure, interval or change in brackets."""
    base = table.loc["baseline"] if "baseline" in table.index else pd.Series(dtype=float)

    def with_change(row: pd.Series, column: str, show: Callable[[float], str]) -> str:
        compared = row.name != "baseline" and pd.notna(row[column]) and pd.notna(base.get(column))
        return cell(row[column], show) + (f" ({change(row[column], base[column])})" if compared else "")

    columns = {}
    for system, row in table.iterrows():
        columns[system_name(table, system)] = {
            **{f"WER {split}": rate_cell(row, split) for split in splits_of(table)},
            **{f"CER {split}": cell(row[f"cer_{split}"], percent) for split in splits_of(table)},
            "K/V cache per second of audio": with_change(row, "cache_bytes_per_second", size),
            "parameters": with_change(row, "parameters", lambda n: f"{n / 1e6:.2f} M"),
            "latency per utterance": cell(row["latency_ms"], "{:.1f} ms".format),
            "RTFx": cell(row["rtfx"], "{:.1f}".format),
            "speed against the baseline": speed_cell(row),
            "peak memory": with_change(row, "peak_memory_bytes", size),
        }
    readable = pd.DataFrame(columns).rename_axis("")
    return readable[(readable != UNKNOWN).any(axis=1)]  # a measure that no system has yet is no row


def headline(run: Run, to_convert: bool = True) -> str:
    """What the run found, in one sentence made from its figures.

    to_convert: where there is no converted model yet, is a conversion to follow?
    """
    table = comparison_table(run)
    measured = table.loc["baseline"].dropna().index if "baseline" in table.index else []
    splits = [split for split in splits_of(table) if f"wer_{split}" in measured]
    if not splits:
        return "No word error rate has been measured yet."
    split = "test-clean" if "test-clean" in splits else splits[0]
    base = table.loc["baseline"]
    wer = f"wer_{split}"
    converted = [name for name in ("finetuned", "converted") if name in table.index and pd.notna(table.at[name, wer])]

    def interval(row: pd.Series) -> str:
        low, high = row[f"{wer}_low"], row[f"{wer}_high"]
        return "unknown" if pd.isna(low) else rate_interval((low, high))

    if not converted:
        missing = "; no converted model has been evaluated yet" if to_convert else ""
        return f"WER of the baseline on {split} is {percent(base[wer])} (95 % interval {interval(base)}){missing}."
    new = table.loc[converted[0]]
    words = f"WER on {split} went from {100 * base[wer]:.2f} to {percent(new[wer])}"
    if new.name == "converted":
        words += " before any fine-tuning"
    if pd.notna(new["cache_cut"]):
        words = f"At {percent(new['cache_cut'], 1).replace('.0 %', ' %')} less cache, {words}"
    tests = run.metrics_so_far("evaluate").get("paired", {}).get(split, {})
    chance = _chance(tests.get(f"baseline vs {new.name}", {}), base, new, wer)
    words += f" (95 % intervals {interval(base)} and {interval(new)}; {chance})"
    if alike := tests.get(f"control vs {new.name}"):
        difference = tested_points(alike["difference"], alike["interval"], alike["p"], unit=" points")
        words += f"; against MHA trained alike {difference}"
    if pd.notna(new["speed_ratio"]):
        words += f", speed {speed_cell(new)}"
    if pd.notna(base["peak_memory_bytes"]) and pd.notna(new["peak_memory_bytes"]):
        words += f", peak memory {change(new['peak_memory_bytes'], base['peak_memory_bytes'])}"
    return words + "."


def _chance(test: dict, base: pd.Series, new: pd.Series, wer: str) -> str:
    """Is the difference between the two systems more than chance? The paired test where there is one."""
    p, interval = test.get("p"), test.get("interval")
    if p is None and interval is None:
        low, high = new[f"{wer}_low"], new[f"{wer}_high"]
        if pd.isna(low) or pd.isna(base[f"{wer}_low"]):
            return "significance not tested"
        apart = low > base[f"{wer}_high"] or high < base[f"{wer}_low"]
        return "they do not overlap" if apart else "they overlap"
    by_interval = interval is not None and not interval[0] <= 0 <= interval[1]
    words = verdict(new[wer] - base[wer], float(not by_interval) if p is None else p)
    sure = "significantly " if words in ("worse", "better") else ""
    tested = "" if p is None else f", {p_value(p)}"
    matched = f"; matched pairs, {p_value(test['matched_pairs']['p'])}" if "matched_pairs" in test else ""
    return f"{sure}{words} in the paired bootstrap{tested}{matched}"


def step_times(run: Run) -> dict[str, float]:
    """Seconds each completed step took, in order."""
    markers = {step: run.completed(step) for step in PAGES}
    return {step: marker["seconds"] for step, marker in markers.items() if marker and "seconds" in marker}


def write_comparison(run: Run) -> pd.DataFrame:
    """Write tables/comparison_table.csv, the comparison's figures, summary.txt and metrics/compare.json.

    Returns the table. Raises MissingStep where the models have not been evaluated and benchmarked.
    """
    for name in ("evaluate", "benchmark"):
        run.read_metrics(name)
    table = comparison_table(run)
    save_table(table, run.tables / "comparison_table.csv")
    for name, figure in figures_of_run(table).items():
        save_figure(figure, run.figures / f"{name}.png")
    write_summary(run)
    run.write_metrics("compare", {"table": table.reset_index().to_dict("records"), "headline": headline(run)})
    return table


def write_summary(run: Run) -> None:
    with atomic_write(run.path / "summary.txt") as file:
        file.write(summary(run))


def summary(run: Run) -> str:
    """The comparison as plain text: word errors, cache, speed, memory, time per step, others' claims."""
    title = f"{run.path.name}: what a smaller cache costs and saves"
    times = {step: duration(seconds) for step, seconds in step_times(run).items()}
    steps = "\n".join(f"{step:<24}{time:>14}" for step, time in times.items()) or "no step has been completed"
    sentence = textwrap.fill(headline(run).replace(" %", "\u00a0%"), 100).replace("\u00a0", " ")
    return "\n".join(
        [
            title,
            "=" * len(title),
            "",
            sentence,
            "",
            readable_comparison(comparison_table(run)).rename_axis(None).to_string(),
            "",
            "Brackets: 95 % interval of WER and speed (bootstrap over utterances), otherwise the change.",
            "RTFx: seconds of audio per second of compute.",
            f"{cache_words(run)}.",
            "",
            "Time per step",
            steps,
            "",
            "Claimed for another model at half the cache, never measured",
            CLAIMED.rename_axis(None).to_string(),
            "",
        ]
    )


def cache_words(run: Run) -> str:
    """Whose cache the tables tell of."""
    if "writing" in run.metrics_so_far("benchmark"):
        return (
            "The cache is what generate keeps for cross-attention, by the formula; the decoder's tokens come on top, "
            "as counted in 05"
        )
    return "The cache is what a stream holds, by the formula; a full-context pass keeps none once it has returned"
