"""What a run on very little speech would take. No time is asserted, only the source of each figure."""

import json
import shutil

import family_models
import pytest
import soundfile
import tiny
import torch
import yaml
from bs4 import BeautifulSoup
from test_run_all import ROOT, call

from asrlib.attention.cache import kv_cache_bytes
from asrlib.conversion.convert import convert
from asrlib.models.scratch import new_processor
from asrlib.reporting import pages
from asrlib.reporting.estimated import estimated_steps
from asrlib.reporting.numbers import duration
from asrlib.running import cost_measurements as measure
from asrlib.running.estimate import Workload, as_text
from asrlib.running.parameters import Schema
from asrlib.running.pipeline import plan
from asrlib.runs import Run, find_notebooks, read_json, write_json
from asrlib.training.training import TrainingSettings

SIZES = {"train": 24, "validation": 4, "test-clean": 6}  # utterances
PARAMS = dict(
    train_split="train", validation_split="validation", eval_splits=["test-clean"],
    latent_dim=6, method="attended", ranks="sensitivity", calibration_seconds=12.0,
    analysis_samples=2, analysis_eval_samples=3, analysis_cuts=[0.5, 0.75],
    analysis_methods=["split svd", "svd", "two_sided, energy"],
    train_samples=None, epochs=2.0, kl_weight=1.0, evaluations_per_epoch=2, batch_seconds=3.0,
    benchmark_samples=3, benchmark_seconds=[5.0, 20.0], device="cpu",
    stream_chunks_ms=[160, None], stream_left_seconds=[1.0], stream_caches=["float32", "int8"],
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The notebooks of this project beside a tiny model, a tiny corpus, and params of our own."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    (root / "asrlib").symlink_to(ROOT / "asrlib")
    (root / "params").mkdir()
    tiny.conformer().save_pretrained(root / "model")
    new_processor().save_pretrained(root / "model")
    for split, count in SIZES.items():
        rows = []
        for utterance in tiny.corpus(count, split):
            path = root / "corpus" / f"{utterance.id}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, utterance.audio(), 16_000)
            rows.append({"audio": path.name, "text": utterance.text})
        (root / "corpus" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def estimated(project, name, *words, **changes):
    """Of such params, through the command line."""
    values = PARAMS | {"model": str(project / "model"), "corpus": str(project / "corpus")} | changes
    values = {key: value for key, value in values.items() if key not in values.get("sweep", ())}
    (project / "params" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert call(project, name, "--estimate", *words) == 0
    return read_json(project / "reports" / name / "metrics" / "estimate.json")


@pytest.fixture(scope="module")
def whole(project):
    return estimated(project, "whole")


@pytest.fixture(scope="module")
def schema(project):
    return Schema(find_notebooks(project))


def test_every_figure_is_labelled_and_sums_up_and_nothing_else_is_written(project, whole):
    assert list(whole["steps"]) == [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for name, step in whole["steps"].items():
        known = [cost for cost in step["costs"] if cost["seconds"] is not None]
        assert step["whole"] == (len(known) == len(step["costs"])) == (name in ("00_baseline", "03_finetune")), name
        assert step["seconds"] == pytest.approx(sum(cost["seconds"] for cost in known))
        assert all(cost["seconds"] > 0 and cost["source"].startswith("measured on a ") for cost in known)
        assert all(cost["source"].startswith("unknown: ") for cost in step["costs"] if cost not in known)
    assert whole["seconds"] == pytest.approx(sum(step["seconds"] for step in whole["steps"].values()))
    assert not whole["whole"] and whole["missing"] == [] and whole["device"] == "cpu"
    parts = {cost["what"] for step in whole["steps"].values() for cost in step["costs"]}
    assert {"2 epochs at most", "word errors of 8 systems: 8 passes", "recognition in chunks"} <= parts
    card = as_text([whole])
    assert all(step in card for step in whole["steps"]) and "nothing has been run" in card and "missing" not in card
    assert "  > " in card and "unknown: never timed here" in card
    for name, step in whole["steps"].items():
        assert ("?" in next(line for line in card.splitlines() if name in line)) == (step["seconds"] == 0), name
    run = project / "reports" / "whole"
    assert [path for path in run.rglob("*") if path.is_file()] == [run / "metrics" / "estimate.json"]


def test_cache_and_memory_are_those_of_the_models(whole):
    model = tiny.conformer()
    assert whole["cache"]["mha_bytes"] == kv_cache_bytes(model.config, 1000)
    assert whole["cache"]["bytes"] == kv_cache_bytes(convert(model, 6).config, 1000)
    assert whole["memory"]["03_finetune"] > 2 * 4 * sum(p.numel() for p in model.parameters())
    assert "peak memory, 03_finetune" in as_text([whole]) and "of MHA's" in as_text([whole])


def test_a_new_model_made_gqa_is_measured_too(project, schema):
    new = dict(
        architecture="conformer", hidden_size=16, num_layers=2, num_heads=4, kv_heads=2, subsampling_channels=4,
        depthwise_kernel=5, baseline_epochs=1.5, baseline_batch_seconds=3.0, speeds=[0.9, 1.0], convert_to="gqa",
    )  # fmt: skip
    given = PARAMS | new | {"corpus": str(project / "corpus"), "method": "two_sided", "ranks": "uniform"}
    work = Workload(schema.defaults | given, {})
    training, passes = work.costs("00_baseline")
    assert training.what == "1.5 epochs at most" and min(training.seconds, passes.seconds) > 0
    assert work.memory["00_baseline"] > 0
    assert work.cache(work.converted)["bytes"] * 2 == work.cache(work.converted)["mha_bytes"]


def test_a_sweep_is_the_sum_over_its_members_and_the_comparison(project, capsys, monkeypatch):
    measured = []
    passes = measure.passes
    monkeypatch.setattr(measure, "passes", lambda *given: measured.append(given) or passes(*given))
    given = {"steps": ["00_baseline", "01_convert"], "sweep": {"latent_dim": [4, 8]}, "ranks": "uniform"}
    comparison = estimated(project, "widths", **given)
    assert list(comparison["steps"]) == ["05_benchmark", "06_compare"] and not comparison["whole"]
    folders = [project / "reports" / "widths" / f"latent_dim-{width}" for width in (4, 8)]
    members = [read_json(folder / "metrics" / "estimate.json") for folder in folders]
    assert members[1]["cache"]["bytes"] == 2 * members[0]["cache"]["bytes"] > 0
    assert len(measured) == 1, "both have the same baseline"
    card = capsys.readouterr().out
    total = sum(estimate["seconds"] for estimate in (*members, comparison))
    assert card.count("00_baseline") == 2 and f"> {duration(total)}" in card.splitlines()[-1]


def test_steps_timed_before_are_not_measured_and_unchanged_ones_take_nothing(project, schema, monkeypatch):
    monkeypatch.setattr(measure, "passes", None)
    run, other = Run(project / "reports" / "before"), Run(project / "reports" / "elsewhere")
    values = PARAMS | {"model": str(project / "model"), "corpus": str(project / "corpus")}
    steps = plan(project, run, schema, values, ["00_baseline", "01_convert"])
    for step, seconds in zip(steps, (60.0, 3.5), strict=True):
        parameters = step.parameters | {"run_dir": "reports/elsewhere"}
        other.mark_completed(step.name, "another", seconds=seconds, time="2026-01-01", parameters=parameters)

    def said(*words):
        found = estimated(project, "before", *words, steps=["00_baseline", "01_convert"])
        return [(step["seconds"], step["source"]) for step in found["steps"].values()]

    assert said() == [(60.0, "timed before"), (3.5, "timed before")]
    facts = {"seconds": 50.0, "time": "2026-02-01", "parameters": steps[0].parameters}
    run.mark_completed("00_baseline", steps[0].fingerprint, **facts)
    assert said() == [(0.0, "unchanged"), (3.5, "timed before")]
    assert said("--force") == [(50.0, "timed before"), (3.5, "timed before")], "the latest counts"


# ---- what is not here --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["whisper", "nemotron", "parakeet_rnnt", "new whisper", "nobody/nothing", "bare"])
def test_a_model_that_is_not_here_or_writes_has_no_estimate(project, model, monkeypatch, capsys):
    monkeypatch.setattr(measure, "passes", None)  # nothing is computed
    changes = {"model": model}
    if model == "new whisper":
        changes = {"architecture": "whisper", "baseline_epochs": 1, "latent_dim": None}
    said = "missing: there is no estimate for "
    if model == "bare":
        (project / "bare").mkdir()
        shutil.copy(project / "model" / "config.json", project / "bare")
        changes, said = {"model": str(project / "bare")}, "/bare holds no vocab.json"
    elif model == "nobody/nothing":
        said = "missing: cannot load nobody/nothing: "
    elif model != "new whisper":
        getattr(family_models, model)().save_pretrained(project / model)
        family_models.processor_of(model).save_pretrained(project / model)
        changes = {"model": str(project / model)}
    estimate = estimated(project, "without", **changes, steps=["00_baseline"], stream_chunks_ms=[])
    assert not estimate["whole"] and estimate["cache"] is None and said in capsys.readouterr().out


def test_speech_that_is_not_here_is_named(project, capsys):
    estimate = estimated(project, "away", corpus="nobody/nothing", steps=["03_finetune"])
    assert not estimate["whole"] and estimate["seconds"] == 0 and estimate["memory"] == {}
    assert "missing: " in (card := capsys.readouterr().out) and "nobody/nothing" in card


def test_a_step_that_does_not_fit_into_memory_is_named(project, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("out of memory in training, on a batch of 3: lower batch_seconds (now 3)")

    monkeypatch.setattr(measure, "batches_of", too_much)
    estimate = estimated(project, "large", steps=["03_finetune"])
    assert not estimate["whole"] and "lower batch_seconds (now 3)" in estimate["missing"][0]


def test_what_would_take_long_is_measured_on_less_audio(monkeypatch, processor):
    model, corpus = tiny.conformer(), tiny.corpus(12)
    shortest = min(utterance.seconds for utterance in corpus)
    settings = TrainingSettings(trainable="all", batch_seconds=3.0, device="cpu")
    measured = []
    transcribe, train = measure.transcribe, measure.train
    monkeypatch.setattr(
        measure, "transcribe", lambda *given, **how: measured.append(given[2]) or transcribe(*given, **how)
    )
    monkeypatch.setattr(measure, "train", lambda *given: measured.append(given[2]) or train(*given))
    assert measure.passes(corpus, model, processor, 3.0, "cpu", "fp32") > 0
    assert measured[-1].seconds > 2 * shortest
    seconds, n_bytes = measure.training(corpus, model, processor, settings, None, 1e-6)
    assert measured[-1].seconds > 2 * measure.STEPS * shortest and seconds > 0
    monkeypatch.setattr(measure, "LONGEST", 1e-9)
    measure.passes(corpus, model, processor, 3.0, "cpu", "fp32")
    assert measured[-1].seconds == pytest.approx(shortest)
    _, scaled = measure.training(corpus, model, processor, settings, None, 1.0)
    assert measured[-1].seconds == pytest.approx(measure.STEPS * shortest)
    assert scaled == pytest.approx(n_bytes, rel=0.5), "the memory is that of the largest batch"


# ---- beside what it took -----------------------------------------------------------------------------------

MADE, LATER, EARLIER = (f"2026-01-01T{hour}:00:00+0000" for hour in (12, 13, 11))


def foreseen(seconds):
    return {"fingerprint": "f", "seconds": seconds, "source": "measured", "whole": True, "costs": []}


def done(run, step, seconds, time=LATER, fingerprint="f"):
    run.mark_started(step, fingerprint)
    run.mark_completed(step, fingerprint, seconds=seconds, time=time)


def page_of(run):
    soup = BeautifulSoup(pages.write_index(run.path).read_text(encoding="utf-8"), "html.parser")
    return soup, soup.main.text.replace("\u00a0", " ")


def test_the_index_says_how_far_off_the_estimate_was(tmp_path):
    run = Run(tmp_path / "trial")
    run.write_metrics("estimate", {"made": MADE, "steps": {"00_baseline": foreseen(720), "01_convert": foreseen(80)}})
    done(run, "00_baseline", 600.0)
    done(run, "01_convert", 100.0)
    soup, text = page_of(run)
    assert [time.text for time in soup.select("ol.steps .time")][:2] == [
        "10 min 00 sestimated 12 min 00 s (−16.7 %)",
        "1 min 40 sestimated 1 min 20 s (+25 %)",
    ]
    assert "Of those that were estimated before: estimated 13 min 20 s, took 11 min 40 s (−12.5 %)" in text


@pytest.mark.parametrize(
    ("changes", "time", "fingerprint"),
    [({}, LATER, "another"), ({}, EARLIER, "f"), ({"source": "unchanged"}, LATER, "f"), ({"whole": False}, LATER, "f")],
)
def test_steps_that_were_not_estimated_so_are_not_compared(tmp_path, changes, time, fingerprint):
    run = Run(tmp_path / "trial")
    run.write_metrics("estimate", {"made": MADE, "steps": {"00_baseline": foreseen(720.0) | changes}})
    done(run, "00_baseline", 600.0, time, fingerprint)
    assert estimated_steps(run) == {} and "estimated" not in page_of(run)[1]


def test_the_page_of_a_sweep_says_it_of_its_members_too(tmp_path):
    sweep = Run(tmp_path / "widths")
    write_json(sweep.path / "params.json", {"sweep": {"latent_dim": [4, 8]}})
    for width, seconds in ((4, 90.0), (8, 120.0)):
        member = Run(sweep.path / f"latent_dim-{width}")
        write_json(member.path / "params.json", {})
        member.write_metrics("estimate", {"made": MADE, "steps": {"00_baseline": foreseen(100.0)}})
        done(member, "00_baseline", seconds)
    soup, text = page_of(sweep)
    assert "estimated 1 min 40 s (−10 %)" in soup.select("ol.members .time")[0].text
    assert "Of those that were estimated before: estimated 3 min 20 s, took 3 min 30 s (+5 %)" in text
