"""Fingerprints: what a step depends on, as one number that changes when any of it does."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from asrlib.runs import plain

READ_BYTES = 1 << 20  # a file's content tells whether it changed, where it is no larger: copies and mounts change times


def fingerprint(*parts: Any) -> str:
    """sha256 over plain data; the order of a mapping's keys does not matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def files_fingerprint(files: Iterable[Path], folder: Path) -> str:
    """Fingerprint of what is in `files`, and of what they are called below `folder`; of Python, of what it does."""
    return fingerprint({str(path.relative_to(folder)): _digest(path, version_of(path)) for path in files})


def version_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew: in one process what was read of it need not be read again. None where
    there is no file."""
    return ((stat := path.stat()).st_mtime_ns, stat.st_size) if path.is_file() else None


@cache  # seven steps depend on many of the same files
def _digest(path: Path, version: tuple | None) -> str:
    return hashlib.sha256(_substance(path)).hexdigest()


def _substance(path: Path) -> bytes:
    """The bytes of a file; of Python its syntax tree, in which comments, docstrings and layout do not count."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def file_state(root: Path, value: Any) -> list | None:
    """Names and contents of the file or the folder's files that a parameter points to; of large ones size and time."""
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
    size, time_ns = (stat := file.stat()).st_size, stat.st_mtime_ns
    return (hashlib.sha256(file.read_bytes()).hexdigest(),) if size <= READ_BYTES else (size, time_ns)
