"""Models beside themselves, compiled: what is said is what the clock says, and what they compute is the same."""

import pytest
import tiny
import torch

from asrlib.measuring import speed as room
from asrlib.measuring import timing
from asrlib.measuring.speed import compiled_beside_eager
from asrlib.models.scratch import new_processor
from asrlib.reporting.benchmark_tables import compiled_table
from asrlib.running.preflight import check_surroundings
from asrlib.runs import BadParameter


@pytest.fixture(scope="module")
def measured():
    systems = {"baseline": tiny.encoder(), "finetuned": tiny.encoder(attention="mla_simple", latent_dim=[5, 8])}
    told = {"baseline": 20.0, "baseline, compiled": 10.0, "finetuned": 30.0, "finetuned, compiled": 45.0}
    asked = []

    def take_turns(passes, turn, device):
        asked.append((list(passes), turn))
        for one in passes.values():
            one()
        return {name: told[name] * (1 + (turn == 0)) for name in passes}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "take_turns", take_turns)
        processor = new_processor("conformer", mel_bins=tiny.MEL_BINS)
        found = compiled_beside_eager(systems, processor, tiny.corpus(5), rounds=3, backend="aot_eager")
    return found, asked


def test_each_model_is_timed_beside_itself_in_the_same_rounds(measured):
    found, asked = measured
    assert len(asked) == 3 * len(found["seconds"]) == 6
    assert {tuple(names) for names, _ in asked} == {
        ("baseline", "finetuned", "baseline, compiled", "finetuned, compiled")
    }
    assert {turn for _, turn in asked} == set(range(4)), "who goes first changes"
    for name, eager, compiled in (("baseline", 20.0, 10.0), ("finetuned", 30.0, 45.0)):
        row = found["systems"][name]
        assert row["eager_ms"] == [eager] * 2 and row["compiled_ms"] == [compiled] * 2
        assert row["ratio"] == compiled / eager and row["ratio_range"] == [compiled / eager] * 2


def test_lengths_are_those_of_the_shortest_and_the_longest_utterance(measured):
    seconds = sorted(utterance.seconds for utterance in tiny.corpus(5))
    assert measured[0]["seconds"] == [seconds[0], seconds[-1]]


def test_what_is_compiled_computes_the_same(measured):
    for row in measured[0]["systems"].values():
        assert row["largest_difference"] < 1e-5 and row["compiling_seconds"] > 0


def test_the_table_has_a_row_of_each_and_says_what_the_brackets_are(measured):
    table, caption = compiled_table(measured[0])
    assert list(table.index) == [
        "baseline (MHA)", "baseline (MHA), compiled", "fine-tuned (MLA)", "fine-tuned (MLA), compiled",
    ]  # fmt: skip
    assert table["time, of the eager one's"].tolist() == ["–", "×0.50 (0.50–0.50)", "–", "×1.50 (1.50–1.50)"]
    assert "the least and the greatest ratio of a round" in caption and "aot_eager" in caption


def test_a_difference_of_what_is_compiled_is_told(monkeypatch):
    def other(model, **_):
        wrong = tiny.conformer()
        with torch.no_grad():
            wrong.lm_head.bias += 1
        return wrong

    monkeypatch.setattr(torch, "compile", other)
    found = compiled_beside_eager({"a": tiny.conformer()}, new_processor(), tiny.corpus(1), rounds=1, backend="any")
    assert found["systems"]["a"]["largest_difference"] == pytest.approx(1, abs=1e-5)


def test_without_a_compiler_a_run_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"needs a C\+\+ compiler"):
        compiled_beside_eager({"a": tiny.conformer()}, new_processor(), tiny.corpus(1))
    with pytest.raises(BadParameter, match=r"needs a C\+\+ compiler for the CPU, and there is none on PATH: install g"):
        check_surroundings({"benchmark_compiled": True, "device": "cpu"})
    check_surroundings({"benchmark_compiled": False, "device": "cpu"})
