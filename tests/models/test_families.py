"""Every family of transformers' CTC models converts, loads back, is evaluated and trained like the first one."""

import subprocess
import sys

import family_models
import numpy as np
import pytest
import tiny
import torch
from family_models import FAMILIES, HEADS, LAYERS, WIDTH, processor_of
from transformers import AutoModelForCTC

import asrlib
from asrlib.attention.names import projections
from asrlib.conversion.convert import convert
from asrlib.conversion.quality import analyze_compression_quality, summarise_quality
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.text import label_ids, normalise_text, unknown_characters
from asrlib.measuring.transcribing import transcribe
from asrlib.models.inference import zero_attention
from asrlib.models.registry import (
    attention_modules,
    family_of,
    frame_counts,
    frames_of,
    frames_per_second,
    layer_frame_counts,
    positions_of,
)
from asrlib.running.preflight import check_model, check_width
from asrlib.runs import BadParameter
from asrlib.training.training import TrainingSettings, train

EVERY = pytest.mark.parametrize("family", FAMILIES)
ADAPTER = dict(add_adapter=True, num_adapter_layers=1, output_hidden_size=WIDTH)
VARIANTS = [
    *((family, {"feat_extract_norm": norm, "do_stable_layer_norm": stable})
      for family in ("wav2vec2", "hubert") for norm in ("group", "layer") for stable in (False, True)),
    ("wav2vec2", ADAPTER),
    *(("wav2vec2-bert", {"position_embeddings_type": kind}) for kind in ("relative_key", "relative", None)),
    ("wav2vec2-bert", ADAPTER),
    ("parakeet_ctc", {"attention_bias": True}),
    ("parakeet_ctc", {"attention_bias": False, "convolution_bias": False, "scale_input": False}),
]  # fmt: skip
METHODS = ("svd", "whitened", "two_sided", "attended")


def batch_of(family: str, count: int = 4) -> dict[str, torch.Tensor]:
    """Noise of different lengths as the model reads it, with labels."""
    items = list(SpeechDataset(tiny.corpus(), processor_of(family)))[:count]
    return SpeechCollator(processor_of(family))(items)


