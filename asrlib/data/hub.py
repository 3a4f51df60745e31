"""Data sets in the form of the Hugging Face hub: on the hub, as a folder of parquet files, or saved to disk.

Audio stays encoded in the memory-mapped table, and soundfile decodes it row by row (`datasets` would need torchcodec).
"""

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import BinaryIO, TypeVar

import datasets
import pyarrow
from pyarrow import parquet

from asrlib.data.corpus import UNKNOWN_SPEAKER, Corpus, NoSuchSplit, Row, gather, named

T = TypeVar("T")
P = TypeVar("P", bound=PurePath)

HUB_LIBRISPEECH = "openslr/librispeech_asr"
TEXT_COLUMNS = ("text", "sentence", "transcription")
DEPTHS = ("", "*/", "*/*/")  # subfolders in which parquet files are looked for
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id")


def hub_names(split: str) -> list[tuple[str | None, str]]:
    """The possible places of LibriSpeech's `split` in the hub's layout, as (configuration, split), best first.

    train-clean-100 is train.clean.100 of "all" and train.100 of "clean"; dev is called validation there.
    Any other name stays as it is, and any configuration may have it (None).
    """
    match = re.fullmatch(r"(train|dev|test)-(clean|other)(-\d+)?", split)
    if not match:
        return [(None, split)]
    part, kind, size = match[1].replace("dev", "validation"), match[2], (match[3] or "").replace("-", ".")
    whole = f"{part}.{kind}{size}"
    return [("all", whole), (kind, f"{part}{size}"), (None, whole), (None, split)]


def open_hub(source: str, split: str, revision: str | None = None) -> Corpus:
    """`owner/name` or `owner/name:configuration` from the hub, through the cache of `datasets`.

    Raises FileNotFoundError where it cannot be loaded, ValueError for unknown columns.
    """
    name, _, configuration = source.partition(":")
    try:
        if name == HUB_LIBRISPEECH:
            # By file: a split's name would download all splits of the configuration, 60 GB.
            configuration = configuration or "all"
            part = f"{configuration}/{dict(hub_names(split)).get(configuration, split)}"
            files = {"train": [f"{part}-*.parquet", f"{part}/*.parquet"]}
            table = datasets.load_dataset(name, data_files=files, split="train", revision=revision)
        else:
            table = datasets.load_dataset(name, configuration or None, split=split, revision=revision)
    except Exception as error:  # dozens of kinds, from network, hub, cache and builder
        raise FileNotFoundError(
            f"'{source}' is no folder here, and split '{split}' of the hub data set of that name "
            f"could not be loaded: {one_line(error)}"
        ) from error
    return from_table(table, source, split)


def holds_tables(folder: Path) -> bool:
    """Whether `folder` holds parquet files, or a Dataset or DatasetDict that `save_to_disk` wrote."""
    return _saved_to_disk(folder) or bool(find_shards(folder))


def open_folder(folder: Path, split: str | None = None) -> Corpus:
    """One split of a folder for which `holds_tables` is true. split: by default the only one, or "train".

    Raises FileNotFoundError, which names the splits there are, and ValueError for tables that cannot be read.
    """
    try:
        if _saved_to_disk(folder):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.Dataset):
                saved = {str(saved.split or split or "train"): saved}
            split, table = choose_split({("", name): table for name, table in saved.items()}, split, folder)
        else:
            split, files = choose_split(find_shards(folder), split, folder)
            for path in files:
                _check_footer(path)
            files = [glob.escape(str(path)) for path in files]
            table = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder} cannot be read: {one_line(error.__cause__ or error)}") from error
    return from_table(table, folder.name, split, folder)


