"""Figures of the members of a sweep. Colour says the kind of attention, marker and line the encoder; where that tells
members apart no longer, each has a colour of its own, from the smallest cache to the largest.

Descriptions and styles are those of `figures`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from asrlib.measuring.entries import UNCONVERTED
from asrlib.measuring.names import ATTENTION, AUDIO_SECONDS, IN_BLOCKS
from asrlib.reporting.figures import (
    GREY,
    SYSTEMS,
    described,
    drawing_style,
    new_figure,
    rate_with_reach,
    system_colours,
)
from asrlib.reporting.members import Comparison, varied_parameters
from asrlib.reporting.numbers import percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"conformer": "o", "branchformer": "D"}
LINES = {"conformer": "-", "branchformer": "--"}
MANY = 8.0  # times as large: from there on an axis is logarithmic


@dataclass(frozen=True)
class Look:
    """How one system is drawn, in every figure."""

    label: str
    colour: tuple
    marker: str = "o"
    line: str = "-"


def looks(sweep: Comparison) -> dict[str, Look]:
    """{member: its look}, in the order of the table."""
    import seaborn as sns

    table, palette = sweep.table, sns.color_palette("colorblind")
    kinds = {"mha": palette[7], "mla": palette[0], "mla_simple": palette[9], "gqa": palette[1], "linear": palette[2]}
    colours = {name: kinds.get(row["attention"], palette[4]) for name, row in table.iterrows()}
    if by_cache(table):
        rising = _members_of(table).sort_values("cache_bytes", kind="stable").index
        colours |= dict(zip(rising, sns.color_palette("viridis", len(rising) + 1), strict=False))
    return {
        name: Look(sweep.short[name], colours[name], MARKERS.get(row["encoder"], "s"), LINES.get(row["encoder"], ":"))
        for name, row in table.iterrows()
    }


def by_cache(table: pd.DataFrame) -> bool:
    """Do colours go by the size of the cache, as encoder and attention do not tell all members apart?"""
    return bool(_members_of(table).duplicated(["encoder", "attention"]).any())


def _members_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[[not name.startswith(UNCONVERTED) for name in table.index]]


def looks_of_run() -> dict[str, Look]:
    """The looks of the three models of a single run, and of its baseline worked in blocks."""
    import seaborn as sns

    looks = {name: Look(label, system_colours()[name]) for name, label in SYSTEMS.items()}
    return looks | {IN_BLOCKS: Look(f"{IN_BLOCKS} of queries", sns.color_palette("colorblind")[2])}


# ---- pieces ------------------------------------------------------------------------------------------------


def _legend(fig: "Figure", drawn: Iterable[Look]) -> None:
    """Beside the axes, one entry per system."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=look.colour, ls=look.line, marker=look.marker, ms=5) for look in drawn]
    labels = [look.label for look in drawn]
    fig.legend(handles, labels, frameon=False, fontsize=8, handlelength=3.6, loc="outside right upper")


