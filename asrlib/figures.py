"""Figures: drawings of the tables that `report` and the notebooks make.

Every figure is a matplotlib Figure that pyplot does not know; its label is a description in words, computed
from the same data, which `save_figure` and `show_figure` hand on as alternative text.
"""

import base64
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from markupsafe import Markup

from asrlib.reporting.numbers import change, percent, size
from asrlib.runs import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYSTEMS = {"baseline": "baseline (MHA)", "converted": "converted (MLA)", "finetuned": "fine-tuned (MLA)"}
IN_BLOCKS = "MHA in blocks"  # the baseline, worked by attention.relative
DPI = 160
LIVE_SECONDS = 5.0  # between two drawings of a figure that grows
INK, GREY = "#1c2126", "#5b656e"


def system_name(table: pd.DataFrame, system: str) -> str:
    """baseline (MHA), or whatever attention the table says it has."""
    return f"{SYSTEMS[system].partition(' (')[0]} ({table.at[system, 'attention']})"


def splits_of(table: pd.DataFrame) -> list[str]:
    return [c.removeprefix("cer_") for c in table.columns if c.startswith("cer_")]


# ---- showing and saving ------------------------------------------------------------------------------------


def _style():
    import matplotlib as mpl
    import seaborn as sns

    style = sns.axes_style("whitegrid", {"grid.color": "#e4e6e3", "axes.edgecolor": GREY})
    sizes = sns.plotting_context("notebook", font_scale=0.85)
    return mpl.rc_context(style | sizes | {"axes.titleweight": "bold"})


def _png(fig: "Figure", alt: str | None) -> bytes:
    """In 256 colours, chosen for the figure: a quarter of the bytes, and no difference to be seen."""
    from PIL import Image, PngImagePlugin

    drawn, small, about = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_itxt("Description", alt or fig.get_label())
    with _style():  # ticks are made while drawing
        fig.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=about)
    return small.getvalue()


def save_figure(fig: "Figure", path: Path, alt: str | None = None) -> None:
    """Write `fig` as PNG; its description (default: the one the figure was made with) is kept in the file."""
    with atomic_write(path, "wb") as file:
        file.write(_png(fig, alt))


def show_figure(fig: "Figure", alt: str | None = None, **place) -> None:
    """Show `fig` in a notebook, with a description for those who cannot see it. `place`: display_id, update."""
    from IPython.display import display

    alt = alt or fig.get_label()
    image = {"image/png": base64.b64encode(_png(fig, alt)).decode(), "text/plain": alt}
    width = round(fig.get_figwidth() * 100)  # CSS pixels: drawn at 160 dpi, shown at 100
    display(image, metadata={"image/png": {"alt": alt, "width": width}}, raw=True, **place)


def as_image(fig: "Figure") -> Markup:
    """`fig` as an element of a page, with its description as the alternative text."""
    data, width = base64.b64encode(_png(fig, None)).decode(), round(fig.get_figwidth() * 100)
    return Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}">').format(data, fig.get_label(), width)


def keep_figure(fig: "Figure", path: Path) -> None:
    """Save and show it."""
    save_figure(fig, path)
    show_figure(fig)


class LiveFigure:
    """A figure that is drawn anew in its place for whoever watches, and is gone at the end.

    Nobody watches outside of notebooks, nor where their client, as papermill, could not answer a question either.
    """

    def __init__(self):
        from IPython import get_ipython

        self.watched = getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False)
        self.place: dict = {"display_id": f"live-{id(self)}"}
        self.drawn = -math.inf

    def show(self, draw: Callable[[], "Figure"]) -> None:
        """Calls `draw` and shows what it gives, unless it has just been done."""
        if self.watched and time.monotonic() > self.drawn + LIVE_SECONDS:
            show_figure(draw(), **self.place)
            self.place["update"] = True
            self.drawn = time.monotonic()

    def __enter__(self) -> "LiveFigure":
        return self

    def __exit__(self, *error) -> None:
        if "update" in self.place:
            from IPython.display import display

            display({"text/plain": ""}, raw=True, **self.place)


# ---- drawings ----------------------------------------------------------------------------------------------


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure of `width` × `height` inches that pyplot does not know, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs)


def _colours() -> dict[str, tuple]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return {"baseline": palette[7], "converted": palette[1], "finetuned": palette[0]}


def _wer(table: pd.DataFrame, system: str, split: str) -> tuple[float, list[list[float]] | None]:
    """Word error rate in per cent, and how far its interval reaches below and above, as errorbar wants it."""
    wer, low, high = (100 * table.at[system, f"wer_{split}{end}"] for end in ("", "_low", "_high"))
    return wer, None if pd.isna(low) else [[wer - low], [high - wer]]


def _described(table: pd.DataFrame, columns: Sequence[str], show: Callable[[float], str]) -> str:
    """What the bars and points of a figure say, in words."""
    systems = []
    for system in table.index:
        values = {c.removeprefix("wer_"): table.at[system, c] for c in columns}
        said = [f"{name if len(columns) > 1 else ''} {show(v)}".strip() for name, v in values.items() if pd.notna(v)]
        systems.append(f"{system_name(table, system)}: {', '.join(said) or 'not measured'}")
    return "; ".join(systems) + "."


