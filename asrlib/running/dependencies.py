"""Which files of the library a piece of code depends on, read from its imports without running it.

A step is done again when the code it runs changes. An edit to how figures look must not train a model for another hour.
"""

import ast
from collections.abc import Iterator
from pathlib import Path


def library_files(code: str, package: Path) -> list[Path]:
    """The files of the folder `package` that `code` imports, and those that they import, sorted; none of no package.

    Imports count wherever they stand, inside functions and conditions too. What the package's `_PUBLIC` (name → module)
    offers lazily counts where it is used, `package.name` or `from package import name`. Modules imported by a name
    that is computed are not seen. IPython's magics are none of Python's and are left out.
    """
    public = _public(package)
    found: set[Path] = set()
    waiting = list(_imported(code, package, public))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path.read_text(encoding="utf-8"), package, public)
    return sorted(found)


def _imported(code: str, package: Path, public: dict[str, str]) -> Iterator[Path]:
    """Files that `code` itself imports, with the __init__.py of each package on the way."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines()]
    for node in ast.walk(ast.parse("\n".join(lines))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            top, _, rest = name.partition(".")
            if top == package.name:
                yield from _files_of(public.get(rest, name), package)


def _files_of(module: str, package: Path) -> Iterator[Path]:
    """`asrlib.models.encoder` → asrlib/__init__.py, asrlib/models/__init__.py, asrlib/models/encoder.py."""
    path = package
    for name in [*module.split(".")[1:], ""]:
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        path = path / name
    if path.with_suffix(".py").is_file():
        yield path.with_suffix(".py")


def _public(package: Path) -> dict[str, str]:
    init = package / "__init__.py"
    for node in ast.parse(init.read_text(encoding="utf-8")).body if init.is_file() else []:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["_PUBLIC"]:
            return ast.literal_eval(node.value)
    return {}
