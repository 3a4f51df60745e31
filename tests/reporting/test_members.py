"""The members of a sweep side by side: what is read, what is tested, what is said, and the notebooks that show it."""

import json
import math
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import soundfile
import tiny
from bs4 import BeautifulSoup

from asrlib.conversion.convert import convert
from asrlib.measuring.entries import UNCONVERTED, entries_of
from asrlib.measuring.systems import load_systems
from asrlib.measuring.word_errors import score, write_predictions
from asrlib.models.scratch import new_model, new_processor
from asrlib.reporting import answers as room
from asrlib.reporting import member_tables, pages
from asrlib.reporting.answers import answers, crossover, multiplicity
from asrlib.reporting.benchmark_tables import (
    lengths_introduction,
    lengths_table,
    speed_sentence,
    speed_table,
    state_table,
)
from asrlib.reporting.figure_captions import caption_of, heading_of
from asrlib.reporting.figures import save_figure
from asrlib.reporting.member_figures import figures_of, lengths_figure, looks, looks_of_run
from asrlib.reporting.members import compare_members, pairs_to_test, short_names, varied_parameters
from asrlib.runs import MissingStep, Run, is_member, is_sweep, write_json
from asrlib.streaming.streams import what_is_kept

ROOT = Path(__file__).parents[2]
TINY = dict(hidden_size=32, num_layers=2, num_heads=4, subsampling_channels=8)
RATES = {"mha": 0.1, "mla": 0.1, "gqa": 0.2, "linear": 0.3}  # share of words that are wrong
CACHES = {"mha": 400_000, "mla": 100_000, "gqa": 100_000, "linear": 5_000}  # bytes
EIGHT = [f"{encoder}_{kind}_tiny" for encoder in ("conformer", "branchformer") for kind in RATES]


# ---- a sweep with made-up metrics --------------------------------------------------------------------------


def transcripts(rate: float, utterances: int = 60) -> list[dict]:
    """Ten words each, of which the first `rate` · 10 are wrong, a little more or less in every third utterance."""
    said = []
    for i in range(utterances):
        wrong = round(10 * rate) + (i % 3 == 1) - (i % 3 == 2 and rate > 0)
        words = [f"w{i}{j}" for j in range(10)]
        said.append({"id": str(i), "speaker": "s", "seconds": 2.0, "reference": " ".join(words)})
        said[-1]["hypothesis"] = " ".join(["x"] * wrong + words[wrong:])
    return said


def evaluated(run: Run, system: str, rates: dict[str, float]) -> dict:
    """Transcripts of that share of wrong words on every split, and what metrics say of them."""
    scores = {}
    for split, rate in rates.items():
        write_predictions(run.predictions / f"{system}_{split}.jsonl", transcripts(rate))
        scores[split] = score(transcripts(rate)).as_metrics()
    return scores


def trained(rate: float, seconds: float = 120.0) -> dict:
    history = [{"step": 10 * k, "epoch": k, "eval_wer": max(rate, 1 / (1 + k))} for k in range(4)]
    return {"history": history, "seconds": seconds, "steps": 30, "best_step": 30, "best_wer": rate}


def member(run: Run, encoder: str, kind: str, rate: float | None = None, **parameters) -> Run:
    rate = RATES[kind] if rate is None else rate
    splits = evaluated(run, "baseline", {"test-clean": rate, "test-other": 2 * rate})
    write_json(run.path / "params.json", {"architecture": encoder, "attention": kind, "seed": 0, **parameters})
    facts = {"model": encoder, "model_type": "speech-encoder", "attention": kind, "parameters": 2_000_000}
    run.write_metrics("baseline", facts | {"splits": splits, "training": trained(rate)})
    run.mark_started("00_baseline", "f")
    run.mark_completed("00_baseline", "f", seconds=130.0)
    (run.path / "index.html").touch()
    return run


def described(encoder: str, kind: str, cache: int | None = None) -> dict:
    cache = cache or CACHES[kind]
    counted = {
        "frames": 100,
        "bytes": cache,
        "formula_bytes": cache,
        "convolution_bytes": 64,
        "tensors": [[1, 100, 16]],
    }
    return {
        "encoder": encoder, "attention": kind, "layers": 2, "hidden_size": 32, "cache_bytes": cache,
        "mha_cache_bytes": CACHES["mha"], "counted": counted,
    }  # fmt: skip


def timing(ms: float, cache: int, ratio: float = 1.0) -> dict:
    return {
        "parameters": 2_000_000, "latency_ms_mean": ms, "latency_ms_p95": 2 * ms, "rtfx": 1000 / ms,
        "latency_ms_interval": [0.9 * ms, 1.1 * ms], "speed_ratio": ratio, "speed_ratio_interval": [ratio, ratio + 0.1],
        "peak_memory_bytes": 10 * cache, "cache_bytes_per_second": cache // 30, "cache_bytes_1000_frames": cache,
    }  # fmt: skip


