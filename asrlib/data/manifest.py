"""Corpora listed in a file: one row an utterance, as JSON lines or CSV."""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from asrlib.data.corpus import UNKNOWN_SPEAKER, Corpus, Rejected, Row, gather, named
from asrlib.data.text import COMPOSITIONS


def open_manifest(path: str | os.PathLike, split: str | None = None) -> Corpus:
    """A .jsonl (one object a line) or .csv (with a header) file, UTF-8.

    Columns: audio (a path; relative paths start at the manifest's folder) and text; optional speaker, id, split and
    language (a name or a code, for models that are told one).
    With a column `split`, the rows of that split are taken. Without it the whole file is one split that has the file's
    name, so that nobody tests on training speech. Raises ValueError, which names missing columns or splits.
    """
    path = Path(path)
    rows = read_manifest(path, split)
    return gather(path.stem, split or path.stem, _manifest_rows(path, rows))


def read_manifest(path: Path, split: str | None = None) -> list[tuple[int, dict | str]]:
    """Line number and row of each utterance of `split`, or the line's fault. Raises what `open_manifest` raises."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is no manifest: expected a .jsonl or .csv file")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise ValueError(f"{path} lists nothing: give a row for each utterance, with the columns audio and text")
    columns = {str(name): None for _, row in rows if isinstance(row, dict) for name in row}  # in order
    missing = [name for name in ("audio", "text") if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no column '.join(missing)}; columns found: {', '.join(columns) or 'none'}"
        )
    if split and "split" in columns:
        splits = {str(row.get("split")) for _, row in rows if isinstance(row, dict)}
        if split not in splits:
            raise ValueError(f"{path} has no rows of split {split!r}; splits found: {', '.join(sorted(splits))}")
        rows = [(line, row) for line, row in rows if isinstance(row, str) or str(row.get("split")) == split]
    elif split and split != path.stem:
        raise ValueError(
            f"{path} is one split, {path.stem!r}, and {split!r} was asked for: add a column `split`, or give a folder "
            f"of {path.stem}{path.suffix} and {split}{path.suffix}"
        )
    return rows


def _manifest_rows(manifest: Path, rows: list[tuple[int, dict | str]]) -> Iterator[Row | Rejected]:
    for line, row in rows:
        where = f"{manifest}:{line}"
        if isinstance(row, str):
            yield Rejected(f"line {line}", row, where)
        elif not isinstance(row.get("audio"), str) or not row["audio"].strip():
            yield Rejected(named(row.get("id"), f"line {line}"), "no audio path", where)
        else:
            id = named(row.get("id"), row["audio"])
            audio = _find(manifest.parent, row["audio"])
            if audio is None:
                yield Rejected(id, f"audio file not found: {row['audio']}", where)
            else:
                speaker = named(row.get("speaker"), UNKNOWN_SPEAKER)
                language = str(row.get("language") or "").strip() or None
                yield Row(id, row.get("text"), speaker, str(audio), partial(bytes, audio), language)


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name, also with its accents composed otherwise: file systems and programs change them."""
    names = [name] if name.isascii() else [name, *(unicodedata.normalize(form, name) for form in COMPOSITIONS)]
    return next((folder / spelling for spelling in names if os.path.exists(folder / spelling)), None)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Line number and object of each line that is not blank, or the line's fault."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # splitlines would cut at U+2028 in a text
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                yield number, row if isinstance(row, dict) else "line is not a JSON object"
            except ValueError as error:
                yield number, f"line is not valid JSON: {error}"


def _read_csv(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Number of the last line and cells of each row, or the row's fault."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            for row in (reader := csv.DictReader(file)):
                unquoted = row.pop(None, None)  # DictReader's key for cells beyond the header
                message = "row has more cells than the header: is its text quoted?"
                yield reader.line_num, message if unquoted else row
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as CSV: {error}") from error
