"""HTML for reports: executed notebooks as self-contained pages, escaped tables, marked transcripts.

A page opens from disk with the network off: style and figures are inside it, it has no script, and its
content security policy forbids the browser to run or to fetch any. Whatever comes from data (transcripts,
names) is escaped, and what of it is written from right to left does not reorder what stands beside it.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asrlib.runs import atomic_write, resolve

if TYPE_CHECKING:
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

    outputs, messages = [], ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            messages += output.text
        elif output.output_type == "stream":
            if not (outputs and outputs[-1].output_type == "stream"):
                outputs.append(new_output("stream", name="stdout", text=""))
            outputs[-1].text += output.text
        elif "data" not in output or not {k for k in output.data if "widget" in k or "javascript" in k}:
            outputs.append(output)
    for output in outputs:
        if output.output_type == "stream":
            output.text = final_terminal_text(output.text)
    outputs = [output for output in outputs if output.output_type != "stream" or output.text]
    lines = _last_states(line for line in final_terminal_text(messages).split("\n") if line)
    if lines:  # one folded block at the end: bars and messages of a cell interleave in meaningless ways
        outputs.append(new_output("stream", name="stderr", text="\n".join(lines)))
    cell.outputs = outputs


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
    shown, running = [], None
    for line in lines:
        bar = re.match(r"(.*?)\s*(\d+)%\|", line)
        if running is not None and bar and bar[1] == running:
            shown.pop()
        shown.append(line)
        running = bar[1] if bar and bar[2] != "100" else None
    return shown


def _first_heading(node: "NotebookNode") -> str | None:
    for cell in node.cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^# +(.+)$", cell.source, re.MULTILINE)):
            return re.sub(r"[`*]", "", heading[1]).strip()
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
