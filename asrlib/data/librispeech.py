"""LibriSpeech in the layout of OpenSLR's archives, and other folders in that layout."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from asrlib.data.corpus import Corpus, Rejected, Row, gather

AUDIO_SUFFIXES = {".flac", ".ogg", ".opus", ".wav"}  # a folder is searched for these


def open_librispeech(root: str | os.PathLike, split: str | None = None) -> Corpus:
    """SPEAKER/CHAPTER/*.{flac,ogg,opus,wav} beside *.trans.txt, whose lines are "ID TEXT".

    root: the folder that holds the split (root/SPLIT or root/CORPUS/SPLIT), or the split itself.
    Audio without a transcript and transcripts without audio are rejected rows.
    Raises FileNotFoundError, which names the splits there are, and ValueError if no row is usable.
    """
    root = Path(root)
    splits = find_splits(root)
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        names = ", ".join(splits) or "none (a split holds SPEAKER/CHAPTER/*.trans.txt)"
        raise FileNotFoundError(f"no split '{split}' in {root}; splits found: {names}")
    return gather(splits[split].resolve().parent.name, split, _librispeech_rows(splits[split]))


def find_splits(root: Path) -> dict[str, Path]:
    """Name → folder of the LibriSpeech splits at `root`; `root` alone if it is a split."""
    if _is_split(root):
        return {root.resolve().name: root}
    folders = sorted(root.glob("*/"))
    splits = [folder for folder in folders if _is_split(folder)]
    below = [inner for folder in folders if folder not in splits for inner in sorted(folder.glob("*/"))]
    # Of two with the same name, the one nearer to `root` counts.
    return {folder.name: folder for folder in [*filter(_is_split, below), *splits]}


def _is_split(folder: Path) -> bool:
    return next(folder.glob("*/*/*.trans.txt"), None) is not None


def _librispeech_rows(folder: Path) -> Iterator[Row | Rejected]:
    for chapter in sorted(folder.glob("*/*/")):
        audio: dict[str, Path] = {}  # by id, in one composition of accents
        texts: dict[str, tuple[str, str]] = {}  # id → text, where
        files = sorted(chapter.glob("*"))
        for path in files:
            if path.suffix.lower() in AUDIO_SUFFIXES:
                first = audio.setdefault(_composed(path.stem), path)
                if first != path:
                    yield Rejected(path.stem, f"the same utterance as {first.name}", str(path))
        spaced = sorted((id for id in audio if any(map(str.isspace, id))), key=len, reverse=True)
        for path in files:
            if path.name.endswith(".trans.txt") and not path.name.startswith("."):
                for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                    id, text = _id_and_text(line.decode("utf-8-sig", "surrogateescape"), spaced)
                    where = f"{path}:{number}"
                    if id and (first := texts.setdefault(id, (text, where))[1]) != where:
                        yield Rejected(id, f"a second transcript, the first is at {first}", where)
        for id in sorted(audio.keys() | texts.keys()):
            if id in audio and id in texts:
                yield Row(audio[id].stem, texts[id][0], chapter.parent.name, str(audio[id]), partial(bytes, audio[id]))
            elif id in texts:
                yield Rejected(id, "transcript without audio", texts[id][1])
            elif not id.startswith("."):  # macOS leaves ._ID.flac beside ID.flac
                yield Rejected(id, "audio without transcript", str(audio[id]))


def _composed(id: str) -> str:
    return unicodedata.normalize("NFC", id)


def _id_and_text(line: str, spaced: Iterable[str]) -> tuple[str, str]:
    """The parts of a line "ID TEXT"; the ID of a blank line is "". `spaced`: IDs that contain spaces, longest first."""
    for id in spaced:
        end = next((end for end in range(len(line), 0, -1) if _composed(line[:end]) == id), None)
        if end is not None and not line[end : end + 1].strip():
            return id, line[end:]
    id, text, *_ = [*line.split(None, 1), "", ""]
    return _composed(id), text
