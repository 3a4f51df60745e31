"""Figures of a single run: word errors, cache and time of its systems side by side."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from asrlib.reporting.figures import (
    GREY,
    INK,
    SYSTEMS,
    described,
    drawing_style,
    new_figure,
    rate_with_reach,
    system_colours,
    system_name,
)
from asrlib.reporting.members import splits_of
from asrlib.reporting.numbers import change, percent, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _described(table: pd.DataFrame, columns: Mapping[str, Callable[[float], str]]) -> str:
    return described(table, {system: system_name(table, system) for system in table.index}, columns)


def _rates_described(table: pd.DataFrame) -> str:
    first, *others = splits_of(table)
    named = {f"wer_{split}": lambda wer, split=split: f"{split} {percent(wer)}" for split in (first, *others)}
    return _described(table, named if others else {f"wer_{first}": percent})


def wer_bars(table: pd.DataFrame) -> "Figure":
    """Word error rate of each system on each split of `comparison_table`, with 95 % intervals."""
    splits, colours = splits_of(table), system_colours()
    width = 0.8 / len(table)
    with drawing_style():
        fig, axes = new_figure(8, 3.6)
        ax = axes[0, 0]
        for i, system in enumerate(table.index):
            for j, split in enumerate(splits):
                wer, reach = rate_with_reach(table.loc[system], split)
                x = j + (i - (len(table) - 1) / 2) * width
                ax.bar(x, wer, 0.9 * width, color=colours[system], label=system_name(table, system) if j == 0 else None)
                if reach:
                    ax.errorbar(x, wer, reach, color=INK, capsize=3, lw=1.2)
                top = wer + (reach[1][0] if reach else 0)
                ax.annotate(f"{wer:.2f}", (x, top), (0, 3), textcoords="offset points", ha="center", size=8)
        ax.set(xticks=range(len(splits)), xticklabels=splits, ylabel="word error rate (%)")
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.12)
        ax.legend(frameon=False, ncols=len(table), loc="lower center", bbox_to_anchor=(0.5, 1))
        ax.spines[["top", "right"]].set_visible(False)
    fig.set_label("Word error rates. " + _rates_described(table))
    return fig


def wer_vs_cache(table: pd.DataFrame) -> "Figure":
    """Word error rate (95 % intervals) against the cache that is left; one dotted line per split."""
    splits, colours, markers = splits_of(table), system_colours(), dict(zip(SYSTEMS, "o^sD", strict=True))
    with drawing_style():
        fig, axes = new_figure(5.6, 5)
        ax = axes[0, 0]
        for split in splits:
            points = []
            for system in table.index:
                wer, reach = rate_with_reach(table.loc[system], split)
                aside = {"control": 1.2, "converted": -1.2, "finetuned": 1.2}.get(
                    system, 0
                )  # of one cache, side by side
                x = 100 * (1 - table.at[system, "cache_cut"]) + aside
                points.append((x, wer))
                look = {"color": colours[system], "marker": markers[system], "label": system_name(table, system)}
                ax.errorbar(x, wer, reach, **look, ls="", ms=7, capsize=3, lw=1.3)
            (x0, y0), (x1, y1) = points[0], points[-1]
            ax.plot([x0, x1], [y0, y1], color=GREY, lw=1, ls=":", zorder=1)
            ax.annotate(
                split,
                (0.7 * x0 + 0.3 * x1, 0.7 * y0 + 0.3 * y1),
                (0, 6),
                textcoords="offset points",
                ha="center",
                size=9,
            )
        ax.axvline(50, color=GREY, lw=1, ls="--", zorder=0)
        note = "half: a latent of each\nlayer is exact here"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        at_foot = {"transform": ax.get_xaxis_transform(), "va": "bottom"}
        ax.text(51, 0.02, note, size=7.5, color=GREY, bbox=white, zorder=4, **at_foot)
        ax.set(xlim=(0, 106), xlabel="K/V cache (% of the baseline's)", ylabel="word error rate (%)")
        ax.set_ylim(bottom=0)
        named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(
            named.values(),
            named.keys(),
            frameon=False,
            fontsize=8,
            ncols=min(3, len(table)),
            columnspacing=1.2,
            handletextpad=0.2,
            loc="lower center",
            bbox_to_anchor=(0.45, 1),
        )
        ax.spines[["top", "right"]].set_visible(False)
    left = ", ".join(
        f"{system_name(table, s)} {percent(1 - c, 1)}" for s, c in table["cache_cut"].items() if pd.notna(c)
    )
    fig.set_label(f"Word error rate against cache left. Cache: {left}. {_rates_described(table)}")
    return fig


def _bars(ax, table: pd.DataFrame, column: str, show: Callable, label: str, scale: float = 1.0) -> None:
    """Horizontal bars, one per system, each with its value and the change from the baseline."""
    colours, longest = system_colours(), table[column].max() / scale
    for i, (system, value) in enumerate(table[column].items()):
        if pd.isna(value):
            continue
        ax.barh(i, value / scale, 0.62, color=colours[system])
        base = table[column].get("baseline")
        note = "" if system == "baseline" or pd.isna(base) else f"  ({change(value, base)})"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        ax.text(value / scale + 0.02 * longest, i, show(value) + note, va="center", size=9, bbox=white, zorder=4)
    ax.set(yticks=range(len(table)), yticklabels=[system_name(table, s) for s in table.index], xlabel=label)
    ax.set_xlim(0, longest * 1.42)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.spines[["top", "right", "left"]].set_visible(False)


def cache_comparison(table: pd.DataFrame) -> "Figure":
    """Bytes of keys and values (or latents) that streaming keeps per second of audio."""
    with drawing_style():
        fig, axes = new_figure(8, 0.55 * len(table) + 1.1)
        _bars(axes[0, 0], table, "cache_bytes_per_second", size, "K/V cache per second of audio (KiB)", 1024)
        full = table["cache_bytes_per_second"].get("baseline")
        if pd.notna(full):
            axes[0, 0].axvline(full / 2048, color=GREY, lw=1, ls="--", zorder=3)
            note = "dashed: half, where a latent of each layer is exact"
            axes[0, 0].set_title(note, size=9, weight="normal", color=GREY, loc="right")
    fig.set_label("K/V cache per second of audio. " + _described(table, {"cache_bytes_per_second": size}))
    return fig


def inference_time_comparison(table: pd.DataFrame) -> "Figure":
    """Mean latency per utterance, and RTFx."""
    with drawing_style():
        fig, axes = new_figure(9, 0.55 * len(table) + 1.1, 1, 2, sharey=True)
        _bars(axes[0, 0], table, "latency_ms", lambda v: f"{v:.1f}", "latency per utterance (ms)")
        _bars(axes[0, 1], table, "rtfx", lambda v: f"{v:.1f}", "RTFx: seconds of audio per second of compute")
        axes[0, 1].invert_yaxis()  # shared, so inverted twice
    fig.set_label(
        "Mean latency per utterance in ms. "
        + _described(table, {"latency_ms": "{:.1f}".format})
        + " RTFx. "
        + _described(table, {"rtfx": "{:.1f}".format})
    )
    return fig


def figures_of_run(table: pd.DataFrame) -> dict[str, "Figure"]:
    """{file name: figure} of all that is drawn of `comparison_table`."""
    return {
        draw.__name__: draw(table) for draw in (wer_bars, wer_vs_cache, cache_comparison, inference_time_comparison)
    }
