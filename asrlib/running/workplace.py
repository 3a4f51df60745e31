"""A run folder at work: locked for this process, with its log open."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from asrlib.runs import Run, remove_partial

LOCK_WAIT_SECONDS = 10.0  # an orphaned kernel notices within 1 s that its parent is gone
PROGRESS_LOG_SECONDS = 10.0  # a progress bar redraws itself ten times a second; the log keeps one line of it

log = logging.getLogger("asrlib.running.pipeline")


class RunLocked(RuntimeError):
    """Another process is at work in the run folder."""


class StepFailed(RuntimeError):
    """A notebook stopped with an error; the message shows it and says where the executed notebook is."""


@dataclass(frozen=True)
class Workplace:
    """A run folder that this process has locked, with its log open."""

    root: Path
    run: Run
    locks: tuple[
        int, ...
    ]  # file descriptors; a kernel inherits them, so that the folder stays locked until the kernel has ended
    log_file: TextIO


@contextmanager
def work_in(root: Path, run: Run, held: tuple[int, ...] = ()) -> Iterator[Workplace]:
    """Lock a run folder and open its log. `held`: the locks of a sweep that the run is part of. Raises RunLocked."""
    with locked(run) as lock, logged(run) as log_file:
        remove_partial(run.path)
        try:
            yield Workplace(root, run, (*held, lock), log_file)
        except BaseException as error:
            expected = isinstance(error, StepFailed | KeyboardInterrupt)
            log.error("%s", type(error).__name__, exc_info=not expected)
            raise


@contextmanager
def locked(run: Run) -> Iterator[int]:
    """Hold the lock of the run folder; yields its file descriptor. Waits for a kernel whose run was killed."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.path / ".lock", "a+", encoding="utf-8") as file:
        give_up = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner, _, machine = file.read().strip().partition(" on ")
                elsewhere = machine not in ("", socket.gethostname())
                if (not elsewhere and _alive(owner)) or time.monotonic() > give_up:
                    where = f" on {machine}" if elsewhere else ""
                    raise RunLocked(
                        f"{run.path} is in use by another run (process {owner}{where}): wait for it, or give this run "
                        "another name with --name"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file.fileno()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


class _LogFile(logging.FileHandler):
    """Appends every line with its time, and of a progress bar, which redraws one line, only a sample."""

    last_progress = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        *ended, rest = record.getMessage().split("\n")
        if "\r" in rest:
            if record.created - self.last_progress < PROGRESS_LOG_SECONDS:
                rest = ""
            else:
                self.last_progress = record.created
        for line in (*ended, rest):
            shown = [text for text in line.split("\r") if text.strip()][-1:]
            self.stream.writelines(f"{stamp} {text.rstrip()}\n" for text in shown)
        if record.exc_info:
            self.stream.write(logging.Formatter().formatException(record.exc_info) + "\n")
        self.flush()


@contextmanager
def logged(run: Run) -> Iterator[TextIO]:
    """Send our log, papermill's, and what kernels print to <run>/pipeline.log and to that of a sweep around it; yields
    the file."""
    handler = _LogFile(run.path / "pipeline.log", encoding="utf-8")
    loggers = [log, logging.getLogger("papermill"), logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield handler.stream
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = not log.handlers
        logging.captureWarnings(bool(log.handlers))
        handler.close()
