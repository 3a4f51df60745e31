"""Execute the notebooks of a run in order, each in a fresh kernel, skipping what is unchanged.

A kernel ends when this process ends, however it ends. Until then it holds the lock of the run folder, so that two
kernels never write to one run.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrlib.reporting.numbers import duration
from asrlib.reporting.provenance import commit, machine, versions
from asrlib.running.parameter_cells import read_cells
from asrlib.running.parameters import Schema
from asrlib.running.workplace import StepFailed, Workplace, log
from asrlib.runs import Run, atomic_write, find_notebooks, needed_by, user_cache
from asrlib.runs.dependencies import library_files, unused_files
from asrlib.runs.fingerprints import file_state, files_fingerprint, fingerprint

ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
KERNEL_SHUTDOWN_SECONDS = 2.0  # then it is killed
ENGINE = "asrlib"  # name of our papermill engine


ADVICE = {  # by the words of the operating system, or of Rust's library
    ("No space left on device", "os error 28", "Disk quota exceeded", "File too large", "os error 27"): (
        "The disk is full, or a limit on files is reached: make room first."
    ),
    ("Permission denied", "Read-only file system", "Operation not permitted"): (
        "Nothing can be written there: make the folder writable, or work in a copy of the project."
    ),
    ("Not a directory", "File exists"): "A folder is needed, and a file is in the way: move it.",
}


# ---- what runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One notebook with its parameters. With an equal fingerprint, running it again would give the same results."""

    name: str
    notebook: Path
    parameters: dict[str, Any]
    fingerprint: str


def plan(
    root: Path,
    run: Run,
    schema: Schema,
    values: Mapping[str, Any],
    names: list[str],
    members: Mapping[str, str] | None = None,
) -> list[Step]:
    """The steps called `names`.

    The fingerprint of a step covers its code cells, its parameters, the files that these name, the files of asrlib that
    it imports and this run uses, and the steps that it needs. For a sweep as a whole it also covers `members`: the name
    of each run that the steps compare → the fingerprint of what they need of that run.
    """
    notebooks = find_notebooks(root)
    run_dir = str(run.path.relative_to(root) if run.path.is_relative_to(root) else run.path)
    # Members differ in the files that they use.
    left_out = unused_files(schema.defaults | values, root) if members is None else {}
    steps: list[Step] = []
    for name in names:
        parameters = schema.for_step(name, values)
        code = [cell.source for cell in read_cells(notebooks[name]) if cell.kind == "code"]
        effective = schema.defaults_of(name) | parameters  # giving a default changes nothing
        files = {key: file_state(root, value) for key, value in effective.items()}
        library = files_fingerprint(library_files("\n".join(code), root / "asrlib", left_out), root)
        needed = [step.fingerprint for step in of_needed(name, steps)]
        digest = fingerprint(code, effective, files, library, members, needed)
        if "run_dir" in schema.parameters[name]:
            parameters["run_dir"] = run_dir
        if members is not None and "members" in schema.parameters[name]:
            parameters["members"] = list(members)
        steps.append(Step(name, notebooks[name], parameters, digest))
    return steps


def of_needed(name: str, steps: list[Step]) -> list[Step]:
    """The steps among `steps` that the step `name` needs."""
    needed = needed_by(name, [step.name for step in steps])
    return [step for step in steps if step.name in needed]


def pending(run: Run, steps: list[Step], redo: Iterable[str] = ()) -> list[Step]:
    """The steps that have to run, in order: those not completed with their present fingerprint, those in `redo`, and
    those that need one of these."""
    waiting: list[Step] = []
    for step in steps:
        done = (run.completed(step.name) or {}).get("fingerprint") == step.fingerprint and step.name not in redo
        if not done or of_needed(step.name, waiting):
            waiting.append(step)
    return waiting


# ---- one step ----------------------------------------------------------------------------------------------


