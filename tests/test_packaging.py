"""The one set of versions, and that a bare clone can be set up from it."""

import glob
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAYERS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
EVERYTHING = [r for lines in LAYERS.values() for r in map(Requirement, lines) if r.name != PROJECT["name"]]
CUDA = re.compile(r"nvidia-|cuda-|triton$")  # each torch build names its own: see constraints.txt

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def read_pins() -> dict[str, Version]:
    """Canonical name → version, for every line of constraints.txt that is not a comment."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([a-z0-9.]+)", line)  # no ranges, markers, local tags or addresses
        assert match, f"not an exact pin: {line!r}"
        assert match[1] not in pins, f"pinned twice: {match[1]}"
        pins[match[1]] = Version(match[2])
    return pins


def installed_closure(requirements: list[Requirement]) -> dict[str, str]:
    """Canonical name → installed version, of all that `requirements` bring in on this machine."""
    versions, waiting = {}, [(r, "") for r in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if CUDA.match(name):
            continue
        versions[name] = metadata.version(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in metadata.requires(name) or []]
    return versions


@pytest.mark.parametrize("requirement", EVERYTHING, ids=lambda r: r.name)
def test_each_dependency_has_a_pin_that_satisfies_it(requirement):
    assert read_pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_all_that_is_installed_for_the_project_is_the_pinned_release():
    pins = read_pins()
    differing = {
        name: f"installed {version}, pinned {pins.get(name)}"
        for name, version in installed_closure(EVERYTHING).items()
        if name not in pins or Version(Version(version).public) != pins[name]
    }
    assert not differing, "run make test, or pip install -c constraints.txt -e '.[dev]'"


def test_what_notebooks_a_sweep_on_a_cluster_and_a_graph_need_is_there_for_the_tests():
    [own] = [r for r in map(Requirement, LAYERS["dev"]) if r.name == PROJECT["name"]]
    assert own.extras == LAYERS.keys() - {"", "dev"}


def test_conda_installs_from_the_same_two_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert conda == ["python" + PROJECT["requires-python"], "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[notebooks]"]}


def test_package_data_covers_every_file_beside_the_code():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["asrlib"]
    package = ROOT / "asrlib"
    packaged = {name for p in patterns for name in glob.glob(p, root_dir=package, recursive=True)}
    beside = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert beside and beside <= packaged


@needs_git
@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".venv/bin/python", True),
        ("asrlib/data/__pycache__/corpus.cpython-311.pyc", True),
        ("asrlib.egg-info/PKG-INFO", True),
        ("notebooks/.ipynb_checkpoints/00_baseline-checkpoint.ipynb", True),
        ("reports/demo/index.html", True),
        ("reports/demo/models/baseline/model.safetensors", True),
        ("reports/examples/demo/index.html", False),
        ("reports/examples/demo/figures/wer_vs_cache.png", False),
        ("reports/examples/demo/tables/comparison_table.csv", False),
        ("asrlib/models/registry.py", False),
        ("asrlib/data/corpus.py", False),
        ("asrlib/models/pretrained/baseline/model.safetensors", False),
        ("asrlib/templates/report/style.css", False),
        ("params/demo.yaml", False),
        (".ci/run", False),
    ],
)
def test_git_keeps_sources_and_examples_and_ignores_runs(tmp_path, path, ignored):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    checked = subprocess.run(["git", "-C", tmp_path, "check-ignore", "-q", path])
    assert checked.returncode == (0 if ignored else 1)


@pytest.fixture
def clone(tmp_path):
    """A folder with what `make` needs for the installation, and an empty bin/ to be the whole PATH."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def python_stub(clone: Path, name: str, version: tuple[int, int]) -> None:
    """A `name` on the clone's PATH that runs this Python but says it is `version`."""
    pretend = f"import sys; sys.version_info = (*{version}, 0, 'final', 0); exec(sys.argv[1])"
    stub = clone / "bin" / name
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n')
    stub.chmod(0o755)


def call_make(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("MFLAGS", "PYTHON")}
    environment["PATH"] = str(clone / "bin")
    return subprocess.run(
        [shutil.which("make"), "-C", clone, *arguments], env=environment, capture_output=True, text=True
    )


