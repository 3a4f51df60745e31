"""A report that was changed afterwards is found out; one that was not is not accused."""

import os
import re
import subprocess
import time

import pytest
from test_evaluation import babble
from test_run_all import ROOT, call

from asrlib.measuring.significance import compare_errors
from asrlib.measuring.word_errors import load_predictions, score, write_predictions
from asrlib.running.verification import CHECKSUMS, as_text, verify, write_checksums
from asrlib.running.without_pages import leave_pages_out
from asrlib.runs import Run, read_json, write_json


def finished(run):
    """What a run of all steps leaves, as far as it is verified."""
    rows = [row | {"speaker": f"s{i % 3}"} for i, row in enumerate(babble(20, seed=1))]
    better = [row | {"hypothesis": row["reference"]} if i % 3 == 0 else row for i, row in enumerate(rows)]
    results = {"baseline": score(rows), "converted": score(rows), "finetuned": score(better)}
    for system, result in results.items():
        write_predictions(run.predictions / f"{system}_test.jsonl", result.predictions)
    pairs = [("baseline", "converted"), ("baseline", "finetuned")]
    paired = {"test": {f"{a} vs {b}": compare_errors(results[a], results[b]) for a, b in pairs}}
    systems = {system: {"test": result.as_metrics()} for system, result in results.items()}
    run.write_metrics("baseline", {"splits": systems["baseline"]})
    run.write_metrics("evaluate", {"systems": systems, "paired": paired})
    write_json(run.path / "params.json", {"seed": 0})
    (run.models / "baseline").mkdir()
    (run.models / "baseline" / "model.safetensors").write_bytes(b"weights")
    (run.path / "index.html").write_text("<p>")
    (run.path / "pipeline.log").write_text("begun")
    write_checksums(run)
    return run


@pytest.fixture
def run(tmp_path):
    return finished(Run(tmp_path / "trial"))


def problems(run):
    return verify(run.path)[run.path.name].problems


def with_metrics(run, change):
    """The run with its metrics changed, and hashes that fit them."""
    metrics = read_json(run.path / "metrics" / "evaluate.json")
    change(metrics)
    write_json(run.path / "metrics" / "evaluate.json", metrics)
    write_checksums(run)


def test_what_was_not_touched_is_right_and_passing_files_may_change(run):
    (run.path / "pipeline.log").write_text("called again")
    (run.checkpoints("03_finetune") / "state.json").write_text("{}")
    (run.path / "exports").mkdir()
    (run.path / "exports" / "README.md").write_text("taken out later")
    found = verify(run.path)
    assert found["trial"].problems == []
    assert found["trial"].checked == [
        "8 of 8 files have the sha256 they had when the run ended",
        "3 of 3 word error rates come out the same again",
        "2 paired tests come out the same again",
    ]
    assert as_text(found).endswith("nothing is wrong in what was checked above")


def test_coreutils_read_the_checksums(run):
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    assert subprocess.run(command, cwd=run.path, capture_output=True).returncode == 0
    (run.path / "index.html").write_text("<p>better")
    assert subprocess.run(command, cwd=run.path, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("index.html", lambda path: path.write_text("<p>better"), "changed since: index.html"),
        ("index.html", lambda path: path.unlink(), "missing: index.html"),
        ("tables.html", lambda path: path.touch(), "not of this run: tables.html"),
        ("predictions/baseline_test.jsonl", lambda path: path.write_text("{}"), "line 1 of "),
    ],
)
def test_a_changed_file_is_named(run, name, change, said):
    change(run.path / name)
    assert any(problem.startswith(said) for problem in problems(run)), problems(run)


@pytest.mark.parametrize("name", ["wer", "substitutions", "wer_interval_by_speaker"])
def test_a_figure_that_the_transcripts_do_not_give_is_named_even_where_the_hashes_fit(run, name):
    said = {}

    def change(metrics):
        of = metrics["systems"]["finetuned"]["test"]
        said["true"] = of[name]
        of[name] = said["false"] = [0.0, 1.0] if isinstance(of[name], list) else of[name] / 2

    with_metrics(run, change)
    assert problems(run) == [
        f"finetuned on test: {name} is {said['false']} in the metrics, but {said['true']} by the transcripts"
    ]


def test_one_changed_transcript_is_one_problem_of_figures_and_one_of_the_file(run):
    path = run.predictions / "baseline_test.jsonl"
    rows = load_predictions(path)
    write_predictions(path, [rows[0] | {"hypothesis": "word " * 40}, *rows[1:]])
    file, figures = problems(run)
    assert file == "changed since: predictions/baseline_test.jsonl"
    assert re.match(
        r"baseline on test: wer is [\d.]+ in the metrics, but [\d.]+ by the transcripts; different too: ", figures
    )