def execute(step: Step, place: Workplace, title: str, pages: list[str]) -> float:
    """Run one notebook, render its page, and mark the step as completed; returns the seconds that it took.

    `title` labels the progress bar on a terminal. The page links to `pages`. Raises StepFailed; a later call then
    resumes here.
    """
    import nbformat

    from asrlib.reporting.notebook_pages import render_notebook

    run = place.run
    folder = run.path / "notebooks"
    folder.mkdir(exist_ok=True)
    running, failed = folder / f"{step.name}.running.ipynb", folder / f"{step.name}.failed.ipynb"
    executed = folder / f"{step.name}.ipynb"
    run.mark_started(step.name, step.fingerprint)
    failed.unlink(missing_ok=True)
    begin = time.monotonic()
    try:
        _run_papermill(step, running, place, title)
    except Exception as error:
        if running.exists():
            running.rename(failed)
        log.info("%s failed", step.name, exc_info=error)
        raise StepFailed(f"{step.name} failed: {_explain(error)}\nexecuted notebook: {failed}") from error
    seconds = time.monotonic() - begin
    notebook = nbformat.read(running, as_version=4)
    notebook.metadata.papermill.update(
        input_path=str(step.notebook.relative_to(place.root)), output_path=str(executed.relative_to(run.path))
    )
    with atomic_write(executed) as file:
        nbformat.write(notebook, file)
    running.unlink()
    render_notebook(executed, run.path / f"{step.name}.html", pages=pages)
    run.mark_completed(
        step.name,
        step.fingerprint,
        seconds=round(seconds, 2),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        parameters=step.parameters,
        versions=versions(),
        machine=machine(),
        commit=commit(place.root),
    )
    return seconds


def _run_papermill(step: Step, output: Path, place: Workplace, title: str) -> None:
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    _register_engine()
    with tempfile.TemporaryDirectory(prefix="asr-") as private:  # the path of a socket has at most 107 bytes
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this interpreter, whatever is installed
            transport="ipc",  # TCP ports are open to all users, and parallel runs race for them
            connection_file=f"{private}/kernel.json",
            shutdown_wait_time=KERNEL_SHUTDOWN_SECONDS,
        )
        papermill.execute_notebook(
            step.notebook,
            output,
            parameters=step.parameters,
            engine_name=ENGINE,
            kernel_name="python3",
            language="python",
            progress_bar={
                "desc": title,
                "bar_format": "{desc}  cell {n_fmt} of {total_fmt}  {elapsed}{postfix}",
                "disable": not sys.stderr.isatty(),
                "dynamic_ncols": True,
                "leave": False,
            },
            log_output=True,
            kernel=kernel,
            start={
                "cwd": str(place.root),
                "env": kernel_environment() | {"IPYTHONDIR": private},
                "pass_fds": list(place.locks),
                "stdout": place.log_file,  # of C libraries and of crashes
                "stderr": place.log_file,
            },
        )


def kernel_environment() -> dict[str, str]:
    """The environment variables of a kernel.

    Where this process writes no bytecode, kernels keep theirs in the user's cache. Without it each kernel would compile
    torch again, which takes longer than many steps.
    """
    variables = os.environ | ENVIRONMENT
    if variables.pop("PYTHONDONTWRITEBYTECODE", "") or sys.dont_write_bytecode:
        variables.setdefault("PYTHONPYCACHEPREFIX", str(user_cache() / "bytecode"))
    return variables


def _register_engine() -> None:
    """Register papermill's own engine, with a kernel that we configured."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.log import logger

    class Client(PapermillNotebookClient):
        def log_output_message(self, output: Any) -> None:
            super().log_output_message(output)
            if output.output_type == "stream" and self.nb_man.pbar is not None:
                lines = re.split(r"[\r\n]+", "".join(output.text).strip())
                self.nb_man.pbar.set_postfix_str(lines[-1].strip()[:60])

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *, kernel: Any, start: dict, **_):
            client = Client(nb_man, km=kernel, log=logger, log_output=True, coalesce_streams=True)
            client.execute(cleanup_kc=True, **start)

    papermill_engines.register(ENGINE, Engine)


def _explain(error: Exception) -> str:
    """The error of a cell, with the lines of its traceback that say where it arose."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, DeadKernelError):
        return "its kernel died (was it killed, or out of memory?); pipeline.log has its last output"
    if not isinstance(error, PapermillExecutionError):
        return f"{type(error).__name__}: {error}"
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    where = [line for line in text.splitlines() if re.match(r"(File |Cell In|-+> ?\d)", line)]
    return "\n".join([with_advice(f"{error.ename}: {error.evalue}"), f"in cell {error.exec_count}:", *where[-8:]])


