"""The real notebooks, the real params/smoke.yaml, executed by papermill in a copy of the project."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import family_models
import nbformat
import pytest
import yaml
from transformers import WhisperFeatureExtractor, WhisperProcessor

import asrlib
from asrlib.running.parameters import Schema, read_params_file
from asrlib.runs import find_notebooks, read_json

ROOT = Path(__file__).parents[2]
TIMES = re.compile("seconds$|runtime|per_second|^time")  # names of what a clock says
STEPS = [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]


def run_all(project: Path, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "run_all.py", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what a run needs, so that the reports of the checkout stay as they are."""
    project = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "asrlib"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.py", project)
    return project


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


def test_killed_in_the_middle_of_training_it_reaches_the_same_metrics(project, smoke):
    killed = project / "reports" / "killed"
    shutil.copytree(smoke, killed)
    arguments = ["smoke", "--name", "killed"]
    process = subprocess.Popen(
        [sys.executable, "run_all.py", *arguments, "--from", "03_finetune"],
        cwd=project,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(killed.glob("checkpoints/03_finetune/checkpoint-*/.completed.json")):
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint came"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / ".completed" / "03_finetune.json").exists()

    done = run_all(project, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resum" in (killed / "pipeline.log").read_text(encoding="utf-8").lower()
    undisturbed, resumed = (read_json(run / "metrics" / "evaluate.json") for run in (smoke, killed))
    assert undisturbed == resumed
    histories = [
        [{k: v for k, v in entry.items() if k in ("step", "loss", "eval_loss", "eval_wer")} for entry in history]
        for history in (read_json(run / "metrics" / "finetune.json")["history"] for run in (smoke, killed))
    ]
    assert histories[0] == histories[1]


def test_a_run_repeated_from_nothing_has_the_same_transcripts_and_metrics_to_the_last_digit(project, smoke):
    done = run_all(project, "smoke", "--name", "again")
    assert done.returncode == 0, done.stdout + done.stderr
    again = project / "reports" / "again"
    for metrics in ("baseline", "convert", "analyze", "finetune", "evaluate"):
        first, second = (without_times(read_json(run / "metrics" / f"{metrics}.json")) for run in (smoke, again))
        assert first == second, metrics
    transcripts = sorted(path.name for path in (smoke / "predictions").iterdir())
    assert len(transcripts) == 6
    for name in transcripts:
        assert (smoke / "predictions" / name).read_bytes() == (again / "predictions" / name).read_bytes()


def killed_in(project: Path, name: str, step: str, *more: str) -> None:
    """Starts the run called `name`, and kills it and its kernel when it is at `step`."""
    process = subprocess.Popen(
        [sys.executable, "run_all.py", "smoke", "--name", name, *more],
        cwd=project,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    running = project / "reports" / name / "notebooks" / f"{step}.running.ipynb"
    deadline = time.monotonic() + 300
    while not running.exists():
        assert time.monotonic() < deadline and process.poll() is None, f"{step} never ran"
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (project / "reports" / name / ".completed" / f"{step}.json").exists()


def test_a_full_disk_and_kills_in_conversion_evaluation_and_comparison_leave_no_trace(project, smoke):
    run = project / "reports" / "unlucky"
    shutil.copytree(smoke, run)

    def little_room():  # for any one file, as it is with a quota or a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    full = run_all(project, "smoke", "--name", "unlucky", "--from", "01_convert", preexec_fn=little_room)
    assert full.returncode == 1 and "make room first" in full.stderr and "Traceback" not in full.stderr
    assert "The same command, given again, resumes there." in full.stderr
    assert (run / ".completed" / "00_baseline.json").exists()
    assert not (run / ".completed" / "01_convert.json").exists()
    for model in (run / "models").iterdir():
        assert (model / "model.safetensors").stat().st_size > 2**20, "half a model"
    for step in ("01_convert", "04_evaluate", "06_compare"):
        killed_in(project, "unlucky", step)
    done = run_all(project, "smoke", "--name", "unlucky")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name or ".running." in path.name]
    for metrics in ("convert", "evaluate", "finetune"):
        undisturbed, resumed = (read_json(each / "metrics" / f"{metrics}.json") for each in (smoke, run))
        assert without_times(undisturbed) == without_times(resumed)


# ---- a model that writes token by token ------------------------------------------------------------------

MOST_TOKENS = 8
WRITES = dict(
    model="models/whisper", corpus="synthetic", eval_splits=["test-clean"], eval_samples=6, latent_dim=4,
    method="two_sided", ranks="sensitivity", parts=["decoder", "cross"], calibration_seconds=20, analysis_samples=2,
    analysis_eval_samples=3, analysis_cuts=[0.5], analysis_methods=["svd"], train_samples=8, validation_samples=4,
    epochs=1, kl_weight=1.0, batch_seconds=20, benchmark_samples=2, device="cpu",
)  # fmt: skip


def test_a_trained_baseline_is_kept_when_only_its_tests_change(project):
    """A new model: what it is tested on changes, then what it is trained by, then it is told to begin again."""
    new = dict(
        architecture="conformer", hidden_size=16, num_layers=1, num_heads=2, subsampling_channels=4, steps=STEPS[:1],
        depthwise_kernel=5, baseline_samples=8, baseline_epochs=1.0, eval_splits=["test-clean"], eval_samples=4,
        device="cpu", frame_shift_ms=6.0,
    )  # fmt: skip
    (project / "params" / "trained.yaml").write_text(yaml.safe_dump(new), encoding="utf-8")
    run = project / "reports" / "trained"
    weights, page = run / "models" / "baseline" / "model.safetensors", run / "00_baseline.html"

    def call(*words: str) -> tuple:
        """(is the model on disk the same as before?, does the page say that it was kept?, metrics)"""
        before = weights.stat().st_mtime_ns if weights.is_file() else None
        done = run_all(project, "trained", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        kept = "The baseline was kept" in re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.S)
        return weights.stat().st_mtime_ns == before, kept, read_json(run / "metrics" / "baseline.json")

    same, kept, first = call()
    assert not same and not kept
    same, kept, tested = call("--set", "eval_samples=6")
    assert same and kept and tested["training"] == first["training"]
    assert (first["splits"]["test-clean"]["utterances"], tested["splits"]["test-clean"]["utterances"]) == (4, 6)
    assert call("--set", "eval_samples=6", "seed=1")[:2] == (False, False)
    assert call("--set", "eval_samples=6", "seed=1", "--force")[:2] == (False, False)


@pytest.fixture(scope="module")
def writes(project) -> Path:
    """A run of a Whisper that hears 5 s and, untrained, writes as much as it may: little."""
    window = 5
    model = family_models.whisper(max_source_positions=50 * window, max_target_positions=96)
    model.generation_config.max_length = MOST_TOKENS
    model.save_pretrained(project / "models" / "whisper")
    extractor = WhisperFeatureExtractor(family_models.MEL_BINS, chunk_length=window)
    WhisperProcessor(extractor, family_models.byte_pairs()).save_pretrained(project / "models" / "whisper")
    (project / "params" / "writes.yaml").write_text(yaml.safe_dump(WRITES))
    done = run_all(project, "writes")
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "reports" / "writes"


def test_a_whisper_goes_through_all_steps(writes):
    assert all((writes / f"{step}.html").is_file() for step in STEPS)
    assert len(list((writes / "metrics").glob("*.json"))) == len(STEPS)
    assert set(read_json(writes / "metrics" / "evaluate.json")["systems"]) == {"baseline", "converted", "finetuned"}
    converted = read_json(writes / "metrics" / "convert.json")
    assert converted["attention"] == "MLA" and sum(converted["latent_dim"]) == 4 * 4
    assert converted["cache_cut"] == 1 - 4 / (2 * family_models.WIDTH)
    (cut,) = (row for row in read_json(writes / "metrics" / "analyze.json")["cost_of_cut"] if row["recipe"] == "svd")
    assert cut["cut_reached"] == 0.5


def test_what_a_whisper_keeps_while_it_writes_is_counted(writes):
    rows = read_json(writes / "metrics" / "benchmark.json")["writing"]
    assert [row["system"] for row in rows] == ["baseline", "converted", "finetuned"]
    for row in rows:
        assert row["cross_bytes"] + row["decoder_bytes"] == row["formula_bytes"] > 0
    assert rows[0]["cross_bytes"] / rows[1]["cross_bytes"] > 4


def test_a_finetuned_whisper_loads_back_and_keeps_what_it_attends_to(writes):
    latent, processor = asrlib.load(writes / "models" / "finetuned")
    assert latent.config.model_type == "whisper-mla" and latent.config.use_cache
    assert processor.tokenizer.prefix_tokens[0] == latent.config.decoder_start_token_id
    assert latent.generation_config.max_length == MOST_TOKENS


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
