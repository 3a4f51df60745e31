"""All runs on one page, and two of them beside each other."""

import base64
import hashlib
import re
import shutil

import pytest
from bs4 import BeautifulSoup
from test_run_all import ROOT, call
from test_verification import finished

from asrlib.reporting.runs_page import write_runs_index
from asrlib.runs import Run, read_json, write_json


@pytest.fixture
def reports(tmp_path):
    """A single run with a benchmark, and a run that was only begun."""
    run = finished(Run(tmp_path / "reports" / "trial"))
    systems = {
        name: {"cache_bytes_per_second": cache, "parameters": 1_000_000, "rtfx": 12.0, "peak_memory_bytes": 2**20}
        for name, cache in (("baseline", 4096), ("converted", 1024), ("finetuned", 1024))
    }
    run.write_metrics("benchmark", {"systems": systems, "device": "cpu", "threads": 1, "dtype": "float32"})
    run.mark_completed("04_evaluate", "f", seconds=1.0, time="2026-01-01T12:00:00+0000", commit="abc")
    begun = Run(tmp_path / "reports" / "begun")
    begun.metrics  # noqa: B018
    (begun.path / "index.html").touch()
    return tmp_path / "reports"


def rows_of(reports):
    soup = BeautifulSoup(write_runs_index(reports).read_text(encoding="utf-8"), "html.parser")
    head = [cell.text for cell in soup.select("thead th")]
    return soup, [dict(zip(head, row.find_all(["th", "td"]), strict=True)) for row in soup.select("tbody tr")]


def test_a_run_is_there_with_its_last_model_and_one_without_word_errors_is_not(reports):
    soup, (row,) = rows_of(reports)
    metrics = read_json(reports / "trial/metrics/evaluate.json")["systems"]["finetuned"]["test"]
    assert row["run"].a["href"] == "trial/index.html" and row["run"].text == "trial"
    assert float(row["WER"]["data-value"]) == metrics["wer"] and f"{100 * metrics['wer']:.2f} %" in row["WER"].text
    assert float(row["cache of 30 s"]["data-value"]) == 30 * 1024 and row["cut"].text == "75.0 %"
    assert (row["RTFx"].text, row["finished"].text) == ("12", "2026-01-01 12:00")
    assert (
        "75" not in soup.select_one("figure img")["alt"].split(";")[0] and "trial test" in soup.select_one("img")["alt"]
    )


def test_models_of_a_sweep_are_there_and_its_members_lead_to_their_own_pages(tmp_path):
    for name in ("baselines_small", "conversion_small"):
        shutil.copytree(ROOT / "reports" / "examples" / name, tmp_path / "examples" / name)
    _, rows = rows_of(tmp_path)
    found = {row["run"].text: row for row in rows if row["split"].text == "test-clean"}
    member = found["examples/baselines_small/conformer_mla_small"]
    assert member["run"].a["href"] == "examples/baselines_small/conformer_mla_small/index.html"
    assert member["WER"].text.startswith("6.27 %") and member["cut"].text == "75.0 %"
    unconverted = found["examples/conversion_small/before conversion"]
    assert (
        unconverted["run"].a["href"] == "examples/conversion_small/index.html"
        and unconverted["attention"].text == "MHA"
    )


def test_the_only_script_is_the_one_that_the_policy_names(reports):
    soup, _ = rows_of(reports)
    (script,) = soup.find_all("script")
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert re.search(r"script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"


def test_where_nothing_was_run_the_page_says_so(tmp_path):
    assert "No run has measured word errors yet" in write_runs_index(tmp_path / "reports").read_text(encoding="utf-8")


# ---- two runs ----------------------------------------------------------------------------------------------


def test_two_runs_differ_in_what_was_asked_and_what_came_out(tmp_path, capsys):
    one, other = (finished(Run(tmp_path / name)) for name in ("one", "other"))
    write_json(other.path / "params.json", {"seed": 1, "latent_dim": 4})
    for split in ("baseline_test", "converted_test"):
        source = other.predictions / "finetuned_test.jsonl"
        (other.predictions / f"{split}.jsonl").write_text(source.read_text())
    metrics = read_json(other.path / "metrics" / "evaluate.json")
    metrics["systems"]["baseline"] = metrics["systems"]["finetuned"]
    write_json(other.path / "metrics" / "evaluate.json", metrics)
    assert call(tmp_path, "--diff", "one", "other") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["parameters", "           one other"]
    assert lines[2].split() == ["seed", "0", "1"] and lines[3].split() == ["latent_dim", "–", "4"]
    assert lines[lines.index("made with") + 1] == "the same"
    wer = lines[lines.index("baseline") + 1]
    before, after = (read_json(run.path / "metrics/evaluate.json")["systems"] for run in (one, other))
    change = after["baseline"]["test"]["wer"] - before["baseline"]["test"]["wer"]
    assert change < 0 and f" −{-100 * change:.2f} points (" in wer and "p < 0.001" in wer
    assert "±0.00 points (±0.00 to ±0.00; p = 1)" in lines[lines.index("finetuned") + 1]


def test_transcripts_of_other_utterances_are_not_tested(tmp_path, capsys):
    _, other = (finished(Run(tmp_path / name)) for name in ("one", "other"))
    path = other.predictions / "baseline_test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert call(tmp_path, "--diff", "one", "other") == 0
    assert "not tested: the results are not over the same utterances: 'u0'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "said"), [("nowhere", "holds no run"), ("widths", "widths is a sweep: give one of")]
)
def test_what_is_no_single_run_is_refused(tmp_path, capsys, folder, said):
    finished(Run(tmp_path / "one"))
    write_json(tmp_path / "widths" / "params.json", {"sweep": {"latent_dim": [4]}})
    assert call(tmp_path, "--diff", "one", folder) == 2
    assert said in capsys.readouterr().err
