"""`import asrlib`: quick, with the names that notebooks call; `asrlib.register()` tells transformers of its models."""

import subprocess
import sys

import pytest

import asrlib

PUBLIC = {
    "load", "open_corpus", "collect_statistics", "convert", "to_standard_attention", "evaluate",
    "analyze_compression_quality", "kv_cache_bytes", "register",
}  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_functions_and_listed():
    assert PUBLIC <= set(asrlib.__all__) <= set(dir(asrlib))
    for name in asrlib.__all__:
        public = getattr(asrlib, name)
        assert callable(public) and public.__name__ == name and public.__doc__, name


def test_other_names_are_missing_in_the_usual_words():
    with pytest.raises(AttributeError, match="module 'asrlib' has no attribute 'convrt'"):
        _ = asrlib.convrt
    with pytest.raises(ImportError, match="cannot import name 'convrt'"):
        from asrlib import convrt  # noqa: F401


HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "papermill")


def test_importing_asrlib_imports_nothing_heavy():
    code = f"import asrlib, sys; print([name for name in {(*HEAVY, 'numpy')} if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("room", ["asrlib.runs", "asrlib.data.corpus", "asrlib.data.synthetic"])
def test_the_ground_floor_is_light(room):
    assert python(f"import {room}, sys; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_importing_asrlib_leaves_transformers_as_it_is():
    code = (
        "import sys; before = list(sys.meta_path); import asrlib; assert sys.meta_path == before; "
        "from transformers import CONFIG_MAPPING; print([name for name in CONFIG_MAPPING if name.endswith('-mla')], "
        "[name for name in sys.modules if name.startswith('asrlib.')])"
    )
    assert python(code) == "[] []"


@pytest.mark.parametrize(
    "calls",
    [
        "import asrlib; asrlib.register()",
        "import transformers, asrlib; asrlib.register(); asrlib.register()",
        "from transformers.models.auto.modeling_auto import AutoModelForCTC; import asrlib; asrlib.register()",
        "import asrlib; asrlib.load",
        "import asrlib; asrlib.convert",
    ],
)
def test_the_latent_models_are_registered_by_register_and_by_all_that_loads_or_makes_them(calls):
    code = (
        f"{calls}; from transformers import AutoConfig, AutoModelForCTC; "
        "config = AutoConfig.for_model('wav2vec2-conformer-mla'); print(AutoModelForCTC._model_mapping[type(config)])"
    )
    assert "Wav2Vec2ConformerMLAForCTC" in python(code)
