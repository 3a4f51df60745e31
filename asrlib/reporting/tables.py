"""Tables, transcripts and players as HTML, in notebooks and on pages."""

import base64
import io
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup, escape

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import as_counted, folded
from asrlib.reporting.numbers import UNKNOWN, percent, rate_interval, span, unbroken
from asrlib.runs import atomic_write

if TYPE_CHECKING:
    import numpy as np

Format = str | Callable[[Any], str]

# Unicode's classes of right-to-left letters, and of marks that turn the direction of what follows them.
TURNS = {"R", "AL", "RLE", "RLO", "RLI", "LRE", "LRO", "LRI", "FSI"}


# ---- pieces that notebooks display -------------------------------------------------------------------------


def turns(text: str) -> bool:
    """Is some of `text` written from right to left?"""
    return not text.isascii() and any(unicodedata.bidirectional(character) in TURNS for character in text)


def isolated(value: Any) -> Markup:
    """`value` escaped, in an element of its own direction where its neighbours would be reordered otherwise."""
    return Markup("<bdi>{}</bdi>").format(value) if turns(str(value)) else escape(value)


def table_html(
    df: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None, index: bool = True
) -> Markup:
    """Table with every name and cell escaped; numbers right-aligned, missing ones shown as a dash.

    formats: column -> format specification (".1%", ",") or function of the value. Only what such a function
    returns as Markup goes in as it is: `{"aligned": Markup}` for a column made by `diff_transcripts`.
    """
    formats = formats or {}

    def text(column: str, value: Any) -> str:
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return "–"
        form = formats.get(column, ".4g" if isinstance(value, float) else "")
        return form(value) if callable(form) else format(value, form)

    def attributes(column: str) -> Markup:
        if pd.api.types.is_numeric_dtype(df[column]):
            return Markup(' class="n"')
        short = not callable(formats.get(column)) and df[column].astype(str).str.len().max() <= 26
        return Markup(' class="short"' if short else "")

    kinds = {column: attributes(column) for column in df.columns}

    def head_of(name: Any, kind: str = "") -> Markup:
        """A head without a name is none, to a screen reader."""
        if name in (None, ""):
            return Markup("<td></td>")
        return Markup('<th scope="col"{}>{}</th>').format(kind, isolated(name))

    corner = head_of(df.index.name) if index else ""
    head = Markup("").join(head_of(c, kinds[c]) for c in df.columns)
    rows = []
    for label, *values in df.itertuples():
        first = Markup('<th scope="row">{}</th>').format(isolated(label)) if index else ""
        shown = ((column, text(column, value)) for column, value in zip(df.columns, values, strict=True))
        cells = (Markup("<td{}>{}</td>").format(kinds[column], isolated(cell)) for column, cell in shown)
        rows.append(Markup("<tr>{}{}</tr>").format(first, Markup("").join(cells)))
    return Markup(
        '<div class="table" tabindex="0" role="region" aria-label="{}"><table>{}<thead><tr>{}{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(
        caption or "table",
        Markup("<caption>{}</caption>").format(caption) if caption else "",
        corner,
        head,
        Markup("\n").join(rows),
    )


def display_table(
    df: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None, index: bool = True
) -> None:
    """Show `table_html` in a notebook."""
    from IPython.display import display

    rich = str(table_html(df, caption, formats, index))
    display({"text/html": rich, "text/plain": df.to_string()}, raw=True)


def diff_transcripts(reference: str, hypothesis: str) -> Markup:
    """The reference as it was heard: deleted words struck through, inserted ones underlined, and
    a substituted word struck through before what was heard instead. Readable without colour and escaped.

    Words are told apart as error rates do: case and the composition of accents do not count.
    """
    import jiwer

    aligned = jiwer.process_words(folded(reference), folded(hypothesis))
    said, heard = reference.split(), hypothesis.split()
    words = []
    for chunk in aligned.alignments[0]:
        left = said[chunk.ref_start_idx : chunk.ref_end_idx]
        right = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            words += [escape(word) for word in left]
        elif chunk.type == "delete":
            words += [Markup('<del title="deleted">{}</del>').format(word) for word in left]
        elif chunk.type == "insert":
            words += [Markup('<ins title="inserted">{}</ins>').format(word) for word in right]
        else:
            pair = '<span class="sub" title="substituted"><del>{}</del> <ins>{}</ins></span>'
            words += [Markup(pair).format(*both) for both in zip(left, right, strict=True)]
    direction = Markup(' dir="auto"') if turns(reference + hypothesis) else ""
    return Markup('<span class="diff"{}>{}</span>').format(direction, Markup(" ").join(words))


