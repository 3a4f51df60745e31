"""The comparison of a run's systems: one table, one sentence, a summary in plain text.

Everything is computed from the run's metrics/*.json. There error rates are fractions; shown, per cent.
"""

import textwrap
from collections.abc import Callable

import pandas as pd

from asrlib.measuring.systems import ATTENTION
from asrlib.reporting.figures import SYSTEMS, save_figure, splits_of, system_name
from asrlib.reporting.notebook_pages import PAGES
from asrlib.reporting.numbers import change, duration, percent, size
from asrlib.reporting.run_figures import cache_comparison, inference_time_comparison, wer_bars, wer_vs_cache
from asrlib.reporting.tables import save_table
from asrlib.runs import STEP_OF_METRICS, Run, atomic_write, read_json

# What Sonawane, Gokhale and Tian (2025) said of another, larger model at half the cache, and did not measure.
CLAIMED = pd.DataFrame(
    {
        "claimed WER test-clean": ["2.3 %", "4–5 %", "2.4–2.6 %"],
        "claimed cache": ["1.0", "0.5", "0.5"],
        "claimed speed": ["1.0", "1.1", "1.1–1.15"],
        "claimed memory": ["1.0", "−25–30 %", "−25–30 %"],
    },
    index=pd.Index(list(SYSTEMS.values()), name="claimed of"),
)


CLAIMS_INTRODUCTION = """\
## Beside what is claimed

These figures were *claimed* for a far larger model at half the cache, on another corpus; nobody measured them."""


# ---- the comparison ----------------------------------------------------------------------------------------


def _metrics(run: Run, completed_only: bool = False) -> dict[str, dict]:
    """All metrics/*.json by name; an empty one where a step has not run (or is not marked as completed)."""
    paths = {name: run.path / "metrics" / f"{name}.json" for name in STEP_OF_METRICS}
    wanted = {n for n, step in STEP_OF_METRICS.items() if not completed_only or run.completed(step)}
    return {n: read_json(path) if n in wanted and path.is_file() else {} for n, path in paths.items()}


def comparison_table(run: Run) -> pd.DataFrame:
    """One row per system measured so far (baseline, converted, finetuned), from metrics/*.json alone.

    Columns: attention, cache_bytes_per_second (of audio), cache_bytes_1000_frames, cache_cut (fraction),
    parameters; wer_<split>, its 95 % interval wer_<split>_low and _high, cer_<split> (all fractions);
    latency_ms (mean per utterance), latency_ms_p50, latency_ms_p95, rtfx, speed_ratio (to the baseline) with
    speed_ratio_low and _high, peak_memory_bytes. NaN: unknown.
    """
    return _table(_metrics(run))


def _table(metrics: dict[str, dict]) -> pd.DataFrame:
    before, convert = metrics["baseline"], metrics["convert"]
    attention = ATTENTION.get(kind := before.get("attention", "mha"), kind)
    scores = metrics["evaluate"].get("systems") or {"baseline": before.get("splits", {})}
    timings = metrics["benchmark"].get("systems", {})
    full_cache = timings.get("baseline", {}).get("cache_bytes_per_second")
    cuts = {"baseline": 0.0, "converted": convert.get("cache_cut"), "finetuned": convert.get("cache_cut")}
    parameters = {"baseline": before.get("parameters"), "converted": convert.get("parameters")}
    rows = {}
    for system in SYSTEMS:
        score, timing = scores.get(system, {}), timings.get(system, {})
        if not score and not timing:
            continue
        cache = timing.get("cache_bytes_per_second")
        row = {
            "attention": attention if system == "baseline" else convert.get("attention", "MLA"),
            "cache_bytes_per_second": cache,
            "cache_bytes_1000_frames": timing.get("cache_bytes_1000_frames"),
            "cache_cut": 1 - cache / full_cache if cache and full_cache else cuts[system],
            "parameters": timing.get("parameters", parameters.get(system)),
        }
        for split, values in score.items():
            row[f"wer_{split}"] = values.get("wer")
            row[f"wer_{split}_low"], row[f"wer_{split}_high"] = values.get("wer_interval") or (None, None)
            row[f"cer_{split}"] = values.get("cer")
        row["latency_ms"] = timing.get("latency_ms_mean")
        for name in ("latency_ms_p50", "latency_ms_p95", "rtfx", "speed_ratio"):
            row[name] = timing.get(name)
        row["speed_ratio_low"], row["speed_ratio_high"] = timing.get("speed_ratio_interval") or (None, None)
        row["peak_memory_bytes"] = timing.get("peak_memory_bytes")
        rows[system] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")
    return table.astype({column: float for column in table.columns if column != "attention"})