def find_shards(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The parquet files in `folder` and up to two levels below it, grouped by `group_shards`."""
    return group_shards(path for depth in DEPTHS for path in folder.resolve().glob(f"{depth}*.parquet"))


def check_shards(folder: Path, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError for a split that `folder` lacks, ValueError for a shard that is cut short."""
    if _saved_to_disk(folder):
        return
    shards = find_shards(folder)
    for split in splits:
        for path in choose_split(shards, split, folder)[1]:
            _check_footer(path)


def group_shards(paths: Iterable[P]) -> dict[tuple[str, str], list[P]]:
    """(configuration, split) → its parquet files, from names like clean/train.100-00000-of-00014.parquet,
    clean/train.100/0000.parquet, test.clean-00000-of-00001.parquet or train.parquet."""
    shards: dict[tuple[str, str], list[P]] = {}
    for path in sorted(paths):
        split, place = re.sub(r"-\d{5}-of-\d{5}(-\w{16})?$", "", path.stem), path.parent
        if split.isdigit():
            split, place = place.name, place.parent
        shards.setdefault((place.name, split), []).append(path)
    return shards


def _check_footer(shard: Path) -> None:
    """Raises ValueError for a shard that is cut short, and names it: `datasets` does not."""
    try:
        parquet.read_metadata(shard)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard} cannot be read: {one_line(error)} Copy or download it again") from error


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def choose_split(tables: dict[tuple[str, str], T], split: str | None, folder: Path | str) -> tuple[str, T]:
    """The name and the table of a split; `split` is LibriSpeech's name or the table's own.

    folder: the path or URL of the tables, for messages. Raises FileNotFoundError, which names the splits there are, and
    ValueError for a split that is there more than once.
    """
    if split is None:
        split = next(iter(tables))[1] if len(tables) == 1 else "train"
    for configuration, name in hub_names(split):
        keys = [key for key in tables if key[1] == name and configuration in (None, key[0])]
        if len(keys) > 1:
            places = " or ".join(f"{folder}/{key[0]}" for key in keys)
            raise ValueError(f"split '{split}' is in {folder} more than once: open {places} instead")
        if keys:
            return split, tables[keys[0]]
    names = ", ".join(f"{configuration}/{name}".lstrip("/") for configuration, name in tables)
    raise NoSuchSplit(f"no split '{split}' in {folder}; splits found: {names}", split)


# ---- from a table to a corpus ------------------------------------------------------------------------------


def from_table(table: datasets.Dataset, name: str, split: str, folder: Path | None = None) -> Corpus:
    """Columns: audio; text, sentence or transcription; optional speaker_id, speaker or client_id, and id.

    folder: where relative audio paths start, for tables that hold paths in place of bytes.
    Raises ValueError where a column is missing, naming those found, and where no row is usable.
    """
    columns = table.column_names
    text, speaker = known_columns(columns, f"{name} {split}")
    audio = table.select_columns(["audio"]).cast_column("audio", datasets.Audio(decode=False))
    labels = table.select_columns([column for column in (text, speaker, "id") if column in columns])

    def rows() -> Iterator[Row]:
        for index, row in enumerate(labels):
            yield Row(
                id=named(row.get("id"), f"{split}-{index:06d}"),
                text=row[text],
                speaker=named(row.get(speaker), UNKNOWN_SPEAKER),
                where=f"{name} {split}, row {index}",
                source=partial(_stored_audio, audio, index, folder),
            )

    return gather(name, split, rows())


def known_columns(columns: list[str], name: str) -> tuple[str, str | None]:
    """The columns of the text and, if there is one, of the speaker. ValueError where `name` lacks text or audio."""
    text = next((column for column in TEXT_COLUMNS if column in columns), None)
    speaker = next((column for column in SPEAKER_COLUMNS if column in columns), None)
    for present, wanted in ("audio" in columns, "audio"), (text, " or ".join(TEXT_COLUMNS)):
        if not present:
            raise ValueError(f"{name} has no column {wanted}; columns found: {', '.join(columns)}")
    return text, speaker


def _stored_audio(table: datasets.Dataset, index: int, folder: Path | None) -> bytes | BinaryIO:
    stored = table[index]["audio"] or {}
    if stored.get("bytes"):
        return io.BytesIO(stored["bytes"])
    if stored.get("path"):
        return os.fsencode((folder or Path()) / stored["path"])
    raise ValueError("the row holds no audio")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
