"""Numbers look alike wherever they are shown: one function for each kind, with its rounding and its signs."""

import ast
from pathlib import Path

import pytest

from asrlib.reporting import numbers
from asrlib.reporting.numbers import (
    change,
    duration,
    interval_with_p,
    p_number,
    p_value,
    percent,
    points,
    points_interval,
    rate_interval,
    size,
    span,
    unbroken,
    verdict,
)
from asrlib.reporting.numbers import (
    tested_points as with_test,
)

NAN = float("nan")
PACKAGE = Path(numbers.__file__).parents[1]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.04555), "4.55 %"),
        (percent(0.875, 1), "87.5 %"),
        (points(0.0026), "+0.26"),
        (points(-0.014), "−1.40"),
        (points(0.00004), "±0.00"),
        (points(-0.00004), "±0.00"),
        (points(0.0), "±0.00"),
        (span(1.2, 1.3), "1.20–1.30"),
        (span(10.06, 12, digits=1), "10.1–12.0"),
        (rate_interval([0.031, 0.042]), "3.10–4.20"),
        (rate_interval((0.0, 1.5)), "0.00–150.00"),
        (rate_interval(None), "–"),
        (rate_interval((NAN, NAN)), "–"),
        (points_interval((-0.001, 0.0042)), "−0.10 to +0.42"),
        (points_interval((0.0, 0.0)), "±0.00 to ±0.00"),
        (points_interval(None), "–"),
        (points_interval((NAN, 0.1)), "–"),
        (p_number(0.25), "0.25"),
        (p_number(0.0014), "0.0014"),
        (p_number(0.2549), "0.25"),
        (p_number(0.00099), "< 0.001"),
        (p_number(0.001), "0.001"),
        (p_number(1.0), "1"),
        (p_number(None), "–"),
        (p_number(NAN), "–"),
        (p_value(0.25), "p = 0.25"),
        (p_value(0.0), "p < 0.001"),
        (interval_with_p((0.001, 0.02), 0.02), "+0.10 to +2.00; p = 0.02"),
        (interval_with_p((0.001, 0.02), None), "+0.10 to +2.00"),
        (with_test(0.01, (0.001, 0.02), 0.02), "+1.00 (+0.10 to +2.00; p = 0.02)"),
        (with_test(-0.01, (-0.02, 0.0), 0.0001, unit=" points"), "−1.00 points (−2.00 to ±0.00; p < 0.001)"),
        (with_test(0.01, (0.001, 0.02)), "+1.00 (+0.10 to +2.00)"),
        (with_test(0.01, (0.001, 0.02), 0.02, 0.2), "+1.00 (+0.10 to +2.00; p = 0.02, corrected p = 0.2)"),
        (with_test(0.01, (0.001, 0.02), 0.02, 0.02), "+1.00 (+0.10 to +2.00; p = 0.02)"),
        (change(25, 100), "−75 %"),
        (change(103.5, 100), "+3.5 %"),
        (change(100.01, 100), "±0 %"),
        (size(1023), "1023 B"),
        (size(100_000), "97.66 KiB"),
        (size(3 * 2**30), "3 GiB"),
        (duration(59.94), "59.9 s"),
        (duration(141), "2 min 21 s"),
        (duration(11_100), "3 h 05 min"),
    ],
)
def test_a_number_as_text(written, expected):
    assert written == expected


@pytest.mark.parametrize(
    ("difference", "p", "corrected", "expected"),
    [
        (0.01, 0.049, None, "worse"),
        (-0.01, 0.049, None, "better"),
        (0.01, 0.05, None, "no significant difference"),
        (0.01, 0.01, 0.04, "worse"),
        (0.01, 0.01, 0.06, "not significant once all comparisons are counted"),
        (0.01, 0.3, 0.9, "no significant difference"),
    ],
)
def test_the_corrected_p_decides_where_there_is_one(difference, p, corrected, expected):
    assert verdict(difference, p, corrected) == expected


def test_numbers_stay_on_one_line_with_what_belongs_to_them():
    text = "12 % (3.10–4.20; p = 0.25) in 5 min, 7 words"
    kept_together = unbroken(text)
    assert kept_together.replace("\u00a0", " ").replace("\u2060", "") == text
    assert "12\u00a0%" in kept_together and "p\u00a0=\u00a00.25" in kept_together and "5\u00a0min" in kept_together
    assert "3.10\u2060–\u20604.20" in kept_together and "7 words" in kept_together


def strings_with_fields(path: Path) -> list[str]:
    """The f-strings and format strings of a file, as they stand there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    formatted = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    return formatted + [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_signed_points_and_p_values_are_written_nowhere_else():
    rooms = ("measuring", "reporting", "running", "export")
    files = [file for room in rooms for file in (PACKAGE / room).glob("*.py") if file.name != "numbers.py"]
    texts = {file.name: strings_with_fields(file) for file in files}
    assert len(texts) > 40
    others = {name: text for name, found in texts.items() for text in found if "+.2f" in text or "p = {" in text}
    assert others == {}
