"""Values that no parameter may have are refused by what they are."""

from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from asrlib.running.parameter_limits import LIMITS


def checked(name: str, value):
    return TypeAdapter(Annotated[type(value), LIMITS[name]]).validate_python(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream_chunks_ms", []),
        ("stream_chunks_ms", [160, 320.5, None]),
        ("stream_left_seconds", [0.5, 10]),
        ("stream_caches", ["float32", "int4"]),
        ("benchmark_left_seconds", [600]),
        ("largest_chunk", 0),
        ("analysis_cuts", [0.5, 0.75]),
    ],
)
def test_what_is_possible_passes(name, value):
    assert checked(name, value) == value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stream_chunks_ms", [160, 0], "should hold numbers above 0 or null, not 0"),
        ("stream_chunks_ms", [True], "not True"),
        ("stream_chunks_ms", ["160"], "not '160'"),
        ("stream_left_seconds", [None], "should hold numbers above 0, not None"),
        ("stream_left_seconds", [float("nan")], "not nan"),
        ("stream_caches", ["float32", "int9"], "should be one of .* did you mean 'int8'"),
        ("benchmark_left_seconds", [-1], "not -1"),
        ("benchmark_seconds", [0], "should hold numbers above 0, not 0"),
        ("analysis_cuts", [0.5, 75], "should hold numbers above 0 and below 1, not 75"),
        ("analysis_cuts", [], "should hold numbers above 0 and below 1"),
        ("speeds", [1.0, float("inf")], "should hold numbers above 0, not inf"),
        ("largest_chunk", -1, "greater than or equal to 0"),
    ],
)
def test_what_is_impossible_is_refused(name, value, said):
    with pytest.raises(ValidationError, match=said):
        checked(name, value)
