"""PARAMETERS.md: every parameter of every notebook in one table, read from their `parameters` cells; and
docs/outdated.md: which steps a change of each runs again.

python -m asrlib.running.parameter_table            prints the first
python -m asrlib.running.parameter_table --write    writes both
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrlib.running.parameter_limits import LIMITS, in_words
from asrlib.running.parameters import SET_BY_RUN_ALL, Parameter, read_parameters
from asrlib.runs import atomic_write, find_notebooks, needed_by, project_root
from asrlib.training.baseline import TESTING

INTRODUCTION = """# Parameters

What a params file, or `--set`, may say, with the defaults of the notebooks' own `parameters` cells, on which
`make demo` runs. A name means the same in every notebook that takes it; the last column has their numbers. A params
file may also say `steps`, a list of the notebooks to run, and `sweep`, what its members differ in. Values that
do not fit together, the model, the speech or the machine are refused before a run starts.

Made from the notebooks and `asrlib/running/parameter_limits.py` by `make parameters`: change those.

| name | type | default | meaning | limits | notebooks |
|---|---|---|---|---|---|
"""


OUTDATED = """# Which steps a change runs again

A step runs again when a parameter that it takes changes, its code, a file that either points to, or a step that it
needs. 01 needs 00; 02 and 03 need 01; 04 and 05 need 03; 06 needs 04 and 05. Of the library a step's code is what it
imports, without the model families and the kinds of corpus that the run does not use.

Where the last column says so, 00 runs again but keeps the baseline that it trained, and only tests it.

Made from the notebooks and the table of needs in `asrlib/runs.py` by `make parameters`: change those.

| parameter | runs again | trained baseline |
|---|---|---|
"""


def outdated(root: Path) -> dict[str, list[str]]:
    """By parameter the steps that a change of it outdates: those that take it and those that need one of these."""
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
    """PARAMETERS.md of the project at `root`, in the order in which the notebooks declare their parameters."""
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
        _told_apart({number: f"`{_yaml(one.default)}`" for number, one in takers.items()}),
        _told_apart({number: one.help for number, one in takers.items()}),
        limits,
        " ".join(takers),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(annotation: str) -> str:
    """As a params file has it: `int or null` for Optional[int]."""
    inner = annotation.removeprefix("Optional[").removesuffix("]")
    return f"{inner} or null" if annotation.startswith("Optional[") else annotation


def _yaml(value: Any) -> str:
    """As one line of a params file."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def _told_apart(said: dict[str, str]) -> str:
    """What all notebooks say, or the first, and behind it what others say instead."""
    (first, *_) = said.values()
    others: dict[str, list[str]] = {}
    for number, text in said.items():
        if text != first:
            others.setdefault(text, []).append(number)
    return "; ".join([first, *(f"in {', '.join(numbers)}: {text}" for text, numbers in others.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib.running.parameter_table", description="Makes PARAMETERS.md and docs/outdated.md."
    )
    parser.add_argument("--write", action="store_true", help="write them in the project instead of printing")
    args = parser.parse_args(argv)
    root = project_root()
    if not args.write:
        sys.stdout.write(table(root))
        return 0
    for name, text in (("PARAMETERS.md", table(root)), ("docs/outdated.md", outdated_table(root))):
        with atomic_write(root / name) as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