def wer_bars(table: pd.DataFrame) -> "Figure":
    """Word error rate of each system on each split of `comparison_table`, with 95 % intervals."""
    splits, colours = splits_of(table), _colours()
    width = 0.8 / len(table)
    with _style():
        fig, axes = _figure(8, 3.6)
        ax = axes[0, 0]
        for i, system in enumerate(table.index):
            for j, split in enumerate(splits):
                wer, reach = _wer(table, system, split)
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
    fig.set_label("Word error rates. " + _described(table, [f"wer_{s}" for s in splits], percent))
    return fig


def wer_vs_cache(table: pd.DataFrame) -> "Figure":
    """Word error rate (95 % intervals) against the cache that is left; one dotted line per split."""
    splits, colours, markers = splits_of(table), _colours(), dict(zip(SYSTEMS, "osD", strict=True))
    with _style():
        fig, axes = _figure(5.6, 5)
        ax = axes[0, 0]
        for split in splits:
            points = []
            for i, system in enumerate(table.index):
                wer, reach = _wer(table, system, split)
                x = 100 * (1 - table.at[system, "cache_cut"]) + (0, -1.2, 1.2)[i]  # side by side at one width
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
        note = "half: a joint latent\nis exact here"
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
            ncols=3,
            columnspacing=1.2,
            handletextpad=0.2,
            loc="lower center",
            bbox_to_anchor=(0.45, 1),
        )
        ax.spines[["top", "right"]].set_visible(False)
    left = ", ".join(
        f"{system_name(table, s)} {percent(1 - c, 1)}" for s, c in table["cache_cut"].items() if pd.notna(c)
    )
    wers = _described(table, [f"wer_{s}" for s in splits], percent)
    fig.set_label(f"Word error rate against cache left. Cache: {left}. {wers}")
    return fig


def _bars(ax, table: pd.DataFrame, column: str, show: Callable, label: str, scale: float = 1.0) -> None:
    """Horizontal bars, one per system, each with its value and the change from the baseline."""
    colours, longest = _colours(), table[column].max() / scale
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
    with _style():
        fig, axes = _figure(8, 0.55 * len(table) + 1.1)
        _bars(axes[0, 0], table, "cache_bytes_per_second", size, "K/V cache per second of audio (KiB)", 1024)
        full = table["cache_bytes_per_second"].get("baseline")
        if pd.notna(full):
            axes[0, 0].axvline(full / 2048, color=GREY, lw=1, ls="--", zorder=3)
            note = "dashed: half, where a joint latent is exact"
            axes[0, 0].set_title(note, size=9, weight="normal", color=GREY, loc="right")
    fig.set_label("K/V cache per second of audio. " + _described(table, ["cache_bytes_per_second"], size))
    return fig


def inference_time_comparison(table: pd.DataFrame) -> "Figure":
    """Mean latency per utterance, and RTFx."""
    with _style():
        fig, axes = _figure(9, 0.55 * len(table) + 1.1, 1, 2, sharey=True)
        _bars(axes[0, 0], table, "latency_ms", lambda v: f"{v:.1f}", "latency per utterance (ms)")
        _bars(axes[0, 1], table, "rtfx", lambda v: f"{v:.1f}", "RTFx: seconds of audio per second of compute")
        axes[0, 1].invert_yaxis()  # shared, so inverted twice
    fig.set_label(
        "Mean latency per utterance in ms. "
        + _described(table, ["latency_ms"], "{:.1f}".format)
        + " RTFx. "
        + _described(table, ["rtfx"], "{:.1f}".format)
    )
    return fig


def training_curves(history: Sequence[Mapping], best_step: int | None = None) -> "Figure":
    """Loss, validation WER and learning rate against the training step; `best_step` is marked."""
    names = ["step", "loss", "eval_loss", "eval_wer", "learning_rate"]
    df = pd.DataFrame(history).reindex(columns=names).astype(float).sort_values("step")
    blue = _colours()["finetuned"]
    with _style():
        fig, axes = _figure(8, 5.6, 3, 1, sharex=True, height_ratios=[2, 2, 1])
        loss, wer, rate = axes[:, 0]
        for ax, column, label, colour, marker, scale in (
            (loss, "loss", "training", GREY, ".", 1),
            (loss, "eval_loss", "validation", blue, "o", 1),
            (wer, "eval_wer", "validation", blue, "o", 100),
            (rate, "learning_rate", None, GREY, "", 1),
        ):
            seen = df[["step", column]].dropna()
            ax.plot(seen["step"], scale * seen[column], color=colour, marker=marker, ms=4, label=label)
        loss.set_ylabel("loss")
        loss.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        wer.set_ylabel("validation WER (%)")
        rate.set(ylabel="learning rate", xlabel="training step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for ax in axes[:, 0]:
            ax.spines[["top", "right"]].set_visible(False)
            if best_step is not None:
                ax.axvline(best_step, color=GREY, lw=1, ls="--", zorder=1.5)
        if best_step is not None:
            side = "right" if best_step > df["step"].median() else "left"
            wer.text(
                best_step,
                0.96,
                " best, kept ",
                transform=wer.get_xaxis_transform(),
                size=8,
                color=GREY,
                va="top",
                ha=side,
            )
    wers = df["eval_wer"].dropna()
    found = f" Validation WER from {percent(wers.iloc[0])} to {percent(wers.iloc[-1])}." if len(wers) else ""
    fig.set_label(f"Training curves over {df['step'].max():.0f} steps.{found}")
    return fig
