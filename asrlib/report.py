"""What a run found, for people: tables, one sentence, a summary, and the index page over its notebooks.

Everything is computed from the run's metrics/*.json. There error rates are fractions; shown, they are per cent.
The figures (figures.py) and the HTML of pages and tables (html.py) are reached through here.
"""

import os
import textwrap
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from asrlib import html
from asrlib.figures import (
    SYSTEMS,
    cache_comparison,
    change,
    duration,
    error_heatmap,
    inference_time_comparison,
    percent,
    save_figure,
    show_figure,
    size,
    spectrum_figure,
    splits_of,
    training_curves,
    unbroken,
    wer_bars,
    wer_vs_cache,
)
from asrlib.html import PAGES, diff_transcripts, display_table, render_notebook, table_html
from asrlib.runs import Run, atomic_write, read_json

__all__ = [  # what notebooks call
    "CLAIMED", "cache_comparison", "comparison_table", "diff_transcripts", "display_table", "error_heatmap", "headline",
    "inference_time_comparison", "readable_comparison", "render_notebook", "save_figure", "save_table", "show_figure",
    "spectrum_figure", "step_times", "table_html", "training_curves", "wer_bars", "wer_vs_cache", "write_comparison",
    "write_index",
]  # fmt: skip

# What the first system said of itself (another, larger model; half the cache). It measured none of it.
CLAIMED = pd.DataFrame(
    {
        "claimed WER test-clean": ["2.3 %", "4–5 %", "2.4–2.6 %"],
        "claimed cache": ["1.0", "0.5", "0.5"],
        "claimed speed": ["1.0", "1.1", "1.1–1.15"],
        "claimed memory": ["1.0", "−25–30 %", "−25–30 %"],
    },
    index=pd.Index(list(SYSTEMS.values()), name="first system"),
)


# ---- the comparison ----------------------------------------------------------------------------------------


def _metrics(run: Run, name: str) -> dict:
    """metrics/<name>.json, or nothing where that step has not run."""
    path = run.path / "metrics" / f"{name}.json"
    return read_json(path) if path.is_file() else {}


def comparison_table(run: Run) -> pd.DataFrame:
    """One row per system measured so far (baseline, converted, finetuned), from metrics/*.json alone.

    Columns: attention, cache_bytes_per_second (of audio), cache_bytes_1000_frames, cache_cut (fraction),
    parameters; for each split wer_, wer_low_, wer_high_ (95 % interval) and cer_<split> (fractions);
    latency_ms (mean per utterance), latency_ms_p50, latency_ms_p95, rtfx, peak_memory_bytes. NaN: not measured.
    """
    before, convert, evaluate, benchmark = (_metrics(run, m) for m in ("baseline", "convert", "evaluate", "benchmark"))
    scores = evaluate.get("systems") or {"baseline": before.get("splits", {})}
    timings = benchmark.get("systems", {})
    known_parameters = {"baseline": before.get("parameters"), "converted": convert.get("parameters")}
    rows = {}
    for system in SYSTEMS:
        score, timing = scores.get(system, {}), timings.get(system, {})
        if not score and not timing:
            continue
        cache, full = timing.get("cache_bytes_per_second"), timings.get("baseline", {}).get("cache_bytes_per_second")
        row = {
            "attention": "MHA" if system == "baseline" else "MLA",
            "cache_bytes_per_second": cache,
            "cache_bytes_1000_frames": timing.get("cache_bytes_1000_frames"),
            "cache_cut": 0.0 if system == "baseline" else 1 - cache / full if cache and full else convert.get("cache_cut"),
            "parameters": timing.get("parameters", known_parameters.get(system)),
        }
        for split, values in score.items():
            low, high = values.get("wer_interval") or (None, None)
            row |= {f"wer_{split}": values.get("wer"), f"wer_low_{split}": low, f"wer_high_{split}": high}
            row[f"cer_{split}"] = values.get("cer")
        row |= {"latency_ms": timing.get("latency_ms_mean")}
        row |= {k: timing.get(k) for k in ("latency_ms_p50", "latency_ms_p95", "rtfx", "peak_memory_bytes")}
        rows[system] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")
    return table.astype({column: float for column in table.columns if column != "attention"})


