"""LibriSpeech from the Hugging Face hub, as parquet shards in a folder that `open_corpus` reads.

root/all/train.clean.100/0000.parquet     a shard, under its name on the hub; whole or absent
root/.cache/huggingface/                  unfinished downloads and checksums of huggingface_hub

huggingface_hub resumes an interrupted download, verifies checksums, and downloads no file twice.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download

from asrlib.data.hub import HUB_LIBRISPEECH, one_line
from asrlib.data.librispeech import find_splits

HUB_FOLDERS = {  # split → its folder in the hub's repository
    "train-clean-100": "all/train.clean.100",
    "train-clean-360": "all/train.clean.360",
    "train-other-500": "all/train.other.500",
    "dev-clean": "all/validation.clean",
    "dev-other": "all/validation.other",
    "test-clean": "all/test.clean",
    "test-other": "all/test.other",
}


def prepare_librispeech(root: str | os.PathLike, splits: Iterable[str]) -> None:
    """Downloads the splits that `root` lacks; `open_corpus(root, split)` reads them.

    Raises ValueError for an unknown split, OSError where `root` cannot be written or its disk is too small, and
    ConnectionError where the hub cannot be reached.
    """
    root, splits = Path(root).absolute(), list(dict.fromkeys(splits))
    if unknown := [split for split in splits if split not in HUB_FOLDERS]:
        raise ValueError(f"LibriSpeech has no split {unknown[0]!r}: it has {', '.join(HUB_FOLDERS)}")
    unpacked = find_splits(root)  # of OpenSLR's archives
    if not (wanted := [split for split in splits if split not in unpacked]):
        return
    if unpacked:
        raise ValueError(
            f"{root} holds {', '.join(unpacked)} in folders of audio, and shards beside these are not read: "
            f"give another --root for {', '.join(wanted)}"
        )
    download = partial(
        snapshot_download,
        HUB_LIBRISPEECH,
        repo_type="dataset",
        local_dir=root,
        allow_patterns=[f"{HUB_FOLDERS[split]}/*.parquet" for split in wanted],
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        shards = download(dry_run=True)
        _check_space(root, sum(shard.file_size for shard in shards if shard.will_download))
        download()
    except Exception as error:  # dozens of kinds, from network, hub and disk
        raise _explained(error, root) from error
    # Without a network the library returns whatever is in the folder.
    if missing := [shard.filename for shard in shards if not (root / shard.filename).is_file()]:
        raise ConnectionError(f"{missing[0]} of {HUB_LIBRISPEECH} did not arrive: give the same command again")


def _check_space(root: Path, needed: int) -> None:
    """needed: bytes."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, and {needed:,} are needed")


def _explained(error: Exception, root: Path) -> OSError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            f"the disk of {root} is too small: {error.strerror}. Make room and give the same command again, and it "
            "resumes; or choose fewer splits or another --root"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return OSError(f"{root} cannot be written to: {error.strerror}. Give another --root")
    return ConnectionError(
        f"{HUB_LIBRISPEECH} cannot be downloaded: {one_line(error) or type(error).__name__} Is there a network, and "
        "does it need a proxy (HTTPS_PROXY)? The same command, given again, resumes"
    )
