"""LibriSpeech as OpenSLR's archives unpack it, and folders in that layout."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from asrlib.data.corpus import Corpus, Rejected, Row, gather

AUDIO_SUFFIXES = {".flac", ".ogg", ".opus", ".wav"}  # a folder is searched for these


def open_librispeech(root: str | os.PathLike, split: str | None = None) -> Corpus:
    """SPEAKER/CHAPTER/*.{flac,ogg,opus,wav} beside *.trans.txt, whose lines are "ID TEXT".

    root: the folder that holds the split (root/SPLIT or root/CORPUS/SPLIT), or the split itself.
    Audio without a transcript and transcripts without audio are rejected rows.
    Raises FileNotFoundError, naming the splits there are; ValueError if no row is usable.
    """
    root = Path(root)
    splits = find_splits(root)
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        found = ", ".join(splits) or "none (a split holds SPEAKER/CHAPTER/*.trans.txt)"
        raise FileNotFoundError(f"no split '{split}' in {root}; splits found: {found}")
    return gather(splits[split].resolve().parent.name, split, _librispeech_rows(splits[split]))


def find_splits(root: Path) -> dict[str, Path]:
    """Name → folder of the LibriSpeech splits at `root`: `root` alone where it is one itself."""
    if _is_split(root):
        return {root.resolve().name: root}
    folders = sorted(root.glob("*/"))
    splits = [folder for folder in folders if _is_split(folder)]
    below = [inner for folder in folders if folder not in splits for inner in sorted(folder.glob("*/"))]
    # Of two that have one name the nearer counts.
    return {folder.name: folder for folder in [*filter(_is_split, below), *splits]}


def _is_split(folder: Path) -> bool:
    return next(folder.glob("*/*/*.trans.txt"), None) is not None


def _librispeech_rows(folder: Path) -> Iterator[Row | Rejected]:
    for chapter in sorted(folder.glob("*/*/")):
        audio: dict[str, Path] = {}
        texts: dict[str, tuple[str, str]] = {}  # id → text, where
        for path in sorted(chapter.glob("[!.]*")):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                if (first := audio.setdefault(path.stem, path)) != path:
                    yield Rejected(path.stem, f"the same utterance as {first.name}", str(path))
            elif path.name.endswith(".trans.txt"):
                for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                    id, text, *_ = [*line.decode("utf-8-sig", "surrogateescape").split(None, 1), "", ""]
                    where = f"{path}:{number}"
                    if id and (first := texts.setdefault(id, (text, where))[1]) != where:
                        yield Rejected(id, f"a second transcript, the first is at {first}", where)
        for id in sorted(audio.keys() | texts.keys()):
            if id not in texts:
                yield Rejected(id, "audio without transcript", str(audio[id]))
            elif id not in audio:
                yield Rejected(id, "transcript without audio", texts[id][1])
            else:
                source = partial(bytes, audio[id])
                yield Row(id, texts[id][0], chapter.parent.name, str(audio[id]), source)
