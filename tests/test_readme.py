"""README is short, its code runs, and its figures are those of the kept reports."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

import asrlib
from asrlib.runs import project_root

ROOT = project_root(Path(__file__).parent)
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "reports" / "examples"
HEADINGS = [
    "Two commands", "In three lines", "Your own model and speech", "The notebooks", "What is known", "Model families",
    "Where things are", "What is not shown", "More",
]  # fmt: skip


def test_it_is_short():
    assert len(README.split()) <= 1200  # tables and code included


def test_it_has_its_headings():
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == HEADINGS


def test_its_lines_convert_save_load_and_evaluate(tmp_path, monkeypatch, capsys):
    """On a few utterances for the whole splits."""
    opened = asrlib.open_corpus
    monkeypatch.setattr(asrlib, "open_corpus", lambda corpus, split: opened(corpus, split).sample(6))
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    loaded, _ = asrlib.load("somewhere")
    assert asrlib.kv_cache_bytes(loaded.config, 100) * 4 == asrlib.kv_cache_bytes(names["model"].config, 100)
    speech = torch.randn(1, 16_000)
    with torch.no_grad():
        assert torch.equal(loaded(speech).logits, names["latent"](speech).logits)
    exec(compile(second, "README.md", "exec"), names)
    assert asrlib.kv_cache_bytes(names["latent"].config, 100) * 16 == asrlib.kv_cache_bytes(names["model"].config, 100)
    assert 0 <= float(capsys.readouterr().out) < 1


def in_points(numbers) -> str:
    difference, low, high = (f"{float(number) * 100:+.2f}".replace("-", "−") for number in numbers)
    return f"{difference} ({low} to {high})"


def of_the_demo() -> list[str]:
    kept = json.loads((EXAMPLES / "demo/metrics/evaluate.json").read_text())
    paired = kept["paired"]["test-clean"]["baseline vs finetuned"]
    rates = [kept["systems"][system]["test-clean"]["wer"] for system in ("baseline", "converted", "finetuned")]
    return [*(f"{rate * 100:.2f}" for rate in rates), in_points([paired["difference"], *paired["interval"]])]


def of_human_speech(split: str) -> list[str]:
    folder = EXAMPLES / "real_speech"
    systems = json.loads((folder / "cache_cut-0.9375/metrics/evaluate.json").read_text())["systems"]
    with open(folder / "tables/tests.csv", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["b"] == "cache_cut-0.9375" and row["split"] == split)
    rates = [systems[system][split]["wer"] for system in ("baseline", "converted", "finetuned")]
    return [*(f"{rate * 100:.2f}" for rate in rates), in_points([row["difference"], row["low"], row["high"]])]


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ("AN4", lambda: of_human_speech("an4-test")),
        ("LibriSpeech", lambda: of_human_speech("dev-4-speakers")),
        ("synthetic", of_the_demo),
    ],
)
def test_its_table_has_the_figures_of_the_kept_reports(row, kept):
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row} ("))
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == kept()