def readable_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """`comparison_table` for reading: a column per system, a row per measure, intervals and changes in brackets."""
    base = table.loc["baseline"] if "baseline" in table.index else None

    def cell(row: pd.Series, column: str, show, compare=None) -> str:
        value = row.get(column)
        if pd.isna(value):
            return "–"
        first = base is None or row.name == "baseline" or compare is None or pd.isna(base.get(column))
        return show(value) if first else f"{show(value)} ({compare(value, base[column])})"

    def with_interval(row: pd.Series, split: str) -> str:
        value, low, high = (row.get(f"{name}_{split}") for name in ("wer", "wer_low", "wer_high"))
        if pd.isna(value):
            return "–"
        return percent(value) if pd.isna(low) else f"{percent(value)} ({100 * low:.2f}–{100 * high:.2f})"

    def ratio(value: float, reference: float) -> str:
        return f"×{value / reference:.2f}"

    columns = {}
    for system, row in table.iterrows():
        shown = {f"WER {split}": with_interval(row, split) for split in splits_of(table)}
        shown |= {f"CER {split}": cell(row, f"cer_{split}", percent) for split in splits_of(table)}
        shown |= {
            "K/V cache per second of audio": cell(row, "cache_bytes_per_second", size, change),
            "parameters": cell(row, "parameters", lambda n: f"{n / 1e6:.2f} M", change),
            "latency per utterance": cell(row, "latency_ms", lambda ms: f"{ms:.1f} ms", ratio),
            "RTFx (audio ÷ compute time)": cell(row, "rtfx", lambda x: f"{x:.1f}", ratio),
            "peak memory": cell(row, "peak_memory_bytes", size, change),
        }
        columns[SYSTEMS[system]] = shown
    readable = pd.DataFrame(columns).rename_axis("")
    return readable[(readable != "–").any(axis=1)]  # a measure that no system has yet is no row


def headline(run: Run) -> str:
    """What the run found, in one sentence made from its figures."""
    table = comparison_table(run)
    splits = [s for s in splits_of(table) if "baseline" in table.index and pd.notna(table.at["baseline", f"wer_{s}"])]
    if not splits:
        return "No word error rate has been measured yet."
    split = "test-clean" if "test-clean" in splits else splits[0]
    base = table.loc["baseline"]
    wer = f"wer_{split}"
    latent = [s for s in ("finetuned", "converted") if s in table.index and pd.notna(table.at[s, wer])]

    def interval(row: pd.Series) -> str:
        low, high = row[f"wer_low_{split}"], row[f"wer_high_{split}"]
        return "unknown" if pd.isna(low) else f"{100 * low:.2f}–{100 * high:.2f}"

    if not latent:
        return (
            f"WER of the baseline on {split} is {percent(base[wer])} (95 % interval {interval(base)}); "
            "no converted model has been evaluated yet."
        )
    new = table.loc[latent[0]]
    words = f"WER on {split} went from {100 * base[wer]:.2f} to {percent(new[wer])}"
    if latent[0] == "converted":
        words += " before any fine-tuning"
    if pd.notna(new["cache_cut"]):
        words = f"At {percent(new['cache_cut'], 1).replace('.0 %', ' %')} less cache, {words}"
    verdict = _verdict(_metrics(run, "evaluate").get("paired", {}).get(split, {}), base, new, split)
    words += f" (95 % intervals {interval(base)} and {interval(new)}; {verdict})"
    if pd.notna(base["latency_ms"]) and pd.notna(new["latency_ms"]):
        words += f", speed ×{base['latency_ms'] / new['latency_ms']:.2f}"
    if pd.notna(base["peak_memory_bytes"]) and pd.notna(new["peak_memory_bytes"]):
        words += f", peak memory {change(new['peak_memory_bytes'], base['peak_memory_bytes'])}"
    return words + "."


def _verdict(paired: dict, base: pd.Series, new: pd.Series, split: str) -> str:
    """Is the difference between the two systems more than chance? The paired test where there is one."""
    test = paired.get(f"baseline vs {new.name}", {})
    p, (low, high) = test.get("p"), test.get("interval") or (None, None)
    if p is None and low is None:
        low, high = new[f"wer_low_{split}"], new[f"wer_high_{split}"]
        if pd.isna(low) or pd.isna(base[f"wer_low_{split}"]):
            return "significance not tested"
        apart = low > base[f"wer_high_{split}"] or high < base[f"wer_low_{split}"]
        return "they do not overlap" if apart else "they overlap"
    significant = p < 0.05 if p is not None else not low <= 0 <= high
    shown = "" if p is None else ", p < 0.001" if p < 0.001 else f", p = {p:.3f}" if p < 0.1 else f", p = {p:.2f}"
    return f"{'a' if significant else 'no'} significant difference in the paired bootstrap{shown}"


def step_times(run: Run) -> dict[str, float | None]:
    """Seconds each completed step took, in order; steps without a marker are left out."""
    markers = {step: run.completed(step) for step in PAGES}
    return {step: marker.get("seconds") for step, marker in markers.items() if marker is not None}


# ---- files -------------------------------------------------------------------------------------------------


def save_table(df: pd.DataFrame, path: Path) -> Path:
    with atomic_write(path) as file:
        df.to_csv(file, lineterminator="\n")
    return path


def write_comparison(run: Run) -> pd.DataFrame:
    """Write tables/comparison_table.csv, the three comparison figures and summary.txt; returns the table.

    Raises MissingStep where the models have not been evaluated and benchmarked.
    """
    for name in ("evaluate", "benchmark"):
        run.read_metrics(name)
    table = comparison_table(run)
    save_table(table, run.tables / "comparison_table.csv")
    save_figure(cache_comparison(table), run.figures / "cache_comparison.png")
    save_figure(wer_vs_cache(table), run.figures / "wer_vs_cache.png")
    save_figure(inference_time_comparison(table), run.figures / "inference_time_comparison.png")
    with atomic_write(run.path / "summary.txt") as file:
        file.write(summary(run))
    return table