def test_a_test_that_the_transcripts_do_not_give_is_named(run):
    with_metrics(run, lambda metrics: metrics["paired"]["test"]["baseline vs finetuned"].update(p=0.5))
    (problem,) = problems(run)
    assert problem.startswith("baseline vs finetuned on test: p is 0.5 in the metrics")


def test_older_metrics_that_say_less_are_compared_in_what_they_say(run):
    with_metrics(run, lambda metrics: metrics["systems"]["baseline"]["test"].pop("speakers"))
    assert problems(run) == []


def test_what_a_kept_report_leaves_out_is_said_and_is_no_problem(run):
    (run.models / "baseline" / "model.safetensors").unlink()
    (run.predictions / "converted_test.jsonl").unlink()
    found = verify(run.path)["trial"]
    assert found.problems == []
    assert "2 files of models, predictions are not here" in found.checked
    assert "without transcripts here, so not counted again: converted on test" in found.checked


def test_without_checksums_or_with_damaged_metrics_it_is_not_called_right(run):
    (run.metrics / "evaluate.json").write_text('{"systems": {')
    assert any("evaluate.json is not valid JSON" in problem for problem in problems(run))
    (run.path / CHECKSUMS).unlink()
    assert problems(run)[0].startswith("there is no checksums.sha256")


def test_calling_a_finished_run_again_does_not_bless_what_was_changed_by_hand(run):
    changed, removed = run.predictions / "baseline_test.jsonl", run.metrics / "baseline.json"
    changed.write_text("")
    os.utime(changed, (0, time.time() - 10))
    removed.unlink()
    (run.path / "index.html").write_text("<p>written again")
    write_checksums(run, since=time.time() - 5)
    assert problems(run)[:2] == ["changed since: predictions/baseline_test.jsonl", "missing: metrics/baseline.json"]


def test_members_of_a_sweep_are_verified_too(tmp_path, capsys):
    sweep = Run(tmp_path / "widths")
    write_json(sweep.path / "params.json", {"sweep": {"latent_dim": [4, 8]}})
    members = [finished(Run(sweep.path / f"latent_dim-{width}")) for width in (4, 8)]
    write_checksums(sweep)
    assert call(tmp_path, "--verify", "widths") == 0
    (members[1].path / "index.html").unlink()
    capsys.readouterr()
    assert call(tmp_path, "--verify", "widths") == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["widths", "  1 of 1 files have the sha256 they had when the run ended"]
    assert shown[-2] == "  WRONG  missing: index.html" and shown[-1].startswith("1 problem found; to run it again: ")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert call(tmp_path, "--verify", "nowhere") == 2
    assert "nowhere holds no run: give its folder, like reports/demo" in capsys.readouterr().err


# ---- reports that are kept ---------------------------------------------------------------------------------

INDEX = """<nav class="pages"><a href="index.html">trial</a>
<a href="00_baseline.html"><small>00</small> Baseline</a>
</nav>
<h2 id="pages">Step by step</h2>
<li><a href="00_baseline.html">Baseline</a>, <a href="tables/a.csv">table</a></li>
"""


def test_a_report_without_pages_has_no_dead_links_and_is_still_what_the_run_made(run):
    (run.path / "index.html").write_text(INDEX)
    (run.path / "00_baseline.html").write_text("<p>")
    for name in ("shown.png", "other.png"):
        (run.figures / name).write_bytes(b"png")
    write_checksums(run)
    leave_pages_out(run.path, "![](reports/examples/trial/figures/shown.png)")
    assert [path.name for path in run.figures.iterdir()] == ["shown.png"]
    page = (run.path / "index.html").read_text()
    assert not (run.path / "00_baseline.html").exists() and re.findall('href="(.*?)"', page) == [
        "index.html",
        "tables/a.csv",
    ]
    assert "<li>Baseline, <a" in page and "<code>python run_all.py trial</code> makes them" in page
    assert problems(run) == []
    assert not any(" not here" in said for said in verify(run.path)["trial"].checked), (
        "nobody expects what was left out"
    )
    leave_pages_out(run.path, "trial/figures/shown.png")
    assert (run.path / "index.html").read_text() == page


def test_a_changed_report_is_still_found_out_when_its_pages_are_left_out(run):
    (run.metrics / "evaluate.json").write_text("{}")
    (run.path / "index.html").write_text(INDEX)
    leave_pages_out(run.path)
    assert problems(run)[0] == "changed since: index.html, metrics/evaluate.json"


def test_the_kept_reports_link_to_nothing_that_is_not_there():
    indexes = sorted((ROOT / "reports" / "examples").rglob("index.html"))
    links = [(page, link) for page in indexes for link in re.findall(r'<a [^>]*href="([^"#:]+)"', page.read_text())]
    assert links and [(page, link) for page, link in links if not (page.parent / link).exists()] == []