def _label_points(ax: "Axes", points: Sequence[tuple[Look, float, float, float, float]]) -> None:
    """Write each label beside its point (x, y, and the ends of its interval), where it covers least of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()  # the axes are where they will be
    renderer, frame = canvas.get_renderer(), ax.get_window_extent()
    point = ax.figure.dpi / 72  # pixels
    taken = []
    for _, x, y, low, high in points:
        (left, middle), (_, bottom), (_, top) = ax.transData.transform([(x, y), (x, low), (x, high)])
        taken += [(left - 5 * point, middle - 5 * point, left + 5 * point, middle + 5 * point)]
        taken += [(left - 3 * point, bottom, left + 3 * point, top)]
    for look, x, y, _, _ in points:
        left, middle = ax.transData.transform((x, y))
        text = ax.annotate(look.label, (x, y), (0, 0), textcoords="offset points", va="center", size=8)
        width = text.get_window_extent(renderer).width
        places = []
        for side, away, up in itertools.product((1, -1), (8, 22, 40), (0, 11, -11, 22, -22, 33, -33, 44, -44)):
            start = left + side * away * point - (width if side < 0 else 0)
            box = (start, middle + (up - 5) * point, start + width, middle + (up + 5) * point)
            outside = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1) + max(0, frame.y0 - box[1])
            cost = sum(_overlap(box, other) for other in taken) + 100 * outside + point * (abs(up) + away) + (side < 0)
            places.append((cost, side, away, up, box))
        _, side, away, up, box = min(places)
        taken.append(box)
        text.set(position=(side * away, up), ha="left" if side > 0 else "right", color=GREY)
        text.set_in_layout(False)
        if up or away > 8:
            ends = dict(arrowstyle="-", color=GREY, lw=0.6, shrinkA=0, shrinkB=4)
            line = ax.annotate("", (x, y), (side * away, up), textcoords="offset points", arrowprops=ends)
            line.set_in_layout(False)


def _overlap(a: tuple, b: tuple) -> float:
    """Area that two boxes (x0, y0, x1, y1) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _plain_log(axis, values: Sequence[float], show=lambda value, _: f"{value:g}") -> None:
    """Ticks of a logarithmic axis as plain numbers; all of `values` where they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(FixedLocator(list(values)) if 0 < len(values) <= 9 else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(show))
    axis.set_minor_formatter(NullFormatter())


def _wer_points(ax: "Axes", table: pd.DataFrame, split: str, x: str, drawn: Mapping[str, Look]) -> list:
    """Word error rate with its interval against the column `x`; (look, x, y, low, high) of every point."""
    points, seen = [], {}
    beside = (table[x].max() / table[x].min()) ** 0.015 if x == "cache_bytes" else 1  # several of one size
    for name, row in table.iterrows():
        if pd.isna(row[x]) or pd.isna(row[f"wer_{split}"]):
            continue
        wer, reach = rate_with_reach(row, split)
        seen[row[x]] = repeats = seen.get(row[x], -1) + 1
        at, look = row[x] * beside**repeats, drawn[name]
        bars = dict(color=look.colour, marker=look.marker, ms=7, capsize=3, lw=1.2, ls="", zorder=3)
        ax.errorbar(at, wer, reach, **bars)
        (below,), (above,) = reach or ([0], [0])
        points.append((look, at, wer, wer - below, wer + above))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(split, size=10)
    return points


# ---- word errors -------------------------------------------------------------------------------------------


def wer_against_cache(sweep: Comparison) -> "Figure":
    """Word error rate (95 % intervals) against the bytes that a stream keeps of AUDIO_SECONDS, on a log axis."""
    return _wer_against(
        sweep, "cache_bytes", f"state kept of {AUDIO_SECONDS:g} s of audio", lambda value, _=None: size(value), log=True
    )


def wer_against_time(sweep: Comparison) -> "Figure":
    """Word error rate (95 % intervals) against the mean time of an utterance."""
    ms = sweep.table["latency_ms"]
    return _wer_against(
        sweep, "latency_ms", "time per utterance (ms)", lambda v, _=None: f"{v:.3g} ms", ms.max() > MANY * ms.min()
    )


def _wer_against(sweep: Comparison, column: str, label: str, show, log: bool) -> "Figure":
    drawn, splits = looks(sweep), sweep.splits[:2]
    with drawing_style():
        fig, axes = new_figure(4.6 * len(splits) + 0.4, 4.2, 1, len(splits))
        points = [_wer_points(ax, sweep.table, split, column, drawn) for ax, split in zip(axes[0], splits, strict=True)]
        for ax in axes[0]:
            if log:
                ax.set_xscale("log")
                _doubling_ticks(ax, sweep.table[column].dropna(), show)
            ax.set(xlabel=label, ylabel="word error rate (%)")
            ax.margins(x=0.14, y=0.1)
            ax.set_ylim(bottom=max(0, ax.get_ylim()[0]))
        for ax, labelled in zip(axes[0], points, strict=True):
            _label_points(ax, labelled)
    wers = {f"wer_{split}": lambda v, split=split: f"{percent(v)} on {split}" for split in splits}
    fig.set_label(f"Word error rate against {label}. " + described(sweep.table, sweep.short, {column: show, **wers}))
    return fig


def _doubling_ticks(ax: "Axes", values: pd.Series, show) -> None:
    """Ticks at powers of two, few enough to be read."""
    first, last = np.floor(np.log2(values.min())), np.ceil(np.log2(values.max()))
    step = max(1, int(np.ceil((last - first) / 5)))
    _plain_log(ax.xaxis, [2**power for power in np.arange(first, last + 1, step)], show)
    ax.minorticks_off()


def wer_against_parameter(sweep: Comparison, parameter: str, groups: Sequence[Sequence[str]]) -> "Figure":
    """Word error rate of the members that differ in `parameter` alone, one line per group and split."""
    import seaborn as sns

    palette, asked = sns.color_palette("colorblind"), {e.name: e.parameters() for e in sweep.entries}
    values = sorted({asked[name][parameter] for group in groups for name in group})
    with drawing_style():
        fig, axes = new_figure(7, 4.2)
        ax = axes[0, 0]
        for i, split in enumerate(sweep.splits):
            for j, group in enumerate(groups):
                rows = 100 * sweep.table.loc[group, [f"wer_{split}", f"wer_{split}_low", f"wer_{split}_high"]]
                wer, low, high = rows.to_numpy(float).T
                at = [asked[name][parameter] for name in group]
                label = split if len(groups) == 1 else f"{split}, {_shared(sweep, group)}"
                line = "" if parameter == "seed" else ("-", "--", ":", "-.")[j % 4]
                look = dict(color=palette[i], marker="oDs^v"[j % 5], ls=line, ms=6, capsize=3, lw=1.3, label=label)
                ax.errorbar(at, wer, [wer - low, high - wer], **look)
            for reference in sweep.table["reference"].dropna().unique():
                wer = sweep.table.at[reference, f"wer_{split}"]
                if pd.notna(wer) and not any(reference in group for group in groups):
                    label = f"{split}, {sweep.short[reference]}"
                    ax.axhline(100 * wer, color=palette[i], ls=(0, (1, 2)), lw=1.2, label=label, zorder=1)
        if values[0] > 0 and values[-1] > MANY * values[0]:
            ax.set_xscale("log")
            _plain_log(ax.xaxis, values)
            ax.minorticks_off()
        ax.set(xlabel=parameter, ylabel="word error rate (%)")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        ax.spines[["top", "right"]].set_visible(False)
    wers = {f"wer_{split}": lambda v, split=split: f"{percent(v)} on {split}" for split in sweep.splits}
    fig.set_label(f"Word error rate against {parameter}. " + described(sweep.table, sweep.short, wers))
    return fig


def _shared(sweep: Comparison, group: Sequence[str]) -> str:
    """What the members of a group are, in as few words as tell."""
    rows = sweep.table.loc[list(group)]
    return f"{rows['encoder'].iloc[0]}, {ATTENTION.get(rows['attention'].iloc[0], rows['attention'].iloc[0])}"


# ---- training ----------------------------------------------------------------------------------------------


def training_together(sweep: Comparison) -> "Figure":
    """Validation word error rate against epochs and against minutes of training, on a logarithmic axis.

    A training's seconds are shared out equally among its steps.
    """
    drawn = {name: look for name, look in looks(sweep).items() if name in sweep.trainings}
    ends = []
    with drawing_style():
        fig, axes = new_figure(9.6, 4, 1, 2, sharey=True)
        for name, look in drawn.items():
            training = sweep.trainings[name]
            seen = pd.DataFrame(training["history"]).reindex(columns=["step", "epoch", "eval_wer"]).dropna()
            seen = seen[seen["eval_wer"] > 0]  # none at all has no place on this axis
            minutes = seen["step"] * training["seconds"] / 60 / max(1, training["steps"])
            for ax, at in zip(axes[0], (seen["epoch"], minutes), strict=True):
                ax.plot(at, 100 * seen["eval_wer"], color=look.colour, ls=look.line, marker=look.marker, ms=3, lw=1.4)
            if len(seen):
                ends.append(f"{look.label} {percent(seen['eval_wer'].iloc[-1])} after {minutes.iloc[-1]:.3g} minutes")
        for ax, label in zip(axes[0], ("epochs", "minutes of training"), strict=True):
            ax.set(xlabel=label, yscale="log")
            ax.spines[["top", "right"]].set_visible(False)
            _plain_log(ax.yaxis, [])
        axes[0, 0].set_ylabel("validation WER (%)")
        _legend(fig, drawn.values())
    fig.set_label("Validation word error rate in training. " + "; ".join(ends) + ".")
    return fig


# ---- the length of the audio -------------------------------------------------------------------------------

PANELS = {"ms": ("time of one pass (s)", 1e-3), "peak_memory_bytes": ("peak memory of one pass (MiB)", 2**-20)}


def lengths_figure(lengths: dict, drawn: Mapping[str, Look]) -> "Figure":
    """Time and peak memory of one pass against the length of the audio, of `length_benchmark.benchmark_lengths`: a row
    of panels for each encoder. Curves that coincide lie upon each other, each narrower than the one below."""
    seconds = np.array(lengths["seconds"], float)
    shown = {name: drawn[name] for name in lengths["systems"] if name in drawn}
    lines = list(dict.fromkeys(look.line for look in shown.values()))
    told = []
    with drawing_style():
        fig, axes = new_figure(9.6, 0.4 + 3.6 * len(lines), len(lines), 2, sharex=True, sharey="col")
        for line, row in zip(lines, axes, strict=True):
            alike = {name: look for name, look in shown.items() if look.line == line}
            widths = np.linspace(min(1.3 * len(alike), 6), 1.3, len(alike))  # points
            for ax, (column, (label, scale)) in zip(row, PANELS.items(), strict=True):
                for (name, look), width in zip(alike.items(), widths, strict=True):
                    values = scale * np.array(lengths["systems"][name][column], float)
                    drawn_as = dict(color=look.colour, ls=line, marker=look.marker, lw=width, ms=width + 2.5)
                    ax.plot(seconds, values, label=look.label, **drawn_as)
                ax.set(xscale="log", yscale="log", ylabel=label)
                _plain_log(ax.xaxis, lengths["seconds"])
                _plain_log(ax.yaxis, [])
                ax.minorticks_off()
                ax.spines[["top", "right"]].set_visible(False)
            row[0].legend(frameon=False, fontsize=9, handlelength=4, loc="upper left")
        for ax in axes[-1]:
            ax.set_xlabel("length of the audio (s)")
    for name, look in shown.items():
        ms = np.array(lengths["systems"][name]["ms"], float)
        last = np.flatnonzero(~np.isnan(ms))
        if len(last):
            told.append(f"{look.label}: {ms[last[-1]] / 1000:.3g} s for {seconds[last[-1]]:g} s of audio")
    fig.set_label("Time and peak memory of one pass against the length of the audio. " + "; ".join(told) + ".")
    return fig


def figures_of(sweep: Comparison) -> dict[str, "Figure"]:
    """{file name: figure} of all that can be drawn from what was measured, the most telling first."""
    table, drawn = sweep.table, {}
    if sweep.splits and table["cache_bytes"].notna().any():
        drawn["wer_vs_cache"] = wer_against_cache(sweep)
    if sweep.splits:
        for parameter, groups in varied_parameters(sweep.entries).items():
            drawn[f"wer_vs_{parameter}"] = wer_against_parameter(sweep, parameter, groups)
    if sweep.trainings:
        drawn["training_together"] = training_together(sweep)
    if sweep.splits and table["latency_ms"].notna().any():
        drawn["wer_vs_time"] = wer_against_time(sweep)
    if sweep.benchmark.get("lengths"):
        drawn["lengths"] = lengths_figure(sweep.benchmark["lengths"], looks(sweep))
    return drawn
