"""Whole runs of a model that is trained anew, and of one that writes token by token."""

import re
from pathlib import Path

import family_models
import pytest
import yaml
from commands import run_all
from transformers import WhisperFeatureExtractor, WhisperProcessor

import asrlib
from asrlib.runs import find_notebooks, read_json

STEPS = list(find_notebooks(Path(__file__).parents[2]))
MOST_TOKENS = 8
WRITES = dict(
    model="models/whisper", corpus="synthetic", eval_splits=["test-clean"], eval_samples=6, latent_dim=4,
    method="two_sided", ranks="sensitivity", parts=["decoder", "cross"], calibration_seconds=20, analysis_samples=2,
    analysis_eval_samples=3, analysis_cuts=[0.5], analysis_methods=["svd", "attended, sensitivity, shared"],
    shared=True, train_samples=8, validation_samples=4,
    epochs=1, kl_weight=1.0, on_policy=0.5, own_words=True, control=True,
    batch_seconds=20, benchmark_samples=2, device="cpu",
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
    systems = ["baseline", "control", "converted", "finetuned"]
    evaluated = read_json(writes / "metrics" / "evaluate.json")
    assert list(evaluated["systems"]) == systems and "control vs finetuned" in evaluated["paired"]["test-clean"]
    assert [row["system"] for row in read_json(writes / "metrics" / "compare.json")["table"]] == systems
    assert "against MHA trained alike" in (writes / "index.html").read_text(encoding="utf-8")
    assert read_json(writes / "metrics" / "finetune.json")["control"]["settings"]["on_policy"] == 0.5
    assert asrlib.load(writes / "models" / "control")[0].config.model_type == "whisper"
    converted = read_json(writes / "metrics" / "convert.json")
    assert converted["attention"] == "MLA" and sum(converted["latent_dim"][:3]) == 4 * 3, "the last two are one"
    assert converted["cache_cut"] == 1 - 3 * 4 / (2 * family_models.WIDTH * 4)
    (cut,) = (row for row in read_json(writes / "metrics" / "analyze.json")["cost_of_cut"] if row["recipe"] == "svd")
    assert cut["cut_reached"] == 0.5


def test_what_a_whisper_keeps_while_it_writes_is_counted(writes):
    rows = read_json(writes / "metrics" / "benchmark.json")["writing"]
    assert [row["system"] for row in rows] == ["baseline", "control", "converted", "finetuned"]
    for row in rows:
        assert row["cross_bytes"] + row["decoder_bytes"] == row["formula_bytes"] > 0
    assert rows[0]["cross_bytes"] == rows[1]["cross_bytes"] > 4 * rows[2]["cross_bytes"]


def test_a_finetuned_whisper_loads_back_and_keeps_what_it_attends_to(writes):
    latent, processor = asrlib.load(writes / "models" / "finetuned")
    assert latent.config.model_type == "whisper-mla" and latent.config.use_cache
    assert processor.tokenizer.prefix_tokens[0] == latent.config.decoder_start_token_id
    assert latent.generation_config.max_length == MOST_TOKENS