def timed(run: Run, members: dict[str, dict]) -> None:
    """metrics/benchmark.json of members, described as given; linear attention is the faster from 20 s on."""
    seconds = [5, 10, 40]
    rows = {}
    for name, facts in members.items():
        linear = facts["attention"] == "linear"
        ms = [20.0, 40.0, 160.0] if linear else [10.0, 20.0, 320.0]
        rows[name] = {"ms": ms, "peak_memory_bytes": [100 * s for s in seconds], "stopped": None}
    systems = {
        name: timing(10.0 + i, 0 if facts["attention"] == "linear" else facts["cache_bytes"], 1 / (1 + i))
        for i, (name, facts) in enumerate(members.items())
    }
    lengths = {"seconds": seconds, "systems": rows, "budget_seconds": 60.0}
    circumstances = {"device": "cpu", "threads": 1, "dtype": "float32", "utterances": 4, "seconds_audio": 9.0}
    run.write_metrics("benchmark", circumstances | {"systems": systems, "members": members, "lengths": lengths})


@pytest.fixture
def eight(tmp_path) -> Run:
    run = Run(tmp_path / "eight")
    write_json(run.path / "params.json", {"sweep": EIGHT, "benchmark_samples": 4})
    kinds = {name: tuple(name.split("_")[:2]) for name in EIGHT}
    for name, (encoder, kind) in kinds.items():
        member(Run(run.path / name), encoder, kind)
    timed(run, {name: described(*of) for name, of in kinds.items()})
    return run


@pytest.fixture
def widths(tmp_path) -> Run:
    run, rates = Run(tmp_path / "widths"), {4: 0.4, 16: 0.2, 64: 0.1}
    names = {width: f"latent_dim-{width}" for width in rates}
    write_json(run.path / "params.json", {"sweep": {"latent_dim": list(rates)}})
    for width, rate in rates.items():
        member(Run(run.path / names[width]), "conformer", "mla", rate, latent_dim=width)
    timed(run, {name: described("conformer", "mla", 1000 * width) for width, name in names.items()})
    return run


@pytest.fixture
def converted(tmp_path) -> Run:
    """Two members made of one trained model, the second of them fine-tuned."""
    run = Run(tmp_path / "converted")
    write_json(run.path / "params.json", {"sweep": {"latent_dim": [8, 16]}})
    for width in (8, 16):
        one = member(Run(run.path / f"latent_dim-{width}"), "speech-encoder", "mha", 0.1, latent_dim=width)
        systems = {"baseline": one.read_metrics("baseline")["splits"]}
        systems["converted"] = evaluated(one, "converted", {"test-clean": 0.3, "test-other": 0.6})
        one.write_metrics("convert", {"cache_cut": 1 - width / 64, "parameters": 1_900_000})
        if width == 16:
            systems["finetuned"] = evaluated(one, "finetuned", {"test-clean": 0.1, "test-other": 0.2})
            one.write_metrics("finetune", trained(0.1, seconds=30.0))
        one.write_metrics("evaluate", {"systems": systems})
    return run


# ---- what is read ------------------------------------------------------------------------------------------


def test_the_table_is_read_from_metrics_and_sorted_by_word_errors(eight):
    found = compare_members(eight, EIGHT)
    table = found.table
    assert found.splits == ["test-clean", "test-other"]
    assert list(table["wer_test-clean"]) == sorted(table["wer_test-clean"]) and len(table) == 8
    row = table.loc["branchformer_gqa_tiny"]
    assert (row["encoder"], row["attention"], row["system"]) == ("branchformer", "gqa", "baseline")
    assert row["cache_cut"] == 0.75 and row["cache_bytes"] == 100_000 and row["counted_bytes"] == 100_000
    assert row["wer_test-clean"] == pytest.approx(0.2) and row["wer_test-clean_low"] < 0.2 < row["wer_test-clean_high"]
    assert row["training_seconds"] == 120 and row["epochs"] == 3 and row["validation_wer"] == 0.2
    assert row["latency_ms"] == 16.0 and row["reference"] == "branchformer_mha_tiny"
    assert table["reference"].isna().sum() == 2, "multi-head attention is compared with nothing"


def test_without_a_benchmark_there_is_still_a_table(eight):
    (eight.path / "metrics" / "benchmark.json").unlink()
    table = compare_members(eight, EIGHT, test=False).table
    assert list(table.at["branchformer_linear_tiny", column] for column in ("encoder", "attention")) == [
        "branchformer",
        "linear",
    ]
    assert table["cache_bytes"].isna().all() and table["latency_ms"].isna().all() and table["parameters"].notna().all()


