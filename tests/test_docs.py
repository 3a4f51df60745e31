"""What README and docs name is there: links, headings, paths, tests, commands and their options."""

import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import family_models
import numpy as np
import pytest

import asrlib
import run_all
from asrlib.models.registry import FAMILIES
from asrlib.running.parameters import Schema
from asrlib.runs import find_notebooks, project_root

ROOT = project_root(Path(__file__).parent)
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TESTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
SCHEMA = Schema(find_notebooks(ROOT))
PLACEHOLDER = re.compile(r"NAME|FOLDER|DIR|FILE|VERB|\.\.\.|…|\*")  # in what a reader puts a name of their own

EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def fenced(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for word, block in blocks if word == language]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """All lines of blocks without a language, and what stands in backticks and is a command."""
    lines = [line.split("  #")[0].strip() for block in fenced(text, "") for line in block.splitlines()]
    inline = re.findall(r"`((?:python|make|run_all\.py) [^`]+)`", prose(text))
    return [line for line in [*lines, *inline] if line and not line.startswith("#")]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in dict.fromkeys(commands(text))]


@EVERY_PAGE
def test_every_link_leads_somewhere(page):
    for label, target in re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", prose(PAGES[page])):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / unquote(name)).resolve() if name else ROOT / page
        assert file.exists(), f"{page}: [{label}]({target})"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: [{label}]({target})"


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


@EVERY_PAGE
def test_every_picture_has_a_text_in_its_place(page):
    assert all(text.strip() for text in re.findall(r"!\[([^]]*)\]\(", PAGES[page]))


@EVERY_PAGE
def test_every_path_in_backticks_exists(page):
    """Of code, params and notebooks; a path may be told by its end, as the file's name alone."""
    files = [path.relative_to(ROOT).as_posix() for folder in ("asrlib", "tests") for path in (ROOT / folder).rglob("*")]
    files += [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*"), *(ROOT / "params").glob("*")]]
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|yml))`", prose(PAGES[page]))
    named += re.findall(r"`((?:asrlib|tests|params)/[\w./-]*)`", prose(PAGES[page]))
    for name in named:
        if not PLACEHOLDER.search(name):
            assert any(f"/{file}".endswith(f"/{name.rstrip('/')}") for file in files), f"{page}: {name}"


@EVERY_PAGE
def test_every_test_that_is_named_exists(page):
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGES[page]):
        assert file in TESTS, f"{page}: {file}"
        assert not name or f"def {name}(" in TESTS[file], f"{page}: {file}::{name}"


def test_every_fault_names_its_test():
    rows = [line for line in PAGES["docs/faults.md"].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    assert [row for row in rows if not re.search(r"`test_\w+\.py::\w+` \|$", row)] == []


def test_every_family_has_rows_with_tests():
    page = PAGES["docs/families.md"]
    assert len(re.findall(r"`test_\w+\.py::\w+`", page)) > 20
    families = set(re.findall(r"`([\w-]+)`", " ".join(line.split("|")[1] for line in page.splitlines() if "|" in line)))
    assert {name.removesuffix("-mla") for name in FAMILIES} <= families


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_can_be_given(page, command):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\d+", word)]
    words = words[1:] if words[0] in ("python", ".venv/bin/python") else words
    match words:
        case ["run_all.py", *rest]:
            _check_run(page, rest)
        case ["-m", "asrlib", verb, *rest]:
            before = itertools.takewhile(lambda word: not word.startswith("--"), rest)
            assert _options(rest) <= _options(re.findall(r"--[\w-]+", _help_of(verb, *before))), command
        case ["make", *rest]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in rest if "=" not in word and "ARGS" not in word} <= set(targets), command
        case ["pip", "install", "-c", constraints, "-e", project]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert (ROOT / constraints).is_file() and re.fullmatch(r"\.\[(\w+)\]", project)[1] in extras
        case ["conda", "env", "create", "-f", file]:
            assert (ROOT / file).is_file()
        case ["accelerate", "launch", *rest]:
            assert find_spec(rest[rest.index("-m") + 1]), command
        case ["-m", "asrlib"] | [".venv/bin/pre-commit", "install"]:
            pass
        case _:
            pytest.fail(f"{page}: nothing here can check `{command}`")


def test_commands_are_found():
    assert len(COMMANDS) > 50 and {page for page, _ in COMMANDS} >= {"README.md", "docs/running.md", "docs/results.md"}


def _check_run(page: str, words: list[str]) -> None:
    """That run_all.py takes these words, that the params file exists (or the page shows it), and the parameters too."""
    args = run_all.parse(words)
    if args.params:
        shown = f"# params/{args.params}.yaml" in PAGES[page]
        assert shown or (ROOT / "params" / f"{args.params}.yaml").is_file() or PLACEHOLDER.search(args.params)
    for setting in args.set or []:
        assert setting.split("=")[0] in SCHEMA.model.model_fields, setting


def _options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


@functools.cache
def _help_of(*words: str) -> str:
    """What `python -m asrlib WORDS --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(sys, "argv", ["asrlib", *words, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("asrlib", run_name="__main__")
    assert end.value.code in (None, 0), f"python -m asrlib {words}"
    return printed.getvalue()


def test_a_stream_goes_as_its_page_says(capsys):
    model, processor = asrlib.load("synthetic-conformer")
    pieces = np.array_split(np.random.default_rng(0).normal(scale=0.1, size=32_000).astype(np.float32), 5)
    (code,) = fenced(PAGES["docs/streaming.md"], "python")
    texts = []
    exec(code, dict(asrlib=asrlib, model=model, processor=processor, pieces_of_audio=pieces, print=texts.append))
    assert len(texts) > 2


def test_a_whisper_is_converted_as_its_page_says(monkeypatch):
    whisper = family_models.whisper(d_model=768)
    monkeypatch.setattr(asrlib, "load", lambda name: (whisper, None))
    names = {"asrlib": asrlib}
    for code in fenced(PAGES["docs/families.md"], "python"):
        exec(code, names)
    assert names["latent"].config.model_type == names["shared"].config.model_type == "whisper-mla"
