"""Starting a training in processes of its own, from a notebook, and following it while it runs.

A job is a folder that all its processes see, on one machine or several. It first holds job.json, model/ and perhaps
teacher/. During the training, history.jsonl, training.log and the files of `training.train` are added, and in the end
trained/ and result.json, or failures/. The processes run `asrlib.training.job`; on further machines, start it by hand.
This file imports no torch, so that the process that only waits starts quickly.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from asrlib.runs import atomic_folder, read_json, resolve, write_json

POLL_SECONDS = 0.5  # between two reads of the history
SHUTDOWN_SECONDS = 30.0  # for processes to end; then they are killed

Show = Callable[[list[dict]], None]  # takes the history so far


class TrainingFailed(RuntimeError):
    """A training ended without a result. The message is that of its first error; `kind` is that error's class by name,
    if it is known."""

    def __init__(self, message: str, kind: str | None = None):
        super().__init__(message)
        self.kind = kind


def train_in_processes(
    model,
    processor,
    training,
    validation,
    folder: str | Path,
    settings,
    teacher=None,
    *,
    corpus: str,
    processes: int = 1,
    accelerate_config: str | None = None,
    shown: Callable[[], AbstractContextManager[Show]] = lambda: nullcontext(lambda history: None),
):
    """Runs `asrlib.training.training.train` in `processes` processes of this machine; a single one is this process.

    Alternatively `accelerate_config`, a file of `accelerate config`, gives the number of processes and machines. Each
    process opens the two corpora anew, from `corpus`. `shown` makes a context whose function shows the growing history.
    When this process ends, for whatever reason, the processes that it started end too.
    Raises what `train` raises; errors of other processes become TrainingFailed.
    """
    if processes == 1 and accelerate_config is None:
        from asrlib.training.training import train

        return train(model, processor, training, validation, folder, settings, teacher)
    from asrlib.training.job import load_trained

    job = write_job(model, processor, training, validation, folder, settings, teacher, corpus=corpus)
    with shown() as show:
        launch(job, launch_command(processes, accelerate_config), show)
    result = load_trained(job, model)
    for copy in ("model", "teacher", "trained"):
        shutil.rmtree(job.parent / copy, ignore_errors=True)
    return result


def write_job(
    model, processor, training, validation, folder: str | Path, settings, teacher=None, *, corpus: str
) -> Path:
    """Writes to `folder` all that the processes need; returns the path of its job.json."""
    folder, local = resolve(folder), resolve(corpus)
    for name, recogniser in (("model", model), ("teacher", teacher)):
        if recogniser is not None:
            with atomic_folder(folder / name) as written:
                recogniser.save_pretrained(written)
                processor.save_pretrained(written)
    speech = {
        name: {
            "corpus": str(local) if local.exists() else corpus,
            "split": opened.split,
            "texts": {utterance.id: utterance.text for utterance in opened},  # perhaps a model's own
            "fingerprint": opened.fingerprint(),
        }
        for name, opened in (("training", training), ("validation", validation))
    }
    job = folder / "job.json"
    write_json(job, {"settings": asdict(settings), "teacher": teacher is not None, **speech})
    return job


def launch_command(processes: int, accelerate_config: str | None = None) -> list[str]:
    """The command that starts a job, without the job's path: in `processes` processes, or by the configuration file."""
    if accelerate_config is not None:
        start = ["accelerate.commands.launch", "--config_file", str(resolve(accelerate_config))]
    else:
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", *start, "-m", "asrlib.training.job"]


def launch(job: Path, command: list[str], follow: Callable[[list[dict]], None] = lambda history: None) -> None:
    """Runs a job to its end; `command` takes its path.

    `follow` is called with the history whenever it has grown: one dict per logged step, evaluation, or step alone, each
    with `step` and `max_steps`. Raises TrainingFailed with the first error of any process.
    """
    folder = job.parent
    history, log, result = (folder / name for name in ("history.jsonl", "training.log", "result.json"))
    for stale in (history, log, result):
        stale.unlink(missing_ok=True)
    shutil.rmtree(folder / "failures", ignore_errors=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, str(job), "--attached"],
            stdin=subprocess.PIPE,  # its end tells all processes that this one has ended: see end_with_stdin
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TQDM_DISABLE": "1"},
            start_new_session=True,  # Ctrl-C reaches this process alone
            close_fds=False,  # an inherited lock of the run folder is held until that process has ended too
        )
    size = 0
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if history.is_file() and history.stat().st_size > size:
                size = history.stat().st_size
                follow(read_history(history))
    finally:
        _end(process)
    if process.returncode != 0 or not result.is_file():
        raise _first_failure(folder, log) or TrainingFailed(_last_words(log, process.returncode))


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_history(path: Path) -> list[dict]:
    """The history, oldest entry first, without a line that is still being written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _first_failure(folder: Path, log: Path) -> TrainingFailed | None:
    failures = [read_json(path) for path in folder.glob("failures/*.json")]
    if not failures:
        return None
    first = min(failures, key=lambda failure: failure["time"])  # it makes the others fail
    told = f"{first['message']} ({first['error']} in process {first['process']}; {log} has the rest)"
    return TrainingFailed(told, first["error"])


def _last_words(log: Path, status: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"training ended with status {status} (killed, or out of memory?); {log} ends with: {last}"
