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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from asrlib.data.audio import SAMPLE_RATE, Source, UnusableAudio, duration, read_audio
from asrlib.data.text import ctc_problem, label_ids, language_problem, normalise_text, unknown_characters
from asrlib.runs import atomic_write

UNKNOWN_SPEAKER = "unknown"
HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]+)?"  # owner/name, owner/name:configuration
URL = r"[a-z][a-z0-9+.-]*://.*"  # s3://bucket/folder: not stored here, but streamed
LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes are added
HELD_BYTES = 1 << 29  # encoded audio of streamed speech that each process holds in memory


@dataclass(frozen=True)
class RowGroup:
    """A part of a parquet file: the unit in which streamed speech is fetched."""

    url: str
    version: str  # of the file, from its size and checksum
    number: int
    bytes: int  # of its audio


@dataclass(frozen=True)
class Utterance:
    id: str
    text: str
    speaker: str
    seconds: float  # from the audio's header
    where: str  # file, or data set and row, for messages
    source: Source = field(repr=False, compare=False)
    group: RowGroup | None = field(default=None, repr=False, compare=False)  # None: all of the corpus is at hand
    language: str | None = None  # a name or a code; None: what the model is told for the whole corpus

    def audio(self) -> np.ndarray:
        """float32 [samples], mono, 16 kHz. Raises UnusableAudio."""
        samples = read_audio(self.source)
        if len(samples) < (self.seconds - 0.1) * SAMPLE_RATE:
            raise UnusableAudio(
                f"audio is cut off: {len(samples) / SAMPLE_RATE:.2f} s of the {self.seconds:.2f} s in its header"
            )
        return samples


@dataclass(frozen=True)
class Rejected:
    id: str
    reason: str
    where: str


class NoSuchSplit(FileNotFoundError, ValueError):
    """A corpus has no split of that name; the message names those that it has."""

    def __init__(self, message: str, split: str):
        super().__init__(message)
        self.split = split


def check_corpus(corpus: Any) -> None:
    """Raises TypeError where `corpus` is no Corpus, but for example the name of one."""
    if not isinstance(corpus, Corpus):
        given = repr(corpus) if isinstance(corpus, str | os.PathLike) else f"a {type(corpus).__name__}"
        raise TypeError(f"a corpus is wanted, not {given}: asrlib.open_corpus(source, split) opens one")


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
        """`n` utterances in corpus order; all of them where n is None or not smaller than the corpus.

        A hash of seed and id chooses: the choice is the same on every machine, and a larger sample contains a smaller
        one. Raises ValueError for n < 1.
        """
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ValueError(f"a sample needs at least one utterance, not {n}; None means all")
        chosen = set(self._shuffled(seed)[:n])
        return replace(self, utterances=tuple(u for i, u in enumerate(self) if i in chosen))

    def excerpt(self, seconds: float, seed: int = 0) -> "Corpus":
        """A `sample` that lasts at most `seconds` in all, but has at least one utterance."""
        order = self._shuffled(seed)
        total = list(itertools.accumulate(self[i].seconds for i in order))
        return self.sample(max(1, bisect.bisect_right(total, seconds)), seed) if order else self

    def _shuffled(self, seed: int) -> list[int]:
        return sorted(range(len(self)), key=lambda i: _digest(f"{seed} {self[i].id}"))

    def usable(self, processor, frames: Callable[[int], int], check_audio: bool = True) -> "Corpus":
        """The corpus without the rows that a model with this processor cannot be trained or scored on.

        frames: samples → encoder frames. `frames_of` gives it for any model; for CTC a plain function will do.
        check_audio: decode everything once; otherwise the headers are trusted.
        Dropped rows join `.rejected`. Raises ValueError if no row is left.
        """
        check = partial(_problem, processor=processor, frames=frames, check_audio=check_audio)
        judged = list(zip(self, _in_threads(check, self, f"checking {self.split}"), strict=True))
        usable = [utterance for utterance, reason in judged if reason is None]
        dropped = [Rejected(utterance.id, reason, utterance.where) for utterance, reason in judged if reason]
        return in_corpus(self.name, self.split, usable, [*self.rejected, *dropped])

    def write_rejected(self, path: str | os.PathLike) -> None:
        """One JSON object a line: id, reason, where. The file is empty where nothing was rejected."""
        with atomic_write(path) as file:
            for row in self.rejected:
                file.write(_valid_unicode(json.dumps(vars(row), ensure_ascii=False)) + "\n")

    def fingerprint(self) -> str:
        """sha256 over ids, texts, durations and, where they are told, languages, in order."""
        rows = ([u.id, u.text, round(u.seconds, 3)] + ([u.language] if u.language else []) for u in self)
        return _digest("\n".join(map(json.dumps, rows)))


# ---- from rows to a corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An utterance that an opener found and nobody has checked yet."""

    id: str
    text: Any
    speaker: str
    where: str
    source: Source
    language: str | None = None


def gather(name: str, split: str, rows: Iterable[Row | Rejected]) -> Corpus:
    """Read the headers of `rows` and make a corpus of them. Raises ValueError if there is no usable row."""
    return collect(name, split, _in_threads(admit, list(rows), f"reading {split}"))


def collect(name: str, split: str, admitted: Sequence[Utterance | Rejected]) -> Corpus:
    """Sort the results of `admit` into utterances and rejected rows.

    Repeated ids get a number, so that transcripts can be told apart. Raises ValueError if there is no utterance.
    """
    utterances = told_apart(row for row in admitted if isinstance(row, Utterance))
    return in_corpus(name, split, utterances, [row for row in admitted if isinstance(row, Rejected)])


def told_apart(utterances: Iterable[Utterance]) -> list[Utterance]:
    """The utterances, with a number after each repeated id."""
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


def in_corpus(name: str, split: str, utterances: list[Utterance], rejected: list[Rejected]) -> Corpus:
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
    speaker, language = _valid_unicode(row.speaker), row.language
    return Utterance(id, row.text.strip(), speaker, seconds, where, row.source, language=language)


def _problem(utterance: Utterance, processor, frames: Callable[[int], int], check_audio: bool) -> str | None:
    """Why this utterance cannot be used, or None."""
    if problem := language_problem(utterance.language, processor):
        return problem
    text = normalise_text(utterance.text, processor)
    if not text:
        return "no transcript"
    if unknown := unknown_characters(text, processor):
        return f"characters outside the vocabulary: {', '.join(map(repr, unknown[:10]))}"
    try:
        samples = len(utterance.audio()) if check_audio else round(utterance.seconds * SAMPLE_RATE)
    except UnusableAudio as error:
        return str(error)
    ids = label_ids(text, processor, utterance.language)
    return (
        frames.problem(ids, samples)
        if hasattr(frames, "problem")
        else ctc_problem(ids, samples, max(0, frames(samples)))
    )


def _in_threads(function: Callable, items: Sequence, label: str) -> list:
    """map in threads (decoding releases the GIL), with a progress bar after two seconds."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=label, delay=2, leave=False))


def named(value: Any, otherwise: str) -> str:
    """An id or speaker as text, also of a number; `otherwise` where it is missing or blank."""
    return str(value) if value is not None and str(value).strip() else otherwise


def _valid_unicode(text: str) -> str:
    """`text` with lone surrogates (of undecodable names and bytes) written as \\udcXX, so that any file can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
