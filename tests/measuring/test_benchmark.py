"""What is measured is what is reported: nothing here waits for a clock to be fast."""

import io
import json

import numpy as np
import pytest
import soundfile
import tiny
import torch
from transformers import (
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus, Utterance
from asrlib.measuring import timing
from asrlib.measuring.speed import benchmark_speed, spread_over_durations
from asrlib.measuring.timing import peak_memory_bytes
from asrlib.models.scratch import new_processor

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


def conformer(layers: int = 2) -> Wav2Vec2ConformerForCTC:
    config = Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        conv_dim=[8, 8, 8], conv_kernel=[10, 8, 4], conv_stride=[10, 8, 4], feat_extract_norm="layer",
        conv_depthwise_kernel_size=7, position_embeddings_type="relative", max_source_positions=200,
        num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2, vocab_size=32,
    )  # fmt: skip
    return Wav2Vec2ConformerForCTC(config)


def silence(seconds: float) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * SAMPLE_RATE)), SAMPLE_RATE, format="WAV")
    file.seek(0)
    return file


def corpus_of(durations) -> Corpus:
    rows = enumerate(durations)
    utterances = tuple(Utterance(f"u{i}", "a", "s", s, "memory", lambda s=s: silence(s)) for i, s in rows)
    return Corpus("silence", "test", utterances)


@pytest.fixture(scope="module")
def processor():
    return new_processor()


# ---- which utterances --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("durations", "n", "picked"),
    [
        ([3, 1, 2], None, [1, 2, 3]),
        ([3, 1, 2], 9, [1, 2, 3]),
        ([3, 1, 2], 1, [3]),
        ([5, 1, 2, 4, 3], 3, [1, 3, 5]),
        ([5, 1, 2, 4, 3], 2, [1, 5]),
        ([2, 2, 2], 2, [2, 2]),
    ],
)
def test_picks_cover_the_durations(durations, n, picked):
    sample = spread_over_durations(corpus_of(durations), n)
    assert [u.seconds for u in sample] == picked
    assert len({u.id for u in sample}) == len(picked)


@pytest.mark.parametrize("size", [1, 7, 10, 33])
def test_no_utterance_is_picked_twice(size):
    corpus = corpus_of(range(1, size + 1))
    for n in range(1, size + 1):
        assert len({u.id for u in spread_over_durations(corpus, n)}) == n


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one utterance, not 0"):
        spread_over_durations(corpus_of([1]), 0)


# ---- memory ------------------------------------------------------------------------------------------------


def zeros(megabytes: float) -> torch.Tensor:
    return torch.zeros(int(megabytes * MEGABYTE), dtype=torch.uint8)


def one_after_the_other():
    for _ in range(5):
        held = zeros(3)
        del held


def rising_then_falling():
    a, b = zeros(1), zeros(2)
    del a
    c = zeros(4)  # the peak: b and c
    del b
    return c, zeros(1)


