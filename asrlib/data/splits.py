"""Is the speech there that a run is going to ask for? Told before anything is opened, read or computed."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from asrlib.data.corpus import HUB_ID, URL, manifest_of, parts_of
from asrlib.runs import resolve


def check_splits(source: str | os.PathLike, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError or ValueError where `open_corpus` is sure to fail, as far as can be told at a glance.

    That is without the hub, but what is at a URL is listed.
    """
    asked = [part for split in splits for part in parts_of(split)]
    if re.match(URL, str(source)):
        from asrlib.data.remote import check_remote

        return check_remote(str(source), asked)
    path, found = resolve(source), None
    if source == "synthetic":
        from asrlib.data.synthetic import SPLITS

        found = list(SPLITS)
    elif path.exists():
        from asrlib.data.manifest import read_manifest

        listed = {split: manifest_of(path, split) for split in asked}
        for split, manifest in listed.items():
            if manifest is not None:
                read_manifest(manifest, split)
        asked = [split for split, manifest in listed.items() if manifest is None]
        found = _splits_in(path, asked) if asked else None
    elif not re.fullmatch(HUB_ID, str(source)):
        raise FileNotFoundError(f"there is no corpus at {path}")
    missing = [split for split in asked if found is not None and split not in found]
    if missing:
        raise ValueError(f"corpus {source} has no split {missing[0]!r}: it has {', '.join(sorted(found))}")


def _splits_in(folder: Path, asked: list[str]) -> list[str] | None:
    """The splits of a folder, None where it has tables, and the splits `asked` for are among them.

    Raises FileNotFoundError where it holds no speech, ValueError for a table that is cut short.
    """
    from asrlib.data.librispeech import AUDIO_SUFFIXES, find_splits

    if found := [*find_splits(folder), *(file.stem for file in folder.iterdir() if file.suffix in (".jsonl", ".csv"))]:
        return found
    from asrlib.data.hub import check_shards, holds_tables

    if holds_tables(folder):
        check_shards(folder, asked)
        return None
    files = (file for depth in range(1, 5) for file in folder.glob("*/" * (depth - 1) + "*"))  # as deep as it may lie
    audio = next((file for file in files if file.suffix.lower() in AUDIO_SUFFIXES), None)
    transcripts = f", and nothing says what is said in {audio.relative_to(folder)}" if audio else ""
    raise FileNotFoundError(
        f"{folder} holds no corpus{transcripts}: give SPLIT/SPEAKER/CHAPTER/*.trans.txt beside audio, SPLIT.csv, "
        "SPLIT.jsonl, or parquet files"
    )
