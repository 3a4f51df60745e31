"""The files of the library that a piece of code depends on, found from its imports without running it.

A step is done again when the code that it runs changes. An edit to a figure's style must not train a model again.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from asrlib.runs.fingerprints import version_of

FAMILY_REGISTRY, CORPUS_REGISTRY = "models/registry.py", "data/opening.py"  # they import every family and every opener
FAMILY_FILES = {  # model type → the family's file
    "wav2vec2": "models/families/wav2vec2.py",
    "hubert": "models/families/wav2vec2.py",
    "wav2vec2-conformer": "models/families/wav2vec2_conformer.py",
    "wav2vec2-bert": "models/families/wav2vec2_bert.py",
    "parakeet_ctc": "models/families/parakeet.py",
    "parakeet_rnnt": "models/families/parakeet.py",
    "nemotron_asr_streaming": "models/families/nemotron.py",
    "whisper": "models/families/whisper.py",
    "speech-encoder": "models/encoder.py",
}
SHARED_FILES = {"models/families/nemotron.py": ["models/families/nemotron_eager.py"]}  # imported along with a family
OPENER_FILES = tuple(f"data/{name}.py" for name in ("synthetic", "remote", "manifest", "librispeech", "hub"))
NEW_MODELS = {"whisper": "whisper", "wav2vec2-conformer": "wav2vec2-conformer"}  # others are a speech-encoder

LeftOut = Mapping[Path, set[Path]]  # file → those files it imports which do not count


def unused_files(values: Mapping[str, Any], root: Path) -> LeftOut:
    """The files that the registries of families and openers import, but that a run with these parameters does not use.

    `architecture` or the folder of `model`, and `corpus`, decide. For a missing model or a hub id all families count,
    whether it was downloaded or not: a download must not outdate the step that made it.
    """
    package = root / "asrlib"
    families = set(FAMILY_FILES.values())
    used = {FAMILY_FILES[kind]} if (kind := _model_type(values, root)) in FAMILY_FILES else families
    unused = families - used
    unused |= {path for family in unused for path in SHARED_FILES.get(family, ())}
    openers = set(OPENER_FILES) - _openers(values.get("corpus"), root)
    by_registry = {FAMILY_REGISTRY: unused, CORPUS_REGISTRY: openers}
    return {package / registry: {package / path for path in paths} for registry, paths in by_registry.items()}


def _model_type(values: Mapping[str, Any], root: Path) -> str | None:
    if architecture := values.get("architecture"):
        return NEW_MODELS.get(architecture, "speech-encoder")
    if not (model := values.get("model")):
        return None
    for folder in (root / "asrlib" / "models" / "pretrained" / model, root / Path(model).expanduser()):
        try:
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"].removesuffix("-mla")
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing or damaged: a later check says so
            continue
    return None


def _openers(corpus: str | None, root: Path) -> set[str]:
    if corpus == "synthetic":
        return {"data/synthetic.py", "data/librispeech.py"}
    if corpus and "://" in corpus:
        return {"data/remote.py", "data/hub.py"}
    if corpus and (root / Path(corpus).expanduser()).exists():
        return set(OPENER_FILES) - {"data/synthetic.py", "data/remote.py"}
    return set(OPENER_FILES)


def library_files(code: str, package: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The files of the folder `package` that `code` imports, directly or through others, sorted.

    All imports count, also inside functions and conditions, except those that `left_out` names. A name of the package's
    `_PUBLIC` (name → module) counts where it is used, as `package.name` or `from package import name`. Imports of
    computed names are not seen. IPython's magics are skipped.
    """
    public = _public(package)
    files: set[Path] = set()
    waiting = list(_imported(code, package, public))
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            imported = _imported_by(path, version_of(path), package, version_of(package / "__init__.py"))
            waiting += [other for other in imported if other not in (left_out or {}).get(path, ())]
    return sorted(files)


@cache
def _imported_by(path: Path, version: tuple | None, package: Path, public_version: tuple | None) -> tuple[Path, ...]:
    return tuple(_imported(path.read_text(encoding="utf-8"), package, _public(package)))


def _imported(code: str, package: Path, public: dict[str, str]) -> Iterator[Path]:
    """The files that `code` itself imports, with the __init__.py of each package above them."""
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