def inside_an_operation():
    return torch.ones(MEGABYTE // 4).double().sum()  # 1 MB and its 2 MB copy


@pytest.mark.parametrize(
    ("work", "megabytes"),
    [(lambda: None, 0), (one_after_the_other, 3), (rising_then_falling, 6), (inside_an_operation, 3)],
)
def test_peak_memory_of_known_allocations(work, megabytes):
    assert peak_memory_bytes(work, CPU) == pytest.approx(megabytes * MEGABYTE, abs=1024)


def test_measuring_memory_is_silent(capfd):
    peak_memory_bytes(lambda: zeros(1), CPU)
    assert capfd.readouterr() == ("", "")


# ---- a whole benchmark -------------------------------------------------------------------------------------


def test_every_system_meets_every_utterance_and_they_take_turns(processor):
    systems = {"first": conformer(), "second": conformer(layers=1).train(), "third": conformer(layers=1)}
    passes, hooks = [], []
    for name, model in systems.items():
        record = lambda module, inputs, name=name: passes.append((name, inputs[0].shape[1] / SAMPLE_RATE))  # noqa: E731
        hooks.append(model.register_forward_pre_hook(record))
    result = benchmark_speed(systems, processor, corpus_of([0.5, 1.5, 1.0, 0.75]), warmup=2, repeats=3)
    for hook in hooks:
        hook.remove()

    warmup, timed, memory = passes[:6], passes[6:-3], passes[-3:]
    assert warmup == [(name, 1.5) for name in systems] * 2
    assert memory == [(name, 1.5) for name in systems]
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(rounds) == 3 * 4
    assert all({name for name, _ in r} == set(systems) and len({s for _, s in r}) == 1 for r in rounds)
    assert [r[0][1] for r in rounds] == [0.5, 1.5, 1.0, 0.75] * 3
    for seconds in (0.5, 1.5, 1.0, 0.75):  # everyone has gone first
        assert {r[0][0] for r in rounds if r[0][1] == seconds} == set(systems)
    assert systems["second"].training

    assert json.loads(json.dumps(result)) == result
    facts = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    assert facts.items() < result.items()
    assert (result["utterances"], result["seconds_audio"]) == (4, 3.75)
    assert list(result["systems"]) == list(result["latencies"]) == list(systems)
    assert {len(ms) for ms in result["latencies"].values()} == {4}


def test_numbers_against_an_explicit_loop(processor, monkeypatch):
    """The clock says what this list says; everything reported follows from it."""
    durations = [0.5, 1.0, 0.75, 0.6, 0.9]
    clock = np.random.default_rng(7).uniform(5, 50, size=(3, 5, 2))  # ms: repeat, utterance, turn
    ticks = iter(clock.flatten())
    monkeypatch.setattr(timing, "milliseconds", lambda work, device: next(ticks))
    systems = {"slow": conformer(), "quick": conformer(layers=1)}
    result = benchmark_speed(systems, processor, corpus_of(durations), warmup=0, repeats=3)

    measured = {"slow": [], "quick": []}
    for i in range(5):
        for who, name in enumerate(systems):
            measured[name].append(float(np.median([clock[r, i, (who + r + i) % 2] for r in range(3)])))
    for name in systems:
        assert result["latencies"][name] == pytest.approx(measured[name])

    generator = np.random.default_rng(0)
    means, ratios = [], []
    for _ in range(10_000):
        picks = generator.integers(5, size=5)
        slow, quick = (sum(measured[name][i] for i in picks) for name in systems)
        means.append(quick / 5)
        ratios.append(slow / quick)
    quick = result["systems"]["quick"]
    assert quick["latency_ms_mean"] == pytest.approx(sum(measured["quick"]) / 5)
    assert quick["latency_ms_p50"] == pytest.approx(sorted(measured["quick"])[2])
    assert quick["latency_ms_p95"] == pytest.approx(np.percentile(measured["quick"], 95))
    assert quick["latency_ms_interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert quick["rtfx"] == pytest.approx(sum(durations) / (sum(measured["quick"]) / 1000))
    assert quick["speed_ratio"] == pytest.approx(sum(measured["slow"]) / sum(measured["quick"]))
    assert quick["speed_ratio_interval"] == pytest.approx(np.percentile(ratios, [2.5, 97.5]))
    slow = result["systems"]["slow"]
    assert (slow["speed_ratio"], slow["speed_ratio_interval"]) == (1, [1, 1])


def test_size_and_memory_of_each_system(processor):
    systems = {"two layers": conformer(), "four layers": conformer(layers=4)}
    reports = [
        benchmark_speed(systems, processor, corpus_of(durations), warmup=1, repeats=1)["systems"]
        for durations in ([1.0], [0.5, 1.0], [2.0])
    ]
    again, longer = reports[1:]
    for name, layers in (("two layers", 2), ("four layers", 4)):
        report = reports[0][name]
        assert report["parameters"] == sum(p.numel() for p in systems[name].parameters())
        assert report["parameter_bytes"] == 4 * report["parameters"]
        assert report["cache_bytes_1000_frames"] == 1000 * 2 * 16 * layers * 4
        assert report["cache_bytes_per_second"] == 50 * 2 * 16 * layers * 4  # a stride of 320 samples
        peak = report["peak_memory_bytes"]
        assert peak == again[name]["peak_memory_bytes"]  # of the longest utterance, every time
        assert peak >= 8 * 1600 * 4  # what the first convolution gives: 8 channels, 1,600 steps
        assert peak < longer[name]["peak_memory_bytes"]


def test_each_system_reads_what_its_own_processor_makes(processor):
    raw = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), processor.tokenizer)
    systems, heard = {"normalised": conformer(), "raw": conformer()}, {"normalised": [], "raw": []}
    for name, model in systems.items():
        model.register_forward_pre_hook(lambda module, inputs, name=name: heard[name].append(inputs[0]))
    loud = Utterance("u", "a", "s", 0.5, "memory", lambda: tiny.wave(np.tile([0.5, 0.0], 4000)))
    speech = Corpus("square wave", "test", (loud,))
    benchmark_speed(systems, {"normalised": processor, "raw": raw}, speech, warmup=0, repeats=1)
    assert all(inputs_1S.mean().abs() < 1e-3 for inputs_1S in heard["normalised"])
    assert all(inputs_1S.mean() == 0.25 for inputs_1S in heard["raw"])
    with pytest.raises(ValueError, match="no processor for raw: give one to each system"):
        benchmark_speed(systems, {"normalised": processor}, speech)


def test_half_precision_halves_the_cache(processor):
    model = conformer()
    result = benchmark_speed({"model": model}, processor, corpus_of([0.5]), warmup=0, repeats=1, precision="bf16")
    assert result["dtype"] == "bfloat16"
    assert result["systems"]["model"]["cache_bytes_1000_frames"] == 1000 * 2 * 16 * 2 * 2
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("systems", "durations", "repeats"), [({}, [1], 1), ({"a": None}, [], 1), ({"a": None}, [1], 0)]
)
def test_nothing_to_measure_is_refused(processor, systems, durations, repeats):
    with pytest.raises(ValueError, match="at least one system, one utterance and one repeat"):
        benchmark_speed(systems, processor, corpus_of(durations), repeats=repeats)
