"""Speech with transcripts behind one interface, whatever it was stored as.

`open_corpus` returns a `Corpus`: a sequence of `Utterance`, and the rows that were left out, each with
its reason. Opening reads headers only; audio is decoded when `Utterance.audio()` is called, always to
16 kHz mono, so a corpus of a hundred hours costs a few megabytes until it is used.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asrlib.data.audio import SAMPLE_RATE, Source, UnusableAudio, duration, read_audio
from asrlib.data.text import ctc_problem, label_ids, normalise_text, unknown_characters
from asrlib.runs import atomic_write, resolve

UNKNOWN_SPEAKER = "unknown"
HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]+)?"  # owner/name, owner/name:configuration
URL = r"[a-z][a-z0-9+.-]*://.*"  # s3://bucket/folder: not stored here, but streamed
LONGEST_NAME = 200  # bytes; file systems end at 255, and more is put around it
HELD_BYTES = 1 << 29  # audio as it is encoded, of streamed speech, in the memory of each process


@dataclass(frozen=True)
class RowGroup:
    """What streamed speech is fetched by: a part of a parquet file."""

    url: str
    version: str  # of the file, told by its size and checksum
    number: int
    bytes: int  # of its audio


@dataclass(frozen=True)
class Utterance:
    id: str
    text: str
    speaker: str
    seconds: float  # by the header of the audio
    where: str  # file, or data set and row: for people
    source: Source = field(repr=False, compare=False)
    group: RowGroup | None = field(default=None, repr=False, compare=False)  # None: all of the corpus is at hand

    def audio(self) -> np.ndarray:
        """float32 [samples], mono, 16 kHz. Raises UnusableAudio."""
        samples = read_audio(self.source)
        if len(samples) < (self.seconds - 0.1) * SAMPLE_RATE:
            raise UnusableAudio(
                f"audio is cut off: {len(samples) / SAMPLE_RATE:.2f} s where {self.seconds:.2f} s are stated"
            )
        return samples


@dataclass(frozen=True)
class Rejected:
    id: str
    reason: str
    where: str


def check_corpus(corpus: Any) -> None:
    """Raises TypeError where `corpus` is none: the name of one, perhaps."""
    if not isinstance(corpus, Corpus):
        shown = repr(corpus) if isinstance(corpus, str | os.PathLike) else f"a {type(corpus).__name__}"
        raise TypeError(f"a corpus is wanted, not {shown}: asrlib.open_corpus(source, split) opens one")


@dataclass(frozen=True, repr=False)
class Corpus(Sequence[Utterance]):
    name: str
    split: str
    utterances: tuple[Utterance, ...]
    rejected: tuple[Rejected, ...] = ()

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index):
        """An utterance, or for a slice the corpus of those utterances."""
        if isinstance(index, slice):
            return replace(self, utterances=self.utterances[index])
        return self.utterances[index]

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name} {self.split}: {len(self):,} utterances, {self.hours:.2f} h, "
            f"{len({u.speaker for u in self}):,} speakers, {len(self.rejected):,} rejected)"
        )

    @property
    def seconds(self) -> float:
        return math.fsum(utterance.seconds for utterance in self)

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    def sample(self, n: int | None, seed: int = 0) -> "Corpus":
        """`n` utterances in corpus order, or all where n is None or not smaller than the corpus.

        Chosen by a hash of seed and id: the choice is the same on every machine, and a smaller sample is
        part of a larger one. Raises ValueError for n < 1.
        """
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ValueError(f"a sample needs at least one utterance, not {n}; None means all")
        chosen = set(self._shuffled(seed)[:n])
        return replace(self, utterances=tuple(u for i, u in enumerate(self) if i in chosen))

    def excerpt(self, seconds: float, seed: int = 0) -> "Corpus":
        """As many utterances as last `seconds` together, at least one; chosen as `sample` chooses."""
        order = self._shuffled(seed)
        total = list(itertools.accumulate(self[i].seconds for i in order))
        return self.sample(max(1, bisect.bisect_right(total, seconds)), seed) if order else self

    def _shuffled(self, seed: int) -> list[int]:
        return sorted(range(len(self)), key=lambda i: _digest(f"{seed} {self[i].id}"))

    def usable(self, processor, frames: Callable[[int], int], check_audio: bool = True) -> "Corpus":
        """The corpus without the rows that a model with this processor cannot be trained or scored on.

        frames: samples → encoder frames: of any model as `frames_of` gives it, a plain function of one with CTC.
        check_audio: decode everything once; without it the headers are believed.
        What is dropped joins `.rejected`. Raises ValueError if nothing is left.
        """
        check = partial(_problem, processor=processor, frames=frames, check_audio=check_audio)
        judged = list(zip(self, _in_threads(check, self, f"checking {self.split}"), strict=True))
        kept = [utterance for utterance, reason in judged if reason is None]
        dropped = [Rejected(utterance.id, reason, utterance.where) for utterance, reason in judged if reason]
        return _corpus(self.name, self.split, kept, [*self.rejected, *dropped])

    def write_rejected(self, path: str | os.PathLike) -> None:
        """One JSON object a line: id, reason, where. An empty file says that nothing was rejected."""
        with atomic_write(path) as file:
            for row in self.rejected:
                file.write(_valid_unicode(json.dumps(vars(row), ensure_ascii=False)) + "\n")

    def fingerprint(self) -> str:
        """sha256 over ids, texts and durations, in order."""
        return _digest("\n".join(json.dumps([u.id, u.text, round(u.seconds, 3)]) for u in self))


def open_corpus(source: str | os.PathLike, split: str | None = None, revision: str | None = None) -> Corpus:
    """Open one split of a corpus.

    source: "synthetic" · a LibriSpeech folder · a manifest (.jsonl or .csv) or a folder of SPLIT.jsonl or
        SPLIT.csv · a folder of parquet files or one written by `Dataset.save_to_disk` · the URL of such a folder of
        parquet files, whose audio is fetched when it is wanted and never stored (`asrlib.data.remote`) · otherwise a
        data set on the hub, `owner/name` or `owner/name:configuration`. Relative paths start at the project root.
    split: by default the only one there is, otherwise "train". "a+b" joins splits a and b.
    revision: of a data set on the hub. A URL carries its own: hf://datasets/owner/name@refs%2Fpr%2F3.
    Raises FileNotFoundError or ValueError, saying what was found instead, and for a URL UnreadableShard.
    """
    if split and "+" in split:
        parts = [open_corpus(source, part, revision) for part in parts_of(split)]
        rejected = [row for part in parts for row in part.rejected]
        return _corpus(parts[0].name, split, _apart(u for part in parts for u in part), rejected)
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
        return open_librispeech(path, split)  # which also says what was looked for
    if re.fullmatch(HUB_ID, str(source)):
        from asrlib.data.hub import open_hub

        return open_hub(str(source), split or "train", revision)
    raise FileNotFoundError(
        f"no corpus at {source}: give 'synthetic', an existing folder, a .jsonl or .csv manifest, "
        "a hub data set as owner/name, or a URL"
    )


def manifest_of(path: Path, split: str) -> Path | None:
    """The manifest at `path`, or for `split` in that folder, if there is one."""
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
    """What every notebook begins with: open a split, take a sample of it, drop what this model cannot use.

    `frames`: samples → encoder frames. `samples` and `seconds` bound the sample. `rejected`: a folder for SPLIT.jsonl,
    the rows dropped and why.
    """
    corpus = open_corpus(source, split).sample(samples, seed)
    if seconds is not None:
        corpus = corpus.excerpt(seconds, seed)
    corpus = corpus.usable(processor, frames)
    if rejected is not None:
        corpus.write_rejected(rejected / f"{split}.jsonl")
    return corpus


def speech_table(corpora: dict[str, Corpus]):
    """DataFrame: one row a corpus, with what a reader asks first."""
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


# ---- from rows to a corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An utterance as an opener found it, nothing checked yet."""

    id: str
    text: Any
    speaker: str
    where: str
    source: Source


