"""Fingerprints: one number for everything that a step depends on, which changes when any of it changes."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from asrlib.runs import plain

READ_BYTES = 1 << 20  # up to this size a file's content counts, and not its time, which copies and mounts change


def fingerprint(*parts: Any) -> str:
    """sha256 over plain data; the order of a mapping's keys does not matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def files_fingerprint(files: Iterable[Path], folder: Path) -> str:
    """The fingerprint of the contents of `files` and their names below `folder`. Comments in Python do not count."""
    return fingerprint({str(path.relative_to(folder)): _digest(path, version_of(path)) for path in files})


def version_of(path: Path) -> tuple[int, int] | None:
    """A value that changes when a file is written again, for caches within a process. None without a file."""
    return ((stat := path.stat()).st_mtime_ns, stat.st_size) if path.is_file() else None


@cache  # seven steps depend on many of the same files
def _digest(path: Path, version: tuple | None) -> str:
    return hashlib.sha256(_substance(path)).hexdigest()


def _substance(path: Path) -> bytes:
    """The bytes of a file, or the syntax tree of Python, without comments, docstrings and layout."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def file_state(root: Path, value: Any) -> list | None:
    """Names and contents of the file, or of the folder's files, that a parameter names; size and time of large ones."""
    if not isinstance(value, str) or not value or len(value) > 255:
        return None
    shipped = root / "asrlib" / "models" / "pretrained" / value
    if value == shipped.name and (shipped / "config.json").is_file():
        return [files_fingerprint(shipped.iterdir(), root)]
    path = root / Path(value).expanduser()
    if not path.exists():
        return None
    files = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
    return [(file.name, *_state_of(file)) for file in files]


def _state_of(file: Path) -> tuple:
    stat = file.stat()
    if stat.st_size <= READ_BYTES:
        return (hashlib.sha256(file.read_bytes()).hexdigest(),)
    return stat.st_size, stat.st_mtime_ns