def test_a_converted_member_is_its_last_model_beside_what_it_was_made_of(converted):
    members = ["latent_dim-8", "latent_dim-16"]
    entries = {entry.name: entry for entry in entries_of(converted, members)}
    assert list(entries) == [*members, UNCONVERTED], "both were made of one model"
    assert [entry.system for entry in entries.values()] == ["converted", "finetuned", "baseline"]
    found = compare_members(converted, members)
    assert found.table["wer_test-clean"].to_dict() == pytest.approx(
        {"latent_dim-16": 0.1, UNCONVERTED: 0.1, "latent_dim-8": 0.3}
    )
    assert list(found.table.loc[members, "reference"]) == [UNCONVERTED, UNCONVERTED]
    assert list(found.trainings) == ["latent_dim-16", UNCONVERTED], "a conversion is no training"
    assert found.test(UNCONVERTED, "latent_dim-8", "test-clean")["difference"] == pytest.approx(0.2)
    assert found.table.at["latent_dim-8", "parameters"] == 1_900_000

    splits = converted.path / "latent_dim-8" / "metrics" / "baseline.json"
    write_json(splits, json.loads(splits.read_text()) | {"revision": "another"})
    assert [entry.name for entry in entries_of(converted, members)][2:] == [UNCONVERTED, f"{UNCONVERTED} 2"]


def test_names_without_what_all_have_in_common():
    assert list(short_names(["a_mha_small", "a_mla_small"]).values()) == ["mha", "mla"]
    assert list(short_names(["conformer_mha", "branchformer_mha_wide"]).values()) == [
        "conformer_mha",
        "branchformer_mha_wide",
    ]
    assert list(short_names(["latent_dim-16", "latent_dim-18", UNCONVERTED]).values()) == [
        "latent_dim-16",
        "latent_dim-18",
        UNCONVERTED,
    ]
    encoders = ("conformer", "branchformer")
    combined = [f"architecture-{encoder}_attention-{kind}" for encoder in encoders for kind in RATES]
    assert list(short_names(combined).values()) == [name.removesuffix("_tiny") for name in EIGHT]
    assert short_names(["a_mha"]) == {"a_mha": "a_mha"}


def test_parameters_in_which_members_differ_alone(widths, eight):
    names = ["latent_dim-64", "latent_dim-4", "latent_dim-16"]
    assert varied_parameters(entries_of(widths, names)) == {"latent_dim": [sorted(names, key=lambda n: int(n[11:]))]}
    assert varied_parameters(entries_of(eight, EIGHT)) == {}, "attention is no number"


def test_folders_of_sweeps_and_of_their_members(eight, tmp_path):
    assert is_sweep(eight.path) and is_member(eight.path / EIGHT[0]) and not is_sweep(eight.path / EIGHT[0])
    assert not is_member(eight.path) and not is_sweep(tmp_path / "nowhere")
    (eight.path / "params.json").unlink()
    assert is_sweep(eight.path)


# ---- what is tested ----------------------------------------------------------------------------------------


def test_pairs_are_those_that_tell_something(eight):
    pairs = pairs_to_test(compare_members(eight, EIGHT, test=False).table)
    asked = {question: [(a, b) for q, a, b in pairs if q == question] for question, *_ in pairs}
    assert {question: len(found) for question, found in asked.items()} == {"reference": 6, "cache": 2, "encoder": 4}
    assert ("conformer_gqa_tiny", "conformer_mla_tiny") in asked["cache"]
    assert ("conformer_linear_tiny", "branchformer_linear_tiny") in asked["encoder"]


def test_gqa_is_compared_with_the_latent_attention_nearest_in_cache(eight):
    table = compare_members(eight, EIGHT, test=False).table
    wide = table.loc[["conformer_mla_tiny"]].assign(cache_bytes=250_000).rename(index=lambda _: "wide")
    pairs = pairs_to_test(pd.concat([wide, table]))
    assert [b for question, a, b in pairs if (question, a) == ("cache", "conformer_gqa_tiny")] == ["conformer_mla_tiny"]
    wider = table.assign(cache_bytes=table["cache_bytes"].where(table.index != "conformer_gqa_tiny", 250_000))
    pairs = pairs_to_test(pd.concat([wide, wider]))
    assert [b for question, a, b in pairs if (question, a) == ("cache", "conformer_gqa_tiny")] == ["wide"]


