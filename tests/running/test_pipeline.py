"""The real notebooks, the real params/smoke.yaml, executed by papermill in a copy of the project."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from commands import run_all

from asrlib.running.parameters import Schema, read_params_file
from asrlib.runs import find_notebooks, read_json

ROOT = Path(__file__).parents[2]
TIMES = re.compile("seconds$|runtime|per_second|^time")  # names of what a clock says
STEPS = [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]


@pytest.fixture(scope="module")
def smoke(project) -> Path:
    done = run_all(project, "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reports/smoke/index.html" in done.stdout
    return project / "reports" / "smoke"


def test_every_step_leaves_its_page_its_metrics_and_its_marker(smoke):
    for step in STEPS:
        assert (smoke / f"{step}.html").is_file()
        assert (smoke / ".completed" / f"{step}.json").is_file()
    assert len(list((smoke / "metrics").glob("*.json"))) == len(STEPS)
    for name in ("cache_comparison.png", "wer_vs_cache.png", "inference_time_comparison.png", "training_curves.png"):
        assert (smoke / "figures" / name).stat().st_size > 5_000
    assert (smoke / "tables" / "comparison_table.csv").is_file() and (smoke / "summary.txt").is_file()


def test_word_errors_are_measured_for_all_three_models_on_both_splits(smoke):
    systems = read_json(smoke / "metrics" / "evaluate.json")["systems"]
    assert set(systems) == {"baseline", "converted", "finetuned"}
    for name, splits in systems.items():
        for split in ("test-clean", "test-other"):
            lines = (smoke / "predictions" / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(lines) == splits[split]["utterances"] == 8
            errors = sum(splits[split][kind] for kind in ("substitutions", "deletions", "insertions"))
            assert splits[split]["wer"] == pytest.approx(errors / splits[split]["words"])


def test_the_index_leads_with_the_comparison_and_links_all_pages(smoke):
    page = (smoke / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{step}.html"' in page for step in STEPS)
    assert page.index("WER on test-clean") < page.index('00_baseline.html">Baseline')


def test_the_finetuned_model_loads_back_in_one_line(smoke):
    code = (
        "import asrlib, transformers; asrlib.register(); print(transformers.AutoModelForCTC"
        f".from_pretrained({str(smoke / 'models' / 'finetuned')!r}).config.model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "wav2vec2-conformer-mla", done.stderr


def test_a_second_call_runs_nothing(project, smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "metrics").iterdir()}
    done = run_all(project, "smoke")
    assert done.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (smoke / "metrics").iterdir()}


def killed_in(project: Path, name: str, step: str, *more: str, until: str = "") -> None:
    """Starts the run called `name`, and kills it and its kernel when it is at `step` and has made the file `until`."""
    process = subprocess.Popen(
        [sys.executable, "run_all.py", "smoke", "--name", name, *more],
        cwd=project,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    run, deadline = project / "reports" / name, time.monotonic() + 300
    while not list(run.glob(until or f"notebooks/{step}.running.ipynb")):
        assert time.monotonic() < deadline and process.poll() is None, f"{step} never came so far"
        time.sleep(0.02)
    time.sleep(0 if until else 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (project / "reports" / name / ".completed" / f"{step}.json").exists()


def test_a_run_from_nothing_through_kills_and_a_full_disk_is_the_same_to_the_last_digit(project, smoke):
    run = project / "reports" / "unlucky"

    def little_room():  # for any one file, as it is with a quota or a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    killed_in(project, "unlucky", "01_convert")
    full = run_all(project, "smoke", "--name", "unlucky", preexec_fn=little_room)
    assert full.returncode == 1 and "make room first" in full.stderr and "Traceback" not in full.stderr
    assert "The same command, given again, resumes there." in full.stderr
    assert (run / ".completed" / "00_baseline.json").exists()
    assert not (run / ".completed" / "01_convert.json").exists()
    for model in (run / "models").iterdir():
        assert (model / "model.safetensors").stat().st_size > 2**20, "half a model"

    killed_in(project, "unlucky", "03_finetune", until="checkpoints/03_finetune/checkpoint-*/.completed.json")
    killed_in(project, "unlucky", "04_evaluate")
    assert "resum" in (run / "pipeline.log").read_text(encoding="utf-8").lower()
    killed_in(project, "unlucky", "06_compare")
    done = run_all(project, "smoke", "--name", "unlucky")
    assert done.returncode == 0, done.stdout + done.stderr

    assert not [path for path in run.rglob("*") if ".tmp-" in path.name or ".running." in path.name]
    for metrics in ("baseline", "convert", "analyze", "finetune", "evaluate"):
        first, second = (without_times(read_json(each / "metrics" / f"{metrics}.json")) for each in (smoke, run))
        assert first == second, metrics
    transcripts = sorted(path.name for path in (smoke / "predictions").iterdir())
    assert len(transcripts) == 6
    for name in transcripts:
        assert (smoke / "predictions" / name).read_bytes() == (run / "predictions" / name).read_bytes()


# ---- notebooks ---------------------------------------------------------------------------------------------


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not TIMES.search(key)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("step", STEPS)
def test_notebooks_are_committed_without_outputs_and_stay_short(step):
    notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    working = [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    lines = [line for cell in working for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 120
    assert not any(line.startswith(("def ", "class ")) for line in lines)
    assert json.dumps(notebook.metadata).count("tags") == 0


def test_the_notebooks_own_defaults_are_the_demo():
    defaults, demo = Schema(find_notebooks(ROOT)).defaults, read_params_file(ROOT / "params" / "demo.yaml")
    assert {name: defaults[name] for name in demo} == demo
