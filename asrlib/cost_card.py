"""What a run is expected to take, in words: before it, and beside what it took.

An estimate is what metrics/estimate.json of a run holds; estimate.py makes it. Times are seconds, memory bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from asrlib.figures import change, duration, size
from asrlib.runs import Run, read_json

MEASURED, BEFORE, UNCHANGED = "measured", "timed before", "unchanged"


@dataclass(frozen=True)
class Cost:
    """One thing that a step does, how long it takes, and how that is known: measured, scaled from …, unknown: …"""

    what: str
    seconds: float | None  # None: nothing tells
    source: str = MEASURED


def summed(costs: list[Cost]) -> dict:
    """{seconds, whole, source, costs}: the sum of what is known; `whole` where nothing else is missing."""
    known = [cost for cost in costs if cost.seconds is not None]
    kinds = dict.fromkeys(cost.source.partition(" from")[0] for cost in known)
    return {
        "seconds": sum(cost.seconds for cost in known),
        "whole": len(known) == len(costs),
        "source": " and ".join(kinds) or "unknown",
        "costs": [vars(cost) for cost in costs],
    }


def in_all(parts: Mapping[str, dict]) -> dict:
    """{seconds, whole} of several such sums."""
    seconds = sum(part["seconds"] for part in parts.values())
    return {"seconds": seconds, "whole": all(part["whole"] for part in parts.values())}


# ---- before the run ----------------------------------------------------------------------------------------


def as_text(estimate: dict) -> str:
    """The card that `run_all.py --estimate` prints."""
    where = f"on {estimate['device']}, {estimate['threads']} thread{'s' * (estimate['threads'] > 1)}"
    lines = [f"what {estimate['run']} is expected to take {where}; nothing has been run"]
    for name, member in estimate.get("members", {}).items():
        lines += ["", f"{name:<48}{_known(member):>14}", *_lines(member)]
    lines += ["", "compared"] if "members" in estimate else []
    lines += [*_lines(estimate), f"{'in all':<48}{_known(estimate):>14}"]
    lines += [f"missing: {reason}" for reason in estimate["missing"]]
    return "\n".join(lines)


def _lines(estimate: dict) -> Iterator[str]:
    for name, step in estimate["steps"].items():
        yield f"  {name:<46}{_known(step):>14}  {step['source']}"
        for cost in step["costs"]:
            time = "?" if cost["seconds"] is None else duration(cost["seconds"])
            yield f"    {cost['what']:<44}{time:>14}  {cost['source']}"
    for name, memory in estimate.get("memory", {}).items():
        yield f"  {'peak memory, ' + name:<46}{size(memory['bytes']):>14}  {memory['source']}"
    if cache := estimate.get("cache"):
        what = f"cache of {cache['frames']} frames, {cache['dtype']}"
        saved = change(cache["bytes"], cache["mha_bytes"])
        yield f"  {what:<46}{size(cache['bytes']):>14}  computed; MHA's is {size(cache['mha_bytes'])} ({saved})"


def _known(part: dict) -> str:
    return duration(part["seconds"]) if part["whole"] else f"> {duration(part['seconds'])}"


# ---- beside what it took -----------------------------------------------------------------------------------


def estimated_steps(run: Run) -> dict[str, tuple[float, float]]:
    """(expected, taken) seconds of each step that was completed, after its estimate, just as it had been estimated.

    Left out are steps that ran with other parameters or other code, and those of which something was unknown.
    """
    pairs = {}
    made, steps = _estimate_of(run)
    for name, step in steps.items():
        marker = run.completed(name)
        if not marker or "time" not in marker or marker["fingerprint"] != step["fingerprint"] or not step["whole"]:
            continue
        if step["source"] != UNCHANGED and datetime.fromisoformat(marker["time"]) >= datetime.fromisoformat(made):
            pairs[name] = step["seconds"], marker["seconds"]
    return pairs


def _estimate_of(run: Run) -> tuple[str, dict[str, dict]]:
    """(when it was made, its steps): the run's own, or else of a member that in its sweep's; no steps where none is."""
    own, sweep = (folder / "metrics" / "estimate.json" for folder in (run.path, run.path.parent))
    if own.is_file():
        estimate = read_json(own)
        return estimate["made"], estimate["steps"]
    estimate = read_json(sweep) if sweep.is_file() else {"made": ""}
    return estimate["made"], estimate.get("members", {}).get(run.path.name, {}).get("steps", {})


def compared(pairs: Mapping[str, tuple[float, float]]) -> str | None:
    """`estimated 12 min 00 s, took 10 min 00 s (−16.7 %)` of the steps together; None of none."""
    expected, taken = (sum(pair[i] for pair in pairs.values()) for i in (0, 1))
    if not expected:
        return None
    return f"estimated {duration(expected)}, took {duration(taken)} ({change(taken, expected)})"