def readable_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """`comparison_table` to read: a column per system, a row per measure, interval or change in brackets."""
    base = table.loc["baseline"] if "baseline" in table.index else pd.Series(dtype=float)

    def alone(row: pd.Series, column: str, form: str) -> str:
        return "–" if pd.isna(row[column]) else form.format(row[column])

    def with_interval(row: pd.Series, column: str, form: str, scale: float = 1.0) -> str:
        value, low, high = (scale * row[name] for name in (column, f"{column}_low", f"{column}_high"))
        if pd.isna(value):
            return "–"
        return form.format(value) + (f" ({low:.2f}–{high:.2f})" if low < high else "")

    def with_change(row: pd.Series, column: str, show: Callable[[float], str]) -> str:
        if pd.isna(row[column]):
            return "–"
        compared = row.name != "baseline" and pd.notna(base.get(column))
        return show(row[column]) + (f" ({change(row[column], base[column])})" if compared else "")

    columns = {}
    for system, row in table.iterrows():
        columns[system_name(table, system)] = {
            **{f"WER {s}": with_interval(row, f"wer_{s}", "{:.2f} %", 100) for s in splits_of(table)},
            **{f"CER {s}": alone(row, f"cer_{s}", "{:.2%}").replace("%", " %") for s in splits_of(table)},
            "K/V cache per second of audio": with_change(row, "cache_bytes_per_second", size),
            "parameters": with_change(row, "parameters", lambda n: f"{n / 1e6:.2f} M"),
            "latency per utterance": alone(row, "latency_ms", "{:.1f} ms"),
            "RTFx": alone(row, "rtfx", "{:.1f}"),
            "speed against the baseline": with_interval(row, "speed_ratio", "×{:.2f}"),
            "peak memory": with_change(row, "peak_memory_bytes", size),
        }
    readable = pd.DataFrame(columns).rename_axis("")
    return readable[(readable != "–").any(axis=1)]  # a measure that no system has yet is no row


def headline(run: Run) -> str:
    """What the run found, in one sentence made from its figures."""
    return _sentence(_metrics(run))


def _sentence(metrics: dict[str, dict], to_convert: bool = True) -> str:
    """`to_convert`: is a conversion to follow where there is none yet?"""
    table = _table(metrics)
    measured = table.loc["baseline"].dropna().index if "baseline" in table.index else []
    splits = [split for split in splits_of(table) if f"wer_{split}" in measured]
    if not splits:
        return "No word error rate has been measured yet."
    split = "test-clean" if "test-clean" in splits else splits[0]
    base = table.loc["baseline"]
    wer = f"wer_{split}"
    latent = [s for s in ("finetuned", "converted") if s in table.index and pd.notna(table.at[s, wer])]

    def interval(row: pd.Series) -> str:
        low, high = row[f"wer_{split}_low"], row[f"wer_{split}_high"]
        return "unknown" if pd.isna(low) else f"{100 * low:.2f}–{100 * high:.2f}"

    if not latent:
        missing = "; no converted model has been evaluated yet" if to_convert else ""
        return f"WER of the baseline on {split} is {percent(base[wer])} (95 % interval {interval(base)}){missing}."
    new = table.loc[latent[0]]
    words = f"WER on {split} went from {100 * base[wer]:.2f} to {percent(new[wer])}"
    if latent[0] == "converted":
        words += " before any fine-tuning"
    if pd.notna(new["cache_cut"]):
        words = f"At {percent(new['cache_cut'], 1).replace('.0 %', ' %')} less cache, {words}"
    verdict = _verdict(metrics["evaluate"].get("paired", {}).get(split, {}), base, new, split)
    words += f" (95 % intervals {interval(base)} and {interval(new)}; {verdict})"
    if pd.notna(new["speed_ratio"]):
        words += f", speed ×{new['speed_ratio']:.2f}"
        if pd.notna(new["speed_ratio_low"]):
            words += f" ({new['speed_ratio_low']:.2f}–{new['speed_ratio_high']:.2f})"
    if pd.notna(base["peak_memory_bytes"]) and pd.notna(new["peak_memory_bytes"]):
        words += f", peak memory {change(new['peak_memory_bytes'], base['peak_memory_bytes'])}"
    return words + "."


def _verdict(paired: dict, base: pd.Series, new: pd.Series, split: str) -> str:
    """Is the difference between the two systems more than chance? The paired test where there is one."""
    test = paired.get(f"baseline vs {new.name}", {})
    p, (low, high) = test.get("p"), test.get("interval") or (None, None)
    if p is None and low is None:
        low, high = new[f"wer_{split}_low"], new[f"wer_{split}_high"]
        if pd.isna(low) or pd.isna(base[f"wer_{split}_low"]):
            return "significance not tested"
        apart = low > base[f"wer_{split}_high"] or high < base[f"wer_{split}_low"]
        return "they do not overlap" if apart else "they overlap"
    significant = p < 0.05 if p is not None else not low <= 0 <= high
    worse = new[f"wer_{split}"] > base[f"wer_{split}"]
    found = f"significantly {'worse' if worse else 'better'}" if significant else "no significant difference"
    matched = f"; matched pairs{_of_p(test['matched_pairs']['p'])}" if "matched_pairs" in test else ""
    return f"{found} in the paired bootstrap{_of_p(p)}{matched}"


def _of_p(p: float | None) -> str:
    return "" if p is None else ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"


def step_times(run: Run) -> dict[str, float]:
    """Seconds each completed step took, in order."""
    markers = {step: run.completed(step) for step in PAGES}
    return {step: marker["seconds"] for step, marker in markers.items() if marker and "seconds" in marker}


def write_comparison(run: Run) -> pd.DataFrame:
    """Write tables/comparison_table.csv, the comparison's figures and summary.txt; returns the table.

    Raises MissingStep where the models have not been evaluated and benchmarked.
    """
    for name in ("evaluate", "benchmark"):
        run.read_metrics(name)
    table = comparison_table(run)
    save_table(table, run.tables / "comparison_table.csv")
    for draw in (wer_bars, wer_vs_cache, cache_comparison, inference_time_comparison):
        save_figure(draw(table), run.figures / f"{draw.__name__}.png")
    _write_summary(run)
    return table


def _write_summary(run: Run) -> None:
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
