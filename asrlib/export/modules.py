"""Our own code as a few files beside a model, which import each other and libraries alone.

transformers copies such files from a folder or the hub into a package of its own and imports them there, if it is told
to trust them. It follows relative imports within one folder, so the modules are laid into one, and their absolute
imports of each other made relative. What they say is what the package says: nothing is written twice.
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
    """{file name: source} of `module` and of all of asrlib that it imports, for one folder.

    Raises ValueError where a module is none of asrlib's, or imports it in a form that cannot be laid flat.
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
        raise ValueError(f"the model's code is in {module}, outside of asrlib: only asrlib's own code can go along")
    source = inspect.getsource(import_module(module))
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names):
            raise _cannot_be_flat(module, node)
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != PACKAGE:
            continue
        if node.module == PACKAGE or find_spec(node.module).submodule_search_locations is not None:
            raise _cannot_be_flat(module, node)
        imported.append(node.module)
        first = lines[node.lineno - 1]
        lines[node.lineno - 1] = first.replace(f"from {node.module} ", f"from .{flat_name(node.module)} ", 1)
    for node in ast.parse(source).body:
        if _registers(node):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    head = f"# {module} of {PACKAGE} {version(PACKAGE)} (MIT licence), with its imports made relative.\n"
    return head + "".join(lines).rstrip() + "\n", imported


def _registers(node: ast.stmt) -> bool:
    """Does this statement tell transformers of a class? A model's config names its own, and a second would collide."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register"


def _cannot_be_flat(module: str, node: ast.stmt) -> ValueError:
    return ValueError(
        f"line {node.lineno} of {module} imports a package: write `from {PACKAGE}.room.module import name`, which can "
        "be made relative"
    )
