"""What docs/extending.md shows is executed, and does what the text around it says."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import asrlib
import run_all
from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import KINDS
from asrlib.conversion.methods import METHODS
from asrlib.measuring.word_errors import METRICS
from asrlib.models.registry import FAMILIES
from asrlib.running.parameters import Schema
from asrlib.runs import find_notebooks, project_root
from asrlib.streaming.streams import Recognition

ROOT = project_root(Path(__file__).parent)
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
REGISTERED = "normed-encoder"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that all code of docs/extending.md was executed in, and the names it leaves behind."""
    folder, names = tmp_path_factory.mktemp("extending"), {}
    tables = [(table, set(table)) for table in (KINDS, METHODS, FAMILIES, METRICS)]
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as printed:
        patched.chdir(folder)
        try:
            for code in blocks("python"):
                exec(compile(code, "docs/extending.md", "exec"), names)
            yield folder, names | {"printed": printed.getvalue()}
        finally:
            for table, before in tables:
                for name in set(table) - before:
                    del table[name]


def streams_as_it_is_cached(model, processor) -> bool:
    recognition = Recognition(model, processor, Chunks(5, 10))
    assert [*recognition.hear(np.zeros(16_000, np.float32)), *recognition.finish()]
    return sum(recognition.streams.attention_bytes) == recognition.streams.formula_bytes > 0


def test_a_model_and_speech_of_ones_own_are_opened_and_evaluated(made):
    folder, names = made
    assert (folder / "my-model" / "vocab.json").is_file()
    assert len(names["speech"]) == 4 and not names["speech"].rejected
    assert names["result"].words == 8  # 4 × "ça va"


def test_the_params_file_fits_the_notebooks(made, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(*blocks("yaml"))
    notebooks = find_notebooks(ROOT)
    values, steps = run_all.read_values(file, [], Schema(notebooks), list(notebooks))
    assert values["model"] == "my-model" and steps == list(notebooks)


def test_the_kind_of_attention_caches_as_it_says_and_streams(made):
    _, names = made
    model = names["multi_query"]
    assert asrlib.kv_cache_bytes(model.config, frames=10) == 10 * 2 * (2 * 8) * 4
    assert streams_as_it_is_cached(model, names["processor"])


def test_the_method_converts_and_loses_nothing_at_full_width(made):
    _, names = made
    assert names["weighed"].config.latent_dim == [8, 8]
    model, features = names["model"].eval(), torch.randn(1, 60, 80)
    exact, plain = (asrlib.convert(model, latent_dim=32, method=name) for name in ("behind_the_output", "svd"))
    with torch.no_grad():
        for latent in (exact, plain):
            torch.testing.assert_close(latent(features).logits, model(features).logits, atol=1e-4, rtol=1e-4)
        other = asrlib.convert(model, latent_dim=8, method="svd")
        assert not torch.equal(names["weighed"](features).logits, other(features).logits)


def test_a_kind_that_takes_keys_for_values_computes_caches_saves_and_loads(made, tmp_path):
    _, names = made
    assert asrlib.kv_cache_bytes(names["shared"].config, frames=1000) == 1000 * 4 * 128 * 4
    assert f"\n{1000 * 4 * 128 * 4}\n" in names["printed"]
    model, processor = names["shared"].eval(), names["processor"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    features = torch.randn(1, 60, 80)
    with torch.no_grad():
        assert torch.equal(asrlib.load(tmp_path)[0](features).logits, model(features).logits)
    assert streams_as_it_is_cached(model, processor)


def test_the_family_converts_loads_back_and_streams(made):
    folder, names = made
    features = torch.randn(1, 60, 80)
    loaded, processor = asrlib.load(folder / "my-latent")
    assert type(loaded) is type(names["latent"]) and loaded.config.model_type == REGISTERED
    with torch.no_grad():
        assert torch.equal(loaded(features).logits, names["latent"](features).logits)
        exact = asrlib.convert(names["normed"], latent_dim=32)
        torch.testing.assert_close(exact(features).logits, names["normed"](features).logits, atol=1e-4, rtol=1e-4)
    assert type(asrlib.to_standard_attention(loaded)) is type(names["normed"])
    assert streams_as_it_is_cached(loaded, processor)


def test_the_metric_is_in_the_table_and_in_the_metrics(made):
    _, names = made
    assert names["result"].as_metrics()["sentence errors"] == 1.0
    assert "sentence errors" in names["error_table"]({("test", "mine"): names["result"]})


def test_the_families_are_what_transformers_is_told_of():
    for model_type, family in FAMILIES.items():
        assert family.head.auto_model._model_mapping[type(AutoConfig.for_model(model_type))]
