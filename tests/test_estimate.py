"""What a run would take, of runs on next to nothing; no time is asserted, only where figures come from."""

import csv
import shutil

import pytest
import soundfile
import tiny
import torch
import yaml
from bs4 import BeautifulSoup
from test_run_all import ROOT, call

from asrlib import cost_measurements as measure
from asrlib import report
from asrlib.attention.cache import kv_cache_bytes
from asrlib.conversion.convert import convert
from asrlib.cost_card import as_text, estimated_steps
from asrlib.cost_materials import PUBLISHED_CONFIGS
from asrlib.data.batches import BucketBatchSampler
from asrlib.estimate import estimate_run, timed_before
from asrlib.models.scratch import new_processor
from asrlib.parameters import BadParameter, Schema
from asrlib.pipeline import Step, find_notebooks, plan
from asrlib.runs import Run, read_json, write_json
from asrlib.step_costs import StepCosts
from asrlib.training import TrainingSettings

SIZES = {"train": 24, "validation": 4, "test-clean": 6}  # utterances
PARAMS = dict(
    train_split="train", validation_split="validation", eval_splits=["test-clean"],
    latent_dim=6, method="attended", ranks="sensitivity", calibration_seconds=12.0,
    analysis_samples=2, analysis_eval_samples=3, analysis_cuts=[0.5, 0.75],
    analysis_methods=["split svd", "svd", "two_sided, energy", "attended, sensitivity"],
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
        with open(root / "corpus" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["audio", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return root


def params(project, name, **changes):
    """Writes params/NAME.yaml."""
    values = PARAMS | {"model": str(project / "model"), "corpus": str(project / "corpus")} | changes
    (project / "params" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return name


def estimate_of(project, name):
    return read_json(project / "reports" / name / "metrics" / "estimate.json")


@pytest.fixture
def quick_start(monkeypatch):
    """The start of a kernel, once measured by `whole`, is taken as known."""
    monkeypatch.setattr(measure, "start_of_a_kernel", lambda imports, folder: (4.0, 2**28))


@pytest.fixture(scope="module")
def whole(project):
    """The estimate of all seven steps, through the command line."""
    assert call(project, params(project, "whole"), "--estimate") == 0
    return estimate_of(project, "whole")


@pytest.fixture(scope="module")
def schema(project):
    return Schema(find_notebooks(project))


# ---- what is said ------------------------------------------------------------------------------------------


def test_every_figure_is_positive_and_labelled_and_sums_up(whole):
    assert list(whole["steps"]) == [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for name, step in whole["steps"].items():
        assert step["whole"] and step["seconds"] == pytest.approx(sum(cost["seconds"] for cost in step["costs"]))
        assert step["costs"][0]["what"] == "start of its kernel, imports", name
        for cost in step["costs"]:
            assert cost["seconds"] > 0 and cost["source"].startswith(("measured", "scaled from ")), cost
    assert whole["seconds"] == pytest.approx(sum(step["seconds"] for step in whole["steps"].values()))
    assert whole["whole"] and whole["missing"] == [] and whole["device"] == "cpu" and whole["measuring_seconds"] > 0


def test_nothing_is_run_and_nothing_else_written(project, whole):
    run = project / "reports" / "whole"
    assert [path for path in run.rglob("*") if path.is_file()] == [run / "metrics" / "estimate.json"]


def test_training_is_counted_as_the_trainer_counts_it(whole):
    lengths = [utterance.seconds for utterance in tiny.corpus(SIZES["train"], "train")]
    batches = len(BucketBatchSampler(lengths, PARAMS["batch_seconds"]))
    whats = [cost["what"] for cost in whole["steps"]["03_finetune"]["costs"]]
    evaluations = 1 + -(-2 * batches // -(-batches // 2))
    assert f"{2 * batches} training steps at most" in whats and f"{evaluations} validations" in whats


def test_streams_and_lengths_of_audio_are_counted_where_they_are_asked_for(whole):
    evaluated, timed = (
        [cost["what"] for cost in whole["steps"][step]["costs"]] for step in ("04_evaluate", "05_benchmark")
    )
    assert "chunks of 160 ms, 6 passes" in evaluated and "full context, 2 passes" in evaluated  # int8 turned, too
    assert [what for what in timed if what.endswith("2 lengths of audio")] == [
        f"{name}: 2 lengths of audio" for name in ("baseline", "converted", "finetuned", "MHA in blocks")
    ]


def test_a_new_model_grouped_is_measured_too(project, schema):
    new = dict(
        architecture="conformer", hidden_size=16, num_layers=2, num_heads=4, kv_heads=2, subsampling_channels=4,
        depthwise_kernel=5, baseline_epochs=1.5, baseline_batch_seconds=3.0, speeds=[0.9, 1.0], convert_to="gqa",
    )  # fmt: skip
    given = PARAMS | new | {"corpus": str(project / "corpus"), "method": "two_sided", "ranks": "uniform"}
    costs = StepCosts(schema.defaults | given, {"start": (4.0, 2**28)})
    whats = {cost.what: cost.seconds for step in ("00_baseline", "01_convert") for cost in costs.of(step)}
    lengths = [utterance.seconds / speed for utterance in tiny.corpus(SIZES["train"], "train") for speed in (0.9, 1.0)]
    steps = round(1.5 * len(BucketBatchSampler(lengths, 3.0)))
    assert {f"{steps} training steps at most", "heads grouped, twice"} <= whats.keys() and min(whats.values()) > 0
    assert costs.trains("00_baseline") and costs.memory["00_baseline"]["parts"]["step"] > 0
    cache = costs.cache(converts=True)
    assert cache["bytes"] * 2 == cache["mha_bytes"]


def test_the_cache_is_that_of_the_model_as_converted(whole):
    model = tiny.conformer()
    assert whole["cache"]["mha_bytes"] == kv_cache_bytes(model.config, 1000)
    assert whole["cache"]["bytes"] == kv_cache_bytes(convert(model, 6).config, 1000)


def test_memory_is_told_by_its_parts(whole):
    memory = whole["memory"]["03_finetune"]
    assert memory["source"] == "measured" and memory["bytes"] == sum(memory["parts"].values())
    student, teacher = convert(tiny.conformer(), 6), tiny.conformer()
    assert memory["parts"]["weights"] == measure.weights_bytes(student) + measure.weights_bytes(teacher)
    assert memory["parts"]["step"] > 0 and memory["parts"]["process"] > 2**26


def test_the_card_shows_all_of_it(whole):
    card = as_text(whole)
    assert "what whole is expected to take on cpu" in card and "nothing has been run" in card
    for part in ("in all", "peak memory, 03_finetune", "cache of 1000 frames, float32", *whole["steps"]):
        assert part in card
    assert card.count("scaled from") > 10 and "missing" not in card


# ---- what is known before ----------------------------------------------------------------------------------


def test_steps_timed_before_are_not_measured_and_unchanged_ones_take_nothing(project, schema, quick_start):
    run, other = Run(project / "reports" / "before"), Run(project / "reports" / "elsewhere")
    values = PARAMS | {"model": str(project / "model"), "corpus": str(project / "corpus")}
    steps = plan(project, run, schema, values, ["00_baseline", "01_convert"])
    for step, seconds in zip(steps, (60.0, 3.5), strict=True):
        parameters = step.parameters | {"run_dir": "reports/elsewhere"}
        other.mark_completed(step.name, "another", seconds=seconds, time="2026-01-01", parameters=parameters)

    def estimated(redo):
        found = estimate_run(project, run, schema, values, steps, redo)
        assert found["seconds"] == sum(step["seconds"] for step in found["steps"].values())
        return [(step["seconds"], step["source"]) for step in found["steps"].values()]

    assert estimated([]) == [(60.0, "timed before"), (3.5, "timed before")]
    run.mark_completed("00_baseline", steps[0].fingerprint, seconds=50.0, time="2026-02-01")
    assert estimated([]) == [(0.0, "unchanged"), (3.5, "timed before")]
    assert estimated(["00_baseline"]) == [(60.0, "timed before"), (3.5, "timed before")]


def test_a_step_behind_another_model_was_never_timed(tmp_path):
    def steps(model, run="one"):
        notebook, where = tmp_path / "a.ipynb", {"run_dir": f"reports/{run}"}
        return [Step("00_baseline", notebook, {"model": model, **where}, "f"), Step("01_convert", notebook, where, "f")]

    run = Run(tmp_path / "reports" / "sweep" / "one")
    for step, seconds in zip(steps("small"), (5.0, 9.0), strict=True):
        run.mark_completed(step.name, "f", seconds=seconds, time="2026-01-01", parameters=step.parameters)
    assert timed_before(tmp_path, steps("small", "two")) == 9.0
    assert timed_before(tmp_path, steps("small", "two")[:1]) == 5.0
    assert timed_before(tmp_path, steps("large", "two")) is None


# ---- what is not here --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "latent_dmi=6"], "unknown parameter 'latent_dmi' (in --set): did you mean 'latent_dim'?"),
        (["--set", "train_split=tran"], "has no split 'tran'"),
        (
            ["--set", "train_split=test-clean"],
            "01_convert cannot run: calibration on 'test-clean' would spoil the test",
        ),
    ],
)
def test_what_cannot_run_is_refused(project, quick_start, capsys, words, message):
    name = params(project, "refused", steps=["01_convert"])
    assert call(project, name, "--estimate", *words) == 2
    assert message in capsys.readouterr().err
    assert not (project / "reports" / "refused").exists()


def test_a_model_of_which_nothing_is_here_is_refused():
    costs = StepCosts({"architecture": None, "model": "nobody/nothing", "revision": None}, {})
    with pytest.raises(BadParameter, match=r"cannot load nobody/nothing: .* its config.json at least must be here"):
        _ = costs.baseline


def test_speech_that_is_not_here_is_told_and_its_rates_are(project, quick_start, capsys):
    assert call(project, params(project, "away", corpus="nobody/nothing", steps=["03_finetune"]), "--estimate") == 0
    found, card = estimate_of(project, "away"), capsys.readouterr().out
    assert not found["whole"] and found["memory"]["03_finetune"]["bytes"] > 0
    unknown = [cost for cost in found["steps"]["03_finetune"]["costs"] if cost["seconds"] is None]
    assert [cost["what"] for cost in unknown] == ["opening train, validation", "training steps", "validations"]
    assert all("an hour of speech takes" in cost["source"] for cost in unknown)
    assert (
        "missing: nobody/nothing train is not on this machine" in card and "--set corpus=DIR" in card and "> " in card
    )


def test_a_model_without_weights_gets_random_ones(project, quick_start, capsys):
    (project / "bare").mkdir()
    shutil.copy(project / "model" / "config.json", project / "bare")
    name = params(project, "random", model=str(project / "bare"), steps=["00_baseline"])
    assert call(project, name, "--estimate") == 0
    assert estimate_of(project, "random")["whole"]
    assert "missing: weights: random ones of the same size took their place, since" in capsys.readouterr().out


def test_a_published_model_that_is_not_here_is_measured_by_its_sizes(monkeypatch):
    sizes = {name: value for name, value in tiny.conformer().config.to_dict().items() if name != "model_type"}
    monkeypatch.setitem(PUBLISHED_CONFIGS, "nobody/published", sizes)
    costs = StepCosts({"architecture": None, "model": "nobody/published", "revision": None}, {})
    assert costs.baseline.config.hidden_size == tiny.WIDTH and costs.loading > 0
    assert costs.missing[0].startswith(
        "weights: random ones of the same size took their place, since cannot load nobody"
    )


def test_a_step_that_does_not_fit_into_memory_is_named(project, quick_start, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("out of memory in training, on a batch of 3: lower batch_seconds (now 3)")

    monkeypatch.setattr(measure, "training", too_much)
    assert call(project, params(project, "large", steps=["03_finetune"]), "--estimate") == 0
    found = estimate_of(project, "large")
    assert not found["whole"] and "lower batch_seconds (now 3)" in found["missing"][0]


# ---- less audio for what takes long ------------------------------------------------------------------------


def test_what_would_take_long_is_measured_on_less_audio(monkeypatch, processor):
    model, corpus = tiny.conformer(), tiny.corpus(12)
    shortest = min(utterance.seconds for utterance in corpus)
    assert measure.passes(model, processor, corpus, 3.0, "cpu", "fp32").audio > 2 * shortest
    settings = TrainingSettings(trainable="all", batch_seconds=3.0, device="cpu")
    whole = measure.training(model, processor, corpus, settings, None, 1e6)
    assert (
        whole.whole
        and whole.step_audio > 2 * shortest
        and whole.optimizer_bytes == 8 * sum(parameter.numel() for parameter in model.parameters())
    )

    monkeypatch.setattr(measure, "LONGEST", 1e-9)
    rate = measure.passes(model, processor, corpus, 3.0, "cpu", "fp32")
    assert rate.audio == pytest.approx(shortest) and rate.seconds > 0
    part = measure.training(model, processor, corpus, settings, None, 1.0)
    assert not part.whole and part.step_audio == pytest.approx(shortest) and 0 < part.step_bytes < whole.step_bytes

    costs = StepCosts({}, {"start": (1.0, 1000)})
    costs._remember_memory("03_finetune", part, longest=3.0)
    memory = costs.memory["03_finetune"]
    assert memory["source"] == f"scaled from a batch of {shortest:.0f} s of audio"
    assert memory["parts"]["step"] == round(part.step_bytes * 3.0 / part.step_audio)


def test_batches_to_measure_on():
    lengths = [1.0, 2.0, 3.0, 4.0, 9.0]
    assert measure.typical_batch(lengths, 0.5) == [0]
    assert measure.padded(lengths, [measure.typical_batch(lengths, 4.0)]) <= 4.0
    assert measure.padded(lengths, [[0, 1], [4]]) == 2 * 2.0 + 9.0


# ---- sweeps ------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_sum_over_its_members(project, quick_start, capsys):
    name = params(project, "widths", steps=["00_baseline", "01_convert"], sweep={"latent_dim": [4, 8]}, ranks="uniform")
    values = yaml.safe_load((project / "params" / "widths.yaml").read_text())
    del values["latent_dim"]
    (project / "params" / "widths.yaml").write_text(yaml.safe_dump(values))
    assert call(project, name, "--estimate") == 0
    found, run = estimate_of(project, name), project / "reports" / name
    assert list(found["members"]) == ["latent_dim-4", "latent_dim-8"] and list(found["steps"]) == [
        "05_benchmark",
        "06_compare",
    ]
    parts = [*found["members"].values(), *found["steps"].values()]
    assert found["seconds"] == pytest.approx(sum(part["seconds"] for part in parts)) and found["whole"]
    caches = [member["cache"]["bytes"] for member in found["members"].values()]
    assert caches[1] == 2 * caches[0] and caches[0] > 0
    whats = [cost["what"] for cost in found["steps"]["05_benchmark"]["costs"]]
    assert whats[1:] == ["latent_dim-4: 3 utterances", "latent_dim-8: 3 utterances"]
    assert [path for path in run.rglob("*") if path.is_file()] == [run / "metrics" / "estimate.json"]
    assert "latent_dim-8" in capsys.readouterr().out


# ---- beside what it took -----------------------------------------------------------------------------------

MADE, LATER, EARLIER = (f"2026-01-01T{hour}:00:00+0000" for hour in (12, 13, 11))


def foreseen(seconds, fingerprint="f", source="measured and scaled", whole=True):
    return {"fingerprint": fingerprint, "seconds": seconds, "source": source, "whole": whole, "costs": []}


def done(run, step, seconds, time=LATER, fingerprint="f"):
    run.mark_started(step, fingerprint)
    run.mark_completed(step, fingerprint, seconds=seconds, time=time)


def page_of(run):
    soup = BeautifulSoup(report.write_index(run.path).read_text(encoding="utf-8"), "html.parser")
    return soup, soup.main.text.replace("\u00a0", " ")


def test_the_index_says_how_far_off_the_estimate_was(tmp_path):
    run = Run(tmp_path / "trial")
    steps = {"00_baseline": foreseen(720.0), "01_convert": foreseen(80.0), "06_compare": foreseen(5.0)}
    run.write_metrics("estimate", {"made": MADE, "steps": steps})
    done(run, "00_baseline", 600.0)
    done(run, "01_convert", 100.0)
    soup, text = page_of(run)
    assert [time.text for time in soup.select("ol.steps .time")][:2] == [
        "10 min 00 sestimated 12 min 00 s, took 10 min 00 s (−16.7 %)",
        "1 min 40 sestimated 1 min 20 s, took 1 min 40 s (+25 %)",
    ]
    assert "Of those that were estimated before: estimated 13 min 20 s, took 11 min 40 s (−12.5 %)" in text


@pytest.mark.parametrize(
    ("step", "time", "fingerprint"),
    [
        (foreseen(720.0), LATER, "another"),
        (foreseen(720.0), EARLIER, "f"),
        (foreseen(0.0, source="unchanged"), LATER, "f"),
        (foreseen(720.0, whole=False), LATER, "f"),
    ],
)
def test_steps_that_were_not_estimated_so_are_not_compared(tmp_path, step, time, fingerprint):
    run = Run(tmp_path / "trial")
    run.write_metrics("estimate", {"made": MADE, "steps": {"00_baseline": step}})
    done(run, "00_baseline", 600.0, time, fingerprint)
    assert estimated_steps(run) == {} and "estimated" not in page_of(run)[1]


def test_the_page_of_a_sweep_and_those_of_its_members_say_it_too(tmp_path):
    sweep = Run(tmp_path / "widths")
    members = {name: Run(sweep.path / name) for name in ("latent_dim-4", "latent_dim-8")}
    write_json(sweep.path / "params.json", {"sweep": {"latent_dim": [4, 8]}})
    each = {name: {"steps": {"00_baseline": foreseen(100.0)}} for name in members}
    sweep.write_metrics("estimate", {"made": MADE, "steps": {}, "members": each})
    for seconds, member in zip((90.0, 120.0), members.values(), strict=True):
        write_json(member.path / "params.json", {})
        done(member, "00_baseline", seconds)
    soup, text = page_of(sweep)
    assert "estimated 1 min 40 s, took 1 min 30 s (−10 %)" in soup.select("ol.members .time")[0].text
    assert "Of those that were estimated before: estimated 3 min 20 s, took 3 min 30 s (+5 %)" in text
    assert "estimated 1 min 40 s, took 2 min 00 s (+20 %)" in page_of(members["latent_dim-8"])[1]
