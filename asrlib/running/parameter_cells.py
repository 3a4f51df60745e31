"""The cells of notebooks, read as JSON, and the parameters that papermill sees in their `parameters` cells.

Neither nbformat nor papermill is imported: that takes seconds, and a wrong call should be answered at once.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from asrlib.runs import BadParameter

PARAMETER = re.compile(  # papermill.translators.PythonTranslator.PARAMETER_PATTERN; a test compares the two
    r"""(?P<name>\w+) \s*
    (: \s* ["']? (?P<annotation>\w[\w\[\],\s]*) ["']? \s*)?
    = \s* (?P<default>.*?)
    (\s* \# \s* (type: \s* (?P<type_comment>\S*) \s*)? (?P<help>.*))? $""",
    re.VERBOSE,
)

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
TYPES |= {"List": list, "Dict": dict, "Optional": Optional}


@dataclass(frozen=True)
class Parameter:
    annotation: str  # as written in the notebook
    default: Any
    help: str


@dataclass(frozen=True)
class Cell:
    kind: str  # code, markdown or raw
    source: str
    tags: list[str]


def read_cells(notebook: Path) -> list[Cell]:
    """The cells of a notebook. Raises BadParameter where the file is no notebook of format 4."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [Cell(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadParameter(f"{notebook} is not a notebook of format 4 ({type(error).__name__}: {error})") from None


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of one notebook, as papermill sees them.

    Raises BadParameter where papermill would overlook a parameter (it skips `int | None` and lines with a second `=`),
    and where a default is not a literal.
    """
    source = next((cell.source for cell in read_cells(notebook) if "parameters" in cell.tags), "")
    seen = definitions(source)
    for name in _assigned_names(source):
        if name not in seen:
            raise BadParameter(
                f"{notebook.name}: papermill does not see parameter {name!r}: write it on one line as "
                "`name: type = literal  # help`, with Optional[int] for `int | None` and no second `=`"
            )
    parameters = {}
    for name, (annotation, default, about) in seen.items():
        try:
            parameters[name] = Parameter(annotation, ast.literal_eval(default), about)
        except (ValueError, SyntaxError):
            raise BadParameter(f"{notebook.name}: default of {name!r} is not a literal: {default}") from None
        type_of(annotation, f"{notebook.name}: parameter {name!r}")
    return parameters


def definitions(source: str) -> dict[str, tuple[str, str, str]]:
    """{name: (annotation, or "None" where there is none, default, help)} of a `parameters` cell.

    As in papermill, blank lines, comments and lines with two `=` are skipped, and a line without `=` belongs to the
    definition before it. The comment of a definition's last line is its help.
    """
    lines_of: list[list[str]] = [[]]
    for line in map(str.strip, source.splitlines()):
        if not line or line.startswith("#"):
            continue
        if "=" in line:
            lines_of.append([])
        if line.count("=") < 2:
            lines_of[-1].append(line)
    seen = {}
    for lines in lines_of:
        whole = "".join([line.partition("#")[0].strip() for line in lines[:-1]] + lines[-1:])
        if match := PARAMETER.match(whole):
            annotation = (match["annotation"] or match["type_comment"] or "None").strip()
            seen[match["name"]] = annotation, match["default"].strip(), (match["help"] or "").strip()
    return seen


def _assigned_names(source: str) -> list[str]:
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def type_of(annotation: str, where: str) -> Any:
    """The type that an annotation means. Raises BadParameter, which begins with `where`, for types not in TYPES."""

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in TYPES:
                return TYPES[name]
            case ast.Subscript(value=outer, slice=ast.Tuple(elts=inner)):
                return build(outer)[*map(build, inner)]
            case ast.Subscript(value=outer, slice=inner):
                return build(outer)[build(inner)]
        raise BadParameter(f"{where} has type {annotation}: annotate it with {', '.join(TYPES)}")

    return build(ast.parse(annotation, mode="eval").body)