def test_tests_are_paired_and_corrected_on_each_split(eight):
    tests = compare_members(eight, EIGHT).tests
    assert len(tests) == 24 and (tests["p_holm"] >= tests["p"]).all()
    of = tests.set_index(["a", "b", "split"])
    same = of.loc[("conformer_mha_tiny", "conformer_mla_tiny", "test-clean")]
    assert same["difference"] == 0 and same["p"] == 1 and same["p_holm"] == 1
    worse = of.loc[("conformer_mha_tiny", "conformer_linear_tiny", "test-other")]
    assert worse["difference"] == pytest.approx(0.4) and worse["p_holm"] < 0.05


def test_members_of_other_utterances_are_not_tested(eight):
    write_predictions(eight.path / EIGHT[1] / "predictions" / "baseline_test-clean.jsonl", transcripts(0.1, 30))
    found = compare_members(eight, EIGHT)
    assert found.test(EIGHT[0], EIGHT[1], "test-clean") is None
    assert found.test(EIGHT[0], EIGHT[1], "test-other") is not None


# ---- what is said ------------------------------------------------------------------------------------------


def test_the_headline_says_who_is_best_and_what_may_be_saved(eight, widths):
    sentence = member_tables.headline(compare_members(eight, EIGHT))
    assert "has the lowest WER on test-clean of 8 recognisers, 10.00 %" in sentence
    assert "mla_tiny: 75.0 % less than MHA keeps of 30 s, ±0.00 points" in sentence
    names = [f"latent_dim-{width}" for width in (4, 16, 64)]
    sentence = member_tables.headline(compare_members(widths, names))
    assert sentence.startswith("latent_dim-64 has the lowest WER on test-clean of 3 recognisers")
    assert "every smaller state raised it significantly somewhere (2 comparisons" in sentence
    assert "that of latent_dim-16 least: 96.0 % less than MHA keeps of 30 s, +10.00 points" in sentence
    assert member_tables.headline(compare_members(eight, [])) == "No word error rate has been measured yet."


def test_a_state_that_raised_errors_on_one_split_alone_is_not_said_to_have_raised_none(eight):
    assert "against conformer_mha_tiny on any split is that of conformer_mla_tiny" in member_tables.headline(
        compare_members(eight, EIGHT)
    )
    spoilt = eight.path / "conformer_mla_tiny" / "predictions" / "baseline_test-other.jsonl"
    write_predictions(spoilt, transcripts(0.9, 60))
    assert "is that of conformer_mla_tiny" not in member_tables.headline(compare_members(eight, EIGHT))


def test_every_question_is_answered_from_the_figures(eight):
    found = compare_members(eight, EIGHT)
    smaller, cost, grouped, linear, encoders = answers(found).values()
    assert "97.66 KiB of 30 s of audio, where MHA in this encoder keeps 390.6 KiB: −75 %" in smaller
    assert "that a stream held in float32" in smaller and "formula's bytes exactly, in all 2 members" in smaller
    assert "Against MHA in the same encoder, 0 of 4 comparisons are significantly worse" in cost
    assert grouped.startswith("**MLA**, significantly in 4 of 4 comparisons") and "keep 97.66 KiB each" in grouped
    assert linear.startswith("**It costs word errors**: 4 of 4 comparisons") and "by +20.00 to +40.00 points" in linear
    assert "faster than conformer_mha from about 20 s on" in linear and "at 40 s ×2.00" in linear
    assert "as much as MHA after 0.38 s" in linear
    assert encoders.startswith("**Not decided**") and "2.00 M parameters → 2.00 M parameters (±0 %)" in encoders
    assert "12 paired comparisons on each split" in multiplicity(found) and "Holm" in multiplicity(found)
    assert "one seed" in member_tables.how_to_read(found)


def test_questions_that_the_members_cannot_answer_say_so(widths, eight):
    found = compare_members(widths, ["latent_dim-4", "latent_dim-16", "latent_dim-64"])
    _, cost, grouped, linear, encoders = answers(found).values()
    assert "Against the largest state (no member has MHA), 4 of 4" in cost
    assert grouped == "No member has GQA: the attention here is MLA."
    assert linear == "No member has linear attention: the attention here is MLA."
    assert encoders == "All members have one encoder, conformer: nothing to compare."
    alone = compare_members(eight, ["conformer_linear_tiny"])
    smaller, cost, _, linear, _ = answers(alone).values()
    assert smaller == cost == "No member has MLA: the attention here is linear."
    assert "30.00 % on test-clean, 60.00 % on test-other, with nothing to be compared with" in linear
    assert multiplicity(alone).startswith("No two members")


def test_a_count_that_differs_from_the_formula_is_said(eight):
    path = eight.path / "metrics" / "benchmark.json"
    measured = json.loads(path.read_text())
    measured["members"]["conformer_mla_tiny"]["counted"]["bytes"] = 7
    write_json(path, measured)
    said = answers(compare_members(eight, EIGHT))["How much smaller does MLA make the state?"]
    assert "differ from the formula's: conformer_mla_tiny 7 B instead of 97.66 KiB" in said


