"""The run folder: the outputs of a run's steps, and the markers that say which steps are done.

    reports/<run>/  metrics/*.json  predictions/*.jsonl  tables/*.csv  figures/*.png  rejected/*.jsonl
                    models/{baseline,converted,finetuned}  checkpoints/<step>/  notebooks/*.ipynb  *.html
                    .started/<step>.json  .completed/<step>.json

Nothing here is ever half-written: a file or folder appears under its name once it is complete. Only a marker
`.completed/<step>.json` means that a step is done.
"""

import difflib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

STEP_OF_METRICS = {
    "baseline": "00_baseline",
    "convert": "01_convert",
    "analyze": "02_analyze_svd_error",
    "finetune": "03_finetune",
    "evaluate": "04_evaluate",
    "benchmark": "05_benchmark",
    "compare": "06_compare",
}
NEEDS = {  # step → the steps whose outputs it reads
    "00_baseline": (),
    "01_convert": ("00_baseline",),
    "02_analyze_svd_error": ("01_convert",),
    "03_finetune": ("01_convert",),
    "04_evaluate": ("03_finetune",),
    "05_benchmark": ("03_finetune",),
    "06_compare": ("04_evaluate", "05_benchmark"),
}
TRAINED = "training.json"  # in a model's folder: identifies its training
VALUE_CHARACTERS = 60  # the last ones of a value go into a member's name: a path's end says more than its beginning
STEP_OF_MODEL = {
    "baseline": "00_baseline",
    "control": "03_finetune",
    "converted": "01_convert",
    "finetuned": "03_finetune",
}


