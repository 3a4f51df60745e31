"""Numbers as text: the words and units in which pages, tables and terminals show them.

Every rate, difference, interval and p value is written here, so that they look alike everywhere. Arguments are as
metrics/*.json has them: error rates and their differences are fractions, memory is in bytes, time in seconds.
"""

import math
import re
from collections.abc import Sequence

from asrlib.measuring.names import SIGNIFICANT

UNKNOWN = "–"


def percent(fraction: float, digits: int = 2) -> str:
    """4.55 %."""
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float) -> str:
    """+0.26, −1.40, ±0.00: a difference of two rates, in points of per cent."""
    text = f"{100 * difference:+.2f}"
    return ("±0.00" if text in ("+0.00", "-0.00") else text).replace("-", "−")


def span(low: float, high: float, digits: int = 2) -> str:
    """1.20–1.30: from the least to the greatest of a quantity that is never negative."""
    return f"{low:.{digits}f}–{high:.{digits}f}"


def rate_interval(interval: Sequence[float] | None) -> str:
    """3.10–4.20: the interval of a rate, in per cent; a dash where it is not known."""
    if interval is None or _unknown(*interval):
        return UNKNOWN
    low, high = interval
    return span(100 * low, 100 * high)


def points_interval(interval: Sequence[float] | None) -> str:
    """−0.10 to +0.42: the interval of a difference, in points; a dash where it is not known."""
    return UNKNOWN if interval is None or _unknown(*interval) else " to ".join(map(points, interval))


def p_number(p: float | None) -> str:
    """0.25, < 0.001: a cell of a column of p values; a dash where there is none."""
    return UNKNOWN if p is None or _unknown(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_value(p: float) -> str:
    """p = 0.25, p < 0.001."""
    number = p_number(p)
    return f"p {number}" if number.startswith("<") else f"p = {number}"


def tested_points(
    difference: float,
    interval: Sequence[float],
    p: float | None = None,
    p_corrected: float | None = None,
    unit: str = "",
) -> str:
    """+1.00 (+0.10 to +2.00; p = 0.02): a difference with its interval and, where they are given, its p values.

    unit: stands behind the difference, as " points" does.
    """
    return f"{points(difference)}{unit} ({interval_with_p(interval, p, p_corrected)})"


def interval_with_p(interval: Sequence[float], p: float | None, p_corrected: float | None = None) -> str:
    """+0.10 to +2.00; p = 0.02, corrected p = 0.2. The corrected p is left out where it is p itself."""
    text = points_interval(interval)
    if p is not None and not _unknown(p):
        text += f"; {p_value(p)}"
    if p_corrected is not None and p_corrected != p:
        text += f", corrected {p_value(p_corrected)}"
    return text


def verdict(difference: float, p: float, p_corrected: float | None = None) -> str:
    """Whether the second of two systems is worse or better than the first, or neither for sure.

    p_corrected: p corrected for the number of tests, which decides where it is given.
    """
    if (p if p_corrected is None else p_corrected) < SIGNIFICANT:
        return "worse" if difference > 0 else "better"
    if p < SIGNIFICANT:
        return "not significant once all comparisons are counted"
    return "no significant difference"


def _unknown(*values: float | None) -> bool:
    return any(value is None or math.isnan(value) for value in values)


def change(value: float, reference: float) -> str:
    """−75 %, +3.5 %."""
    text = f"{100 * (value / reference - 1):+.1f}".removesuffix(".0")
    return ("±0" if text in ("+0", "-0") else text.replace("-", "−")) + " %"


def size(n_bytes: float) -> str:
    """97.66 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"


def duration(seconds: float) -> str:
    """12.3 s, 2 min 21 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def unbroken(text: str) -> str:
    """Keep a number with its unit, `p = 0.3` and `3.1–4.2` on one line of a page."""
    text = re.sub(r"(?<=\d) (?=(%|ms|s|[KMG]?i?B|M|min|h)(\W|$))", "\u00a0", text)
    text = re.sub(r"\bp ([=<]) ", "p\u00a0\\1\u00a0", text)
    return re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)
