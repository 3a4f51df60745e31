"""The index page over the notebooks of a run."""

import os
from collections.abc import Container
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from asrlib.reporting import notebook_pages, tables
from asrlib.reporting.comparison import (
    cache_words,
    comparison_table,
    headline,
    readable_comparison,
    step_times,
    write_summary,
)
from asrlib.reporting.estimated import beside, compared, estimated_steps
from asrlib.reporting.figures import save_figure
from asrlib.reporting.members import splits_of
from asrlib.reporting.notebook_pages import PAGES
from asrlib.reporting.numbers import duration, percent, unbroken
from asrlib.reporting.provenance import parameters_of, provenance_of
from asrlib.reporting.run_figures import wer_bars
from asrlib.reporting.tables import small_print, table_html
from asrlib.runs import STEP_OF_METRICS, CompletedRun, Run, asked_steps, is_member, is_sweep

# ---- the index page ----------------------------------------------------------------------------------------


def write_index(run_dir: str | os.PathLike, command: str | None = None) -> Path:
    """Write index.html of a run from its completed steps, and say which are missing. Returns its path.

    The page shows nothing of a step that is to run again, until that step is completed.
    command: what makes this run, for those who want to repeat it (default: `python run_all.py NAME`).
    """
    run = Run.open(run_dir)
    command = command or f"python run_all.py {run.path.name}"
    if is_sweep(run.path):
        from asrlib.reporting.sweep_page import write_sweep_index

        return write_sweep_index(run, command)
    completed = CompletedRun(run.path)
    metrics = {name: completed.metrics_so_far(name) for name in STEP_OF_METRICS}
    times, table, estimated = step_times(run), comparison_table(completed), estimated_steps(run)
    if "06_compare" in times:
        write_summary(run)  # the step that wrote it did not know yet how long it took itself
    index = run.path / "index.html"
    pages = [stem for stem in times if (run.path / f"{stem}.html").is_file()]
    sweep = run.path.parent.name if is_member(run.path) else None
    asked = asked_steps(run.path, list(PAGES))
    steps = {stem: of for stem, of in PAGES.items() if stem in asked and (not sweep or run.started(stem))}
    title = "What a smaller cache costs and saves" if "01_convert" in steps else "One recogniser"
    return notebook_pages.render_template(
        "index.html.j2",
        index,
        page=notebook_pages.page_facts(index, run.path.name, title, pages),
        headline=unbroken(headline(completed, to_convert="01_convert" in steps)),
        comparison=_comparison_html(table) if len(table) else None,
        figures=_index_figures(run, table, times),
        data=_data_facts(metrics),
        cache_words=cache_words(run),
        sweep=sweep,
        steps=steps,
        pages=pages,
        times={stem: duration(seconds) for stem, seconds in times.items()},
        estimated={stem: beside({stem: pair}) for stem, pair in estimated.items()},
        estimate=compared(estimated),
        missing=[name for stem, (name, _) in steps.items() if stem not in times],
        total=duration(sum(times.values())),
        command=command,
        parameters=parameters_of(run),
        provenance=provenance_of(run, metrics),
        files=["summary.txt", "tables/comparison_table.csv"] if "06_compare" in times else [],
    )


def _comparison_html(table: pd.DataFrame) -> Markup:
    """The readable comparison, with what stands in brackets in small print."""
    readable = readable_comparison(table)
    return table_html(readable, formats=dict.fromkeys(readable, small_print))


def _index_figures(run: Run, table: pd.DataFrame, done: Container[str]) -> list[Markup]:
    """The figure beside the table first, then the others that the run has."""
    names = []
    if "06_compare" in done:
        names = ["wer_vs_cache", "wer_bars", "cache_comparison", "inference_time_comparison"]
    elif splits_of(table):
        save_figure(wer_bars(table), run.figures / "wer_bars.png")
        names = ["wer_bars"]
    if "03_finetune" in done:
        names.append("training_curves")
    paths = [run.path / "figures" / f"{name}.png" for name in names]
    return [tables.figure_html(path) for path in paths if path.is_file()]


def _data_facts(metrics: dict[str, dict]) -> list[Markup]:
    """What the word errors are those of: the model, then one line per split."""
    before = metrics["baseline"]
    named = (
        [
            Markup("model {}, {:.2f} M parameters, corpus {}").format(
                tables.isolated(before["model"]), before["parameters"] / 1e6, tables.isolated(before["corpus"])
            )
        ]
        if before.get("corpus")
        else []
    )
    scores = metrics["evaluate"].get("systems", {}).get("baseline") or before.get("splits", {})
    lines = []
    for split, s in scores.items():
        line = Markup("{}: {:,} utterances, {:,} words, {}").format(
            tables.isolated(split), s["utterances"], s["words"], duration(s["seconds_audio"])
        )
        if zeroed := before.get("attention_zeroed", {}).get(split):
            few = f" ({zeroed['utterances']} utterances)" if zeroed["utterances"] < s["utterances"] else ""
            line += unbroken(f"; WER of the baseline with its attention set to zero {percent(zeroed['wer'])}{few}")
        lines.append(line)
    return named + lines
