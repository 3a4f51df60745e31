"""The figures of README and docs/results.md are those of the kept reports, as far as these have them."""

import csv
import json
from pathlib import Path

import pytest

from asrlib.runs import project_root

ROOT = project_root(Path(__file__).parent)
EXAMPLES = ROOT / "reports" / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
CUTS = {"−50 %": 0.5, "−75 %": 0.75, "−87.5 %": 0.875, "−93.75 %": 0.9375, "−96.9 %": 0.96875}


def metrics(file: str) -> dict:
    return json.loads((EXAMPLES / file).read_text(encoding="utf-8"))


def table(file: str) -> list[dict[str, str]]:
    with open(EXAMPLES / file, newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def per_cent(share: float | str) -> str:
    return f"{float(share) * 100:.2f}"


def points(difference, low, high) -> str:
    difference, low, high = (f"{float(share) * 100:+.2f}".replace("-", "−") for share in (difference, low, high))
    return f"{difference} ({low} to {high})"


def with_interval(result: dict) -> str:
    low, high = result["wer_interval"]
    return f"{per_cent(result['wer'])} ({per_cent(low)}–{per_cent(high)})"


def rates(systems: dict, split: str) -> str:
    return " | ".join(per_cent(systems[name][split]["wer"]) for name in ("converted", "finetuned"))


def of_human_speech(cut: float, split: str) -> tuple[dict, str]:
    """The systems of a member, and its row behind the column of MHA."""
    systems = metrics(f"real_speech/cache_cut-{cut}/metrics/evaluate.json")["systems"]
    (test,) = (
        row for row in table("real_speech/tables/tests.csv") if (row["b"], row["split"]) == (f"cache_cut-{cut}", split)
    )
    return systems, f"{rates(systems, split)} | {points(test['difference'], test['low'], test['high'])}"


def of_a_run(run: str, split: str, system: str) -> tuple[dict, str]:
    kept = metrics(f"{run}/metrics/evaluate.json")
    test = kept["paired"][split][f"baseline vs {system}"]
    return kept["systems"], points(test["difference"], *test["interval"])


@pytest.mark.parametrize(("row", "split"), [("AN4 (773)", "an4-test"), ("LibriSpeech (6,706)", "dev-4-speakers")])
def test_readme_on_human_speech(row, split):
    systems, rest = of_human_speech(0.9375, split)
    assert f"| trained on 5 hours, {row} | {per_cent(systems['baseline'][split]['wer'])} | {rest} |" in README


PUBLISHED = {"whisper_tiny_en": "tiny.en", "whisper_base": "base"}


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_whisper(run):
    split = "dev-4-speakers"
    systems, change = of_a_run(run, split, "finetuned")
    standard, rest = per_cent(systems["baseline"][split]["wer"]), f"{rates(systems, split)} | {change} |"
    assert f"| OpenAI's Whisper {PUBLISHED[run]}, LibriSpeech (6,793) | {standard} | {rest}" in README
    for name, row in {"baseline": "MHA", "converted": "converted", "finetuned": "fine-tuned"}.items():
        result = systems[name][split]
        wrong = ", ".join(str(result[kind]) for kind in ("substitutions", "deletions", "insertions"))
        change = "" if name == "baseline" else of_a_run(run, split, name)[1] + " "
        assert f"| {row} | {with_interval(result)} | {change}| {wrong} | {result['loops']} |" in RESULTS
    held = {row["system"]: row for row in metrics(f"{run}/metrics/benchmark.json")["writing"]}
    cells = (
        f"{held['converted'][part] / 1e6:.{digits}f}" for part, digits in (("cross_bytes", 2), ("decoder_bytes", 3))
    )
    assert f"| converted | {' | '.join(cells)} | {held['converted']['ratio']:.1f} |" in RESULTS


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_whisper_at_every_cut(run):
    methods = ["svd", "whitened", "two_sided", "attended, sensitivity", "attended, sensitivity, shared"]
    rows = metrics(f"{run}/metrics/analyze.json")["cost_of_cut"]
    of_each = {(row["recipe"], row["cut"]): per_cent(row["wer"]) + "*" * (row["p"] < 0.05) for row in rows}
    for name, cut in CUTS.items():
        assert f"| {name} | {' | '.join(of_each[method, cut] for method in methods)} |" in RESULTS


def test_synthetic_speech():
    systems, change = of_a_run("demo", "test-clean", "finetuned")
    clean, rest = systems["baseline"]["test-clean"], f"{rates(systems, 'test-clean')} | {change} |"
    assert f"| shipped, synthetic (2,744) | {per_cent(clean['wer'])} | {rest}" in README
    assert f"| test-clean, 2,744 words | {with_interval(clean)} | {rest}" in RESULTS
    other = f"{rates(systems, 'test-other')} | {of_a_run('demo', 'test-other', 'finetuned')[1]}"
    assert f"| test-other, 2,684 words | {with_interval(systems['baseline']['test-other'])} | {other} |" in RESULTS


@pytest.mark.parametrize("split", ["an4-test", "dev-4-speakers"])
def test_human_speech_at_every_cut(split):
    for name, cut in CUTS.items():
        systems, rest = of_human_speech(cut, split)
        assert any(line.startswith(f"| {name} | {rest}") for line in RESULTS), name
    assert f"| MHA | {with_interval(systems['baseline'][split])} | | |" in RESULTS
    zeroed = metrics("real_speech_baseline/metrics/baseline.json")["attention_zeroed"][split]["wer"]
    assert any(line.startswith("- With all attention") and f"{per_cent(zeroed)} %" in line for line in RESULTS)


def test_streams_in_chunks():
    rows = metrics("streaming_small/metrics/streaming.json")["rows"]
    for chunk in (168, 312, 648, 1272):
        in_chunks = [row for row in rows if row["chunk_ms"] == chunk and round(row["left_seconds"]) == 2]
        (mha,) = (row for row in in_chunks if (row["system"], row["cache"]) == ("baseline", "float32"))
        (mla,) = (row for row in in_chunks if (row["system"], row["cache"]) == ("finetuned", "int8"))
        change = points(mla["difference"], mla["difference_low"], mla["difference_high"])
        assert f"| {chunk} ms | {per_cent(mha['wer'])} | {per_cent(mla['wer'])} | {change} |" in RESULTS
        assert (mha["cache_bytes"] / 1024, mla["cache_bytes"] / 1024) == (332, pytest.approx(5.2, abs=0.05))
        assert mha["cache_bytes"] / mla["cache_bytes"] == 64


@pytest.mark.parametrize("encoder", ["conformer", "branchformer"])
@pytest.mark.parametrize("attention", ["mha", "mla", "gqa", "linear"])
def test_models_from_scratch(encoder, attention):
    name = attention if attention == "linear" else attention.upper()
    (row,) = (
        row
        for row in table("baselines_small/tables/ranking.csv")
        if encoder in row["member"] and attention in row["member"]
    )
    clean, low, high = (per_cent(row[f"wer_test-clean{end}"]) for end in ("", "_low", "_high"))
    other = per_cent(row["wer_test-other"])
    assert f"| {encoder.capitalize()}, {name} | {clean} ({low}–{high}) | {other} |" in RESULTS


@pytest.mark.parametrize(
    ("row", "member"), [("MHA", "before conversion"), ("made MLA", "convert_to-mla"), ("made GQA", "convert_to-gqa")]
)
def test_gqa_or_mla(row, member):
    (kept,) = (kept for kept in table("gqa_or_mla_small/tables/ranking.csv") if kept["member"] == member)
    assert f"| {row} | {per_cent(kept['wer_test-clean'])} | {per_cent(kept['wer_test-other'])} |" in RESULTS