def gather(name: str, split: str, rows: Iterable[Row | Rejected]) -> Corpus:
    """Read the headers of `rows` and make a corpus of them. Raises ValueError if there is no usable row."""
    return collect(name, split, _in_threads(admit, list(rows), f"reading {split}"))


def collect(name: str, split: str, admitted: Sequence[Utterance | Rejected]) -> Corpus:
    """Sort what `admit` gave into utterances and rejected rows.

    Ids that occur again get a number, so that transcripts can be told apart.
    Raises ValueError if there is no utterance.
    """
    utterances = _apart(row for row in admitted if isinstance(row, Utterance))
    return _corpus(name, split, utterances, [row for row in admitted if isinstance(row, Rejected)])


def _apart(utterances: Iterable[Utterance]) -> list[Utterance]:
    """The utterances with a number behind each id that occurs again."""
    taken: set[str] = set()
    told_apart = []
    for utterance in utterances:
        id, count = utterance.id, 1
        while id in taken:
            count += 1
            id = f"{utterance.id}#{count}"
        taken.add(id)
        told_apart.append(utterance if id == utterance.id else replace(utterance, id=id))
    return told_apart


def _corpus(name: str, split: str, utterances: list[Utterance], rejected: list[Rejected]) -> Corpus:
    if not utterances:
        reasons = "; ".join(f"{row.id}: {row.reason}" for row in rejected[:3])
        raise ValueError(
            f"{name} {split} has no usable row: "
            + (f"{len(rejected):,} rejected, the first: {reasons}" if rejected else "it is empty")
        )
    return Corpus(name, split, tuple(utterances), tuple(rejected))