@pytest.mark.parametrize(
    ("slow", "fast", "length"),
    [
        ([1, 4, 16], [2, 4, 8], 20),  # equal there, ahead from then on
        ([1, 2, 16], [2, 4, 8], 20 * math.sqrt(2)),
        ([1, 1, 1], [2, 2, 2], None),
        ([2, 2, 2], [1, 1, 1], 10),
        ([2, 1, 4], [1, 2, 2], 20 * math.sqrt(2)),  # ahead, behind, ahead
        ([1, 1, None], [2, 2, 2], 40),  # the slow one was given up
        ([1, None, None], [2, None, None], None),
        ([1, 4, 16], [2, 2, None], 10 * math.sqrt(2)),
        ([None, 1, 1], [None, 2, 2], None),
    ],
)
def test_the_crossover_is_where_the_lines_meet(slow, fast, length):
    found = crossover([10, 20, 40], slow, fast)
    assert found is None if length is None else found == pytest.approx(length)


def test_significant_is_what_remains_so_among_all_comparisons():
    test = pd.Series({"difference": 0.01, "low": 0.001, "high": 0.02, "p": 0.02, "p_holm": 0.2})
    assert member_tables.verdict_of(test) == "not significant once all comparisons are counted"
    assert member_tables.verdict_of(test.replace(0.2, 0.03)) == "worse"
    assert member_tables.tested(test) == "+1.00 points (+0.10 to +2.00; p = 0.02, corrected p = 0.2)"
    rows = pd.DataFrame([test, test.replace({0.2: 0.01})])
    assert room._winner(rows, "A", "B") == "**A**, significantly in 1 of 2 comparisons; the others decide nothing."
    assert room._winner(rows.iloc[:1], "A", "B") == "**Not decided**."


def test_what_a_benchmark_says(eight):
    measured = eight.read_metrics("benchmark")
    assert speed_sentence(measured).startswith("The fastest is conformer_mha_tiny, 10.0 ms per utterance, the slowest")
    assert speed_table(measured).at["conformer_linear_tiny", "cache per second"] == "0 B"
    assert state_table(measured["members"]).at["conformer_mla_tiny", "of MHA's"] == "25.0 %"


def test_why_curves_end_is_said_once_for_all_that_end_alike(eight):
    lengths = eight.read_metrics("benchmark")["lengths"]
    assert "longer than that" not in lengths_introduction(lengths) and "profiler" not in lengths_introduction(lengths)

    def end(name, reason):
        row = lengths["systems"][name]
        row["stopped"], row["ms"][2] = {"seconds": 10, "reason": reason}, None
        row["peak_memory_bytes"][1:] = [None, None]

    end(EIGHT[0], "time")
    end(EIGHT[1], "memory")
    said = lengths_introduction(lengths)
    assert "At 10 s conformer_mha took longer than that." in said
    assert "At 10 s conformer_mla ran out of memory." in said
    assert (
        "over more than 60 s of audio that take more than 5 s" in said
        and "ends at 5 s for conformer_mha and conformer_mla." in said
    )
    assert lengths_table(lengths).loc[EIGHT[0]].isna().tolist() == [False, False, True]
    for name in EIGHT[1:7]:
        end(name, "time")
    assert "At 10 s all but branchformer_linear took longer than that." in lengths_introduction(lengths)
    end(EIGHT[7], "time")
    assert "ends at 5 s for all." in lengths_introduction(lengths)


# ---- figures -----------------------------------------------------------------------------------------------


def test_figures_of_all_that_was_measured(eight, widths):
    drawn = figures_of(compare_members(eight, EIGHT))
    assert list(drawn) == ["wer_vs_cache", "training_together", "wer_vs_time", "lengths"]
    assert "conformer_mla: 97.66 KiB, 10.00 % on test-clean, 20.00 % on test-other" in drawn["wer_vs_cache"].get_label()
    assert {text.get_text() for text in drawn["wer_vs_cache"].axes[0].texts} >= {"conformer_mha", "branchformer_linear"}
    assert drawn["wer_vs_cache"].axes[0].get_xscale() == "log"
    epochs, minutes = drawn["training_together"].axes
    assert epochs.lines[0].get_xdata().tolist() == [0, 1, 2, 3] and minutes.lines[0].get_xdata()[-1] == 2
    assert epochs.get_yscale() == "log" and epochs.lines[0].get_ydata()[0] == 100
    lengths = drawn["lengths"].axes
    assert lengths[0].lines[0].get_ydata().tolist() == pytest.approx([0.01, 0.02, 0.32])
    assert [{line.get_linestyle() for line in ax.lines} for ax in lengths] == [{"-"}, {"-"}, {"--"}, {"--"}]
    thickness = [line.get_linewidth() for line in lengths[0].lines]
    assert thickness == sorted(set(thickness), reverse=True), "none hides another of the same values"

    found = compare_members(widths, ["latent_dim-4", "latent_dim-16", "latent_dim-64"])
    parameter = figures_of(found)["wer_vs_latent_dim"].axes[0]
    assert parameter.containers[0][0].get_xdata().tolist() == [4, 16, 64]
    assert parameter.containers[0][0].get_ydata().round(1).tolist() == [40, 20, 10]
    table = member_tables.parameter_table(found, "latent_dim", [list(found.table.index[::-1])])
    assert list(table["latent_dim"]) == [4, 16, 64] and "cut against MHA" in table


