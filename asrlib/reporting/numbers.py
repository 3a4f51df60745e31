"""Numbers as text: the words and units in which pages, tables and terminals show them."""

import re
from collections.abc import Sequence


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


def change(value: float, reference: float) -> str:
    """−75 %, +3.5 %."""
    text = f"{100 * (value / reference - 1):+.1f}".removesuffix(".0")
    return ("±0" if text in ("+0", "-0") else text.replace("-", "−")) + " %"


def size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def unbroken(text: str) -> str:
    """Keep a number with its unit, `p = 0.3` and `3.1–4.2` on one line of a page."""
    text = re.sub(r"(?<=\d) (?=(%|ms|s|[KMG]?i?B|M|min|h)(\W|$))", "\u00a0", text)
    text = re.sub(r"\bp ([=<]) ", "p\u00a0\\1\u00a0", text)
    return re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)


def in_per_cent(interval: Sequence[float] | None, form: str = ".2f") -> str:
    """An interval of fractions, written in per cent or points."""
    return "–" if interval is None else " to ".join(format(100 * end, form) for end in interval).replace("-", "−")


def in_points(change: float) -> str:
    """A change of a fraction, in points, with the minus sign, as wide as the plus."""
    return f"{100 * change:+.2f}".replace("-", "−")
