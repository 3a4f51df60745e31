"""What was estimated of a run beside what it took, as pages show it."""

from collections.abc import Mapping
from datetime import datetime

from asrlib.reporting.numbers import change, duration
from asrlib.runs import Run, read_json

UNCHANGED = "unchanged"  # the source of an estimate of nothing: the step is not to run


def estimated_steps(run: Run) -> dict[str, tuple[float, float]]:
    """(expected, taken) seconds of each step that was completed, after its estimate, just as it had been estimated.

    Left out are steps that ran with other parameters or other code, and those of which something was unknown.
    """
    path = run.path / "metrics" / "estimate.json"
    estimate = read_json(path) if path.is_file() else {"steps": {}}
    pairs = {}
    for name, step in estimate["steps"].items():
        marker = run.completed(name) or {"fingerprint": None}
        if marker["fingerprint"] != step["fingerprint"] or not step["whole"] or step["source"] == UNCHANGED:
            continue
        if datetime.fromisoformat(marker["time"]) >= datetime.fromisoformat(estimate["made"]):
            pairs[name] = step["seconds"], marker["seconds"]
    return pairs


def beside(pairs: Mapping[str, tuple[float, float]]) -> str | None:
    """`estimated 12 min 00 s (−16.7 %)`, to stand below the time that was taken; None of none."""
    expected, taken = _sums(pairs)
    return f"estimated {duration(expected)} ({change(taken, expected)})" if expected else None


def compared(pairs: Mapping[str, tuple[float, float]]) -> str | None:
    """`estimated 12 min 00 s, took 10 min 00 s (−16.7 %)` of the steps together; None of none."""
    expected, taken = _sums(pairs)
    if not expected:
        return None
    return f"estimated {duration(expected)}, took {duration(taken)} ({change(taken, expected)})"


def _sums(pairs: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    return sum(pair[0] for pair in pairs.values()), sum(pair[1] for pair in pairs.values())
