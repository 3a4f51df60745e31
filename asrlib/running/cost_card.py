"""What a run is expected to take, in words: before it, and beside what it took.

An estimate is what metrics/estimate.json of a run holds; estimate.py makes it. Times are seconds, memory bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from asrlib.reporting.numbers import change, duration, size

MEASURED, BEFORE = "measured", "timed before"


@dataclass(frozen=True)
class Cost:
    """One thing that a step does, how long it takes, and how that is known: measured, scaled from …, unknown: …"""

    what: str
    seconds: float | None  # None: nothing tells
    source: str = MEASURED


def summed(costs: list[Cost]) -> dict:
    """{seconds, whole, source, costs}: the sum of what is known; `whole` where nothing else is missing."""
    known = [cost for cost in costs if cost.seconds is not None]
    return {
        "seconds": sum(cost.seconds for cost in known),
        "whole": len(known) == len(costs),
        "source": " and ".join(dict.fromkeys(cost.source.partition(" from")[0] for cost in known)) or "unknown",
        "costs": [vars(cost) for cost in costs],
    }


def in_all(parts: Iterable[dict]) -> dict:
    """{seconds, whole} of several such sums."""
    parts = list(parts)
    return {"seconds": sum(part["seconds"] for part in parts), "whole": all(part["whole"] for part in parts)}


def as_text(estimates: list[dict]) -> str:
    """The card that `run_all.py --estimate` prints: of a run, or of all members of a sweep and of their comparison."""
    first = estimates[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}"
    lines = [f"what is expected on {where}; nothing has been run"]
    if first["load"] > 1.5 * first["threads"]:
        lines.append(f"Other work was going on (load {first['load']:.1f}): on a quiet machine it takes less.")
    for estimate in estimates:
        lines += ["", _line(estimate["run"], _known(estimate)), *_lines(estimate)]
    lines += ["", _line("in all", _known(in_all(estimates)))] if len(estimates) > 1 else []
    reasons = dict.fromkeys(reason for estimate in estimates for reason in estimate["missing"])
    return "\n".join([*lines, *(f"missing: {reason}" for reason in reasons)])


def _lines(estimate: dict) -> Iterator[str]:
    for name, step in estimate["steps"].items():
        yield _line(f"  {name}", _known(step), step["source"])
        for cost in step["costs"]:
            time = "?" if cost["seconds"] is None else duration(cost["seconds"])
            yield _line(f"    {cost['what']}", time, cost["source"])
    for name, memory in estimate["memory"].items():
        yield _line(f"  peak memory, {name}", size(memory["bytes"]), memory["source"])
    if cache := estimate["cache"]:
        saved = f"{change(cache['bytes'], cache['mha_bytes'])} of MHA's {size(cache['mha_bytes'])}, by the formula"
        yield _line(f"  cache of {cache['frames']} frames, {cache['dtype']}", size(cache["bytes"]), saved)


def _line(what: str, amount: str, source: str = "") -> str:
    return f"{what:<56}{amount:>14}  {source}".rstrip()


def _known(part: dict) -> str:
    return duration(part["seconds"]) if part["whole"] else f"> {duration(part['seconds'])}"
