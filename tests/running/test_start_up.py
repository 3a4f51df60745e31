"""What a call imports before it answers: a list, a help or a refusal waits for nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from asrlib.running import pipeline
from asrlib.running.parameter_cells import definitions, read_cells, read_parameters
from asrlib.runs import BadParameter, find_notebooks, project_root

ROOT = project_root(Path(__file__).parent)
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "pandas", "numpy", "papermill", "nbformat", "jsonschema"}
CHECKS = {"pydantic", "yaml"}  # a tenth of a second, which only the checks of parameters are worth


def imported_by(*words: str, status: int) -> set[str]:
    """The top-level modules that `run_all.py WORDS` imports."""
    code = f"""
import sys, run_all
try:
    status = run_all.main({list(words)!r})
except SystemExit as end:
    status = end.code
print("\\n", status, *{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ended, *modules = done.stdout.splitlines()[-1].split()
    assert int(ended) == status, done.stderr
    return set(modules)


@pytest.mark.parametrize("word", ["--list", "--help"])
def test_a_list_and_a_help_import_not_even_the_checks(word):
    assert imported_by(word, status=0) & (HEAVY | CHECKS) == set()


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--set", "latent_dmi=3"),
        ("demo", "--set", "latent_dim=-1"),
        ("demo", "--set", "latent_dim=x"),
        ("demo", "--from", "01_convrt"),
        ("demo", "--name", ".."),
        ("baselines_small", "--set", "latent_dmi=3"),
        ("no_such_params_file",),
    ],
)
def test_a_refusal_imports_nothing_heavier_than_the_checks(words):
    assert imported_by(*words, status=2) & (HEAVY | CHECKS) == CHECKS


# ---- reading notebooks without papermill -----------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_those_that_papermill_sees(notebook):
    source = next((cell.source for cell in read_cells(notebook) if "parameters" in cell.tags), "")
    seen = papermill.inspect_notebook(notebook).values()
    assert definitions(source) == {
        facts["name"]: (facts["inferred_type_name"], facts["default"], facts["help"]) for facts in seen
    }
    assert list(read_parameters(notebook)) == [facts["name"] for facts in seen]


@pytest.mark.parametrize(
    "source",
    [
        "a: int = 1  # help\n\n# a comment\nb = 2",
        "a: list[int] = [  # dropped\n    1,\n    2,\n]  # help\nb: int = 3",
        "a: str = 'x = y'\n  'rest'\nb: int = 1",
        "a: int = 1  # b=2\nc: int = 2",
        "a: int | None = 1\nb: Optional[int] = None",
        "a = 1  # type: float  help",
        "a: 'int' = 1\na: int = 2  # the last counts",
        "a: dict[str, int] = {'#': 1}  # help",
        "import os\na : int=1#help",
        "for",
        "",
    ],
)
def test_odd_cells_are_read_as_papermill_reads_them(source):
    translator = papermill.translators.PythonTranslator
    seen = {one.name: (one.inferred_type_name, one.default, one.help) for one in translator.inspect({"source": source})}
    assert definitions(source) == seen


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": [{}]}', '{"cells": {"a": 1}}', '{"worksheets": []}'])
def test_what_is_no_notebook_is_refused(tmp_path, text):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_a.ipynb").write_text(text)
    with pytest.raises(BadParameter, match=r"00_a\.ipynb is not a notebook of format 4"):
        read_parameters(find_notebooks(tmp_path)["00_a"])


# ---- bytecode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variable", "flag", "kept"), [("1", False, True), ("", True, True), ("", False, False)])
def test_kernels_keep_bytecode_where_this_process_writes_none(asrlib_cache, monkeypatch, variable, flag, kept):
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", variable)
    monkeypatch.setattr(sys, "dont_write_bytecode", flag)
    environment = pipeline.kernel_environment()
    assert environment.get("PYTHONPYCACHEPREFIX") == (str(asrlib_cache / "bytecode") if kept else None)
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == variable, "this process's own stays"


def test_a_prefix_that_was_given_stays(monkeypatch):
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "/mine")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert pipeline.kernel_environment()["PYTHONPYCACHEPREFIX"] == "/mine"
