"""How figures are drawn, shown and saved.

Every figure is a matplotlib Figure outside of pyplot. Its label describes it in words, computed from the same data;
`save_figure` and `show_figure` use it as the alternative text.
"""

import base64
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from markupsafe import Markup
from tqdm import tqdm

from asrlib.reporting.numbers import percent
from asrlib.runs import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYSTEMS = {
    "baseline": "baseline (MHA)",
    "control": "trained alike (MHA)",
    "converted": "converted (MLA)",
    "finetuned": "fine-tuned (MLA)",
}
DPI = 160
LIVE_SECONDS = 5.0  # between two drawings of a figure that grows
INK, GREY = "#1c2126", "#5b656e"


def system_name(table: pd.DataFrame, system: str) -> str:
    """baseline (MHA), or whatever attention the table says it has."""
    return f"{SYSTEMS[system].partition(' (')[0]} ({table.at[system, 'attention']})"


# ---- showing and saving ------------------------------------------------------------------------------------


def drawing_style():
    import matplotlib as mpl
    import seaborn as sns

    style = sns.axes_style("whitegrid", {"grid.color": "#e4e6e3", "axes.edgecolor": GREY})
    sizes = sns.plotting_context("notebook", font_scale=0.85)
    return mpl.rc_context(style | sizes | {"axes.titleweight": "bold"})


def _png(fig: "Figure", alt: str | None) -> bytes:
    """The figure in 256 colours chosen for it: a quarter of the bytes, with no visible difference."""
    from PIL import Image, PngImagePlugin

    drawn, small, about = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_itxt("Description", alt or fig.get_label())
    with drawing_style():  # ticks are made while drawing
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
    """A figure that grows in its place in a notebook, and disappears at the end.

    It is drawn only where somebody can watch: not outside of notebooks, and not where papermill runs one.
    """

    def __init__(self):
        from IPython import get_ipython

        self.watched = getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False)
        self.place: dict = {"display_id": f"live-{id(self)}"}
        self.drawn = -math.inf

    def show(self, draw: Callable[[], "Figure"]) -> None:
        """Show what `draw` returns, at most once in LIVE_SECONDS."""
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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure of `width` × `height` inches that pyplot does not know, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs)


def system_colours() -> dict[str, tuple]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return {"baseline": palette[7], "control": palette[2], "converted": palette[1], "finetuned": palette[0]}


def rate_with_reach(row: pd.Series, split: str) -> tuple[float, list[list[float]] | None]:
    """Word error rate in per cent, and how far its interval reaches below and above, as errorbar wants it."""
    wer, low, high = (100 * row[f"wer_{split}{end}"] for end in ("", "_low", "_high"))
    return wer, None if pd.isna(low) else [[wer - low], [high - wer]]


def described(table: pd.DataFrame, names: Mapping[str, str], columns: Mapping[str, Callable[[float], str]]) -> str:
    """What the bars and points of a figure say, in words; `columns`: column → how a value of it is shown."""
    systems = []
    for system, row in table.iterrows():
        values = [show(row[column]) for column, show in columns.items() if pd.notna(row.get(column))]
        systems.append(f"{names[system]}: {', '.join(values) or 'not measured'}")
    return "; ".join(systems) + "."


def training_curves(history: Sequence[Mapping], best_step: int | None = None) -> "Figure":
    """Loss, validation WER and learning rate against the training step; `best_step` is marked."""
    names = ["step", "loss", "eval_loss", "eval_wer", "learning_rate"]
    df = pd.DataFrame(history).reindex(columns=names).astype(float).sort_values("step")
    blue = system_colours()["finetuned"]
    with drawing_style():
        fig, axes = new_figure(8, 5.6, 3, 1, sharex=True, height_ratios=[2, 2, 1])
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
    ends = f" Validation WER from {percent(wers.iloc[0])} to {percent(wers.iloc[-1])}." if len(wers) else ""
    fig.set_label(f"Training curves over {df['step'].max():.0f} steps.{ends}")
    return fig


@contextmanager
def live_curves() -> Iterator[Callable[[list[dict]], None]]:
    """Give a function that shows the history of a training: its progress and, where somebody watches, its curves."""
    with tqdm(desc="training", unit=" steps", leave=False) as bar, LiveFigure() as figure:

        def show(history: list[dict]) -> None:
            bar.total = history[-1]["max_steps"]
            bar.update(history[-1]["step"] - bar.n)
            errors = [row["eval_wer"] for row in history if "eval_wer" in row]
            if errors:
                bar.set_postfix_str(f"validation WER {percent(errors[-1])}")
            figure.show(lambda: training_curves(history))

        yield show
