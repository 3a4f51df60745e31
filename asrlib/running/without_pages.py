"""A kept report without the notebooks' pages: its results stay, and can still be verified.

make example RUN=baseline PAGES=no
"""

import re
from pathlib import Path

from asrlib.running.verification import CHECKSUMS, sha256_of
from asrlib.runs import atomic_write

LINK = r'<a [^>]*href="(?:[^"/]+/)?\d\d_\w+\.html"[^>]*>(.*?)</a>'  # to a notebook's page, perhaps of a member
NAVIGATION = r'<nav class="pages".*?</nav>'
STEPS = r'<h2 id="pages">.*?</h2>'


def leave_pages_out(folder: Path, shown: str = "") -> None:
    """Remove the notebooks' pages and the figures of the kept run in `folder`, and those of its members.

    Figures whose paths below reports/examples are in `shown`, a text, stay. index.html says that the pages are not
    there and links to none of them; CHECKSUMS forgets what is removed.
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
        _forget(run, {path.relative_to(run).as_posix() for path in pages + figures}, before)


def index_without_links(page: str, name: str) -> str:
    """The index page of a run or a member, its links to notebooks' pages made plain text; unchanged where it has none.

    name: of the run, or of the sweep, that makes them.
    """
    if not re.search(LINK, page):
        return page
    page = re.sub(NAVIGATION, lambda nav: re.sub(rf"{LINK}\n?", "", nav[0]), page, flags=re.DOTALL)
    page = re.sub(LINK, r"\1", page)
    said = f"The pages of this run are not kept in the repository: <code>python run_all.py {name}</code> makes them."
    return re.sub(STEPS, lambda heading: f'{heading[0]}\n<p class="muted">{said}</p>', page)


def _forget(run: Path, removed: set[str], index_before: str) -> None:
    """Take `removed` out of CHECKSUMS. An index.html changed by hand stays found out."""
    lines = (run / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    kept = {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name not in removed}
    if kept.get("index.html") == index_before:
        kept["index.html"] = sha256_of(run / "index.html")
    with atomic_write(run / CHECKSUMS) as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(kept.items()))
