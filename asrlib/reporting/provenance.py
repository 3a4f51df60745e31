"""Where a run's figures come from: code, versions, machine, speech and parameters; noted by a step when it ends."""

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from asrlib.reporting.notebook_pages import PAGES
from asrlib.runs import Run, read_json


def versions() -> dict[str, str]:
    numbers = {"python": sys.version.split()[0]}
    for name in ("asrlib", "torch", "transformers", "datasets"):
        with suppress(metadata.PackageNotFoundError):
            numbers[name] = metadata.version(name)
    return numbers


def machine() -> str:
    """What this runs on: system, processor, cores, accelerators."""
    import torch

    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = named[1] if named else platform.processor() or platform.machine()
    return ", ".join([f"{platform.system()} {platform.machine()}", processor, f"{os.cpu_count()} cores", *gpus])


def commit(root: Path) -> str | None:
    """`git describe` of the project, with -dirty where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def parameters_of(run: Run) -> dict[str, str]:
    """What the run was asked for: params.json, otherwise what its steps say they were given."""
    path = run.path / "params.json"
    if path.is_file():
        given = read_json(path)
    else:
        given = {k: v for step in PAGES for k, v in (run.completed(step) or {}).get("parameters", {}).items()}
    return {name: str(value) for name, value in given.items()}


def provenance_of(run: Run, metrics: dict[str, dict]) -> dict[str, str]:
    """When, with which code and on what the run was made, as its last completed step says."""
    markers = [marker for step in PAGES if (marker := run.completed(step))]
    last = markers[-1] if markers else {}
    benchmark = metrics["benchmark"]
    before = metrics["baseline"]
    seeds = sorted({str(m["parameters"]["seed"]) for m in markers if "seed" in m.get("parameters", {})})
    speech = before.get("corpora", {}) | metrics.get("finetune", {}).get("corpora", {})
    facts = {
        "finished": last.get("time"),
        "commit": last.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in last.get("versions", {}).items()),
        "machine": last.get("machine"),
        "timed on": "{device}, {threads} threads, {dtype}".format(**benchmark) if benchmark else None,
        "seed": ", ".join(seeds),
        "base model": before.get("model"),
        "revision": before.get("revision"),
        "corpus": before.get("corpus"),
        **{
            f"speech, {split}": "{utterances:,} utterances; sha256 of ids, texts, durations: {fingerprint}".format(**of)
            for split, of in speech.items()
        },
    }
    return {name: str(value) for name, value in facts.items() if value}
