"""A step depends on what it imports, however deep, and on nothing else."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest

from asrlib.dependencies import library_files
from asrlib.pipeline import find_notebooks
from asrlib.runs import project_root

ROOT = project_root(Path(__file__).parent)


@pytest.fixture
def package(tmp_path):
    files = {
        "__init__.py": '_PUBLIC = {"load": "lib.models.loading"}\nfrom lib.early import x',
        "early.py": "",
        "unused.py": "import lib.models.loading",
        "models/__init__.py": "",
        "models/loading.py": "def load():\n    import lib.models.encoder",
        "models/encoder.py": "import torch, lib.models.loading",
    }
    for name, code in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return tmp_path / "lib"


LOADING = ["__init__.py", "early.py", "models/__init__.py", "models/encoder.py", "models/loading.py"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch", []),
        ("import lib", ["__init__.py", "early.py"]),
        ("import libother.unused", []),
        ("lib = 1\nlib.early", ["__init__.py", "early.py"]),
        ("import lib\nlib.load('x')", LOADING),
        ("from lib import load", LOADING),
        ("from lib import models", ["__init__.py", "early.py", "models/__init__.py"]),
        ("from lib.models import encoder as e", LOADING),
        ("%matplotlib inline\n!ls\nif x:\n    import lib.models.encoder", LOADING),
        ("import lib.unused", sorted([*LOADING, "unused.py"])),
    ],
)
def test_files_are_found_through_every_way_to_import(package, code, expected):
    assert [str(path.relative_to(package)) for path in library_files(code, package)] == expected


@pytest.mark.parametrize("step", find_notebooks(ROOT))
def test_a_notebook_imports_no_more_of_the_library_than_it_is_said_to_depend_on(step):
    """What Python really imports, for the imports of this notebook, in a process of its own."""
    import subprocess

    cells = nbformat.read(find_notebooks(ROOT)[step], as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    imports = [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
    script = "\n".join(
        [
            *map(ast.unparse, imports),
            "import sys",
            "print(*(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'asrlib'), sep='\\n')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {Path(line) for line in done.stdout.split()} <= set(library_files(code, ROOT / "asrlib"))
