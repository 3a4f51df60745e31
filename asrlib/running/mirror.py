"""The copy of a run folder at a URL of fsspec (s3://…, gs://…, file:///…), for machines that share no storage.

    mirror = Mirror(run.path, "s3://bucket/reports/baselines/architecture-conformer_attention-mha")
    mirror.fetch()    # the folder becomes equal to the copy
    mirror.send()     # the copy becomes equal to the folder

Only a marker in .completed means that a step is done. So a marker is removed before the files of its step change, and
written when all of them are there. In between the step does not count as done.
"""

import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from asrlib.runs import BadParameter, atomic_write

State = tuple[int, int]  # size in bytes and time in ns of a file


def check_storage(url: str) -> None:
    """Raises BadParameter where nothing can be written at `url`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "written").touch()
        mirror = Mirror(Path(folder), url)
        mirror.root += f"/.tmp-{uuid.uuid4().hex}"
        try:
            mirror.send()
            mirror.storage.rm(mirror.root, recursive=True)
        except Exception as error:  # each kind of storage has its own
            raise BadParameter(f"--storage {url} cannot be written to: {error}") from error


class Mirror:
    """`folder`: the local one. `url`: the place of its copy. `without`: names at its top that are not copied.

    Raises BadParameter where fsspec does not know such a URL, or a package for it is missing.
    """

    def __init__(self, folder: Path, url: str, without: Iterable[str] = ()):
        from fsspec.core import url_to_fs

        try:
            self.storage, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BadParameter(f"{url} cannot be used: {error}") from None
        self.folder, self.root = folder, root.rstrip("/")
        self.without = {".lock", *without}
        self.sent: dict[str, State | None] | None = None  # files of the copy, as far as known

    def exists(self) -> bool:
        """Whether there is a copy."""
        return bool(self._copied())

    def fetch(self) -> None:
        """Make the folder equal to the copy; without a copy, leave it as it is."""
        there = self._copied()
        if there:
            here = self._files()
            for name in {name for name in here if _is_marker(name)} | (here.keys() - there):
                (self.folder / name).unlink()
            for name in sorted(there, key=_is_marker):
                with atomic_write(self.folder / name, "wb") as file:
                    self.storage.get_file(f"{self.root}/{name}", file.name)
        self.sent = self._files() if there else {}

    def send(self) -> None:
        """Make the copy equal to the folder."""
        sent = dict.fromkeys(self._copied()) if self.sent is None else self.sent
        here = self._files()
        changed = {name for name, state in here.items() if state != sent.get(name)}
        gone = sent.keys() - here.keys()
        self._remove({name for name in (changed & sent.keys()) | gone if _is_marker(name)})
        for folder in {PurePosixPath(self.root, name).parent for name in changed}:
            self.storage.makedirs(str(folder), exist_ok=True)
        for name in sorted(changed, key=_is_marker):
            path = PurePosixPath(self.root, name)
            partial = str(path.with_name(f".tmp-{path.name}")) if _is_marker(name) else str(path)
            self.storage.put_file(str(self.folder / name), partial)
            if _is_marker(name):
                self.storage.mv(partial, str(path))
        self._remove({name for name in gone if not _is_marker(name)})
        self.sent = dict(here)

    def _remove(self, names: set[str]) -> None:
        for name in sorted(names):
            self.storage.rm_file(f"{self.root}/{name}")

    def _copied(self) -> set[str]:
        self.storage.invalidate_cache()
        names = (path.removeprefix(f"{self.root}/") for path in self.storage.find(self.root))
        return {name for name in names if self._belongs(name)}

    def _files(self) -> dict[str, State]:
        files = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and self._belongs(name):
                files[name] = (path.stat().st_size, path.stat().st_mtime_ns)
        return files

    def _belongs(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return parts[0] not in self.without and not any(part.startswith(".tmp-") for part in parts)


def _is_marker(name: str) -> bool:
    return name.startswith(".completed/")
