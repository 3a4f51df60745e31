"""Speech that does not fit the disk: parquet shards at a URL of fsspec, in the hub's layout, streamed and never stored.

    open_corpus("hf://datasets/openslr/librispeech_asr", "train-clean-100")    # append @refs%2Fpr%2F3 for a revision
    open_corpus("s3://bucket/folder", "train")                                 # needs the package s3fs

The user's cache keeps an index of ids, texts and lengths. Only the audio's own headers state lengths, so the first
opening reads every shard once, and later ones read no shard. Audio is fetched by row group when it is needed, and
stays in memory while there is room. In the order of `BucketBatchSampler`, each process fetches a row group once an
epoch. A sample of few utterances still fetches the whole row groups that hold them. Credentials come from fsspec's own
configuration.

Tested on storage in memory and in folders, never against the hub or a bucket.
"""

import io
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, TypeVar

import pyarrow
from fsspec.core import url_to_fs
from pyarrow import compute, parquet
from tqdm import tqdm

from asrlib.data.corpus import (
    HELD_BYTES,
    UNKNOWN_SPEAKER,
    Corpus,
    Rejected,
    Row,
    RowGroup,
    Utterance,
    admit,
    collect,
    named,
)
from asrlib.data.hub import DEPTHS, choose_split, group_shards, known_columns, one_line
from asrlib.runs import atomic_write, user_cache
from asrlib.runs.fingerprints import fingerprint

T = TypeVar("T")

INDEX = "streamed-1"  # folder of the user's cache; a new form of the index gets a new number
PAUSES_SECONDS = (1, 4, 16)  # before a part of a shard is asked for again
# Facts that show that a file has changed, by the names that kinds of storage give to size, checksum and time.
TELLING = ("size", "blob_id", "ETag", "etag", "md5Hash", "mtime", "created")


class UnreadableShard(Exception):
    """A part of a shard cannot be fetched; the message is the reason.

    It is no OSError or ValueError, which mean damaged audio: a lost connection must not reject utterances.
    """


@dataclass(frozen=True)
class Shard:
    url: str
    version: str  # of its URL and content
    size: int  # bytes


def open_remote(url: str, split: str | None = None) -> Corpus:
    """One split of the shards at `url` and up to two levels below it; see `asrlib.data.hub.find_shards` for names.

    Raises FileNotFoundError where nothing can be listed or there is no such split, ValueError for unknown columns or
    where no row is usable, and UnreadableShard.
    """
    split, shards = choose_split(_find(url), split, url)
    spoken: list[Utterance | Rejected] = []
    total = sum(shard.size for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"indexing {split}", delay=2, leave=False) as progress:
        for shard in shards:
            for number, (size, rows) in enumerate(_index(shard, progress)):
                group = RowGroup(shard.url, shard.version, number, size)
                for row, (id, text, speaker, seconds, reason) in enumerate(rows):
                    id, where = id or f"{split}-{len(spoken):06d}", f"{shard.url}, row group {number}, row {row}"
                    if reason:
                        spoken.append(Rejected(id, reason, where))
                    else:
                        source = partial(_audio, group, row)
                        spoken.append(Utterance(id, text, speaker, seconds, where, source, group))
    return collect(url, split, spoken)


