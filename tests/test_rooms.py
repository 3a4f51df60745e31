"""Where things stand: few entries at the root, files of a size to read, and no notebook that reaches what runs it.

The order in which rooms import each other is checked by `make lint`, from the contract in pyproject.toml.
"""

import json
from pathlib import Path

import pytest

from asrlib.runs import find_notebooks, project_root
from asrlib.runs.dependencies import library_files

ROOT = project_root(Path(__file__).parent)
PACKAGE = ROOT / "asrlib"
ENTRIES = 14  # of the package's root
LINES = 400
CODE_LINES = 120  # of a notebook, its parameters included, without blank lines and comments
REACH = {  # files of asrlib that a notebook may depend on
    "00_baseline": 71,
    "01_convert": 68,
    "02_analyze_svd_error": 76,
    "03_finetune": 65,
    "04_evaluate": 63,
    "05_benchmark": 81,
    "06_compare": 33,
}


def code_of(notebook: Path, parameters: bool = True) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    wanted = [cell for cell in cells if parameters or "parameters" not in cell["metadata"].get("tags", [])]
    return "\n".join("".join(cell["source"]) for cell in wanted if cell["cell_type"] == "code")


def test_the_root_of_the_package_has_few_entries():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES, sorted(path.name for path in entries)


def test_files_have_a_size_to_read():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LINES} == {}


@pytest.mark.parametrize("name", REACH)
def test_a_notebook_reaches_what_it_needs_and_not_what_runs_it(name):
    files = [path.relative_to(PACKAGE) for path in library_files(code_of(find_notebooks(ROOT)[name]), PACKAGE)]
    assert len(files) > 10
    assert [str(path) for path in files if path.parts[0] in ("running", "export", "explore")] == []
    assert len(files) <= REACH[name], f"{len(files)} files"


@pytest.mark.parametrize("name", REACH)
def test_a_notebook_is_short(name):
    lines = [line.strip() for line in code_of(find_notebooks(ROOT)[name]).splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= CODE_LINES