def summary(run: Run) -> str:
    """The comparison as plain text: word errors, cache, speed, memory, time per step, and what others claimed."""

    def aligned(df: pd.DataFrame) -> str:
        return df.to_string(justify="left")

    title = f"{run.path.name}: what a smaller cache costs and saves"
    times = {step: duration(seconds) for step, seconds in step_times(run).items() if seconds is not None}
    steps = "\n".join(f"{step:<24}{time:>14}" for step, time in times.items()) or "no step is marked as completed"
    return "\n".join(
        [
            title,
            "=" * len(title),
            "",
            textwrap.fill(headline(run), 100),
            "",
            aligned(readable_comparison(comparison_table(run))),
            "",
            "Brackets: 95 % interval of WER (bootstrap by utterance); otherwise the change from the baseline.",
            "The cache is what streaming keeps; a full-context call keeps none once it has returned.",
            "",
            "Time per step",
            steps,
            "",
            "Claimed by the first system for another model at half the cache; it never measured these figures",
            aligned(CLAIMED),
            "",
        ]
    )


# ---- the index page ----------------------------------------------------------------------------------------


def write_index(run_dir: str | os.PathLike) -> Path:
    """Write index.html of a run from whatever is done so far; says what is missing. Returns its path."""
    run = Run.open(run_dir)
    times, table = step_times(run), comparison_table(run)
    command = f"python run_all.py {run.path.name}"
    steps = [
        {
            "stem": stem,
            "name": name,
            "what": what,
            "done": stem in times,
            "page": (run.path / f"{stem}.html").is_file(),
            "time": duration(times[stem]) if times.get(stem) is not None else "",
        }
        for stem, (name, what) in PAGES.items()
    ]
    return html.render_template(
        "index.html.j2",
        run.path / "index.html",
        page=html.page_facts(run.path / "index.html", run.path.name, "What a smaller cache costs and saves"),
        headline=unbroken(headline(run)),
        comparison=_comparison_html(table) if len(table) else None,
        figures=_index_figures(run, table),
        data=_data_facts(run),
        steps=steps,
        missing=[step["name"] for step in steps if not step["done"]],
        total=duration(sum(t for t in times.values() if t is not None)),
        command=command,
        parameters=_parameters(run),
        provenance=_provenance(run),
        files=[f for f in ("summary.txt", "tables/comparison_table.csv") if (run.path / f).is_file()],
    )


def _comparison_html(table: pd.DataFrame) -> Markup:
    """The readable comparison with what stands in brackets in small print."""

    def cell(text: str) -> Markup:
        value, bracket, note = unbroken(text).partition(" (")
        return Markup("{} <small>{}</small>").format(value, note.removesuffix(")")) if bracket else Markup.escape(value)

    readable = readable_comparison(table)
    return table_html(readable.map(cell), formats={c: str for c in readable})


def _index_figures(run: Run, table: pd.DataFrame) -> list[Markup]:
    """The figure beside the table first, then the others that the run has."""
    names = ("wer_vs_cache", "cache_comparison", "inference_time_comparison", "training_curves")
    paths = [run.path / "figures" / f"{name}.png" for name in names]
    if not paths[0].is_file() and splits_of(table):  # not compared yet: show what there is
        paths[0] = save_figure(wer_bars(table), run.figures / "wer.png")
    return [html.figure_html(path) for path in paths if path.is_file()]


def _data_facts(run: Run) -> list[str]:
    """On how much speech the word errors stand: one line per split."""
    systems = _metrics(run, "evaluate").get("systems", {})
    scores = systems.get("baseline") or _metrics(run, "baseline").get("splits", {})
    return [
        unbroken(f"{split}: {s['utterances']:,} utterances, {s['words']:,} words, {duration(s['seconds_audio'])}")
        for split, s in scores.items()
        if {"utterances", "words", "seconds_audio"} <= s.keys()
    ]


def _parameters(run: Run) -> dict[str, str]:
    """What the run was asked for: params.json, otherwise what its steps say they were given."""
    path = run.path / "params.json"
    if path.is_file():
        given = read_json(path)
    else:
        given = {k: v for step in PAGES for k, v in (run.completed(step) or {}).get("parameters", {}).items()}
    return {name: str(value) for name, value in given.items()}


def _provenance(run: Run) -> dict[str, str]:
    """When, with which code and on what the run was made, as its last completed step says."""
    markers = [marker for step in PAGES if (marker := run.completed(step))]
    last = markers[-1] if markers else {}
    benchmark = _metrics(run, "benchmark")
    facts = {
        "finished": last.get("time"),
        "commit": last.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in last.get("versions", {}).items()),
        "timed on": ", ".join(f"{benchmark[k]} {unit}".strip() for k, unit in
                              (("device", ""), ("threads", "threads"), ("dtype", "")) if k in benchmark),
        "base model": _metrics(run, "baseline").get("model"),
    }  # fmt: skip
    return {name: str(value) for name, value in facts.items() if value}
