"""Drawings of what a cut of the cache costs: spectra, errors by layer, word errors by method, widths by layer.

Tables of methods and cuts are those of `measuring.rows.as_frame`. How figures are saved and described: figures.py.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from asrlib.measuring.names import SIGNIFICANT
from asrlib.measuring.rows import BASELINE, ZEROED
from asrlib.reporting.figures import GREY, INK, drawing_style, new_figure
from asrlib.reporting.numbers import percent
from asrlib.reporting.tables import cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>hd"
WIDTHS = {0.9375: "d/8", 0.875: "d/4", 0.75: "d/2", 0.625: "3d/4", 0.5: "d"}  # of the joint latent, by the cut

# Cut of the cache that Sonawane, Gokhale and Tian (2025) stated for a width, of d = 512, and did not measure.
CLAIMED_CUTS = {"d/4": "cut 87.5 %", "d/2": "cut 75 %", "d": "cut 50 %"}


def spectrum_figure(spectra: Mapping[int | str, Sequence[float]], latent_dim: int | None = None) -> "Figure":
    """Singular values of each layer, relative to its largest, and the share of energy that a rank keeps."""
    import seaborn as sns

    palette = sns.color_palette("viridis", len(spectra))
    with drawing_style():
        fig, axes = new_figure(9, 3.6, 1, 2)
        for (layer, values), colour in zip(spectra.items(), palette, strict=True):
            values = np.asarray(values, dtype=float)
            rank = np.arange(1, len(values) + 1)
            axes[0, 0].semilogy(rank, values / values[0], color=colour, lw=1.4, label=str(layer))
            energy = 100 * np.cumsum(values**2) / np.sum(values**2)
            axes[0, 1].plot(rank, energy, color=colour, lw=1.4, label=str(layer))
        axes[0, 0].set(xlabel="direction, the largest first", ylabel="singular value ÷ the largest")
        axes[0, 1].set(xlabel="directions kept", ylabel="energy kept (%)", ylim=(None, 101))
        for ax in axes[0]:
            ax.spines[["top", "right"]].set_visible(False)
            if latent_dim:
                ax.axvline(latent_dim, color=GREY, lw=1, ls="--", label=f"latent_dim {latent_dim}")
        columns = 1 + len(spectra) // 8
        axes[0, 1].legend(frameon=False, title="layer", fontsize=8, ncols=columns, loc="lower right")
    at = f", {latent_dim} marked" if latent_dim else ""
    fig.set_label(f"Singular spectrum and energy kept against rank for {len(spectra)} layers{at}.")
    return fig


def error_heatmap(df: pd.DataFrame, columns: Mapping[str, str] | None = None, rows: str = "layout") -> "Figure":
    """Relative errors per layer and latent width: a row of panels per `rows` (layout, method), one per quantity.

    df: columns layer, latent_dim, those of `columns` (name → title; default: K, V and attention output) and, if there
    are several, `rows`.
    """
    import seaborn as sns

    columns = columns or {"key_error": "K", "value_error": "V", "output_error": "attention output"}
    kinds = list(df[rows].unique()) if rows in df else [None]
    if len(columns) == 1:  # the kinds side by side then
        panels = [[(kind, *column) for kind in kinds for column in columns.items()]]
    else:
        panels = [[(kind, *column) for column in columns.items()] for kind in kinds]
    n_layers, n_widths = df["layer"].nunique(), df["latent_dim"].nunique()
    largest = 100 * df[list(columns)].to_numpy().max()
    with drawing_style():
        height = len(panels) * (max(0.26 * n_layers, 1.2) + 0.5) + 0.6
        fig, axes = new_figure(10, height, len(panels), len(panels[0]), sharex=True, sharey=True)
        for row, line in zip(axes, panels, strict=True):
            for ax, (kind, column, name) in zip(row, line, strict=True):
                part = df if kind is None else df[df[rows] == kind]
                grid = 100 * part.pivot_table(index="layer", columns="latent_dim", values=column)
                numbers = {"annot": n_widths <= 10, "fmt": ".0f", "annot_kws": {"size": 7.5}}
                sns.heatmap(grid, ax=ax, vmin=0, vmax=largest, cmap="rocket_r", cbar=False, linewidths=0.5, **numbers)
                shown = kind if len(columns) == 1 else name if kind is None else f"{name}, {kind}"
                ax.set_title(shown, size=10)
                ax.set(xlabel="", ylabel="layer" if ax is row[0] else "")
                ax.tick_params(labelsize=8.5, rotation=0)
        for ax in axes[-1]:
            ax.set_xlabel("latent_dim (numbers per frame)" if len(panels[0]) < 4 else "latent_dim")
        fig.colorbar(axes[0, 0].collections[0], ax=axes, label="relative error (%)", pad=0.01)
    last, title = list(columns.items())[-1]
    mean = df.groupby("latent_dim")[last].mean()
    ends = ", ".join(f"{percent(mean[w], 1)} at latent_dim {w}" for w in (mean.index.min(), mean.index.max()))
    about = f"Relative errors of {', '.join(columns.values())} in {n_layers} layers."
    fig.set_label(f"{about} Mean error of the {title}: {ends}.")
    return fig


def error_by_layer(table: pd.DataFrame, limits: Mapping[str, float]) -> "Figure":
    """Relative errors of each layer of one conversion, a bar for each of keys, values, scores and output.

    `table`: of `analyze_compression_quality`. `limits` (name → fraction) are drawn across.
    """
    import seaborn as sns

    names = {"key_error": "keys", "value_error": "values", "score_error": "scores", "output_error": "attention output"}
    palette = sns.color_palette("colorblind")
    width = 0.8 / len(names)
    with drawing_style():
        fig, axes = new_figure(8, 3)
        ax = axes[0, 0]
        for place, (column, name) in enumerate(names.items()):
            x = table["layer"] + (place - (len(names) - 1) / 2) * width
            ax.bar(x, 100 * table[column], 0.9 * width, color=palette[place], label=name)
        for name, limit in limits.items():
            ax.axhline(100 * limit, color=GREY, lw=1, ls="--", zorder=0.5)
            ax.text(1.01, 100 * limit, name, transform=ax.get_yaxis_transform(), size=8, color=GREY, va="center")
        ax.set(xlabel="layer", ylabel="relative error (%)", xticks=table["layer"])
        ax.set_ylim(0, max(100 * table[list(names)].to_numpy().max() * 1.08, 115 * max(limits.values(), default=0)))
        ax.grid(axis="x", visible=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    said = "; ".join(
        f"layer {row['layer']:.0f}: " + ", ".join(f"{name} {percent(row[column], 1)}" for column, name in names.items())
        for _, row in table.iterrows()
    )
    widths = " ".join(str(width) for width in table["latent_dim"].unique())
    fig.set_label(f"Relative errors by layer at latent_dim {widths}. {said}.")
    return fig


def attention_maps(
    weights: Mapping[str, np.ndarray], seconds: float, about: str, tokens: tuple[bool, bool] = (False, False)
) -> "Figure":
    """Attention weights [T, T] side by side, by the name of their model, in one scale, over `seconds` of audio.

    Rows are the frames that attend, columns those attended to; `tokens` says which of the two are a decoder's tokens
    instead. `about` says of which layer and head, and utterance.
    """
    from matplotlib.colors import PowerNorm

    largest = max(float(np.quantile(weights_TT, 0.999)) for weights_TT in weights.values())
    shade = PowerNorm(0.5, vmin=0, vmax=largest)  # or little but the peaks would be seen
    units = ["token" if of else "s" for of in tokens]
    with drawing_style():
        fig, axes = new_figure(4 * len(weights) + 0.8, 4.3, 1, len(weights), sharex=True, sharey=True)
        for ax, (name, weights_TT) in zip(axes[0], weights.items(), strict=True):
            height, width = (n if of else seconds for n, of in zip(weights_TT.shape, tokens, strict=True))
            extent = [0, width, height, 0]
            image = ax.imshow(
                weights_TT, cmap="cividis", norm=shade, extent=extent, aspect="auto", interpolation="nearest"
            )
            ax.set(title=name, xlabel=f"attended to ({units[1]})")
            ax.grid(visible=False)
        axes[0, 0].set_ylabel(f"attending ({units[0]})")
        fig.colorbar(image, ax=axes, label="attention weight", extend="max", pad=0.01)
    apart = ""
    if len(weights) == 2:
        first, second = weights.values()
        shifted = float(np.abs(first - second).sum(-1).mean() / 2)
        whose = "token" if tokens[0] else "frame"
        apart = f" On average {percent(shifted, 1)} of the attention of a {whose} goes elsewhere."
    fig.set_label(f"Attention weights of {about}, {' beside '.join(weights)}, over {seconds:.1f} s.{apart}")
    return fig


def cost_of_cut(frame: pd.DataFrame) -> "Figure":
    """Word errors and KL divergence against the cut of the cache, a line per method, a row of panels per split."""
    import seaborn as sns

    made = frame[~frame["recipe"].isin([BASELINE, ZEROED])]
    recipes, splits, cuts = list(made["recipe"].unique()), list(made["split"].unique()), sorted(made["cut"].unique())
    palette = sns.color_palette("colorblind", len(recipes))
    place = {cut: index for index, cut in enumerate(cuts)}  # a step is half of the cache that was left
    with drawing_style():
        fig, axes = new_figure(10, 3.9 * len(splits) + 0.5 + 0.1 * len(recipes), len(splits), 2, sharex=True)
        for row, split in zip(axes, splits, strict=True):
            baseline = frame[(frame["recipe"] == BASELINE) & (frame["split"] == split)].iloc[0]
            row[0].axhspan(100 * baseline["wer_low"], 100 * baseline["wer_high"], color=GREY, alpha=0.15, lw=0)
            row[0].axhline(100 * baseline["wer"], color=GREY, lw=1.2, label="baseline, 95 % interval")
            for index, recipe in enumerate(recipes):
                part = made[(made["recipe"] == recipe) & (made["split"] == split)].sort_values("cut")
                if part.empty:
                    continue
                dodge = (index - (len(recipes) - 1) / 2) * 0.5 / max(len(recipes), 8)
                x = np.array([place[cut] for cut in part["cut"]]) + dodge
                for ax, column, scale in ((row[0], "wer", 100.0), (row[1], "kl", 1.0)):
                    value, low, high = (scale * part[f"{column}{end}"].to_numpy() for end in ("", "_low", "_high"))
                    reach = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
                    look = {"color": palette[index], "marker": MARKERS[index % len(MARKERS)], "ms": 4.5, "lw": 1.3}
                    ax.errorbar(x, value, reach, elinewidth=0.8, capsize=1.5, label=recipe, **look)
            row[0].set(ylabel="WER (%)", title=f"{split}: word errors")
            row[1].set(ylabel="KL divergence (nats per frame)", title=f"{split}: change of the output", yscale="log")
            if made.loc[made["split"] == split, "wer_high"].max() > 8 * baseline["wer_high"] > 0:
                row[0].set_yscale("log")
                row[0].yaxis.set_major_formatter(_plainly)
                row[0].yaxis.set_minor_formatter(_plainly)
            row[1].set_ylim(bottom=max(1e-8, row[1].get_ylim()[0]))  # below it nothing but rounding is seen
            for ax in row:
                ax.spines[["top", "right"]].set_visible(False)
        for ax in axes[-1]:
            ax.set_xticks(range(len(cuts)), [f"{100 * cut:.4g}" for cut in cuts])
            ax.set_xlabel("cut of the cache (%), not to scale")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    deepest = made[made["cut"] == cuts[-1]]
    said = "; ".join(
        f"{split}: "
        + ", ".join(f"{r['recipe']} {percent(r['wer'])}" for _, r in deepest[deepest["split"] == split].iterrows())
        for split in splits
    )
    fig.set_label(f"WER and KL divergence against the cut of the cache. At {percent(cuts[-1])}, {said}.")
    return fig


def _plainly(value: float, _) -> str:
    """Tick labels of logarithmic axes: 1, 2, 5, 10, 20 … and nothing between."""
    return f"{value:g}" if value == 0 or f"{abs(value):.0e}"[0] in "125" else ""


def allocation_figure(frame: pd.DataFrame, recipes: Sequence[str], layers: Sequence[str] | None = None) -> "Figure":
    """Numbers per frame that each layer is given at each cut, a panel per method of `recipes`; `layers` names them."""
    import seaborn as sns

    made = frame.drop_duplicates(["recipe", "cut"])
    with drawing_style():
        n_layers = len(made["latent_dim"].iloc[0].split())
        fig, axes = new_figure(10, max(0.26 * n_layers, 1.6) + 1.1, 1, len(recipes), sharey=True)
        for ax, recipe in zip(axes[0], recipes, strict=True):
            part = made[made["recipe"] == recipe].sort_values("cut")
            widths = {
                f"{100 * cut:.4g}": list(map(int, w.split()))
                for cut, w in zip(part["cut"], part["latent_dim"], strict=True)
            }
            grid = pd.DataFrame(widths, index=layers if layers and len(layers) == n_layers else None)
            share = grid / grid.mean()
            limits = {"vmin": 0, "vmax": 2, "center": 1, "cmap": "vlag", "cbar": False, "linewidths": 0.5}
            sns.heatmap(share, ax=ax, annot=grid if n_layers <= 32 else None, fmt="d", annot_kws={"size": 8}, **limits)
            ax.set_title(recipe, size=10)
            ax.set(xlabel="cut of the cache (%)", ylabel="layer" if ax is axes[0, 0] else "")
            ax.tick_params(labelsize=8.5, rotation=0)
        fig.colorbar(axes[0, 0].collections[0], ax=axes, label="÷ the mean of all layers", pad=0.01)
    fig.set_label(f"Numbers per frame given to each of {n_layers} layers, by {', '.join(recipes)}.")
    return fig


def error_against_wer(frame: pd.DataFrame, limits: Sequence[float]) -> "Figure":
    """Whether the error of the attention outputs tells what word errors become: a point per method and cut."""
    import seaborn as sns

    made = frame[~frame["recipe"].isin([BASELINE, ZEROED])]
    worse = (made["wer_difference"] > 0) & (made["p"] < SIGNIFICANT)
    palette = sns.color_palette("colorblind")
    splits = list(made["split"].unique())
    with drawing_style():
        fig, axes = new_figure(5 * len(splits), 3.6, 1, len(splits), sharex=True)
        for ax, split in zip(axes[0], splits, strict=True):
            for risen, name, colour, marker in (
                (False, "not significantly worse", palette[0], "o"),
                (True, f"significantly worse (p < {SIGNIFICANT})", palette[1], "X"),
            ):
                part = made[(made["split"] == split) & (worse == risen)]
                x, y = 100 * part["output_error"].clip(lower=1e-3), 100 * part["wer_difference"]
                ax.scatter(x, y, s=24, color=colour, marker=marker, label=name, alpha=0.8)
            for limit in limits:
                ax.axvline(100 * limit, color=INK, lw=1, ls="--")
            ax.axhline(0, color=GREY, lw=1)
            ax.set(xscale="log", xlabel="error of the attention outputs (%)", title=split)
            ax.set_yscale("symlog", linthresh=1)
            ax.xaxis.set_major_formatter(_plainly)
            ax.yaxis.set_major_formatter(_plainly)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set_ylabel("WER − baseline's (points)")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    highest = made.loc[~worse, "output_error"].max()
    fig.set_label(
        f"Change of WER against the error of the attention outputs, {len(made)} conversions; the largest error without "
        f"a significant change is {percent(highest, 0)}."
    )
    return fig


def by_width(frame: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Word error rates where the joint latent of each layer has a simple share of the width d, and the cut claimed for
    it."""
    from asrlib.measuring.recipes import RECIPES

    methods = [name for name in methods if not getattr(RECIPES.get(name), "shared", False)]  # their widths are others
    table = frame[frame["cut"].isin(WIDTHS)].pivot_table(index="recipe", columns="cut", values="wer")
    table = table.loc[[name for name in methods if name in table.index], ::-1].map(lambda wer: cell(wer, percent))
    table.loc["claimed"] = [CLAIMED_CUTS.get(WIDTHS[cut], "–") for cut in table]
    table.columns = [f"{WIDTHS[cut]} (cut {cut:.4g})" for cut in table]
    return table.rename_axis("method")


def errors_sentence(frame: pd.DataFrame, limit: float) -> str:
    """How many conversions have significantly more word errors, with attention errors below `limit` and above."""
    worse = (frame["wer_difference"] > 0) & (frame["p"] < SIGNIFICANT)
    below = frame["output_error"] < limit
    return (
        f"Of {below.sum()} conversions with an error below {percent(limit, 0)}, {(worse & below).sum()} had "
        f"significantly more word errors than the baseline; of the {(~below).sum()} above, {(worse & ~below).sum()}."
    )
