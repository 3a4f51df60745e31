"""A step depends on what it imports, however deep, and on nothing else."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from asrlib.runs import find_notebooks, project_root
from asrlib.runs.dependencies import library_files

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


IMPORT_EACH = """
import json, os, sys
import datasets, IPython, matplotlib, pandas, seaborn, torch, transformers  # once for all children
for step, imports in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        exec(imports, {})
        files = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "asrlib"]
        print(json.dumps([step, files]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_notebook_imports_no_more_of_the_library_than_it_is_said_to_depend_on():
    """What Python really imports for the imports of each notebook, in a process of its own."""
    imports, expected = {}, {}
    for step, notebook in find_notebooks(ROOT).items():
        cells = nbformat.read(notebook, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        nodes = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports[step], expected[step] = "\n".join(map(ast.unparse, nodes)), library_files(code, ROOT / "asrlib")
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps(imports)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == expected.keys()
    for step, files in found.items():
        assert len(files) > 2 and set(map(Path, files)) <= set(expected[step]), step
