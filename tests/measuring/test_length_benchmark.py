"""What is tried at which length, and what is said of it: the clock says what the tests say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from commands import command
from torch import nn
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC, Wav2Vec2Processor
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerSelfAttention

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.features import log_mel
from asrlib.measuring import lengths as room
from asrlib.measuring import timing
from asrlib.measuring.lengths import benchmark_lengths, joined
from asrlib.measuring.names import IN_BLOCKS
from asrlib.measuring.random_models import PUBLISHED, RECOGNISER_SIZES, random_recognisers
from asrlib.models.registry import attention_modules
from asrlib.runs import read_json

main = command("lengths")

SPEECH = tiny.corpus(3)


class Listener(nn.Module):
    """Remembers how much it was given; `room_for` is the most it has memory for."""

    dtype = torch.float32
    config = SimpleNamespace(model_type="wav2vec2-conformer")

    def __init__(self, heard: list, name: str, reads: str = "input_values", room_for: int = 10**9):
        super().__init__()
        self.heard, self.name, self.main_input_name, self.room_for = heard, name, reads, room_for
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs_1S):
        self.heard.append((self.name, *inputs_1S.shape[1:]))
        if inputs_1S.shape[1] > self.room_for:
            raise torch.OutOfMemoryError("no more")
        return SimpleNamespace(logits=torch.zeros(1, inputs_1S.shape[1] // 320, 4))


@pytest.fixture
def clock(monkeypatch):
    """A clock that is told, by system and samples, how many milliseconds a pass takes; it counts the passes."""
    clock = SimpleNamespace(says=lambda name, samples: 10.0, timed=[], profiled=[])

    def milliseconds(work, device):
        work()
        clock.timed.append(clock.heard[-1])
        return clock.says(*clock.heard[-1][:2])

    def peak(work, device):
        work()
        clock.profiled.append(clock.heard[-1])
        return 100 * clock.heard[-1][1]

    clock.heard = []
    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    monkeypatch.setattr(room, "peak_memory_bytes", peak)
    return clock


def listeners(clock, *names: str, **settings) -> dict[str, Listener]:
    return {name: Listener(clock.heard, name, **settings) for name in names}


# ---- the audio ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 0.9, 7.0])
def test_utterances_are_joined_end_to_end(seconds):
    whole = np.concatenate([utterance.audio() for utterance in SPEECH] * 6)
    found = joined(SPEECH, seconds)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[: round(seconds * SAMPLE_RATE)])


# ---- what is measured --------------------------------------------------------------------------------------


def test_every_system_meets_every_length_and_they_take_turns(clock, processor):
    systems = listeners(clock, "a", "b", "c")
    ticks = iter(np.arange(100.0, 200.0))
    clock.says = lambda name, samples: next(ticks)
    result = benchmark_lengths(systems, processor, SPEECH, [2.0, 0.5, 1.0, 0.5], repeats=3)
    assert result["seconds"] == [0.5, 1.0, 2.0]
    samples = [8_000, 16_000, 32_000]
    rounds = [clock.timed[i : i + 3] for i in range(0, len(clock.timed), 3)]
    assert [one[0][1] for one in rounds] == [n for n in samples for _ in range(1 + 3)]  # one to warm up
    assert all({name for name, _ in one} == set(systems) and len({n for _, n in one}) == 1 for one in rounds)
    for n in samples:  # everyone has gone first
        assert {one[0][0] for one in rounds if one[0][1] == n} == set(systems)
    assert sorted(clock.profiled) == [(name, n) for name in systems for n in samples]

    measured: dict[str, list] = {name: [] for name in systems}
    for i, (name, _) in enumerate(clock.timed):
        measured[name].append(100.0 + i)
    for name, row in result["systems"].items():
        assert row["ms"] == [np.median(measured[name][i + 1 : i + 4]) for i in (0, 4, 8)]
        assert row["peak_memory_bytes"] == [100 * n for n in samples]
        assert row["stopped"] is None
    assert (result["device"], result["threads"], result["dtype"]) == ("cpu", torch.get_num_threads(), "float32")
    assert json.loads(json.dumps(result)) == result


def test_each_system_reads_what_its_processor_makes(clock, processor):
    systems = listeners(clock, "samples") | listeners(clock, "mel", "fine", reads="input_features")
    mel, fine = (Wav2Vec2Processor(log_mel(80, shift), processor.tokenizer) for shift in (10.0, 5.0))
    processors = {"samples": processor, "mel": mel, "fine": fine}
    benchmark_lengths(systems, processors, SPEECH, [1.0], repeats=1)
    assert set(clock.heard) == {("samples", 16_000), ("mel", 98, 80), ("fine", 196, 80)}
    with pytest.raises(ValueError, match="no processor for fine: give one to each system"):
        benchmark_lengths(systems, {"samples": processor, "mel": mel}, SPEECH, [1.0])


def test_a_long_pass_is_not_repeated(clock, processor):
    clock.says = lambda name, samples: 5001.0 if name == "slow" and samples >= 16_000 else 4999.0
    result = benchmark_lengths(listeners(clock, "slow", "quick"), processor, SPEECH, [0.5, 1.0], repeats=2)
    passes = [clock.timed.count(("slow", n)) for n in (8_000, 16_000)]
    assert passes == [3, 1] and clock.timed.count(("quick", 16_000)) == 3
    assert result["systems"]["slow"]["ms"] == [4999.0, 5001.0]
    assert result["systems"]["slow"]["stopped"] is None


def test_memory_of_long_audio_is_measured_where_that_is_quick(clock, processor, monkeypatch):
    monkeypatch.setattr(room, "PROFILED_AUDIO", 0.5)
    clock.says = lambda name, samples: 6000.0 if name == "slow" else 10.0
    result = benchmark_lengths(listeners(clock, "slow", "quick"), processor, SPEECH, [0.5, 1.0], repeats=1)
    assert result["systems"]["slow"]["peak_memory_bytes"] == [800_000, None]
    assert result["systems"]["quick"]["peak_memory_bytes"] == [800_000, 1_600_000]


# ---- limits ------------------------------------------------------------------------------------------------


def test_a_system_over_its_budget_is_not_tried_at_longer_lengths(clock, processor):
    clock.says = lambda name, samples: samples / (8 if name == "slow" else 80)  # 1 s of audio takes 2 s, 0.2 s
    systems, lengths = listeners(clock, "slow", "quick"), [0.5, 1.0, 1.5, 2.0]
    result = benchmark_lengths(systems, processor, SPEECH, lengths, repeats=1, budget_seconds=1.5)
    assert result["systems"]["slow"] == {
        "ms": [1000.0, 2000.0, None, None],
        "peak_memory_bytes": [800_000, 1_600_000, None, None],
        "stopped": {"seconds": 1.0, "reason": "time"},
    }
    assert result["systems"]["quick"]["ms"] == [100.0, 200.0, 300.0, 400.0]
    assert result["budget_seconds"] == 1.5
    assert max(shape for name, shape in clock.heard if name == "slow") == 16_000


def test_a_system_out_of_memory_is_not_tried_again(clock, processor):
    systems = listeners(clock, "large", room_for=16_000) | listeners(clock, "small")
    result = benchmark_lengths(systems, processor, SPEECH, [0.5, 1.0, 1.5, 2.0], repeats=2)
    assert result["systems"]["large"] == {
        "ms": [10.0, 10.0, None, None],
        "peak_memory_bytes": [800_000, 1_600_000, None, None],
        "stopped": {"seconds": 1.5, "reason": "memory"},
    }
    assert result["systems"]["small"]["ms"] == [10.0] * 4
    assert clock.heard.count(("large", 24_000)) == 1 and ("large", 32_000) not in clock.heard


def test_nothing_is_left_to_try(clock, processor):
    result = benchmark_lengths(listeners(clock, "a", room_for=1), processor, SPEECH, [0.5, 1.0])
    assert result["systems"]["a"]["ms"] == result["systems"]["a"]["peak_memory_bytes"] == [None, None]


def test_other_errors_are_not_taken_for_a_lack_of_memory(clock, processor, monkeypatch):
    def fail(self, inputs_1S):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Listener, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        benchmark_lengths(listeners(clock, "a"), processor, SPEECH, [0.5])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"systems": {}}, "at least one system"),
        ({"corpus": SPEECH[:0]}, "at least one system, one utterance"),
        ({"seconds": []}, "one length"),
        ({"repeats": 0}, "one repeat"),
        ({"seconds": [2.0, -1.0]}, "a length must be a positive number of seconds, not -1"),
    ],
)
def test_nothing_to_measure_is_refused(clock, processor, changes, said):
    usual = {"systems": listeners(clock, "a"), "processors": processor, "corpus": SPEECH, "seconds": [1.0]}
    with pytest.raises(ValueError, match=said):
        benchmark_lengths(**usual | changes)


def test_real_models_are_measured_without_a_stand_in(processor):
    result = benchmark_lengths({"tiny": tiny.conformer()}, processor, SPEECH, [0.5, 1.0], repeats=1)
    ms, peaks = (result["systems"]["tiny"][what] for what in ("ms", "peak_memory_bytes"))
    assert min(ms) > 0 and 0 < peaks[0] < peaks[1]


# ---- random weights ----------------------------------------------------------------------------------------


def test_recognisers_share_all_but_keys_and_values(monkeypatch):
    monkeypatch.setitem(RECOGNISER_SIZES, "published", tiny.conformer().config.to_dict())
    systems = random_recognisers("published", [2, 4])
    assert list(systems) == ["MHA by transformers", IN_BLOCKS, "MLA 8", "MLA 4"]
    first, *others = systems.values()
    theirs = dict(first.named_parameters())
    for other in others:
        ours = dict(other.named_parameters())
        assert all(ours[name] is theirs[name] for name in ours.keys() & theirs.keys())
        lost = theirs.keys() - ours.keys()
        assert all("linear_k" in name or "linear_v" in name for name in lost) and (other is others[0]) == (not lost)
    x_BS = torch.randn(1, 4000)
    with torch.no_grad():
        torch.testing.assert_close(others[0](x_BS).logits, first(x_BS).logits, rtol=1e-4, atol=1e-4)
    assert type(attention_modules(first)[0]) is Wav2Vec2ConformerSelfAttention


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(RECOGNISER_SIZES, "published", tiny.conformer().config.to_dict())
    out = tmp_path / "lengths.json"
    assert main(["--size", "published", "--seconds", "0.5", "--latents", "4", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "MLA 4" in printed and "MLA 8" not in printed and read_json(out)["seconds"] == [0.5]


def test_the_published_size_has_as_many_parameters_as_the_published_model():
    with torch.device("meta"):
        model = Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**PUBLISHED))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 618.6