def as_counted_diff(prediction: Mapping[str, Any]) -> Markup:
    """`diff_transcripts` of a transcript in the form in which its word errors are counted."""
    return diff_transcripts(as_counted(prediction, "reference"), as_counted(prediction, "hypothesis"))


def audio_html(samples_S: "np.ndarray", name: str) -> Markup:
    """A player with 16 kHz mono audio inside it, as MP3 of 3 KB a second, which every browser plays."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples_S, SAMPLE_RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=0.9)
    data = base64.b64encode(file.getvalue()).decode()
    player = '<audio controls preload="metadata" aria-label="audio of {}" src="data:audio/mpeg;base64,{}"></audio>'
    return Markup(player).format(name, data)


def figure_html(png: Path) -> Markup:
    """`png` as an embedded image, with the description that `save_figure` left in the file."""
    from PIL import Image

    with Image.open(png) as image:
        alt = image.info.get("Description", png.stem.replace("_", " "))
        width = round(image.width / image.info.get("dpi", (100, 100))[0] * 100)  # CSS pixels: 100 to the inch
    data = base64.b64encode(png.read_bytes()).decode()
    wide = Markup(' class="wide"') if width > 700 else ""
    return Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}"{}>').format(data, alt, width, wide)


# ---- cells -------------------------------------------------------------------------------------------------


def cell(value: float, show: Callable[[float], str], missing: str = UNKNOWN) -> str:
    """`value` as `show` writes it; `missing` where it is not known."""
    return missing if pd.isna(value) else show(value)


def rate_cell(row: pd.Series, split: str) -> str:
    """4.55 % (3.50–5.70): the word error rate of a row of a comparison, with its interval."""
    low, high = row[f"wer_{split}_low"], row[f"wer_{split}_high"]
    return cell(row[f"wer_{split}"], percent) + (f" ({rate_interval((low, high))})" if low < high else "")


def speed_cell(row: pd.Series) -> str:
    """×1.25 (1.20–1.30): the speed of a row of a comparison, with its interval."""
    low, high = row["speed_ratio_low"], row["speed_ratio_high"]
    return cell(row["speed_ratio"], "×{:.2f}".format) + (f" ({span(low, high)})" if low < high else "")


# ---- files -------------------------------------------------------------------------------------------------


def save_table(df: pd.DataFrame, path: Path) -> None:
    with atomic_write(path) as file:
        df.to_csv(file, lineterminator="\n")


def as_rows(table: pd.DataFrame) -> list[dict]:
    """The rows of a table for metrics/*.json, with None for what is not known."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def display_text(text: str) -> None:
    """Show Markdown in a notebook, numbers on one line with their units."""
    from IPython.display import Markdown, display

    display(Markdown(unbroken(text)))


def small_print(text: str) -> Markup:
    """A cell with what stands in brackets below the rest, in small print."""
    value, _, note = unbroken(text).partition(" (")
    return Markup("{} <small>{}</small>").format(value, note.removesuffix(")"))


def sizes_shown(models: Mapping[str, Any], numbers: Mapping[str, float], title: str) -> tuple:
    """What `display_table` shows of the cache and the parameters of models; `numbers` cached per frame and layer."""
    from asrlib.attention.cache import kv_cache_bytes

    caches = {name: kv_cache_bytes(model.config, frames=1000) / 1024 for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    columns = ["cached numbers per frame and layer", "cache of 1000 frames, float32, KiB", "parameters, M"]
    table = pd.DataFrame(dict(zip(columns, (numbers, caches, parameters), strict=True)))
    return table, title, dict(zip(columns, (",.0f", ",.0f", ".2f"), strict=True))


def exactness(before, after) -> tuple[float, str]:
    """(largest difference, a sentence that tells it) of logits [N, V] before and after a conversion at full width."""
    difference, largest = (values.abs().max().item() for values in (before - after, before))
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    return difference, (
        f"the logits differ by at most **{difference:.1e}**, beside values up to {largest:.0f}; {same:.2%} of them "
        "have the same best symbol."
    )
