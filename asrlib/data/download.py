"""LibriSpeech from OpenSLR: what is missing is downloaded, verified and unpacked; after a kill it goes on there.

root/LibriSpeech/SPLIT/SPEAKER/CHAPTER/*.flac     a split: whole, or not there
root/LibriSpeech/*.TXT                            what OpenSLR says about speakers, chapters and books
root/SPLIT.tar.gz.part                            an archive on its way, gone once it is unpacked
root/SPLIT.tar.gz                                 an archive, of keep=True or of the user's own: left alone
"""

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx2
from tqdm import tqdm

from asrlib.data.librispeech import find_splits

LIBRISPEECH_URL = "https://www.openslr.org/resources/12"
LIBRISPEECH_MD5 = {  # https://www.openslr.org/resources/12/md5sum.txt
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}
TIMEOUT_SECONDS = 60  # of a server that says nothing
TRIES = 5  # in a row that bring nothing new, before a download is given up
PAUSE_SECONDS = 2  # before a connection that broke off is taken up again
UNPACKING = ".unpacking"  # the folder beside the splits
UNPACKED = 1.05  # bytes on disk for one of an archive: FLAC does not compress further, files fill whole blocks


def prepare_librispeech(
    root: str | os.PathLike, splits: Iterable[str], url: str = LIBRISPEECH_URL, keep: bool = False
) -> None:
    """Afterwards `root` holds the splits, as `open_corpus(root, split)` reads them. Those there already are left alone.

    url: of the folder with the archives, OpenSLR's or a mirror's. keep: leave the archives as root/SPLIT.tar.gz.
    Raises ValueError for an unknown split and an archive with another checksum than OpenSLR publishes,
    FileNotFoundError for an archive that is not at `url`, ConnectionError without a network, and OSError where
    the disk is too small or another process is at work in the folder.
    """
    root, splits = Path(root).absolute(), list(dict.fromkeys(splits))
    if unknown := [split for split in splits if split not in LIBRISPEECH_MD5]:
        raise ValueError(f"LibriSpeech has no split {unknown[0]!r}: it has {', '.join(LIBRISPEECH_MD5)}")
    there = find_splits(root)
    if root in there.values():
        raise ValueError(f"{root} is itself a split: give the folder that should hold the splits")
    archives = [
        Archive(split, root / f"{split}.tar.gz", f"{url.rstrip('/')}/{split}.tar.gz")
        for split in splits
        if split not in there
    ]
    if not archives:
        return
    if not hasattr(tarfile, "data_filter"):
        raise OSError(f"Python {platform.python_version()} cannot unpack archives safely: use 3.11.4 or a later one")
    home = root if root.name == "LibriSpeech" else root / "LibriSpeech"
    for archive in archives:
        if (home / archive.split).exists():
            raise ValueError(f"{home / archive.split} is there but holds no SPEAKER/CHAPTER/*.trans.txt: remove it")
    with _alone_in(home), _full_disk_explained(root):
        shutil.rmtree(home / UNPACKING, ignore_errors=True)  # a killed process left it
        sizes = [_bytes_of(archive.path) or _size_at(archive.url) for archive in archives]
        _check_space(root, archives, sizes, keep)
        for archive, size in zip(archives, sizes, strict=True):
            if archive.path.exists():
                _verify_own(archive)
            else:
                _download_whole(archive, size)
                if keep:
                    os.replace(archive.part, archive.path)
            unpack(archive.path if archive.path.exists() else archive.part, home, archive.split)
            archive.part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archive:
    split: str
    path: Path  # where one is that stays: the user's own, or of keep=True
    url: str

    @property
    def part(self) -> Path:
        """Where it is downloaded to, and unpacked from unless it should stay."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def md5(self) -> str:
        return LIBRISPEECH_MD5[self.split]


def _download_whole(archive: Archive, size: int | None) -> None:
    download(archive.url, archive.part, size)
    if (found := _md5(archive.part)) != archive.md5:
        archive.part.unlink()
        raise ValueError(
            f"{archive.url} is not what OpenSLR publishes: its MD5 is {found} and should be {archive.md5}. "
            "What came was removed: give the same command again, or another --url"
        )


def _verify_own(archive: Archive) -> None:
    if (found := _md5(archive.path)) != archive.md5:
        raise ValueError(
            f"{archive.path} is damaged, or not OpenSLR's: its MD5 is {found} and should be {archive.md5}. "
            "Remove it, and it is downloaded"
        )


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel opens it again, after a kill too
        except BlockingIOError:
            raise OSError(f"another process prepares splits in {home}: wait for it") from None
        yield


# ---- room on the disk --------------------------------------------------------------------------------------


def _check_space(root: Path, archives: list[Archive], sizes: list[int | None], keep: bool) -> None:
    """sizes: bytes of the archives, None where the server does not say."""
    known = [(archive, size) for archive, size in zip(archives, sizes, strict=True) if size]
    to_come = [max(0, size - _bytes_of(archive.part)) for archive, size in known if not archive.path.exists()]
    # Without keep each is removed before the next one comes.
    needed = (sum(to_come) if keep else max(to_come, default=0)) + round(UNPACKED * sum(size for _, size in known))
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            f"the disk of {root} has {free:,} bytes free, and {needed:,} are needed for "
            f"{', '.join(archive.split for archive in archives)}: make room, or choose fewer splits or another --root"
        )


@contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {root} is full: make room and give the same command again; what was downloaded is kept"
        ) from error


# ---- over the network --------------------------------------------------------------------------------------


def download(url: str, part: Path, size: int | None = None) -> None:
    """Adds to the file `part` what it lacks of `url`; a server that cannot begin in the middle sends all of it again.

    size: bytes at `url`, if known. A connection that breaks off is taken up again, until `TRIES` in a row bring nothing
    new. Raises FileNotFoundError, OSError or ConnectionError as `_answer`.
    """
    furthest, tries = _bytes_of(part), 0
    while True:
        try:
            return _download_rest(url, part, size)
        except ConnectionError as error:
            tries = tries + 1 if _bytes_of(part) <= furthest else 0
            furthest = max(furthest, _bytes_of(part))
            if tries == TRIES:
                raise ConnectionError(
                    f"{error} The same command, given again, goes on from the {_bytes_of(part):,} bytes in {part}"
                ) from error
            time.sleep(PAUSE_SECONDS)


def _download_rest(url: str, part: Path, size: int | None) -> None:
    have = _bytes_of(part)
    if have and have == size:  # killed afterwards, while it was verified or unpacked
        return
    with _answer("GET", url, {"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking; if there is too much, the checksum will tell
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            have = 0
        bar = tqdm(desc=part.stem, total=size, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in response.iter_raw():  # raw: to some servers the .gz is an encoding, to be undone
                file.write(block)
                bar.update(len(block))


def _size_at(url: str) -> int | None:
    """Bytes, or None where the server does not say. Raises as `_answer`."""
    with _answer("HEAD", url, {}) as response:
        size = response.headers.get("Content-Length")
        return int(size) if size else None


@contextmanager
def _answer(method: str, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """Raises FileNotFoundError for HTTP 404, OSError for another refusal, ConnectionError for no whole answer, and
    ValueError for what is no address."""
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        with httpx2.stream(method, url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True) as response:
            status = response.status_code
            if status == HTTPStatus.NOT_FOUND:
                raise FileNotFoundError(f"{url} is not there (HTTP 404): OpenSLR has it in {LIBRISPEECH_URL}")
            if response.is_error and status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise OSError(
                    f"{url} is refused (HTTP {status} {response.reason_phrase}): try again later, or give another --url"
                )
            yield response
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise ValueError(f"{url} cannot be had: {error}") from error
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(
            f"{url} does not come: {reason}. Is the network there, and does it need a proxy (HTTPS_PROXY)?"
        ) from error


# ---- archives ----------------------------------------------------------------------------------------------


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, _bar_over(file, f"verifying {path.name}") as counted:
        while block := counted.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, home: Path, split: str) -> None:
    """home/SPLIT from a .tar.gz of LibriSpeech/SPLIT: unpacked beside it and renamed, so that it is whole or not there.

    The *.TXT beside the split come along where there are none yet. Raises ValueError for an archive that cannot be
    unpacked, or would write elsewhere.
    """
    beside = home / UNPACKING
    try:
        with (
            open(archive, "rb") as file,
            _bar_over(file, f"unpacking {split}") as counted,
            tarfile.open(fileobj=counted, mode="r:gz") as tar,
        ):
            tar.extractall(beside, filter="data")
        os.sync()  # the archive will be removed: a power cut must not leave a split of empty files
        for about in (beside / "LibriSpeech").glob("*.TXT"):
            if not (home / about.name).exists():
                os.replace(about, home / about.name)
        os.replace(beside / "LibriSpeech" / split, home / split)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bar_over(file, label: str):
    size = os.fstat(file.fileno()).st_size
    return tqdm.wrapattr(file, "read", total=size, desc=label, delay=2, leave=False)
