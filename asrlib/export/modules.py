"""Our own code as a few files beside a model, which import only each other and libraries.

If it may trust them, transformers copies such files from a folder or the hub into a package of its own and imports them
there. It follows relative imports within one folder, so all modules go into one folder, and their imports of each other
become relative. Families' records are left out, and the imports that only these need. The rest is the package's own
source.
"""

import ast
import inspect
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

PACKAGE = "asrlib"


def flat_name(module: str) -> str:
    """asrlib.attention.kinds → attention_kinds"""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def self_contained(module: str) -> dict[str, str]:
    """{file name: source} of `module` and of all modules of asrlib that it imports, for one folder.

    Raises ValueError for a module outside asrlib, and for an import of asrlib that cannot become relative.
    """
    files, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        if f"{flat_name(name)}.py" not in files:
            files[f"{flat_name(name)}.py"], imported = _flattened(name)
            waiting += imported
    return dict(sorted(files.items()))


def _flattened(module: str) -> tuple[str, list[str]]:
    """(source of `module` for a flat folder, the modules of asrlib that it imports)."""
    if not module.startswith(f"{PACKAGE}."):
        raise ValueError(f"the model's code is in {module}, outside asrlib: only asrlib's own code can be exported")
    source = inspect.getsource(import_module(module))
    lines, imported = source.splitlines(keepends=True), []
    tree = ast.parse(source)
    for record in filter(_is_record, tree.body):
        _blank(lines, record)
    tree.body = [node for node in tree.body if not _is_record(node)]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names):
            raise _cannot_be_flat(module, node)
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != PACKAGE:
            continue
        node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
        if not node.names:
            _blank(lines, node)
            continue
        if node.module == PACKAGE or find_spec(node.module).submodule_search_locations is not None:
            raise _cannot_be_flat(module, node)
        imported.append(node.module)
        relative = ast.ImportFrom(flat_name(node.module), node.names, level=1)
        _blank(lines, node)
        lines[node.lineno - 1] = " " * node.col_offset + ast.unparse(relative) + "\n"
    head = f"# {module} of {PACKAGE} {version(PACKAGE)} (MIT licence), with its imports made relative.\n"
    return head + "".join(lines).rstrip() + "\n", imported


def _is_record(node: ast.stmt) -> bool:
    """Whether this statement makes the record of a family, which a model by itself does not need."""
    call = node.value if isinstance(node, ast.Assign) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("Family", "replace")


def _blank(lines: list[str], node: ast.stmt) -> None:
    lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)


def _cannot_be_flat(module: str, node: ast.stmt) -> ValueError:
    return ValueError(
        f"line {node.lineno} of {module} imports a package: write `from {PACKAGE}.room.module import name`, which can "
        "be made relative"
    )
