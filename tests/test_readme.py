"""README is short, has its headings, and its code runs."""

import re
from pathlib import Path

import torch

import asrlib
from asrlib.runs import project_root

README = (project_root(Path(__file__).parent) / "README.md").read_text(encoding="utf-8")
HEADINGS = [
    "Two commands", "In a few lines", "Your own model and speech", "The notebooks", "What is known", "Model families",
    "Where things are", "What is not shown", "More",
]  # fmt: skip


def test_it_is_short():
    assert len(README.split()) <= 1200  # tables and code included


def test_it_has_its_headings():
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == HEADINGS


def test_its_lines_convert_save_load_and_evaluate(tmp_path, monkeypatch, capsys):
    """On a few utterances for the whole splits."""
    opened = asrlib.open_corpus
    monkeypatch.setattr(asrlib, "open_corpus", lambda corpus, split: opened(corpus, split).sample(3))
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
    rate, low, high = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert 0 <= low <= rate <= high < 1
