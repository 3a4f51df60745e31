"""HTML for reports: executed notebooks as self-contained pages, escaped tables, marked transcripts.

A page opens from disk with the network off: style and figures are inside it, it has no script, and its
content security policy forbids the browser to run or to fetch any. Whatever comes from data (transcripts,
names) is escaped, and what of it is written from right to left does not reorder what stands beside it.
"""

import ast
import base64
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import folded
from asrlib.runs import atomic_write, resolve

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from bs4 import BeautifulSoup
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"

# The pages of a run in reading order: stem of notebook and page -> (short name, what the page shows).
PAGES = {
    "00_baseline": ("Baseline", "the recogniser as it comes: its word errors, with and without attention"),
    "01_convert": ("Convert", "keys and values through a latent, and the proof that full width is exact"),
    "02_analyze_svd_error": ("What a cut costs", "every method at every cut: word errors and what breaks first"),
    "03_finetune": ("Fine-tune", "training the converted model: losses, word errors, learning rate"),
    "04_evaluate": ("Evaluate", "transcripts and word errors of all three models on the same speech"),
    "05_benchmark": ("Benchmark", "latency, speed, memory and cache, the models taking turns"),
    "06_compare": ("Compare", "what it cost and what it saved"),
}

Format = str | Callable[[Any], str]

# Unicode's classes of right-to-left letters, and of marks that turn the direction of what follows them.
TURNS = {"R", "AL", "RLE", "RLO", "RLI", "LRE", "LRO", "LRI", "FSI"}


# ---- pages -------------------------------------------------------------------------------------------------


def render_notebook(notebook: Path, page: Path, run_dir: Path | None = None, pages: Iterable[str] = PAGES) -> Path:
    """Write the executed `notebook` as one HTML file; returns its path.

    Code is folded, parameters become one table, progress bars and messages are reduced to their last state and folded.
    The page is named after the notebook's first heading and `run_dir` (default: its own folder). `pages`: the stems of
    the pages that the run has or will have, to link to.
    """
    import nbformat
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    notebook, page = resolve(notebook), resolve(page)
    node = nbformat.read(notebook, as_version=4)
    _gather_parameters(node)
    for cell in node.cells:
        if cell.cell_type == "code":
            _tidy_outputs(cell)
    node.metadata.pop("widgets", None)

    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="report",
        template_file="notebook.html.j2",
        embed_images=True,
        anchor_link_text="#",
    )
    facts = page_facts(page, (run_dir or page.parent).name, _first_heading(node) or notebook.stem, pages)
    resources = {"metadata": {"path": str(notebook.parent)}, "page": facts}
    html, _ = exporter.from_notebook_node(node, resources)

    soup = BeautifulSoup(html, "html.parser")
    _remove_active_content(soup)
    _list_sections(soup)
    with atomic_write(page) as file:
        file.write(str(soup))
    return page


def render_template(name: str, target: Path, **values: Any) -> Path:
    """Write the jinja template `name` with `values`, all of them escaped, as `target`; returns its path."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES / "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(name).render(**values)
    with atomic_write(target) as file:
        file.write(text)
    return resolve(target)


def page_facts(page: Path, run_name: str, title: str, pages: Iterable[str] = PAGES) -> dict:
    """What the frame around every page needs: title, navigation, neighbours, colours of the code."""
    stems = [stem for stem in PAGES if stem in set(pages)]
    here = stems.index(page.stem) if page.stem in stems else None
    link = {s: {"href": f"{s}.html", "number": s[:2], "name": name} for s, (name, _) in PAGES.items() if s in stems}
    return {
        "title": title,
        "run": run_name,
        "stem": page.stem,
        "links": link,
        "previous": link[stems[here - 1]] if here else None,
        "next": link[stems[here + 1]] if here is not None and here + 1 < len(stems) else None,
        "code_css": _code_css(),
    }


def _code_css() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in ("tango", "github-dark"))
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


# ---- tidying an executed notebook --------------------------------------------------------------------------


def _gather_parameters(node: "NotebookNode") -> None:
    """Turn the `parameters` cell and papermill's injected one into one table in the cell's metadata."""
    from papermill.translators import PythonTranslator

    def tagged(tag: str) -> list:
        return [cell for cell in node.cells if tag in cell.metadata.get("tags", [])]

    injected = tagged("injected-parameters")
    given = {name: value for cell in injected for name, value in _assigned(cell.source)}
    for cell in tagged("parameters"):
        defaults = PythonTranslator.inspect(cell)
        cell.metadata["parameter_rows"] = [
            {
                "name": p.name,
                "value": given.get(p.name, p.default),
                "default": None if given.get(p.name, p.default) == p.default else p.default,
                "help": p.help,
            }
            for p in defaults
        ]
        if given.keys() <= {p.name for p in defaults}:  # everything injected is in the table
            node.cells = [c for c in node.cells if c not in injected]


def _assigned(source: str) -> Iterator[tuple[str, str]]:
    """Names and literals of what papermill injected, which writes é as \\xe9."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            literal = ast.get_source_segment(source, node.value)
            yield node.targets[0].id, repr(ast.literal_eval(literal)) if "\\" in literal else literal


