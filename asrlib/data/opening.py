"""Opening a corpus by its name: a folder, a manifest, a table, a hub id or a URL, and which splits it has."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from asrlib.data.corpus import HUB_ID, LONGEST_NAME, URL, Corpus, NoSuchSplit, in_corpus, told_apart
from asrlib.runs import resolve


def open_corpus(source: str | os.PathLike, split: str | None = None, revision: str | None = None) -> Corpus:
    """Open one split of a corpus.

    source: "synthetic" · a LibriSpeech folder · a manifest (.jsonl or .csv) or a folder of SPLIT.jsonl or
        SPLIT.csv · a folder of parquet files or one written by `Dataset.save_to_disk` · the URL of such a folder of
        parquet files, whose audio is fetched when it is needed and never stored (`asrlib.data.remote`) · otherwise a
        data set on the hub, `owner/name` or `owner/name:configuration`. Relative paths start at the project root.
    split: by default the only one there is, otherwise "train". "a+b" joins splits a and b.
    revision: of a data set on the hub. A URL carries its own: hf://datasets/owner/name@refs%2Fpr%2F3.
    Raises FileNotFoundError or ValueError, which say what was found instead, and UnreadableShard for a URL.
    """
    if split and "+" in split:
        parts = [open_corpus(source, part, revision) for part in parts_of(split)]
        rejected = [row for part in parts for row in part.rejected]
        return in_corpus(parts[0].name, split, told_apart(u for part in parts for u in part), rejected)
    if source == "synthetic":
        from asrlib.data.synthetic import open_synthetic

        return open_synthetic(split or "train")
    if re.match(URL, str(source)):
        from asrlib.data.remote import open_remote

        return open_remote(str(source), split)

    path = resolve(source)
    if manifest := manifest_of(path, split or "train"):
        from asrlib.data.manifest import open_manifest

        return open_manifest(manifest, split)
    if path.is_dir():
        from asrlib.data.librispeech import find_splits, open_librispeech

        if not find_splits(path):
            from asrlib.data.hub import holds_tables, open_folder

            if holds_tables(path):
                return open_folder(path, split)
        return open_librispeech(path, split)  # its error says what was looked for
    if re.fullmatch(HUB_ID, str(source)):
        from asrlib.data.hub import open_hub

        return open_hub(str(source), split or "train", revision)
    raise FileNotFoundError(
        f"no corpus at {source}: give 'synthetic', an existing folder, a .jsonl or .csv manifest, "
        "a hub data set as owner/name, or a URL"
    )


def manifest_of(path: Path, split: str) -> Path | None:
    """The manifest at `path`, or the one of `split` in that folder; None if there is none."""
    return next(filter(Path.is_file, [path, path / f"{split}.jsonl", path / f"{split}.csv"]), None)


def parts_of(split: str) -> list[str]:
    """The splits that "a+b" joins; ValueError where one is missing or given twice."""
    parts = split.split("+")
    if not all(parts) or len(set(parts)) < len(parts):
        raise ValueError(f"split is {split!r}: join different splits like train-clean-100+train-clean-360")
    for part in parts:
        if "/" in part or part.startswith(".") or min(part) < " " or len(part.encode()) > LONGEST_NAME:
            raise ValueError(f"split {part!r} cannot name files, as it must: give it a short name without slashes")
    return parts


def open_usable(
    source: str | os.PathLike,
    split: str,
    processor,
    frames: Callable[[int], int],
    samples: int | None = None,
    seed: int = 0,
    rejected: Path | None = None,
    seconds: float | None = None,
) -> Corpus:
    """Open a split, take a sample of it, and drop the utterances that this model cannot use.

    `frames`: samples → encoder frames. `samples` and `seconds` bound the sample. `rejected`: a folder for SPLIT.jsonl,
    which lists the dropped rows and the reasons.
    """
    corpus = open_corpus(source, split).sample(samples, seed)
    if seconds is not None:
        corpus = corpus.excerpt(seconds, seed)
    corpus = corpus.usable(processor, frames)
    if rejected is not None:
        corpus.write_rejected(rejected / f"{split}.jsonl")
    return corpus


def speech_table(corpora: dict[str, Corpus]):
    """DataFrame with one row a corpus: utterances, minutes, speakers, rejected rows and words."""
    import pandas as pd

    rows = {
        name: {
            "utterances": len(corpus),
            "minutes": round(corpus.seconds / 60, 1),
            "speakers": len({utterance.speaker for utterance in corpus}),
            "rejected": len(corpus.rejected),
            "words": sum(len(utterance.text.split()) for utterance in corpus),
        }
        for name, corpus in corpora.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def check_splits(source: str | os.PathLike, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError or ValueError where a quick look shows that `open_corpus` would fail.

    The look lists a folder or a URL, and does not ask the hub.
    """
    asked = [part for split in splits for part in parts_of(split)]
    if re.match(URL, str(source)):
        from asrlib.data.remote import check_remote

        return check_remote(str(source), asked)
    path, present = resolve(source), None
    if source == "synthetic":
        from asrlib.data.synthetic import SPLITS

        present = list(SPLITS)
    elif path.exists():
        from asrlib.data.manifest import read_manifest

        listed = {split: manifest_of(path, split) for split in asked}
        for split, manifest in listed.items():
            if manifest is not None:
                read_manifest(manifest, split)
        asked = [split for split, manifest in listed.items() if manifest is None]
        present = _splits_in(path, asked) if asked else None
    elif not re.fullmatch(HUB_ID, str(source)):
        raise FileNotFoundError(f"there is no corpus at {path}")
    missing = [split for split in asked if present is not None and split not in present]
    if missing:
        raise NoSuchSplit(
            f"corpus {source} has no split {missing[0]!r}: it has {', '.join(sorted(present))}", missing[0]
        )


def _splits_in(folder: Path, asked: list[str]) -> list[str] | None:
    """The splits of a folder; None where it has tables, whose splits `asked` for are then checked.

    Raises FileNotFoundError where it holds no speech, ValueError for a table that is cut short.
    """
    from asrlib.data.librispeech import AUDIO_SUFFIXES, find_splits

    manifests = (file.stem for file in folder.iterdir() if file.suffix in (".jsonl", ".csv"))
    if splits := [*find_splits(folder), *manifests]:
        return splits
    from asrlib.data.hub import check_shards, holds_tables

    if holds_tables(folder):
        check_shards(folder, asked)
        return None
    files = (file for depth in range(4) for file in folder.glob("*/" * depth + "*"))  # CORPUS/SPLIT/SPEAKER/CHAPTER
    audio = next((file for file in files if file.suffix.lower() in AUDIO_SUFFIXES), None)
    transcripts = f", and no transcript of {audio.relative_to(folder)}" if audio else ""
    raise FileNotFoundError(
        f"{folder} holds no corpus{transcripts}: give SPLIT/SPEAKER/CHAPTER/*.trans.txt beside audio, SPLIT.csv, "
        "SPLIT.jsonl, or parquet files"
    )
