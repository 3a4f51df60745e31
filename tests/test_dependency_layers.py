"""Each layer of dependencies suffices for its code: the library alone, notebooks, cluster, graphs, tests."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import asrlib
from asrlib.__main__ import VERBS
from asrlib.data.synthetic import Espeak
from asrlib.running.command_line import sentence
from asrlib.runs.dependencies import library_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asrlib"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWNERS = metadata.packages_distributions()
LIBRARY_ROOMS = ("runs", "attention", "data", "models", "conversion", "streaming", "measuring")
BASE_VERBS = VERBS.keys() - {"export", "parameters"}  # those that need no notebooks
SPOKEN = ("data/synthetic.py", "espeakng_loader")  # asks for its extra where it is not installed


def declared(*extras: str) -> set[str]:
    """Canonical names of the base dependencies and those of `extras`."""
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {PROJECT["name"]}


def imported_names(path: Path) -> set[str]:
    """Top-level modules that a Python file or the code cells of a notebook import, wherever in it."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        source = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE)
    else:
        source = path.read_text()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def foreign(paths: list[Path]) -> set[tuple[str, str]]:
    """(file, module) of each import that is neither Python's nor the project's own."""
    local = {"asrlib", "run_all"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert paths
    return {
        (str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)), name)
        for path in paths
        for name in imported_names(path) - sys.stdlib_module_names - local
    }


def undeclared(paths: list[Path], *extras: str) -> set[tuple[str, str]]:
    return {
        (path, name)
        for path, name in foreign(paths)
        if not declared(*extras) & {canonicalize_name(owner) for owner in OWNERS.get(name, [])}
    }


def room_files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in (PACKAGE / room).rglob("*.py")]


@pytest.mark.parametrize("name", asrlib._PUBLIC)
def test_what_a_public_function_reaches_imports_the_base_set_alone(name):
    reached = library_files(f"from asrlib import {name}", PACKAGE)
    assert undeclared(reached) <= {SPOKEN}


@pytest.mark.parametrize("verb", sorted(BASE_VERBS))
def test_what_a_command_of_the_library_reaches_imports_the_base_set_alone(verb):
    reached = library_files(f"import asrlib.__main__, {VERBS[verb].module}", PACKAGE)
    assert undeclared(reached) <= {SPOKEN}


def test_the_rooms_of_the_library_import_the_base_set_and_all_of_it():
    paths = room_files(*LIBRARY_ROOMS)
    assert undeclared(paths) == {SPOKEN}
    owners = {canonicalize_name(owner) for _, name in foreign(paths) for owner in OWNERS[name]}
    assert declared() <= owners


@pytest.mark.parametrize(
    ("patterns", "extras"),
    [
        (["asrlib/training/*.py", "asrlib/reporting/*.py", "asrlib/explore/*.py"], ["notebooks"]),
        (["run_all.py", "notebooks/*.ipynb", "asrlib/*.py"], ["notebooks"]),
        (["asrlib/running/*.py"], ["notebooks", "cluster"]),
        (["asrlib/export/*.py"], ["notebooks", "onnx"]),
        (["tests/**/*.py"], ["notebooks", "cluster", "onnx", "dev"]),
    ],
    ids=["rooms", "notebooks", "running", "export", "tests"],
)
def test_what_is_imported_is_declared(patterns, extras):
    assert not undeclared([path for pattern in patterns for path in ROOT.glob(pattern)], *extras)


def test_every_room_is_in_a_layer():
    others = {"training", "reporting", "explore", "running", "export"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*LIBRARY_ROOMS, *others}


def test_ray_is_imported_by_the_cluster_alone():
    assert {path for path, name in foreign(room_files("running")) if name == "ray"} == {"running/cluster.py"}


WITHOUT_EXTRAS = """
import sys
from pathlib import Path

sys.modules |= dict.fromkeys(sys.argv[1].split())  # as if they were not installed

import numpy as np
import soundfile
import asrlib

chapter = Path(sys.argv[2]) / "train" / "1" / "1"
chapter.mkdir(parents=True)
soundfile.write(chapter / "1-1-1.wav", np.random.default_rng(0).normal(0, 0.1, 30 * 16_000), 16_000)
(chapter / "1-1.trans.txt").write_text("1-1-1 SAY SOMETHING")
corpus = asrlib.open_corpus(sys.argv[2])
model, processor = asrlib.load("synthetic-conformer")
statistics = asrlib.collect_statistics(model, processor, corpus, attention=True)
latent = asrlib.convert(model, 18, method="attended", ranks="sensitivity", statistics=statistics)
assert asrlib.analyze_compression_quality and asrlib.stream
latent.save_pretrained(sys.argv[2] + "/latent")
processor.save_pretrained(sys.argv[2] + "/latent")
latent, processor = asrlib.load(sys.argv[2] + "/latent")
assert asrlib.kv_cache_bytes(latent.config, 100) < asrlib.kv_cache_bytes(model.config, 100)
assert asrlib.evaluate(asrlib.to_standard_attention(latent), processor, corpus).wer >= 0
"""


def test_the_library_converts_and_evaluates_where_no_extra_is_installed(tmp_path):
    """`sys.modules[name] = None` makes Python and transformers believe that a package is missing."""
    extras = declared(*PROJECT["optional-dependencies"]) - declared()
    shared = {"jinja2", "markupsafe", "packaging"}  # which torch and transformers bring along
    missing = [name for name, owners in OWNERS.items() if {*map(canonicalize_name, owners)} & (extras - shared)]
    assert {"accelerate", "espeakng_loader", "IPython", "matplotlib", "onnxruntime", "papermill", "ray"} <= {*missing}
    subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, " ".join(missing), str(tmp_path)], check=True, cwd=ROOT)


def test_speech_without_espeak_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(OSError, match=re.escape('by espeak-ng: pip install "asrlib[notebooks]"')):
        Espeak()


def test_training_without_its_extra_says_which_brings_it():
    code = "import sys; sys.modules['accelerate'] = None; import asrlib.training.job"
    refused = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = refused.stderr.splitlines()[-1]
    assert last == 'ImportError: training needs accelerate: pip install "asrlib[notebooks]"'


def test_a_command_without_its_extra_says_which_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        import pydantic  # noqa: F401
    assert sentence(missing.value) == 'pydantic is not installed: pip install "asrlib[notebooks]"'