def test_seeds_are_summed_up_with_every_system_beside(tmp_path):
    run, names = Run(tmp_path / "seeds"), ["seed-0", "seed-1"]
    write_json(run.path / "params.json", {"sweep": {"seed": [0, 1]}})
    for seed, name in enumerate(names):
        one = member(Run(run.path / name), "speech-encoder", "mha", 0.1, seed=seed)
        systems = {"baseline": one.read_metrics("baseline")["splits"]}
        for system, wer in {"control": 0.1, "converted": 0.3, "finetuned": 0.1 + 0.1 * seed}.items():
            systems[system] = evaluated(one, system, {"test-clean": wer, "test-other": 0.5})
        one.write_metrics("convert", {"cache_cut": 0.9, "parameters": 1_900_000})
        one.write_metrics("finetune", trained(0.1, seconds=30.0))
        one.write_metrics("evaluate", {"systems": systems})
    found = compare_members(run, names, test=False)
    assert varied_parameters(found.entries) == {"seed": [names]}
    table = member_tables.seed_table(found, [names]).query("split == 'test-clean'").set_index("system")
    assert table.index.tolist() == ["baseline", "trained alike", "converted", "fine-tuned"]
    assert table.at["fine-tuned", "WER"] == "15.00 % (10.00–20.00)" and set(table["seeds"]) == {2}
    more = table["fine-tuned, points more"]
    assert more["trained alike"] == "+5.00 (±0.00 to +10.00)" and more["fine-tuned"] == ""


def test_captions_say_how_to_read_each_figure(eight, widths):
    found = compare_members(eight, EIGHT)
    captions = {name: caption_of(name, found) for name in figures_of(found)}
    assert "side by side, to be seen all: conformer_linear and branchformer_linear; " in captions["wer_vs_cache"]
    assert all("Colour: the kind of attention; shape and line: the encoder." in said for said in captions.values())
    found = compare_members(widths, [f"latent_dim-{width}" for width in (4, 16, 64)])
    assert "side by side" not in caption_of("wer_vs_cache", found), "no two are of one size"
    assert "from the smallest state to the largest" in caption_of("wer_vs_time", found)
    assert heading_of("wer_vs_latent_dim") == "Word errors against latent_dim"
    assert caption_of("wer_vs_latent_dim", found) == "Members that differ in latent_dim alone; bars: 95 % intervals."


def test_a_member_looks_the_same_everywhere_and_unlike_the_others(eight, widths):
    drawn = looks(compare_members(eight, EIGHT, test=False))
    assert len({(look.colour, look.marker) for look in drawn.values()}) == 8
    assert drawn["conformer_mla_tiny"].colour == drawn["branchformer_mla_tiny"].colour
    names = ["latent_dim-4", "latent_dim-16", "latent_dim-64"]
    assert len({look.colour for look in looks(compare_members(widths, names, test=False)).values()}) == 3


def test_lengths_of_a_single_run():
    rows = {name: {"ms": [1.0, None], "peak_memory_bytes": [5, None], "stopped": None} for name in looks_of_run()}
    figure = lengths_figure({"seconds": [5, 10], "systems": rows}, looks_of_run())
    assert len(figure.axes) == 2, "one encoder"
    assert "baseline (MHA): 0.001 s for 5 s of audio" in figure.get_label()


# ---- pages and files ---------------------------------------------------------------------------------------


def compare(run: Run, members: list[str]) -> None:
    """What 05_benchmark and 06_compare leave."""
    found = compare_members(run, members)
    drawn = figures_of(found)
    for name, figure in drawn.items():
        save_figure(figure, run.figures / f"{name}.png")
    room.write_member_comparison(run, found, drawn)
    for step in ("05_benchmark", "06_compare"):
        (run.path / f"{step}.html").touch()
        run.mark_started(step, "f")
        run.mark_completed(step, "f", seconds=9.0, parameters={"members": members}, commit="abc123")