@needs_make
@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": (3, 11)}, "python3"),
        ({"python3": (3, 14), "python3.12": (3, 12)}, "python3"),
        ({"python3": (3, 9), "python3.12": (3, 12)}, "python3.12"),
        ({"python3": (3, 15), "python3.13": (3, 13)}, "python3.13"),
    ],
    ids=str,
)
def test_make_finds_a_python_that_fits(clone, pythons, chosen):
    for name, version in pythons.items():
        python_stub(clone, name, version)
    planned = call_make(clone, "--dry-run", ".venv/.installed")
    assert planned.returncode == 0
    assert f"|| {chosen} -m venv --clear .venv" in planned.stdout


@needs_make
@pytest.mark.parametrize("version", [None, (3, 10), (3, 15)])
def test_make_says_so_where_no_python_fits(clone, version):
    if version:
        python_stub(clone, "python3", version)
    refused = call_make(clone, "demo")
    assert refused.returncode != 0
    assert "No Python 3.11 to 3.14 with venv on PATH" in refused.stderr
    assert not (clone / ".venv").exists()


@needs_make
@pytest.mark.parametrize("name", [".installed", ".notebooks"])
@pytest.mark.parametrize(
    ("changed", "up_to_date"), [(None, True), ("constraints.txt", False), ("pyproject.toml", False)]
)
def test_make_installs_again_only_when_the_set_changed(clone, changed, up_to_date, name):
    stamp = clone / ".venv" / name
    stamp.parent.mkdir()
    stamp.touch()
    if changed:
        later = stamp.stat().st_mtime + 10
        os.utime(clone / changed, (later, later))
    assert call_make(clone, "--question", f".venv/{name}").returncode == (0 if up_to_date else 1)


@needs_make
@pytest.mark.parametrize(
    ("target", "extra"),
    [(name, "notebooks") for name in ("demo", "quick", "full", "smoke", "baseline", "baselines_small", "lab")]
    + [(name, "dev") for name in ("test", "fresh-environment", "lint", "format", "parameters")],
)
def test_make_installs_what_the_target_needs(clone, target, extra):
    python_stub(clone, "python3", (3, 12))
    planned = call_make(clone, "--dry-run", target)
    assert re.findall(r"-e \"\.\[(\w+)\]\"", planned.stdout) == [extra]


@pytest.fixture
def pretended_pip(clone):
    """The clone with a .venv whose Python does nothing, but fails while the file `broken` is there."""
    for tool in ("sh", "rm", "touch", "make"):
        (clone / "bin" / tool).symlink_to(shutil.which(tool))
    python_stub(clone, "python3", (3, 12))
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *install*) echo "$*" >> installed; test ! -e broken;; esac\n')
    python.chmod(0o755)
    return clone


def installed(clone: Path, stamp: str) -> list[str]:
    """The extras that a call for `stamp` installs."""
    (clone / "installed").unlink(missing_ok=True)
    call_make(clone, f".venv/{stamp}")
    return re.findall(r"\[(\w+)\]", (clone / "installed").read_text()) if (clone / "installed").exists() else []


@needs_make
def test_the_notebooks_set_may_come_before_all_or_with_it(pretended_pip):
    assert [installed(pretended_pip, s) for s in (".notebooks", ".installed")] == [["notebooks"], ["dev"]]
    assert [installed(pretended_pip, s) for s in (".notebooks", ".installed")] == [[], []]
    for name in (".notebooks", ".installed"):
        (pretended_pip / ".venv" / name).unlink()
    assert [installed(pretended_pip, s) for s in (".installed", ".notebooks")] == [["dev"], []]


@needs_make
@pytest.mark.parametrize(("stamp", "extra"), [(".notebooks", "notebooks"), (".installed", "dev")])
def test_an_installation_that_was_interrupted_is_taken_up_again(pretended_pip, stamp, extra):
    assert installed(pretended_pip, ".notebooks") == ["notebooks"]
    later = (pretended_pip / ".venv" / ".notebooks").stat().st_mtime + 10
    os.utime(pretended_pip / "pyproject.toml", (later, later))
    (pretended_pip / "broken").touch()
    assert installed(pretended_pip, stamp) == [extra]
    assert not list((pretended_pip / ".venv").glob(".*"))
    os.utime(pretended_pip / "pyproject.toml", (0, 0))
    (pretended_pip / "broken").unlink()
    assert installed(pretended_pip, stamp) == [extra] and installed(pretended_pip, ".notebooks") == []
