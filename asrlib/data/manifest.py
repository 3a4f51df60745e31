"""Corpora listed in a file: one row an utterance, as JSON lines or CSV."""

import csv
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from asrlib.data.corpus import UNKNOWN_SPEAKER, Corpus, Rejected, Row, gather, named


def open_manifest(path: str | os.PathLike, split: str | None = None) -> Corpus:
    """A .jsonl (one object a line) or .csv (with a header) file, UTF-8.

    Columns: audio (a path, relative ones from the manifest's folder) and text; optional speaker and id.
    `split` only names the result: a manifest is one split. Raises ValueError naming missing columns.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is no manifest: expected a .jsonl or .csv file")
    rows = list(readers[path.suffix.lower()](path))
    columns = {str(name): None for row in rows if isinstance(row, dict) for name in row}  # in order
    missing = [name for name in ("audio", "text") if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no column '.join(missing)}; "
            f"columns found: {', '.join(columns) or 'none'}"
        )
    return gather(path.stem, split or path.stem, _manifest_rows(path, rows))


def _manifest_rows(manifest: Path, rows: list[dict | str]) -> Iterator[Row | Rejected]:
    for number, row in enumerate(rows, 1):
        where = f"{manifest}, row {number}"
        if isinstance(row, str):
            yield Rejected(f"row {number}", row, where)
        elif not isinstance(row.get("audio"), str) or not row["audio"].strip():
            yield Rejected(named(row.get("id"), f"row {number}"), "no audio path", where)
        else:
            id = named(row.get("id"), row["audio"])
            audio = manifest.parent / row["audio"]
            if not os.path.exists(audio):
                yield Rejected(id, f"audio file not found: {row['audio']}", where)
            else:
                speaker = named(row.get("speaker"), UNKNOWN_SPEAKER)
                yield Row(id, row.get("text"), speaker, str(audio), partial(os.fsencode, audio))


def _read_jsonl(path: Path) -> Iterator[dict | str]:
    """The object of each line that is not blank, or what is wrong with the line."""
    for line in path.read_bytes().split(b"\n"):  # str.splitlines would also cut at U+2028 inside a text
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                yield row if isinstance(row, dict) else "line is not a JSON object"
            except ValueError as error:
                yield f"line is not valid JSON: {error}"


def _read_csv(path: Path) -> Iterator[dict | str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            for row in csv.DictReader(file):
                unquoted = row.pop(None, None)  # DictReader's key for cells beyond the header
                yield "row has more cells than the header: is its text quoted?" if unquoted else row
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as CSV: {error}") from error
