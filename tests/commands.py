"""The commands of asrlib, as somebody gives them."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from asrlib.__main__ import main


def command(verb: str) -> Callable[[Sequence[str]], int]:
    """`python -m asrlib VERB WORDS`, in this process: words → exit status."""
    return lambda words: main([verb, *map(str, words)])


def run_all(project: Path, *words: str, **process) -> subprocess.CompletedProcess:
    """`python run_all.py WORDS` in a process of its own, in the folder `project`."""
    command = [sys.executable, "run_all.py", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1200, **process)