def check_remote(url: str, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError or ValueError where the list of the files shows that `open_remote` would."""
    tables = _find(url)
    for split in splits:
        choose_split(tables, split, url)


def _find(url: str) -> dict[tuple[str, str], list[Shard]]:
    """(configuration, split) → shards. Raises FileNotFoundError."""
    try:
        storage, root = url_to_fs(url)
        storage.invalidate_cache()
        files = storage.find(root, maxdepth=len(DEPTHS), detail=True)
    except Exception as error:  # each kind of storage has its own
        raise FileNotFoundError(f"no corpus can be listed at {url}: {one_line(error)}") from error
    paths = {PurePosixPath(path): path for path in files if path.endswith(".parquet")}
    if not paths:
        raise FileNotFoundError(f"there is no .parquet file at {url}, nor up to two levels below it")

    def shard(path: PurePosixPath) -> Shard:
        address, facts = storage.unstrip_protocol(paths[path]), files[paths[path]]
        version = fingerprint(address, {name: str(facts[name]) for name in TELLING if name in facts})
        return Shard(address, version, facts["size"])

    return {key: [shard(path) for path in group] for key, group in group_shards(paths).items()}


# ---- the index ---------------------------------------------------------------------------------------------


def _index(shard: Shard, progress: tqdm) -> list[tuple[int, list]]:
    """For each row group the bytes of its audio, and its rows [id, text, speaker, seconds, reason]; the reason says why
    a row cannot be used, or is None. One pass over the shard makes it, unless the cache has it."""
    path = user_cache() / INDEX / f"{shard.version}.json"
    if path.is_file():
        progress.update(shard.size)
        return json.loads(path.read_text(encoding="utf-8"))
    count, schema = _read(shard.url, "the footer", lambda file: (file.num_row_groups, file.schema_arrow))
    text, speaker = known_columns(schema.names, shard.url)
    kind = schema.field("audio").type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(f"{shard.url}: column audio should hold {{bytes, path}}, as on the hub, but holds {kind}")
    index = []
    for number in range(count):
        audio, labels = _fetch(shard.url, number, [name for name in (text, speaker, "id") if name in schema.names])
        index.append((_size(audio), list(_admitted(audio, labels, text, speaker))))
        progress.update(shard.size / count)
    with atomic_write(path) as file:
        json.dump(index, file, ensure_ascii=False)
    return index


def _admitted(audio: pyarrow.ChunkedArray, labels: list[dict[str, Any]], text: str, speaker: str | None) -> Iterator:
    for encoded, label in zip(audio, labels, strict=True):
        about = named(label.get("id"), ""), label[text], named(label.get(speaker), UNKNOWN_SPEAKER), ""
        row = admit(Row(*about, partial(_file, encoded)))
        rejected = isinstance(row, Rejected)
        yield [row.id, None, None, None, row.reason] if rejected else [row.id, row.text, row.speaker, row.seconds, None]


# ---- audio -------------------------------------------------------------------------------------------------


class RowGroups:
    """The audio of the row groups used last: up to HELD_BYTES, or one larger row group.

    One thread fetches at a time, so that a row group that several want is fetched once.
    """

    def __init__(self):
        self.lock = Lock()
        self.held: OrderedDict[RowGroup, pyarrow.ChunkedArray] = OrderedDict()

    def audio(self, group: RowGroup) -> pyarrow.ChunkedArray:
        with self.lock:
            if group not in self.held:
                while self.held and sum(held.bytes for held in self.held) + group.bytes > HELD_BYTES:
                    self.held.popitem(last=False)
                audio, _ = _fetch(group.url, group.number)
                if _size(audio) != group.bytes:
                    raise UnreadableShard(f"{group.url} has changed since it was opened: open the corpus again")
                self.held[group] = audio
            self.held.move_to_end(group)
            return self.held[group]


row_groups = RowGroups()  # of this process; sources hold names alone, so that they can be pickled


def _audio(group: RowGroup, row: int) -> BinaryIO:
    return _file(row_groups.audio(group)[row])


def _file(encoded: pyarrow.Scalar) -> BinaryIO:
    if not (data := encoded.as_py()):
        raise ValueError("the row holds no audio")
    return io.BytesIO(data)


def _fetch(url: str, number: int, labels: Sequence[str] = ()) -> tuple[pyarrow.ChunkedArray, list[dict[str, Any]]]:
    """The encoded audio of a row group, and the columns `labels` of each row."""
    columns = ["audio.bytes", *labels]
    table = _read(url, f"row group {number}", lambda file: file.read_row_group(number, columns=columns))
    return compute.struct_field(table["audio"], "bytes"), table.select(labels).to_pylist()


def _size(audio: pyarrow.ChunkedArray) -> int:
    """Bytes of the audio alone, without Arrow's overhead."""
    return compute.sum(compute.binary_length(audio)).as_py() or 0


def _read(url: str, part: str, read: Callable[[parquet.ParquetFile], T]) -> T:
    """The result of `read` on the shard, with retries. Raises UnreadableShard, which names the `part`."""
    for pause in (0, *PAUSES_SECONDS):
        time.sleep(pause)
        try:
            storage, path = url_to_fs(url)  # a forked process needs its own
            with storage.open(path, cache_type="none") as file:  # parquet knows which bytes it needs
                return read(parquet.ParquetFile(file))
        except pyarrow.ArrowInvalid as error:
            raise UnreadableShard(f"{part} of {url} is damaged: {one_line(error)} Copy it there again") from error
        except Exception as error:  # each kind of storage has its own
            last = error
    raise UnreadableShard(
        f"{part} of {url} could not be fetched in {len(PAUSES_SECONDS) + 1} attempts: {one_line(last)}. Is there a "
        "connection, and is the file whole? Started again, the work resumes there"
    ) from last