class BadParameter(ValueError):
    """A parameter that cannot be used. The message says which one, where it was given, and what would be valid."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`: did you mean 'latent_dim'?`, or nothing where no name is similar."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


class MissingStep(FileNotFoundError):
    """The output of an earlier notebook is not in the run folder yet. The message says which notebook to run."""


def needed_by(step: str, steps: Iterable[str]) -> list[str]:
    """Those of `steps` that `step` needs, directly or through other steps. A step that is not in NEEDS needs all steps
    with smaller numbers."""
    if step not in NEEDS:
        return [other for other in steps if other < step]
    needed: set[str] = set()
    waiting = list(NEEDS[step])
    while waiting:
        needed.add(other := waiting.pop())
        waiting += NEEDS[other]
    return [other for other in steps if other in needed]


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the working directory) with notebooks/ and params/.

    JupyterLab runs a notebook in notebooks/, papermill in the project root: both find the same folder. Without such a
    folder, it is `start`.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    return start


def resolve(path: str | os.PathLike) -> Path:
    """The absolute path. A relative path starts at the project root, `~` is the home folder."""
    return project_root() / Path(path).expanduser()


def user_cache() -> Path:
    """The folder for files that can be made again: $ASRLIB_CACHE, else ~/.cache/asrlib."""
    return Path(os.environ.get("ASRLIB_CACHE") or Path.home() / ".cache" / "asrlib")


# ---- complete files and folders ----------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a new file that replaces `path` when the block ends without an error."""
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder to fill. It replaces `path` when the block ends without an error."""
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = _beside(path), _beside(path)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove the unfinished files of a killed process under `folder`. Nothing else may be writing there."""
    for partial in list(folder.rglob(".tmp-*")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Plain data for values that json cannot write: numpy and torch scalars and arrays, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def write_json(path: str | os.PathLike, obj: Any) -> None:
    text = json.dumps(obj, indent=2, ensure_ascii=False, default=plain)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Raises MissingStep where the file is missing, ValueError where it is not JSON."""
    path = resolve(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        step = STEP_OF_METRICS.get(path.stem) if path.parent.name == "metrics" else None
        if step is None:
            raise MissingStep(f"{path} is missing") from None
        raise _missing(path, path.parent.parent, step) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run the step again") from None


def _missing(path: Path, run: Path, step: str) -> MissingStep:
    folder = run.relative_to(project_root()) if run.is_relative_to(project_root()) else run
    return MissingStep(f"{path.relative_to(run)} is missing in {folder}: run {step} first")


# ---- the run folder ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run folder. Its sub-folders are made at their first use."""

    path: Path

    @classmethod
    def open(cls, run_dir: str | os.PathLike) -> "Run":
        return cls(resolve(run_dir))

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def models(self) -> Path:
        return self._folder("models")

    @property
    def metrics(self) -> Path:
        return self._folder("metrics")

    @property
    def predictions(self) -> Path:
        return self._folder("predictions")

    @property
    def tables(self) -> Path:
        return self._folder("tables")

    @property
    def figures(self) -> Path:
        return self._folder("figures")

    @property
    def rejected(self) -> Path:
        return self._folder("rejected")

    def write_metrics(self, name: str, values: dict) -> None:
        """Write metrics/<name>.json. The step that wrote it, and all steps that need it, no longer count as completed:
        run_all runs them again."""
        if written := STEP_OF_METRICS.get(name):
            for step in NEEDS:
                if step == written or needed_by(step, [written]):
                    self.outdate(step)
        write_json(self.path / "metrics" / f"{name}.json", values)

    def read_metrics(self, name: str) -> dict:
        """Read metrics/<name>.json. Raises MissingStep, which names the notebook that makes it."""
        return read_json(self.path / "metrics" / f"{name}.json")

    def metrics_so_far(self, name: str) -> dict:
        """The same, but empty where the file is missing."""
        return self.read_metrics(name) if (self.path / "metrics" / f"{name}.json").is_file() else {}

    def require_model(self, name: str) -> Path:
        """The folder models/<name>. Raises MissingStep, which names the notebook that makes it."""
        folder = self.path / "models" / name
        if not (folder / "config.json").is_file():
            raise _missing(folder, self.path, STEP_OF_MODEL.get(name, "the step that makes it"))
        return folder

    # -- markers

    def checkpoints(self, step: str) -> Path:
        """The folder from which `step` resumes after a kill. It is emptied first if it belongs to an outdated step."""
        folder = self._checkpoints(step)
        if not self.resumable(step):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _checkpoints(self, step: str) -> Path:
        return self.path / "checkpoints" / step

    def started(self, step: str) -> dict | None:
        return self._marker("started", step)

    def completed(self, step: str) -> dict | None:
        return self._marker("completed", step)

    def resumable(self, step: str) -> bool:
        """Whether run_all began `step` and did not finish it, so that its checkpoints are of use."""
        started = self.started(step)
        return started is not None and started["fingerprint"] is not None and self.completed(step) is None

    def mark_started(self, step: str, fingerprint: str) -> None:
        """`step` begins. Its checkpoints stay only if they come from the same unfinished step."""
        if not (self.resumable(step) and self.started(step)["fingerprint"] == fingerprint):
            self._begin_afresh(step)
        marker = {"fingerprint": fingerprint, "seconds": self.seconds(step)}
        write_json(self._marker_path("started", step), marker)

    def mark_completed(self, step: str, fingerprint: str, seconds: float, **facts: Any) -> None:
        write_json(self._marker_path("completed", step), {"fingerprint": fingerprint, "seconds": seconds, **facts})

    def outdate(self, step: str) -> None:
        """The output of `step` no longer counts. An interrupted step can still be resumed."""
        if self.completed(step) is not None:
            self._begin_afresh(step)

    def discard(self, step: str) -> None:
        """`step` must begin afresh and train again. Its outputs stay until they are replaced."""
        for model in (model for model, maker in STEP_OF_MODEL.items() if maker == step):
            (self.path / "models" / model / TRAINED).unlink(missing_ok=True)
        self._begin_afresh(step)

    def _begin_afresh(self, step: str) -> None:
        write_json(self._marker_path("started", step), {"fingerprint": None, "seconds": self.seconds(step)})
        self._marker_path("completed", step).unlink(missing_ok=True)
        shutil.rmtree(self._checkpoints(step), ignore_errors=True)

    def seconds(self, step: str) -> float | None:
        """The time that `step` took when it was last completed in this folder."""
        marker = self.completed(step) or self.started(step) or {}
        return marker.get("seconds")

    def _marker_path(self, kind: str, step: str) -> Path:
        return self.path / f".{kind}" / f"{step}.json"

    def _marker(self, kind: str, step: str) -> dict | None:
        path = self._marker_path(kind, step)
        return read_json(path) if path.is_file() else None


class CompletedRun(Run):
    """A run as its completed steps left it: what a step measured that is to run again does not count."""

    def metrics_so_far(self, name: str) -> dict:
        return super().metrics_so_far(name) if self.completed(STEP_OF_METRICS[name]) else {}


# ---- steps, sweeps and their members -------------------------------------------------------------------------


def find_notebooks(root: Path) -> dict[str, Path]:
    """The notebooks that are steps, in order: notebooks/NN_*.ipynb."""
    return {path.stem: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def asked_steps(folder: Path, steps: Sequence[str]) -> list[str]:
    """Those of `steps` that the run in `folder` should do: params.json names them unless they are all."""
    params = folder / "params.json"
    asked = read_json(params).get("steps", steps) if params.is_file() else steps
    return [step for step in steps if step in asked]


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is that of a sweep, and not of a single run."""
    params = folder / "params.json"
    return "sweep" in read_json(params) if params.is_file() else any(folder.glob("*/params.json"))


def is_member(folder: Path) -> bool:
    """Whether `folder` is that of one run of a sweep."""
    return (folder.parent / "params.json").is_file() and is_sweep(folder.parent)


def member_names(sweep: list | dict[str, list]) -> list[str]:
    """The names of the members, which are also those of their folders, in order."""
    if isinstance(sweep, list):
        return [re.sub(r"\.ya?ml$", "", Path(name).name) for name in sweep]
    members = own_values(sweep)
    return ["_".join(f"{name}-{_in_file_name(value)}" for name, value in own.items()) for own in members]


def _in_file_name(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_in_file_name, value))
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^\w.+-]+", "-", text)[-VALUE_CHARACTERS:]


def own_values(sweep: list | dict[str, list]) -> list[str | dict[str, Any]]:
    """What defines each member: the name of its params file, or its combination of the varying values."""
    if isinstance(sweep, list):
        return sweep
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def asked_for(run: Run) -> list[str]:
    """The members that the sweep's params.json names; without that file, the folders that hold runs."""
    params = run.path / "params.json"
    if params.is_file():
        return member_names(read_json(params)["sweep"])
    return sorted(path.parent.name for path in run.path.glob("*/params.json"))


def progress(folder: Path) -> tuple[int, int] | None:
    """(number of finished members, number of members) of the sweep in `folder`; None where no sweep ran there."""
    params = folder / "params.json"
    if not params.is_file() or "sweep" not in (asked := read_json(params)):
        return None
    names = member_names(asked["sweep"])
    return sum(_done(folder / name) for name in names), len(names)


def _done(folder: Path) -> bool:
    """Whether a run completed all steps that it began, by its markers."""
    begun, completed = ({path.name for path in (folder / kind).glob("*.json")} for kind in (".started", ".completed"))
    return bool(begun) and begun <= completed