def index_of(run: Run) -> BeautifulSoup:
    page = pages.write_index(run.path, "python run_all.py eight").read_text(encoding="utf-8")
    return BeautifulSoup(page.replace("\u00a0", " ").replace("\u2060", ""), "html.parser")


def test_the_index_of_a_sweep(eight):
    compare(eight, EIGHT)
    found = compare_members(eight, EIGHT)
    assert len(pd.read_csv(eight.tables / "ranking.csv")) == 8 and len(pd.read_csv(eight.tables / "tests.csv")) == 24
    kept = eight.read_metrics("compare")
    assert kept["headline"] == member_tables.headline(found) and len(kept["answers"]) == 5
    assert kept["table"][0]["member"] == found.table.index[0]
    soup = index_of(eight)
    assert soup.select_one(".lead").text == member_tables.headline(found)
    ranked = [link["href"] for link in soup.select(".ranking tbody a")]
    assert ranked == [f"{name}/index.html" for name in found.table.index]
    worst = soup.select(".ranking tbody tr")[-1].text
    assert "linear" in worst and "+20.00*" in worst
    assert [link["href"] for link in soup.select("ol.steps:not(.members) a")] == [
        "05_benchmark.html",
        "06_compare.html",
    ]
    assert [link["href"] for link in soup.select("ol.members a")] == [f"{name}/index.html" for name in EIGHT]
    assert len(soup.select("figure img[alt]")) == 4 and not soup.select(".notice")
    assert [heading.text for heading in soup.select("h3")] == [heading_of(name) for name in kept["figures"]]
    captions = [caption.text for caption in soup.select("figure figcaption")]
    assert captions == [caption_of(name, found) for name in kept["figures"]]
    assert "python run_all.py eight" in soup.select_one("dl.facts").text and not soup.select("script")


def test_the_index_of_a_sweep_half_done(eight):
    (eight.path / "metrics" / "benchmark.json").unlink()
    eight_th = Run(eight.path / EIGHT[7])
    eight_th.mark_started("00_baseline", "changed")
    eight_th.discard("00_baseline")
    soup = index_of(eight)
    assert len(soup.select(".ranking tbody tr")) == 7 and not soup.select("figure")
    notices = " ".join(notice.text for notice in soup.select(".notice"))
    assert f"Not finished so far: {EIGHT[7]}." in notices and "not been timed and compared yet" in notices
    assert "not done: Baseline" in soup.select("ol.members li")[7].text
    assert "not finished" in soup.select("ol.members li")[7].text
    for name in EIGHT:
        Run(eight.path / name).discard("00_baseline")
    assert index_of(eight).select_one(".lead").text == "No member is finished yet."


def test_the_index_of_a_sweep_tells_interrupted_members_from_those_not_begun(eight):
    interrupted, anew, failed, waiting = (Run(eight.path / name) for name in EIGHT[:4])
    for begun in (interrupted, anew, failed):
        begun.discard("00_baseline")
        begun.mark_started("00_baseline", "f")
    (interrupted.checkpoints("00_baseline") / "checkpoint-5").mkdir()
    (failed.path / "notebooks").mkdir()
    (failed.path / "notebooks" / "00_baseline.failed.ipynb").touch()
    for marker in (".completed", ".started"):
        (waiting.path / marker / "00_baseline.json").unlink()
    said = [line.select_one(".what").text for line in index_of(eight).select("ol.members li")]
    assert said == [
        "Baseline interrupted, goes on where it stopped",
        "Baseline interrupted, begins again",
        "Baseline failed",
        "not begun",
        *4 * ["Baseline"],
    ]


def test_links_lead_to_pages_that_exist(eight):
    (eight.path / EIGHT[0] / "index.html").unlink()
    (eight.path / EIGHT[1] / "00_baseline.html").touch()
    found = compare_members(eight, EIGHT, test=False)
    of_notebooks = (member_tables.links_html(found), member_tables.ranking_html(found))
    pages = [index_of(eight).main, *(BeautifulSoup(made, "html.parser") for made in of_notebooks)]
    for page in pages:
        links = {link["href"] for link in page.select("a")}
        assert links >= {f"{name}/index.html" for name in EIGHT[1:]}
        assert all((eight.path / link).is_file() for link in links)
    assert pages[0].select_one(f'ol.members a[href="{EIGHT[1]}/00_baseline.html"]').text == "Baseline"