def _tidy_outputs(cell: "NotebookNode") -> None:
    """Drop widgets and scripts, join streams, keep of a progress bar what a terminal shows at the end."""
    from nbformat.v4 import new_output

    kept, messages = [], ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            messages += output.text
        elif output.output_type == "stream":
            if not (kept and kept[-1].output_type == "stream"):
                kept.append(new_output("stream", name="stdout", text=""))
            kept[-1].text += output.text
        elif "data" not in output or not {k for k in output.data if "widget" in k or "javascript" in k}:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = final_terminal_text(output.text)
    kept = [o for o in kept if o.output_type != "stream" or o.text]
    lines = _last_states(line for line in final_terminal_text(messages).split("\n") if line)
    if lines:  # one folded block at the end: bars and messages of a cell interleave in meaningless ways
        kept.append(new_output("stream", name="stderr", text="\n".join(lines)))
    cell.outputs = kept


def final_terminal_text(text: str) -> str:
    """What a terminal shows in the end: carriage returns and cursor-up obeyed (tqdm), colours dropped."""
    text = re.sub(r"\x1b\[(?!A)[0-9;?]*[A-Za-z]", "", text)
    lines, row, column = [""], 0, 0
    for piece in re.split(r"(\r\n|\r|\n|\x1b\[A)", text):
        if piece in ("\n", "\r\n"):
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[A":
            row = max(row - 1, 0)
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _last_states(lines: Iterable[str]) -> list[str]:
    """Keep one line of each progress bar: nbclient, joining streams, drops the cursor-up of nested bars."""
    kept, running = [], None
    for line in lines:
        bar = re.match(r"(.*?)\s*(\d+)%\|", line)
        if running is not None and bar and bar[1] == running:
            kept.pop()
        kept.append(line)
        running = bar[1] if bar and bar[2] != "100" else None
    return kept


def _first_heading(node: "NotebookNode") -> str | None:
    for cell in node.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^# +(.+)$", cell.source, re.MULTILINE)):
            return re.sub(r"[`*]", "", found[1]).strip()
    return None


def _remove_active_content(soup: "BeautifulSoup") -> None:
    """Take out of cell outputs what would run or be fetched; links to follow by hand stay."""
    for element in soup.main.select("script, iframe, object, embed, link, base, meta"):
        element.decompose()
    for element in soup.main.find_all(True):
        for name, value in list(element.attrs.items()):
            fetched = name in ("src", "srcset", "poster", "data", "background", "xlink:href")
            fetched = fetched or (name == "href" and element.name != "a")
            local = str(value).strip().startswith(("data:", "#"))
            scripted = name.startswith("on") or str(value).strip().lower().startswith("javascript:")
            if scripted or (fetched and not local):
                del element[name]


def _list_sections(soup: "BeautifulSoup") -> None:
    """Put a list of the page's sections after its title, where there are enough of them to need one."""
    headings = soup.main.select(".markdown h2[id]")
    if len(headings) < 3:
        return
    nav = soup.new_tag("nav", attrs={"class": "sections", "aria-label": "Sections of this page"})
    for heading in headings:
        anchor = heading.select_one(".anchor-link")
        name = heading.get_text().removesuffix(anchor.get_text() if anchor else "").strip()
        link = soup.new_tag("a", href=f"#{heading['id']}")
        link.string = name
        nav.append(link)
    soup.main.select_one(".markdown").insert_after(nav)


# ---- pieces that notebooks display -------------------------------------------------------------------------


def turns(text: str) -> bool:
    """Is some of `text` written from right to left?"""
    return not text.isascii() and any(unicodedata.bidirectional(character) in TURNS for character in text)


def isolated(value: Any) -> Markup:
    """`value` escaped, in an element of its own direction where its neighbours would be reordered otherwise."""
    return Markup("<bdi>{}</bdi>").format(value) if turns(str(value)) else escape(value)


def table_html(
    df: "pd.DataFrame", caption: str = "", formats: Mapping[str, Format] | None = None, index: bool = True
) -> Markup:
    """Table with every name and cell escaped; numbers right-aligned, missing ones shown as a dash.

    formats: column -> format specification (".1%", ",") or function of the value. Only what such a function
    returns as Markup goes in as it is: `{"aligned": Markup}` for a column made by `diff_transcripts`.
    """
    import pandas as pd

    formats = formats or {}

    def text(column: str, value: Any) -> str:
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return "–"
        how = formats.get(column, ".4g" if isinstance(value, float) else "")
        return how(value) if callable(how) else format(value, how)

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
    df: "pd.DataFrame", caption: str = "", formats: Mapping[str, Format] | None = None, index: bool = True
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
