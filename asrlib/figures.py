"""Figures: numbers as text, and drawings of the tables that `report` and the notebooks make.

Every figure is a matplotlib Figure that pyplot does not know; its label is a description in words, computed
from the same data, which `save_figure` and `show_figure` hand on as alternative text.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from asrlib.runs import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYSTEMS = {"baseline": "baseline (MHA)", "converted": "converted (MLA)", "finetuned": "fine-tuned (MLA)"}
DPI = 160


# ---- numbers as text ---------------------------------------------------------------------------------------


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


def change(value: float, reference: float) -> str:
    """−75 %, +3.5 %."""
    text = f"{100 * (value / reference - 1):+.1f}".removesuffix(".0")
    return ("0" if text in ("+0", "-0") else text.replace("-", "−")) + " %"


def size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def unbroken(text: str) -> str:
    """Keep a number and its unit on one line of a page."""
    return re.sub(r"(?<=\d) (?=%|ms\b|s\b|[KMG]?i?B\b|M\b|min\b|h\b)", "\u00a0", text)


def splits_of(table: pd.DataFrame) -> list[str]:
    return [c.removeprefix("cer_") for c in table.columns if c.startswith("cer_")]


# ---- showing and saving ------------------------------------------------------------------------------------


def _style():
    import matplotlib as mpl
    import seaborn as sns

    style = sns.axes_style("whitegrid", {"grid.color": "#e4e6e3", "axes.edgecolor": "#5b656e"})
    return mpl.rc_context(style | sns.plotting_context("notebook", font_scale=0.85) | {"axes.titleweight": "bold"})


def _png(fig: "Figure", alt: str | None) -> bytes:
    buffer = io.BytesIO()
    with _style():  # ticks are made while drawing
        fig.savefig(buffer, format="png", dpi=DPI, metadata={"Description": alt or fig.get_label(), "Software": None})
    return buffer.getvalue()


def save_figure(fig: "Figure", path: Path, alt: str | None = None) -> Path:
    """Write `fig` as PNG; its description (default: the one the figure was made with) is kept in the file."""
    with atomic_write(path, "wb") as file:
        file.write(_png(fig, alt))
    return path


def show_figure(fig: "Figure", alt: str | None = None) -> None:
    """Show `fig` in a notebook, with a description for those who cannot see it."""
    from IPython.display import display

    alt = alt or fig.get_label()
    image = {"image/png": base64.b64encode(_png(fig, alt)).decode(), "text/plain": alt}
    width = round(fig.get_figwidth() * 100)  # CSS pixels: drawn at 160 dpi, shown at 100
    display(image, metadata={"image/png": {"alt": alt, "width": width}}, raw=True)


# ---- drawings -----------------------------------------------------------------------------------------------


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure of `width` × `height` inches that pyplot does not know, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs)


def _colours() -> dict[str, tuple]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return {"baseline": palette[7], "converted": palette[1], "finetuned": palette[0]}


def wer_bars(table: pd.DataFrame) -> "Figure":
    """Word error rate of each system on each split of `comparison_table`, with 95 % intervals."""
    splits, systems, colours = splits_of(table), list(table.index), _colours()
    with _style():
        fig, axes = _figure(8, 3.6)
        ax, width = axes[0, 0], 0.8 / len(systems)
        for i, system in enumerate(systems):
            for j, split in enumerate(splits):
                wer, low, high = (100 * table.at[system, f"{k}_{split}"] for k in ("wer", "wer_low", "wer_high"))
                x = j + (i - (len(systems) - 1) / 2) * width
                ax.bar(x, wer, 0.9 * width, color=colours[system], label=SYSTEMS[system] if j == 0 else None)
                if pd.notna(low):
                    ax.errorbar(x, wer, [[wer - low], [high - wer]], color="#1c2126", capsize=3, lw=1.2)
                ax.annotate(
                    f"{wer:.2f}", (x, wer if pd.isna(high) else high), (0, 3), textcoords="offset points",
                    ha="center", size=8,
                )  # fmt: skip
        ax.set(xticks=range(len(splits)), xticklabels=splits, ylabel="word error rate (%)")
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.12)
        ax.legend(frameon=False, ncols=len(systems), loc="lower center", bbox_to_anchor=(0.5, 1))
        ax.spines[["top", "right"]].set_visible(False)
    fig.set_label("Word error rates. " + _described(table, [f"wer_{s}" for s in splits], percent))
    return fig


def wer_vs_cache(table: pd.DataFrame) -> "Figure":
    """Word error rate (95 % intervals) against the cache that is left, per split."""
    import seaborn as sns

    markers = {"baseline": "o", "converted": "s", "finetuned": "D"}
    with _style():
        fig, axes = _figure(6.4, 4.4)
        ax = axes[0, 0]
        for j, (split, colour) in enumerate(zip(splits_of(table), sns.color_palette("colorblind"), strict=False)):
            shift = 1.4 * (j - (len(splits_of(table)) - 1) / 2)
            points = {}
            for i, system in enumerate(table.index):
                wer, low, high = (100 * table.at[system, f"{k}_{split}"] for k in ("wer", "wer_low", "wer_high"))
                x = 100 * (1 - table.at[system, "cache_cut"]) + shift + 0.5 * (i - 1)
                points[system] = x, wer
                errors = None if pd.isna(low) else [[wer - low], [high - wer]]
                ax.errorbar(x, wer, errors, color=colour, marker=markers[system], ms=7, capsize=3, lw=1.2)
            last = points.get("finetuned", points.get("converted"))
            if last and "baseline" in points:
                ax.plot(*zip(points["baseline"], last, strict=True), color=colour, lw=1, ls=":", zorder=1)
        ax.axvline(50, color="#5b656e", lw=1, ls="--", zorder=0)
        ax.text(50.8, 0.02, "exact: one latent as\nwide as the model", transform=ax.get_xaxis_transform(), size=8,
                color="#5b656e", va="bottom")  # fmt: skip
        for system in table.index:
            ax.plot([], [], color="#5b656e", marker=markers[system], ls="", label=SYSTEMS[system])
        for split, colour in zip(splits_of(table), sns.color_palette("colorblind"), strict=False):
            ax.plot([], [], color=colour, lw=3, label=split)
        ax.set(xlim=(0, 106), xlabel="K/V cache, per cent of the baseline's", ylabel="word error rate (%)")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        ax.spines[["top", "right"]].set_visible(False)
    left = ", ".join(f"{SYSTEMS[s]} {percent(1 - c, 1)}" for s, c in table["cache_cut"].items() if pd.notna(c))
    wers = _described(table, [f"wer_{s}" for s in splits_of(table)], percent)
    fig.set_label(f"Word error rate against cache left. Cache: {left}. {wers}")
    return fig


def _described(table: pd.DataFrame, columns: Sequence[str], show) -> str:
    """Alternative text: what the bars and points of a figure say, in words."""
    def row(system: str) -> str:
        values = (f"{c.removeprefix('wer_')} {show(table.at[system, c])}" for c in columns if pd.notna(table.at[system, c]))
        return f"{SYSTEMS[system]}: " + ", ".join(values)

    return "; ".join(map(row, table.index)) + "."


def _bars(ax, table: pd.DataFrame, column: str, show, label: str, scale: float = 1.0) -> None:
    """Horizontal bars, one per system, each with its value and the change from the baseline."""
    colours, longest = _colours(), table[column].max() / scale
    for i, (system, value) in enumerate(table[column].items()):
        if pd.isna(value):
            continue
        ax.barh(i, value / scale, 0.62, color=colours[system])
        base = table[column].get("baseline")
        note = "" if system == "baseline" or pd.isna(base) else f"  ({change(value, base)})"
        ax.text(value / scale + 0.015 * longest, i, show(value) + note, va="center", size=9)
    ax.set(yticks=range(len(table)), yticklabels=[SYSTEMS[s] for s in table.index], xlabel=label)
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
            axes[0, 0].axvline(full / 2048, color="#5b656e", lw=1, ls="--", zorder=3)
            axes[0, 0].set_title("dashed: half, which is exact for any model", size=9, weight="normal", color="#5b656e")
    fig.set_label("K/V cache per second of audio. " + _described(table, ["cache_bytes_per_second"], size))
    return fig


def inference_time_comparison(table: pd.DataFrame) -> "Figure":
    """Mean latency per utterance (line: median to 95th percentile) and RTFx."""
    with _style():
        fig, axes = _figure(9, 0.55 * len(table) + 1.1, 1, 2, sharey=True)
        _bars(axes[0, 0], table, "latency_ms", lambda v: f"{v:.1f}", "latency per utterance (ms)")
        _bars(axes[0, 1], table, "rtfx", lambda v: f"{v:.1f}", "RTFx: seconds of audio per second of compute")
        axes[0, 1].invert_yaxis()  # shared, so inverted twice
    fig.set_label("Mean latency per utterance in ms. " + _described(table, ["latency_ms"], "{:.1f}".format)
                  + " RTFx. " + _described(table, ["rtfx"], "{:.1f}".format))  # fmt: skip
    return fig


def training_curves(history: Sequence[Mapping], best_step: int | None = None) -> "Figure":
    """Loss, validation WER and learning rate against the training step; `best_step` is marked."""
    names = ["step", "loss", "eval_loss", "eval_wer", "learning_rate"]
    df = pd.DataFrame(history).reindex(columns=names).astype(float).sort_values("step")
    colours = list(_colours().values())
    with _style():
        fig, axes = _figure(8, 5.6, 3, 1, sharex=True, height_ratios=[2, 2, 1])
        loss, wer, rate = axes[:, 0]
        for ax, column, label, colour, marker, scale in (
            (loss, "loss", "training", colours[0], "", 1),
            (loss, "eval_loss", "validation", colours[2], "o", 1),
            (wer, "eval_wer", "validation", colours[2], "o", 100),
            (rate, "learning_rate", None, colours[1], "", 1),
        ):
            seen = df[["step", column]].dropna()
            ax.plot(seen["step"], scale * seen[column], color=colour, marker=marker or (None if len(seen) > 1 else "o"),
                    ms=4, label=label)  # fmt: skip
        loss.set_ylabel("CTC loss")
        loss.legend(frameon=False, ncols=2)
        wer.set_ylabel("validation WER (%)")
        rate.set(ylabel="learning rate", xlabel="training step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for ax in axes[:, 0]:
            ax.spines[["top", "right"]].set_visible(False)
            if best_step is not None:
                ax.axvline(best_step, color="#5b656e", lw=1, ls="--", zorder=0)
        if best_step is not None:
            wer.text(best_step, 0.96, " kept ", transform=wer.get_xaxis_transform(), size=8, color="#5b656e", va="top",
                     ha="right" if best_step > df["step"].median() else "left")  # fmt: skip
    wers = df["eval_wer"].dropna()
    found = f" Validation WER from {percent(wers.iloc[0])} to {percent(wers.iloc[-1])}." if len(wers) else ""
    fig.set_label(f"Training curves over {df['step'].max():.0f} steps.{found}")
    return fig


def spectrum_figure(spectra: Mapping[int | str, Sequence[float]], latent_dim: int | None = None) -> "Figure":
    """Singular values of each layer, relative to its largest, and the share of energy that a rank keeps."""
    import numpy as np
    import seaborn as sns

    palette = sns.color_palette("viridis", len(spectra))
    with _style():
        fig, axes = _figure(9, 3.6, 1, 2)
        for (layer, values), colour in zip(spectra.items(), palette, strict=True):
            values = np.asarray(values, dtype=float)
            rank = np.arange(1, len(values) + 1)
            axes[0, 0].semilogy(rank, values / values[0], color=colour, lw=1.4, label=str(layer))
            axes[0, 1].plot(rank, 100 * np.cumsum(values**2) / np.sum(values**2), color=colour, lw=1.4, label=str(layer))
        axes[0, 0].set(xlabel="index", ylabel="singular value ÷ the largest")
        axes[0, 1].set(xlabel="rank kept", ylabel="energy kept (%)", ylim=(None, 101))
        for ax in axes[0]:
            ax.spines[["top", "right"]].set_visible(False)
            if latent_dim:
                ax.axvline(latent_dim, color="#5b656e", lw=1, ls="--", label=f"latent_dim {latent_dim}")
        axes[0, 1].legend(frameon=False, title="layer", fontsize=8, ncols=1 + len(spectra) // 8, loc="lower right")
    at = f", {latent_dim} marked" if latent_dim else ""
    fig.set_label(f"Singular spectrum and energy kept against rank for {len(spectra)} layers{at}.")
    return fig


def error_heatmap(df: pd.DataFrame) -> "Figure":
    """Relative error of keys, values and attention output per layer and latent width (rows: layouts, if several).

    df: columns layer, latent_dim, key_error, value_error, output_error and, if wanted, fraction and layout.
    """
    import seaborn as sns

    quantities = {"key_error": "K", "value_error": "V", "output_error": "attention output"}
    layouts = list(df["layout"].unique()) if "layout" in df else [None]
    n_layers, n_widths = df["layer"].nunique(), df["latent_dim"].nunique()
    top = df[list(quantities)].to_numpy().max()
    with _style():
        fig, axes = _figure(10, len(layouts) * (0.26 * n_layers + 0.9) + 0.5, len(layouts), 3, sharey=True)
        for i, layout in enumerate(layouts):
            part = df if layout is None else df[df["layout"] == layout]
            shares = part.drop_duplicates("latent_dim").set_index("latent_dim").get("fraction", pd.Series(dtype=float))
            for ax, (column, name) in zip(axes[i], quantities.items(), strict=True):
                grid = 100 * part.pivot_table(index="layer", columns="latent_dim", values=column)
                sns.heatmap(grid, ax=ax, vmin=0, vmax=100 * top, cmap="rocket_r", cbar=False, annot=n_widths <= 9,
                            fmt=".0f", annot_kws={"size": 7}, linewidths=0.5)  # fmt: skip
                labels = [f"{w}\n{100 * shares[w]:.3g} %" if w in shares.index else w for w in grid.columns]
                ax.set_xticklabels(labels, size=7.5, rotation=0)
                ax.set_title(name if layout is None else f"{name}, {layout}", size=10)
                ax.set(xlabel="latent_dim (share of 2·d)" if i == len(layouts) - 1 else "", ylabel="")
            axes[i, 0].set_ylabel("layer")
        fig.colorbar(axes[0, 0].collections[0], ax=axes, label="relative error (%)", shrink=0.9, pad=0.01)
    mean = df.groupby("latent_dim")["output_error"].mean()
    ends = ", ".join(f"{percent(mean[w], 1)} at latent_dim {w}" for w in (mean.index.min(), mean.index.max()))
    fig.set_label(f"Relative errors of K, V and attention output in {n_layers} layers. Mean output error: {ends}.")
    return fig
