"""docs/parameters.md says what the notebooks say."""

from pathlib import Path

import pytest

from asrlib.running.parameter_limits import LIMITS, in_words
from asrlib.running.parameter_table import PAGE, main, table
from asrlib.running.parameters import Schema
from asrlib.runs import find_notebooks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """By name what the other columns say."""
    cells = [line.strip("| ").split(" | ") for line in table(ROOT).splitlines() if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells}


def test_the_table_is_up_to_date():
    if (ROOT / PAGE).read_text(encoding="utf-8") != table(ROOT):
        pytest.fail(f"{PAGE} is not what the notebooks say: run `make parameters`")


def test_every_parameter_has_a_row_that_says_what_it_means(rows):
    declared = Schema(find_notebooks(ROOT)).parameters.values()
    assert rows.keys() == {name for parameters in declared for name in parameters}
    assert [name for name, (_, _, meaning, *_) in rows.items() if not meaning.strip()] == []


def test_a_row_says_type_default_limits_and_who_takes_it(rows):
    kind, default, meaning, limits, notebooks = rows["cache_cut"]
    assert (kind, default, limits, notebooks) == ("float or null", "`null`", "more than 0, less than 1", "01")
    assert meaning == "share of the cache to save, instead of latent_dim"
    assert rows["layout"][3:] == ["one of joint, split", "01 02"]
    assert rows["run_dir"][3] == "set by run_all: name the run with --name"
    assert "; in 05: of the corpus; the first is used" in rows["eval_splits"][2]


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_can_be_put_in_words(name):
    assert in_words(LIMITS[name])


def test_it_is_printed_unless_it_shall_be_written(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([]) == 0
    assert capsys.readouterr().out == table(ROOT)
