"""What README shows is executed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from asrlib import load
from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import KINDS
from asrlib.models.registry import FAMILIES
from asrlib.runs import project_root
from asrlib.streaming.streams import Recognition

README = (project_root(Path(__file__).parent) / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def own_kind(capsys):
    """The names that README's example of an attention kind leaves behind, and what it prints."""
    section = README.split("## A kind of attention of your own")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {}
    try:
        exec(compile(code, "README.md", "exec"), names)
        yield names, capsys.readouterr().out
    finally:
        KINDS.pop("shared_kv", None)


def test_a_kind_of_attention_of_ones_own_computes_caches_saves_and_loads(own_kind, tmp_path):
    names, printed = own_kind
    assert int(printed) == 1000 * 4 * 128 * 4
    model = names["model"].eval()
    model.save_pretrained(tmp_path)
    names["processor"].save_pretrained(tmp_path)
    features = torch.randn(1, 60, 80)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)[0](features).logits, model(features).logits)
    recognition = Recognition(model, names["processor"], Chunks(5, 10))
    assert len([*recognition.hear(np.zeros(16_000, np.float32)), *recognition.finish()]) == 5
    assert sum(recognition.streams.attention_bytes) == recognition.streams.formula_bytes > 0


def test_every_fault_in_the_table_names_a_test_that_there_is():
    section = README.split("## What goes wrong, and what is lost")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", section)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(named) == len(rows) > 10
    for file, name in named:
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), name


def test_every_cell_of_families_names_a_test_that_there_is():
    tests = Path(__file__).parent
    page = (project_root(tests) / "FAMILIES.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+\.py)", page)) <= {file.name for file in tests.glob("test_*.py")}
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", page))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), name
    families = set(re.findall(r"`([\w-]+)`", " ".join(line.split("|")[1] for line in page.splitlines() if "|" in line)))
    assert {name.removesuffix("-mla") for name in FAMILIES} <= families