def test_a_member_s_index_leads_back_to_the_sweep(eight):
    soup = index_of(Run(eight.path / EIGHT[0]))
    assert soup.select_one('a[href="../index.html"]').text == "eight"
    assert len(soup.select("ol.steps li")) == 1, "of the steps it was asked for"
    assert not soup.select(".notice")
    assert soup.h1.text == f"{EIGHT[0]}: one recogniser" and "converted" not in soup.select_one(".lead").text
    linear = index_of(Run(eight.path / EIGHT[3])).select_one(".comparison thead").text
    assert "baseline (linear)" in linear


# ---- the state, counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["conformer", "branchformer"])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("mha", [[1, 57, 32], [1, 57, 32]]),
        ("mla", [[1, 57, 12]]),
        ("mla_simple", [[1, 57, 12]]),
        ("gqa", [[1, 57, 16], [1, 57, 16]]),
        ("linear", [[1, 4, 8, 8], [1, 4, 8]]),
    ],
)
def test_what_a_stream_holds_has_the_bytes_of_the_formula(encoder, kind, shapes):
    processor = new_processor(encoder)
    model = new_model(encoder, processor, attention=kind, latent_dim=12, **TINY).eval()
    counted = what_is_kept(model, processor, noise(400 + 160 * 230))
    assert counted["frames"] == 57 and counted["tensors"] == shapes
    assert counted["bytes"] == counted["formula_bytes"] == 2 * 4 * sum(math.prod(shape) for shape in shapes)
    assert counted["convolution_bytes"] > 0


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_a_stream_of_a_converted_model_holds_its_latents(tiny_model, layout):
    latent = convert(tiny_model, latent_dim=6, layout=layout)
    for model, numbers in ((tiny_model, 2 * tiny.WIDTH), (latent, 6)):
        counted = what_is_kept(model.eval(), new_processor(), noise(9_000))
        assert counted["bytes"] == counted["formula_bytes"] == 4 * tiny.LAYERS * numbers * counted["frames"]


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)


# ---- the notebooks -----------------------------------------------------------------------------------------


def execute(step: str, **parameters) -> dict:
    """Run the code cells of a notebook here, with these parameters; the names they leave."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", as_version=4)
    names: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{step} {cell.id}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= names.keys()
                names |= parameters
    return names


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """All that is displayed, as text."""
    said: list[str] = []

    def display(what, **_):
        said.append(str(what.get("text/html", what.get("text/plain"))) if isinstance(what, dict) else what.data)

    monkeypatch.setattr("IPython.display.display", display)
    return said


def speech(folder: Path) -> Path:
    """A manifest of four noises."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", random.normal(scale=0.1, size=16_000 + 4000 * i), 16_000)
        rows.append({"audio": f"{i}.wav", "text": "A B", "split": "test-clean"})
    write_json_lines(folder / "test-clean.jsonl", rows)
    return folder


def write_json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_models(run: Run, kinds: dict[str, str]) -> None:
    for name, kind in kinds.items():
        processor = new_processor("conformer", frame_shift_ms=10 if kind == "mha" else 6)
        folder = Run(run.path / name).models / "baseline"
        new_model("conformer", processor, attention=kind, **TINY).save_pretrained(folder)
        processor.save_pretrained(folder)


def test_the_notebooks_of_a_sweep(eight, tmp_path, shown):
    members = ["conformer_mha_tiny", "conformer_linear_tiny"]
    with_models(eight, dict(zip(members, ("mha", "linear"), strict=True)))
    corpus = str(speech(tmp_path / "speech"))
    given = dict(run_dir=str(eight.path), members=members)
    timed_here = dict(corpus=corpus, eval_splits=["test-clean"], benchmark_samples=3, device="cpu")
    execute("05_benchmark", **given, **timed_here, benchmark_seconds=[1, 2])
    measured = eight.read_metrics("benchmark")
    assert list(measured["systems"]) == list(measured["members"]) == members
    assert measured["lengths"]["seconds"] == [1, 2] and (eight.figures / "lengths.png").is_file()
    facts = measured["members"]["conformer_linear_tiny"]
    assert facts["encoder"] == "conformer" and facts["cache_bytes"] == 2 * 4 * 4 * 8 * 9 < facts["mha_cache_bytes"]
    page = "\n".join(shown)
    assert "## Against the length of the audio" in page and "## What a stream keeps" in page

    shown.clear()
    execute("06_compare", **given)
    page = "\n".join(shown)
    for heading in ("In pictures", "The questions", "Every test", "How long each step took"):
        assert f"## {heading}" in page
    assert "By latent_dim" not in page and "Baseline, converted" not in page
    assert {path.stem for path in eight.figures.iterdir()} == set(eight.read_metrics("compare")["figures"])


def test_members_without_a_model_say_which_step_makes_it(eight):
    with pytest.raises(MissingStep, match=r"models/baseline is missing in .*: run 00_baseline first"):
        load_systems(eight, EIGHT[:1])