def with_advice(message: str) -> str:
    """An error of the operating system, followed by what to do about it where that is known."""
    for signs, advice in ADVICE.items():
        if any(sign in message for sign in signs):
            return f"{message}\n{advice}"
    return message


# ---- all steps ---------------------------------------------------------------------------------------------


def run_steps(
    steps: list[Step],
    place: Workplace,
    say: Callable[[str], None],
    command: str,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Say which of `steps` are unchanged, and execute the others.

    The index page is kept up to date; it shows `command` to those who want to repeat the run. Raises StepFailed where a
    step fails.
    """
    from asrlib.reporting.pages import write_index
    from asrlib.running.verification import write_checksums

    run, called = place.run, time.time()
    waiting = pending(run, steps)
    expected = [expected_seconds(place.root, run, steps[: index + 1]) for index in range(len(steps))]
    for step, seconds in zip(steps, expected, strict=True):
        begun = run.resumable(step.name) and run.started(step.name)["fingerprint"] == step.fingerprint
        state = "unchanged" if step not in waiting else "resumes" if begun else "runs"
        took = f"{duration(seconds):>12}" if seconds is not None else ""
        say(f"  {step.name:<24}{state:<12}{took}".rstrip())
    for step in waiting:  # before the first one runs, since all are out of date now
        run.outdate(step.name)
    write_index(run.path, command)
    begin = time.monotonic()
    for number, step in enumerate(waiting, 1):
        title = f"[{steps.index(step) + 1}/{len(steps)}] {step.name}"
        if not sys.stderr.isatty():
            say(f"{title} ...")
        seconds = execute(step, place, title, [step.name for step in steps])
        elapsed = duration(time.monotonic() - begin)
        write_index(run.path, command)
        ahead = [expected[steps.index(later)] for later in waiting[number:]]
        say(f"{title} took {duration(seconds)} (elapsed {elapsed}{time_left(ahead)})")
        write_checksums(run, called)
        after_step()
    if not waiting:
        write_checksums(run, called)


def expected_seconds(root: Path, run: Run, steps: list[Step]) -> float | None:
    """Seconds that the last of `steps` took in this run the last time; otherwise what `seconds_before` gives."""
    seconds = run.seconds(steps[-1].name)
    return seconds_before(root, steps) if seconds is None else seconds


def seconds_before(root: Path, steps: list[Step]) -> float | None:
    """Seconds that the last of `steps` took in the latest run with the same parameters, of it and of the steps that it
    needs; members of sweeps count."""
    asked = {step.name: step.parameters | {"run_dir": ""} for step in [*of_needed(steps[-1].name, steps), steps[-1]]}
    latest: dict[str, Any] = {"time": "", "seconds": None}
    for runs in ("*", "*/*"):
        for path in (root / "reports").glob(f"{runs}/.completed/{steps[-1].name}.json"):
            markers = {name: Run(path.parent.parent).completed(name) or {} for name in asked}
            last = {"time": ""} | markers[steps[-1].name]
            same = all(markers[name].get("parameters", {}) | {"run_dir": ""} == asked[name] for name in asked)
            if same and last["time"] >= latest["time"]:
                latest = last
    return latest["seconds"]


def time_left(expected: list[float | None]) -> str:
    """`, about 3 min 10 s left`; `more than` where some steps were never timed; empty where none was."""
    known = [seconds for seconds in expected if seconds is not None]
    if not known:
        return ""
    return f", {'about' if len(known) == len(expected) else 'more than'} {duration(sum(known))} left"