@torch.no_grad()
def spoken(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the frames that are no padding [N, V]."""
    logits_BTV = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
    frames_B = frame_counts(model, batch["attention_mask"].sum(-1))
    return logits_BTV[torch.arange(logits_BTV.shape[1]) < frames_B[:, None]]


@pytest.fixture(scope="module")
def statistics():
    """Of each family, made once, with what attention makes of the inputs."""
    made = {}

    def of(family: str):
        if family not in made:
            model = FAMILIES[family]()
            made[family] = asrlib.collect_statistics(model, processor_of(family), tiny.corpus(24), attention=True)
        return made[family]

    return of


# ---- the twin ----------------------------------------------------------------------------------------------


# transformers' eager Parakeet takes the softmax in float32, where a mask made for float64 is no number.
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"), [("sdpa", torch.float64, 1e-9), ("eager", torch.float32, 1e-3)]
)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_at_full_width_the_twin_says_what_transformers_class_says(family, changes, implementation, dtype, tolerance):
    model = FAMILIES[family](**changes).to(dtype)
    model.set_attn_implementation(implementation)
    assert type(model) is family_of(model.config).standard_model
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch_of(family).items()}
    wanted_NV = spoken(model, batch)
    assert wanted_NV.std() > 0.3
    with zero_attention(model):
        assert (spoken(model, batch) - wanted_NV).abs().max() > 0.1  # or attention would not show
    for layout, width in (("joint", WIDTH), ("split", 2 * WIDTH)):
        latent = convert(model, width, layout=layout)
        torch.testing.assert_close(spoken(latent, batch), wanted_NV, atol=tolerance, rtol=0)


def test_rotary_keys_get_a_latent_of_their_own():
    model = FAMILIES["wav2vec2-bert"](position_embeddings_type="rotary")
    with pytest.raises(ValueError, match=r"rotary positions .* use layout: split"):
        convert(model, WIDTH)
    latent, batch = convert(model, 2 * WIDTH, layout="split"), batch_of("wav2vec2-bert")
    torch.testing.assert_close(spoken(latent, batch), spoken(model, batch), atol=2e-4, rtol=1e-4)


@EVERY
def test_blocks_change_nothing(family):
    model, batch = FAMILIES[family](), batch_of(family)
    wanted_NV = spoken(model, batch)
    torch.testing.assert_close(
        spoken(family_of(model.config).work_in_blocks(model), batch), wanted_NV, atol=2e-5, rtol=1e-4
    )


@EVERY
def test_the_cache_is_the_latent(family):
    model = FAMILIES[family]()
    assert asrlib.kv_cache_bytes(model.config, frames=10) == 10 * LAYERS * 2 * WIDTH * 4
    for layout in ("joint", "split"):
        latent = convert(model, [7, 5], layout=layout)
        assert asrlib.kv_cache_bytes(latent.config, frames=10) == 10 * 12 * 4
        assert [a.latent_kv.layout for a in attention_modules(latent)] == [layout] * LAYERS


# ---- conversion --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_each_method_lowers_the_error_that_it_is_about(family, layout, statistics):
    model, stats, batch = FAMILIES[family](), statistics(family), batch_of(family)
    width = 6 if layout == "joint" else 12
    found = {}
    for method in METHODS:
        latent = convert(model, width, layout=layout, method=method, statistics=stats)
        found[method] = summarise_quality(analyze_compression_quality(model, latent, batch))
    errors = {method: quality["output_error"] for method, quality in found.items()}
    assert all(0 < error < 1 for error in errors.values())
    assert found["whitened"]["value_error"] < found["svd"]["value_error"]
    assert max(errors["two_sided"], errors["attended"]) < errors["svd"]


@EVERY
def test_in_sequence_and_by_sensitivity(family, statistics):
    model, stats, batch = FAMILIES[family](), statistics(family), batch_of(family)
    how = dict(method="two_sided", statistics=stats)
    latent = convert(model, 6, ranks="sensitivity", **how)
    assert sum(latent.config.latent_dim) == 6 * LAYERS
    wanted_NV = spoken(model, batch)
    exact = convert(model, WIDTH, sequential=True, reestimate_batch_norm=True, **how)
    torch.testing.assert_close(spoken(exact, batch), wanted_NV, atol=1e-3, rtol=1e-3)
    plain, adjusted = convert(model, 6, **how), convert(model, 6, sequential=True, **how)
    first, second = ([a.latent_kv.down.weight for a in attention_modules(one)] for one in (plain, adjusted))
    assert torch.allclose(first[0], second[0], atol=1e-4) and not torch.allclose(first[1], second[1], atol=1e-4)


@EVERY
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_back_to_standard_attention(family, layout, statistics):
    model, batch = FAMILIES[family](), batch_of(family)
    latent = convert(model, 8, layout=layout, method="whitened", statistics=statistics(family))
    again = asrlib.to_standard_attention(latent)
    assert type(again) is type(model) and type(again.config) is type(model.config)
    torch.testing.assert_close(spoken(again, batch), spoken(latent, batch), atol=2e-4, rtol=1e-4)


def test_values_without_a_bias_have_no_way_back():
    model = FAMILIES["parakeet_ctc"](attention_bias=False)
    again = asrlib.to_standard_attention(convert(model, 6))  # svd looks at weights alone, and adds no bias
    assert attention_modules(again)[0].v_proj.bias is None
    stats = asrlib.collect_statistics(model, processor_of("parakeet_ctc"), tiny.corpus(24))
    with pytest.raises(ValueError, match=r"values with a bias, .* keep the latent model"):
        asrlib.to_standard_attention(convert(model, 6, method="whitened", statistics=stats))


# ---- on disk -----------------------------------------------------------------------------------------------


def test_all_load_back_wherever_asrlib_was_imported(tmp_path):
    wanted = {}
    for family, make in FAMILIES.items():
        latent, folder = convert(make(), [7, 5]), tmp_path / family
        latent.save_pretrained(folder)
        processor_of(family).save_pretrained(folder)
        batch = batch_of(family)
        model, processor = asrlib.load(folder)
        assert type(model) is type(latent) and type(processor) is type(processor_of(family))
        assert torch.equal(spoken(model, batch), spoken(latent, batch))
        again = SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(), processor))[:4])
        assert all(torch.equal(again[name], values) for name, values in batch.items())
        wanted[family] = spoken(latent, batch)
        torch.save(batch, folder / "batch.pt")
    code = """
import sys
from pathlib import Path
import torch, asrlib
from transformers import AutoModelForCTC
asrlib.register()
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCTC.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(folder / "batch.pt")).logits, folder / "logits.pt")
"""
    folders = [tmp_path / family for family in FAMILIES]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, timeout=300)
    for folder in folders:
        model = AutoModelForCTC.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(torch.load(folder / "logits.pt"), model(**torch.load(folder / "batch.pt")).logits)
        assert wanted[folder.name].isfinite().all()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    FAMILIES["parakeet_ctc"]().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no vocab\.json or tokenizer\.json"):
        asrlib.load(tmp_path)


# ---- running -----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("samples", [3_000, 5_123, 8_000, 12_345, 16_000])
def test_frames_of_audio_are_those_of_the_logits(family, samples):
    model, noise = FAMILIES[family](), np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)
    batch = SpeechCollator(processor_of(family))([{"audio": noise, "text": "A"}])
    del batch["labels"]
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == frames_of(model)(samples) > 0
    assert frames_of(model)(samples + 32_000) == frames_of(model)(samples) + 2 * frames_per_second(model.config)
    assert frames_of(model)(0) == 0


def test_an_adapter_has_fewer_frames_than_the_layers():
    for family in ("wav2vec2", "wav2vec2-bert"):
        model, lengths = FAMILIES[family](**ADAPTER), batch_of(family)["attention_mask"].sum(-1)
        at_layers, at_logits = layer_frame_counts(model, lengths), frame_counts(model, lengths)
        assert (at_logits <= at_layers // 2 + 1).all() and (at_logits > 0).all()


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("hubert", {"feat_extract_norm": "group"}), ("wav2vec2-bert", ADAPTER)],
)
def test_what_an_utterance_says_does_not_depend_on_its_neighbours(family, changes):
    latent, processor, corpus = convert(FAMILIES[family](**changes), 8), processor_of(family), tiny.corpus(6)
    said: dict[str, dict] = {}
    for name, batch_seconds in (("alone", 0.95), ("together", 60.0)):
        logits = said[name] = {}
        transcribe(latent, processor, corpus, batch_seconds, record=logits.__setitem__)
    for index in range(len(corpus)):
        torch.testing.assert_close(said["alone"][index], said["together"][index], atol=1e-4, rtol=1e-4)


@EVERY
def test_a_few_steps_lower_the_loss(family, tmp_path):
    teacher, processor = FAMILIES[family](), processor_of(family)
    latent, corpus = convert(teacher, 6), tiny.corpus()
    settings = TrainingSettings(
        trainable="attention", epochs=4, learning_rate=2e-2, batch_seconds=60.0, hidden_weight=1.0, kl_weight=1.0,
        device="cpu",
    )  # fmt: skip
    result = train(latent, processor, corpus, tiny.corpus(2, "validation"), tmp_path, settings, teacher)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert result.steps == 4 and losses[-1] < 0.9 * losses[0]
    assert len(asrlib.evaluate(latent, processor, corpus).predictions) == len(corpus)


@EVERY
def test_streaming_is_refused_with_its_reason(family):
    model, reason = FAMILIES[family](), "convolution that hears|normalised over whole recordings"
    with pytest.raises(ValueError, match=reason):
        next(asrlib.stream(model, processor_of(family), [np.zeros(16_000, np.float32)]))


def test_positions_are_named():
    named = {family: positions_of(make().config) for family, make in FAMILIES.items()}
    assert named == {
        "wav2vec2": "convolutional", "hubert": "convolutional", "wav2vec2-bert": "relative_key",
        "parakeet_ctc": "relative",
    }  # fmt: skip


# ---- what a processor can spell ----------------------------------------------------------------------------


def test_a_text_is_spelt_with_pieces_of_words():
    processor = processor_of("parakeet_ctc")
    text = normalise_text("  the hat's  SINGING ", processor)
    assert text == "THE HAT'S SINGING" and not unknown_characters(text, processor)
    ids = label_ids(text, processor)
    assert len(ids) < len(text) and processor.tokenizer.decode(ids, group_tokens=False) == text


def test_what_pieces_can_not_spell_is_named():
    processor = processor_of("parakeet_ctc")
    assert unknown_characters(normalise_text("señor <pad> ▁", processor), processor) == ["<", ">", "ñ", "▁"]


def test_one_vocabulary_of_pieces_is_asked_once(monkeypatch):
    tokenizer, asked = family_models.pieces(), []
    original = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: asked.append(1) or original(self))
    for text in ("A", "B", "THE"):
        normalise_text(text, tokenizer)
    assert len(asked) == 1


def test_heads_are_those_of_the_config():
    for make in FAMILIES.values():
        for model in (make(), convert(make(), 6)):
            assert {projections(attention).heads for attention in attention_modules(model)} == {HEADS}


# ---- a run's parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "values", "reason"),
    [
        ("wav2vec2", {}, {"stream_chunks_ms": [320]}, "convolution that hears"),
        ("parakeet_ctc", {}, {"stream_chunks_ms": [320]}, "normalised over whole recordings"),
        ("wav2vec2-bert", {"position_embeddings_type": "rotary"}, {"layout": "joint"}, "use layout: split"),
    ],
)
def test_what_an_architecture_forbids_is_refused_before_a_run(tmp_path, family, changes, values, reason):
    FAMILIES[family](**changes).save_pretrained(tmp_path)
    processor_of(family).save_pretrained(tmp_path)
    steps = ["00_baseline", "01_convert", "04_evaluate"]
    check_model({"model": str(tmp_path), "layout": "split", "stream_chunks_ms": []}, steps)
    check_model({"model": str(tmp_path)} | values, steps[:1])
    with pytest.raises(BadParameter, match=reason):
        check_model({"model": str(tmp_path)} | values, steps)


def test_a_latent_too_wide_is_refused_before_a_run(tmp_path):
    FAMILIES["parakeet_ctc"]().save_pretrained(tmp_path)
    with pytest.raises(BadParameter, match="between 1 and 32 numbers"):
        check_width({"model": str(tmp_path), "latent_dim": 33})
