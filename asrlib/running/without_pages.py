"""Removes the pages of notebooks from a report. Its results stay, and can still be verified.

make example RUN=baseline PAGES=no
"""

import re
from pathlib import Path

from asrlib.running.verification import checksums, keep_checksums, sha256_of
from asrlib.runs import Run

LINK = (
    r'<a [^>]*href="(?:[^"/]+/)?\d\d_\w+\.html"[^>]*>(.*?)</a>'  # to the page of a notebook, of this run or of a member
)
NAVIGATION = r'<nav class="pages".*?</nav>'
STEPS = r'<h2 id="pages">.*?</h2>'


def leave_pages_out(folder: Path, shown: str = "") -> None:
    """Remove the notebooks' pages and the figures of the run in `folder` and of its members.

    Figures whose paths below reports/examples occur in the text `shown` stay. index.html says that the pages are not
    kept and has no links to them. CHECKSUMS lists what remains.
    """
    for run in (folder, *sorted(path.parent for path in folder.glob("*/params.json"))):
        pages = [path for path in run.glob("*.html") if path.name != "index.html"]
        figures = [path for path in run.glob("figures/*") if path.relative_to(folder.parent).as_posix() not in shown]
        for path in pages + figures:
            path.unlink()
        if (run / "figures").is_dir() and not any((run / "figures").iterdir()):
            (run / "figures").rmdir()
        index = run / "index.html"
        before = sha256_of(index)
        index.write_text(index_without_links(index.read_text(encoding="utf-8"), folder.name), encoding="utf-8")
        _forget(Run(run), {path.relative_to(run).as_posix() for path in pages + figures}, before)


def index_without_links(page: str, name: str) -> str:
    """An index page whose links to notebooks' pages are plain text; unchanged where it has none.

    `name`: of the run or the sweep that makes these pages.
    """
    if not re.search(LINK, page):
        return page
    page = re.sub(NAVIGATION, lambda nav: re.sub(rf"{LINK}\n?", "", nav[0]), page, flags=re.DOTALL)
    page = re.sub(LINK, r"\1", page)
    note = f"The pages of this run are not kept in the repository: <code>python run_all.py {name}</code> makes them."
    return re.sub(STEPS, lambda heading: f'{heading[0]}\n<p class="muted">{note}</p>', page)


def _forget(run: Run, removed: set[str], index_before: str) -> None:
    """Take `removed` out of CHECKSUMS. An index.html that was changed by hand keeps its old hash."""
    digests = {name: digest for name, digest in checksums(run).items() if name not in removed}
    if digests.get("index.html") == index_before:
        digests["index.html"] = sha256_of(run.path / "index.html")
    keep_checksums(run, digests)