def admit(row: Row | Rejected) -> Utterance | Rejected:
    """Read the header of `row`, and check its text."""
    if isinstance(row, Rejected):
        return replace(row, id=_valid_unicode(row.id), where=_valid_unicode(row.where))
    id, where = _valid_unicode(row.id), _valid_unicode(row.where)
    if not isinstance(row.text, str) or not row.text.strip():
        return Rejected(id, "no transcript", where)
    if row.text != _valid_unicode(row.text):
        return Rejected(id, "transcript is not valid Unicode", where)
    try:
        seconds = duration(row.source)
    except UnusableAudio as error:
        return Rejected(id, str(error), where)
    return Utterance(id, row.text.strip(), _valid_unicode(row.speaker), seconds, where, row.source)


def _problem(utterance: Utterance, processor, frames: Callable[[int], int], check_audio: bool) -> str | None:
    """Why this utterance cannot be used, or None."""
    text = normalise_text(utterance.text, processor)
    if not text:
        return "no transcript"
    if unknown := unknown_characters(text, processor):
        return f"characters outside the vocabulary: {', '.join(map(repr, unknown[:10]))}"
    try:
        samples = len(utterance.audio()) if check_audio else round(utterance.seconds * SAMPLE_RATE)
    except UnusableAudio as error:
        return str(error)
    ids = label_ids(text, processor)
    return (
        frames.problem(ids, samples)
        if hasattr(frames, "problem")
        else ctc_problem(ids, samples, max(0, frames(samples)))
    )


def _in_threads(function: Callable, items: Sequence, label: str) -> list:
    """map in threads (decoding releases the GIL), with a bar once it takes longer than a moment."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=label, delay=2, leave=False))


def named(value: Any, otherwise: str) -> str:
    """An id or speaker as text; numbers are welcome, what is missing or blank becomes `otherwise`."""
    return str(value) if value is not None and str(value).strip() else otherwise


def _valid_unicode(text: str) -> str:
    """Lone surrogates (from undecodable file names and bytes) written as \\udcXX: such text fits any file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
