"""reports/index.html: all runs below a folder side by side, in a table that sorts, and word errors against cache.

python run_all.py --index
"""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from asrlib.measuring.names import ATTENTION, AUDIO_SECONDS
from asrlib.reporting import notebook_pages, tables
from asrlib.reporting.comparison import comparison_table
from asrlib.reporting.figures import drawing_style, new_figure, save_figure
from asrlib.reporting.members import compare_members, splits_of
from asrlib.reporting.numbers import percent, rate_interval, size
from asrlib.runs import Run, asked_for, is_member, is_sweep, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = ".wer_vs_cache.png"
MOST_SPLITS = 6  # in the figure: those that most runs were evaluated on
SHOWN = {  # column of the page: (of the table, how)
    "run": ("name", str),
    "attention": ("attention", str),
    "split": ("split", str),
    "WER": ("wer", percent),
    f"cache of {AUDIO_SECONDS:g} s": ("cache", size),
    "cut": ("cut", lambda cut: percent(cut, 1)),
    "RTFx": ("rtfx", "{:.0f}".format),
    "finished": ("finished", lambda time: time[:16].replace("T", " ")),
}
NUMBERS = {"wer", "cache", "cut", "rtfx"}


def write_runs_index(reports: Path) -> Path:
    """Write index.html of the folder `reports`; returns its path. Runs without word errors yet are left out."""
    table = pd.DataFrame(_rows(reports))
    script = (notebook_pages.TEMPLATES / "report" / "sort.js").read_text(encoding="utf-8")
    page = notebook_pages.page_facts(reports / "index.html", reports.name, "All runs", [])
    page["script_hash"] = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figure = None
    if len(table) and (table["cache"].notna() & (table["wer"] <= 1)).any():
        save_figure(wer_against_cache(table), reports / FIGURE)
        figure = tables.figure_html(reports / FIGURE)
    rows = [
        {
            "href": row["href"],
            "interval": "" if pd.isna(row["low"]) else rate_interval((row["low"], row["high"])),
            "cells": [
                ("" if pd.isna(row[key]) else show(row[key]), "" if pd.isna(row[key]) else row[key], key in NUMBERS)
                for key, show in SHOWN.values()
            ],
        }
        for row in table.to_dict("records")
    ]
    index = reports / "index.html"
    return notebook_pages.render_template(
        "runs.html.j2", index, page=page, columns=list(SHOWN), rows=rows, figure=figure, script=script
    )


def _rows(reports: Path) -> Iterator[dict]:
    """Of each run its last model, and of each sweep all its models, on each split."""
    for page in sorted(path for depth in ("*", "*/*") for path in reports.glob(f"{depth}/index.html")):
        run = Run(page.parent)
        if is_sweep(run.path):
            table = compare_members(run, asked_for(run), test=False).table
        elif not is_member(run.path):
            table = comparison_table(run).tail(1)
            table = table.assign(cache_bytes=AUDIO_SECONDS * table["cache_bytes_per_second"]) if len(table) else table
        else:
            continue
        for model, row in table.iterrows():
            own_page = run.path / model / "index.html"
            place = own_page if own_page.is_file() else page
            markers = [read_json(path) for path in (place.parent / ".completed").glob("*.json")]
            shown = run.path / model if is_sweep(run.path) else run.path
            for split in splits_of(table):
                yield {
                    "name": shown.relative_to(reports).as_posix(),
                    "href": place.relative_to(reports).as_posix(),
                    "attention": ATTENTION.get(row["attention"], row["attention"]),
                    "split": split,
                    "wer": row[f"wer_{split}"],
                    "low": row[f"wer_{split}_low"],
                    "high": row[f"wer_{split}_high"],
                    "cache": row["cache_bytes"],
                    "cut": row["cache_cut"],
                    "rtfx": row["rtfx"],
                    "finished": max((marker.get("time", "") for marker in markers), default=""),
                }


def wer_against_cache(table: pd.DataFrame) -> "Figure":
    """Word error rate of every run against the cache of AUDIO_SECONDS of audio, up to 100 %; one panel per split."""
    import seaborn as sns

    known = table[table["cache"].notna() & (table["wer"] <= 1)]
    splits = known["split"].value_counts().index[:MOST_SPLITS].tolist()
    columns = min(3, len(splits))
    with drawing_style():
        fig, axes = new_figure(3.4 * columns, 3.1 * -(-len(splits) // columns), -(-len(splits) // columns), columns)
        for ax, split in zip(axes.flat, splits, strict=False):
            of_split = known[known["split"] == split]
            points = {"x": of_split["cache"] / 1024, "y": 100 * of_split["wer"]}
            kinds = sorted(known["attention"].unique())
            sns.scatterplot(
                **points, hue=of_split["attention"], style=of_split["attention"], hue_order=kinds, style_order=kinds,
                palette="colorblind", s=50, ax=ax, legend=split == splits[0],
            )  # fmt: skip
            ax.set(xscale="log", xlabel=f"cache of {AUDIO_SECONDS:g} s of audio (KiB)", title=split)
            ax.set(ylabel="word error rate (%)", ylim=(0, 108 * of_split["wer"].max()))
            ax.xaxis.set_minor_formatter("")
        for ax in axes.flat[len(splits) :]:
            ax.set_visible(False)
        named = axes.flat[0].get_legend_handles_labels()
        axes.flat[0].get_legend().remove()
        fig.legend(*named, loc="outside lower center", ncols=len(kinds), frameon=False)
    fig.set_label(
        f"Word error rate against the cache of {AUDIO_SECONDS:g} s of audio: "
        + "; ".join(f"{r['name']} {r['split']} {percent(r['wer'])} at {size(r['cache'])}" for _, r in known.iterrows())
    )
    return fig
