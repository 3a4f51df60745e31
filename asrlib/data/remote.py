"""Speech that does not fit the disk: parquet shards at a URL of fsspec, in the hub's layout, streamed and never stored.

    open_corpus("hf://datasets/openslr/librispeech_asr", "train-clean-100")    # @refs%2Fpr%2F3 behind it: a revision
    open_corpus("s3://bucket/folder", "train")                                 # needs the package s3fs

What is kept, in the user's cache, is an index: ids, texts and lengths. Lengths are told by the audio's own headers
alone, so that a first opening reads every shard once, and a later one nothing. Audio is fetched by row group when it is
wanted, and held in memory as long as there is room; `BucketBatchSampler` asks for it in an order in which that is once
an epoch and process. A sample of few utterances still costs all row groups that they are in. Credentials are those of
fsspec's own configuration.

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

INDEX = "streamed-1"  # folder of the user's cache; another number when what is in it changes
PAUSES_SECONDS = (1, 4, 16)  # before a part of a shard is asked for again
# What tells that a file is no longer the one it was, as the kinds of storage call it: size, checksum, or time.
TELLING = ("size", "blob_id", "ETag", "etag", "md5Hash", "mtime", "created")


class UnreadableShard(Exception):
    """A part of a shard cannot be had, and why.

    No OSError or ValueError, which are taken for damaged audio: nothing is rejected for a lost connection.
    """


@dataclass(frozen=True)
class Shard:
    url: str
    version: str  # of its URL and content
    size: int  # bytes


def open_remote(url: str, split: str | None = None) -> Corpus:
    """One split of the shards at `url`, or down to two folders below it; see `asrlib.data.hub.find_shards` for names.

    Raises FileNotFoundError where nothing can be listed or there is no such split, ValueError for columns that are not
    understood or where no row is usable, UnreadableShard.
    """
    split, shards = choose_split(_find(url), split, url)
    found: list[Utterance | Rejected] = []
    total = sum(shard.size for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"indexing {split}", delay=2, leave=False) as progress:
        for shard in shards:
            for number, (size, rows) in enumerate(_index(shard, progress)):
                group = RowGroup(shard.url, shard.version, number, size)
                for row, (id, text, speaker, seconds, reason) in enumerate(rows):
                    id, where = id or f"{split}-{len(found):06d}", f"{shard.url}, row group {number}, row {row}"
                    source = partial(_audio, group, row)
                    spoken = Utterance(id, text, speaker, seconds, where, source, group)
                    found.append(Rejected(id, reason, where) if reason else spoken)
    return collect(url, split, found)


def check_remote(url: str, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError or ValueError where `open_remote` would, as far as a list of the files tells."""
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
        raise FileNotFoundError(f"there is no .parquet file at {url}, nor down to two folders below it")

    def shard(path: PurePosixPath) -> Shard:
        address, facts = storage.unstrip_protocol(paths[path]), files[paths[path]]
        version = fingerprint(address, {name: str(facts[name]) for name in TELLING if name in facts})
        return Shard(address, version, facts["size"])

    return {key: [shard(path) for path in group] for key, group in group_shards(paths).items()}


# ---- the index ---------------------------------------------------------------------------------------------


def _index(shard: Shard, progress: tqdm) -> list[tuple[int, list]]:
    """Of each row group the bytes of its audio, and of each row [id, text, speaker, seconds, None], or the reason why
    it cannot be used in the last place. Made by one pass over the shard, unless the cache has it."""
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
    """The audio of the row groups asked for last, HELD_BYTES of it, or of one larger than that.

    Fetched by one thread at a time, so that what several want is fetched once.
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
                    raise UnreadableShard(f"{group.url} is not what it was when it was opened: open the corpus again")
                self.held[group] = audio
            self.held.move_to_end(group)
            return self.held[group]


row_groups = RowGroups()  # of this process; sources only name what they want of it, so that they can be pickled


def _audio(group: RowGroup, row: int) -> BinaryIO:
    return _file(row_groups.audio(group)[row])


def _file(encoded: pyarrow.Scalar) -> BinaryIO:
    if not (data := encoded.as_py()):
        raise ValueError("the row holds no audio")
    return io.BytesIO(data)


def _fetch(url: str, number: int, labels: Sequence[str] = ()) -> tuple[pyarrow.ChunkedArray, list[dict[str, Any]]]:
    """The encoded audio of a row group, and of each row the columns `labels`."""
    columns = ["audio.bytes", *labels]
    table = _read(url, f"row group {number}", lambda file: file.read_row_group(number, columns=columns))
    return compute.struct_field(table["audio"], "bytes"), table.select(labels).to_pylist()


def _size(audio: pyarrow.ChunkedArray) -> int:
    """Bytes, without what Arrow adds."""
    return compute.sum(compute.binary_length(audio)).as_py() or 0


def _read(url: str, part: str, read: Callable[[parquet.ParquetFile], T]) -> T:
    """What `read` gives for the shard, tried again where that fails. Raises UnreadableShard, naming the `part`."""
    for pause in (0, *PAUSES_SECONDS):
        time.sleep(pause)
        try:
            storage, path = url_to_fs(url)  # in a process that was forked another one
            with storage.open(path, cache_type="none") as file:  # parquet knows which bytes it needs
                return read(parquet.ParquetFile(file))
        except pyarrow.ArrowInvalid as error:
            raise UnreadableShard(f"{part} of {url} is damaged: {one_line(error)} Copy it there again") from error
        except Exception as error:  # each kind of storage has its own
            last = error
    raise UnreadableShard(
        f"{part} of {url} could not be fetched, tried {len(PAUSES_SECONDS) + 1} times: {one_line(last)}. Is there a "
        "connection, and the file whole? What was begun goes on there when it is started again"
    ) from last
