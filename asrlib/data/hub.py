"""Data sets in the form of the Hugging Face hub: on the hub, as a folder of parquet files, or saved to disk.

Audio stays in the memory-mapped table, encoded as it came, and is decoded by soundfile row by row
(`datasets` itself would need torchcodec).
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
DEPTHS = ("", "*/", "*/*/")  # below its folder that a parquet file may lie
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id")


def hub_names(split: str) -> list[tuple[str | None, str]]:
    """Where LibriSpeech's `split` may be in the hub's layout, as (configuration, split), best first.

    train-clean-100 is train.clean.100 of "all" and train.100 of "clean"; dev is called validation there.
    Any other name is taken as it is, from whatever configuration has it (None).
    """
    match = re.fullmatch(r"(train|dev|test)-(clean|other)(-\d+)?", split)
    if not match:
        return [(None, split)]
    part, kind, size = match[1].replace("dev", "validation"), match[2], (match[3] or "").replace("-", ".")
    whole = f"{part}.{kind}{size}"
    return [("all", whole), (kind, f"{part}{size}"), (None, whole), (None, split)]


def open_hub(source: str, split: str, revision: str | None = None) -> Corpus:
    """`owner/name` or `owner/name:configuration` from the hub, through the cache of `datasets`.

    Raises FileNotFoundError where it cannot be had, ValueError for columns that are not understood.
    """
    name, _, configuration = source.partition(":")
    try:
        if name == HUB_LIBRISPEECH:
            # By file, because asking for a split by name downloads all splits of the configuration: 60 GB.
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
    """Whether `folder` holds parquet files, or what `save_to_disk` of a Dataset or DatasetDict wrote."""
    return _saved_to_disk(folder) or bool(find_shards(folder))


def open_folder(folder: Path, split: str | None = None) -> Corpus:
    """One split of a folder for which `holds_tables` says yes. split: by default the only one, or "train".

    Raises FileNotFoundError naming the splits there are, ValueError for tables that cannot be read.
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
    """The parquet files in `folder` and down to two folders below it, as `group_shards` groups them."""
    return group_shards(path for depth in DEPTHS for path in folder.resolve().glob(f"{depth}*.parquet"))


def check_shards(folder: Path, splits: Iterable[str]) -> None:
    """Raises FileNotFoundError for a split that `folder` has not, ValueError for a shard of one that is cut short."""
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
    """ValueError for a shard that was not copied to its end, by name: `datasets` only says that there is one."""
    try:
        parquet.read_metadata(shard)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard} cannot be read: {one_line(error)} Copy or download it again") from error


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def choose_split(tables: dict[tuple[str, str], T], split: str | None, folder: Path | str) -> tuple[str, T]:
    """The name and the table of the split asked for, `split` being LibriSpeech's name or the table's own.

    folder: where they were found, a path or URL. Raises FileNotFoundError naming the splits there are, ValueError for
    one that is there more than once.
    """
    if split is None:
        split = next(iter(tables))[1] if len(tables) == 1 else "train"
    for configuration, name in hub_names(split):
        found = [key for key in tables if key[1] == name and configuration in (None, key[0])]
        if len(found) > 1:
            places = " or ".join(f"{folder}/{key[0]}" for key in found)
            raise ValueError(f"split '{split}' is in {folder} more than once: open {places} instead")
        if found:
            return split, tables[found[0]]
    names = ", ".join(f"{configuration}/{name}".lstrip("/") for configuration, name in tables)
    raise NoSuchSplit(f"no split '{split}' in {folder}; splits found: {names}", split)


# ---- from a table to a corpus ------------------------------------------------------------------------------


def from_table(table: datasets.Dataset, name: str, split: str, folder: Path | None = None) -> Corpus:
    """Columns: audio; text, sentence or transcription; optional speaker_id, speaker or client_id, and id.

    folder: where relative audio paths start, for tables that hold paths in place of bytes.
    Raises ValueError naming the columns found where one is missing, or where no row is usable.
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
    """Those of the text and, if there is one, the speaker; ValueError where text or audio is missing in `name`."""
    text = next((column for column in TEXT_COLUMNS if column in columns), None)
    speaker = next((column for column in SPEAKER_COLUMNS if column in columns), None)
    for found, wanted in ("audio" in columns, "audio"), (text, " or ".join(TEXT_COLUMNS)):
        if not found:
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
