"""docs/parameters.md, a table of all parameters, and docs/outdated.md, the steps that a change of each runs again.

python -m asrlib parameters            prints the first page
python -m asrlib parameters --write    writes both pages
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrlib.running.parameter_cells import Parameter, read_parameters
from asrlib.running.parameter_limits import LIMITS, in_words
from asrlib.running.parameters import SET_BY_RUN_ALL
from asrlib.runs import atomic_write, find_notebooks, needed_by, project_root
from asrlib.training.baseline import TESTING

PAGE = Path("docs", "parameters.md")  # from the project's root
OUTDATED_PAGE = Path("docs", "outdated.md")
INTRODUCTION = """# Parameters

A params file, or `--set`, may give these parameters. The defaults are those of the notebooks' own `parameters` cells;
`make demo` runs on them. A name means the same in every notebook that takes it. The last column numbers those
notebooks. Two more names may stand in a params file: `steps`, a list of the notebooks to run, and `sweep`, in which the
members of a sweep differ. Before a run starts, values are refused that do not fit each other, the model, the speech or
the machine.

This page is made from the notebooks and `asrlib/running/parameter_limits.py`, by `make parameters`: change those.

| name | type | default | meaning | limits | notebooks |
|---|---|---|---|---|---|
"""


OUTDATED = """# Which steps a change runs again

A step runs again when something that it depends on has changed:

- a parameter that it takes, or the file or folder that the parameter names;
- the code of its notebook, or a file of asrlib that the notebook imports, directly or not. Model families and kinds of
  corpus that the run does not use do not count;
- a step whose results it needs. 01 needs 00; 02 and 03 need 01; 04 and 05 need 03; 06 needs 04 and 05.

The last column says where 00 keeps the baseline that it has trained, and only tests it again.

This page is made from the notebooks and `NEEDS` in `asrlib/runs/__init__.py`, by `make parameters`: change those.

| parameter | runs again | trained baseline |
|---|---|---|
"""


def outdated(root: Path) -> dict[str, list[str]]:
    """{parameter: the steps that its change outdates}: those that take it, and those that need one of these."""
    declared = {step: read_parameters(path) for step, path in find_notebooks(root).items()}
    names = dict.fromkeys(name for parameters in declared.values() for name in parameters if name not in SET_BY_RUN_ALL)
    takers = {name: [step for step, parameters in declared.items() if name in parameters] for name in names}
    return {
        name: [step for step in declared if step in taking or needed_by(step, taking)]
        for name, taking in takers.items()
    }


def outdated_table(root: Path) -> str:
    """docs/outdated.md of the project at `root`."""
    rows = []
    for name, steps in outdated(root).items():
        kept = "kept" if name in TESTING and "00_baseline" in steps else ""
        rows.append(f"| `{name}` | {' '.join(step.split('_')[0] for step in steps)} | {kept} |\n")
    return OUTDATED + "".join(rows)


def table(root: Path) -> str:
    """docs/parameters.md of the project at `root`, in the order in which the notebooks declare their parameters."""
    declared = {step.split("_")[0]: read_parameters(path) for step, path in find_notebooks(root).items()}
    names = dict.fromkeys(name for parameters in declared.values() for name in parameters)
    return INTRODUCTION + "".join(_row(name, _takers(name, declared)) for name in names)


def _takers(name: str, declared: Mapping[str, Mapping[str, Parameter]]) -> dict[str, Parameter]:
    return {number: parameters[name] for number, parameters in declared.items() if name in parameters}


def _row(name: str, takers: dict[str, Parameter]) -> str:
    (first, *_) = takers.values()
    limits = f"set by run_all: {SET_BY_RUN_ALL[name]}" if name in SET_BY_RUN_ALL else ""
    limits = limits or (in_words(LIMITS[name]) if name in LIMITS else "")
    cells = [
        f"`{name}`",
        _type(first.annotation),
        _differences({number: f"`{_yaml(parameter.default)}`" for number, parameter in takers.items()}),
        _differences({number: parameter.help for number, parameter in takers.items()}),
        limits,
        " ".join(takers),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(annotation: str) -> str:
    """A type in the words of a params file: `int or null` for Optional[int]."""
    inner = annotation.removeprefix("Optional[").removesuffix("]")
    return f"{inner} or null" if annotation.startswith("Optional[") else annotation


def _yaml(value: Any) -> str:
    """A value as a params file holds it."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def _differences(texts: dict[str, str]) -> str:
    """The text of the first notebook, and after it those of notebooks that differ, with their numbers."""
    (first, *_) = texts.values()
    others: dict[str, list[str]] = {}
    for number, text in texts.items():
        if text != first:
            others.setdefault(text, []).append(number)
    return "; ".join([first, *(f"in {', '.join(numbers)}: {text}" for text, numbers in others.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib parameters", description="Make docs/parameters.md and docs/outdated.md."
    )
    parser.add_argument("--write", action="store_true", help="write both pages into the project")
    args = parser.parse_args(argv)
    root = project_root()
    if not args.write:
        sys.stdout.write(table(root))
        return 0
    for page, text in ((PAGE, table(root)), (OUTDATED_PAGE, outdated_table(root))):
        with atomic_write(root / page) as file:
            file.write(text)
    return 0
