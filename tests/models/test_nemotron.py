"""A FastConformer with a cache and a transducer of its own streams with latents in that cache, and says the same."""

import copy

import numpy as np
import pytest
import tiny
import torch
from family_models import LAYERS, LOOKAHEADS, WIDTH, WINDOW, nemotron, parakeet_rnnt, processor_of
from transformers import AutoModelForRNNT, DynamicCache

import asrlib
from asrlib.attention.cache import held_bytes
from asrlib.conversion.convert import convert
from asrlib.conversion.quality import analyze_compression_quality, summarise_quality
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.measuring.random_models import window_models
from asrlib.measuring.stream_steps import benchmark_windows
from asrlib.models.inference import zero_attention
from asrlib.models.registry import attention_modules, family_of, frame_counts, frames_of, run

FACTOR = 8  # frames of features in a frame of the encoder
FULL = (("joint", WIDTH), ("split", 2 * WIDTH))
EVERY_LOOKAHEAD = pytest.mark.parametrize("ahead", LOOKAHEADS)


def features(lengths=(201, 150, 90), seed: int = 1) -> dict[str, torch.Tensor]:
    """Noise, as frames of features, padded: of 26, 19 and 12 frames of the encoder."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    noise = torch.randn(*mask.shape, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_features": noise * mask[..., None], "attention_mask": mask}


def in_chunks(x_BSF: torch.Tensor, ahead: int):
    """As a stream gives them: the first for one frame less, as the convolutions begin with it."""
    start, stop = 0, 1 + FACTOR * ahead
    while stop <= x_BSF.shape[1]:
        yield x_BSF[:, start:stop]
        start, stop = stop, stop + FACTOR * (ahead + 1)


def streamed(model, x_BSF: torch.Tensor, ahead: int) -> tuple[torch.Tensor, DynamicCache]:
    """What the encoder says chunk by chunk [B, T, D], and its window afterwards."""
    past, padding, said = None, None, []
    with torch.no_grad():
        for chunk in in_chunks(x_BSF, ahead):
            output = model.encoder(
                chunk, past_key_values=past, padding_cache=padding, use_cache=True, num_lookahead_tokens=ahead
            )
            past, padding = output.past_key_values, output.padding_cache
            said.append(output.last_hidden_state)
    return torch.cat(said, dim=1), past


@torch.no_grad()
def spoken(model, batch: dict[str, torch.Tensor], ahead: int) -> torch.Tensor:
    """What the encoder says of the frames that are no padding [N, D]."""
    x_BTD = model.encoder(**batch, num_lookahead_tokens=ahead).last_hidden_state
    frames_B = frame_counts(model, batch["attention_mask"].sum(-1))
    return x_BTD[torch.arange(x_BTD.shape[1]) < frames_B[:, None]]


@pytest.fixture(scope="module")
def statistics():
    return asrlib.collect_statistics(nemotron(), processor_of("nemotron"), tiny.corpus(24), attention=True)


# ---- the twin ----------------------------------------------------------------------------------------------


@EVERY_LOOKAHEAD
def test_at_full_width_the_twin_says_what_transformers_class_says(ahead):
    model, batch = nemotron().double(), features()
    batch["input_features"] = batch["input_features"].double()
    assert type(model) is family_of(model.config).standard_model
    wanted_ND = spoken(model, batch, ahead)
    with zero_attention(model):
        assert (spoken(model, batch, ahead) - wanted_ND).abs().max() > 0.1  # or attention would not show
    for layout, width in FULL:
        latent = convert(model, width, layout=layout)
        torch.testing.assert_close(spoken(latent, batch, ahead), wanted_ND, atol=1e-9, rtol=0)


@EVERY_LOOKAHEAD
def test_a_stream_says_what_transformers_class_says_in_its_chunks(ahead):
    model, x_BSF = nemotron(), features((201, 201))["input_features"]
    wanted_BTD, window = streamed(model, x_BSF, ahead)
    assert window.get_seq_length() > 2 * WINDOW  # it is full, and moves on
    for layout, width in FULL:
        said_BTD, _ = streamed(convert(model, width, layout=layout), x_BSF, ahead)
        torch.testing.assert_close(said_BTD, wanted_BTD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_narrow_latent_streams_like_standard_attention_with_its_product(layout, form, statistics):
    latent = convert(nemotron(), 6, layout=layout, method="whitened", statistics=statistics)
    for attention in attention_modules(latent):
        attention.form = form
    standard, batch = asrlib.to_standard_attention(latent), features()
    assert type(standard) is type(nemotron())
    torch.testing.assert_close(spoken(standard, batch, 1), spoken(latent, batch, 1), atol=1e-4, rtol=1e-4)
    wanted_BTD, _ = streamed(standard, batch["input_features"], 1)
    said_BTD, _ = streamed(latent, batch["input_features"], 1)
    torch.testing.assert_close(said_BTD, wanted_BTD, atol=1e-4, rtol=1e-4)
    assert (said_BTD - streamed(nemotron(), batch["input_features"], 1)[0]).abs().max() > 0.01  # something was cut


@EVERY_LOOKAHEAD
def test_a_stream_says_what_the_whole_recording_says(ahead):
    latent, batch = convert(nemotron(), 6), features((201,))
    said_1TD, _ = streamed(latent, batch["input_features"], ahead)
    torch.testing.assert_close(said_1TD[0], spoken(latent, batch, ahead)[: said_1TD.shape[1]], atol=1e-4, rtol=1e-4)


def test_a_window_that_is_no_multiple_of_the_chunk():
    model, x_BSF = nemotron(sliding_window=6), features((201,))["input_features"]
    said_1TD, _ = streamed(convert(model, WIDTH), x_BSF, 2)
    torch.testing.assert_close(said_1TD, streamed(model, x_BSF, 2)[0], atol=1e-4, rtol=1e-4)


def test_blocks_change_nothing():
    model, batch = nemotron(), features()
    wanted_ND, wanted_BTD = spoken(model, batch, 1), streamed(model, batch["input_features"], 1)[0]
    blocked = family_of(model.config).work_in_blocks(model)
    assert type(attention_modules(blocked)[0]).__name__ == "BlockedAttention"
    torch.testing.assert_close(spoken(blocked, batch, 1), wanted_ND, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(streamed(blocked, batch["input_features"], 1)[0], wanted_BTD, atol=1e-5, rtol=1e-4)


def test_eager_attention_hears_what_the_other_hears():
    batch = features((201, 40))  # the second ends so early that padding behind it hears nothing
    for model in (nemotron(), convert(nemotron(), 6)):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        torch.testing.assert_close(spoken(eager, batch, 1), spoken(model, batch, 1), atol=1e-4, rtol=1e-4)


# ---- what it writes ----------------------------------------------------------------------------------------


def generated(model, x_BSF: torch.Tensor, ahead: int) -> list[list[int]]:
    return model.generate(input_features=in_chunks(x_BSF, ahead), num_lookahead_tokens=ahead).sequences.tolist()


@EVERY_LOOKAHEAD
def test_chunks_generate_the_same_tokens(ahead):
    model, x_1SF = nemotron(), features((401,))["input_features"]
    wanted = generated(model, x_1SF, ahead)
    said = {token for row in wanted for token in row}
    assert model.config.blank_token_id in said and len(said) > 5  # it listens, and it writes
    for layout, width in FULL:
        assert generated(convert(model, width, layout=layout), x_1SF, ahead) == wanted
    narrow = convert(model, 4)
    assert generated(narrow, x_1SF, ahead) == generated(asrlib.to_standard_attention(narrow), x_1SF, ahead)


def test_it_streams_by_its_own_cache_alone():
    with pytest.raises(ValueError, match=r"streams by its own cache .* model\.generate"):
        next(asrlib.stream(nemotron(), processor_of("nemotron"), [np.zeros(16_000, np.float32)]))


# ---- what it keeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "width"), [("joint", 8), ("joint", 2), ("split", 9)])
def test_the_window_takes_the_bytes_of_the_formula(layout, width):
    model, x_1SF = nemotron(), features((201,))["input_features"]
    latent = convert(model, width, layout=layout)
    held, standard = (held_bytes(streamed(one, x_1SF, 1)[1]) for one in (latent, model))
    assert held == asrlib.kv_cache_bytes(latent.config, frames=WINDOW - 1) == 4 * (WINDOW - 1) * LAYERS * width
    assert standard == asrlib.kv_cache_bytes(model.config, frames=WINDOW - 1)
    assert held * 2 * WIDTH == standard * width


def test_nothing_but_latents_is_held():
    for layout, widths in (("joint", (8, 0)), ("split", (4, 4))):
        _, window = streamed(convert(nemotron(), 8, layout=layout), features((201,))["input_features"], 1)
        for layer in window.layers:
            assert (layer.keys.shape, layer.values.shape) == tuple((1, 1, WINDOW - 1, width) for width in widths)


def test_windows_are_measured_full():
    models = window_models([8, 2], hidden_size=16, num_attention_heads=4, intermediate_size=24, num_mel_bins=24)
    table = benchmark_windows(models, lookaheads=(0, 2), repeats=1)
    assert table["system"].tolist() == ["MHA", "MHA in blocks", "MLA 8", "MLA 2"] * 2
    assert (table["window_bytes"] == table["formula_bytes"]).all()
    assert table["window_bytes"].tolist() == [4 * 70 * width for width in (32, 32, 8, 2)] * 2
    assert (table["reserved_bytes"] / table["window_bytes"]).round(6).tolist() == [round(71 / 70, 6)] * 4 + [
        round(73 / 70, 6)
    ] * 4
    assert (table["chunk_ms"] == 80 * (table["lookahead"] + 1)).all() and (table["ratio"] > 0).all()


# ---- conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_each_method_lowers_the_error_that_it_is_about(layout, statistics):
    model, processor = nemotron(), processor_of("nemotron")
    batch = SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(), processor))[:4])
    found = {}
    for method in ("svd", "whitened", "two_sided", "attended"):
        latent = convert(model, 6 if layout == "joint" else 12, layout=layout, method=method, statistics=statistics)
        found[method] = summarise_quality(analyze_compression_quality(model, latent, batch))
    errors = {method: quality["output_error"] for method, quality in found.items()}
    assert all(0 < error < 1 for error in errors.values())
    assert found["whitened"]["value_error"] < found["svd"]["value_error"]
    assert max(errors["two_sided"], errors["attended"]) < errors["svd"]


def test_scores_that_no_frame_may_have_are_no_error():
    model, batch = nemotron(), features((201,))
    latent = convert(model, 6)
    with torch.no_grad():
        for attention in attention_modules(latent):
            attention.latent_kv.up_k.weight.zero_()
            attention.latent_kv.up_k.bias.zero_()
    errors = analyze_compression_quality(model, latent, batch)["score_error"]
    assert (errors > 0.1).all()  # what is left are positions alone


def test_ranks_go_where_the_output_feels_them(statistics):
    latent = convert(nemotron(), 6, ranks="sensitivity", method="two_sided", statistics=statistics)
    assert sum(latent.config.latent_dim) == 6 * LAYERS


def test_in_sequence(statistics):
    model, batch = nemotron(), features()
    exact = convert(model, WIDTH, method="two_sided", sequential=True, statistics=statistics)
    torch.testing.assert_close(spoken(exact, batch, 1), spoken(model, batch, 1), atol=1e-3, rtol=1e-3)


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nemotron, parakeet_rnnt])
def test_it_loads_back(make, tmp_path):
    latent, batch = convert(make(), [7, 5], layout="split"), features()
    latent.save_pretrained(tmp_path)
    processor_of(make.__name__).save_pretrained(tmp_path)
    again, processor = asrlib.load(tmp_path)
    assert type(again) is type(latent) and again.config.latent_dim == [7, 5]
    assert again.generation_config.decoder_start_token_id == processor.blank_token_id
    with torch.no_grad():
        wanted_BTD, said_BTD = (run(model, batch).last_hidden_state for model in (latent, again))
    assert torch.equal(said_BTD, wanted_BTD)
    assert type(AutoModelForRNNT.from_pretrained(tmp_path)) is type(latent)


def test_a_parakeet_with_a_transducer():
    model, batch = parakeet_rnnt(), features()
    kept_BT = torch.arange(26) < frame_counts(model, batch["attention_mask"].sum(-1))[:, None]
    with torch.no_grad():
        wanted_BTD = run(model, batch).last_hidden_state
        for layout, width in FULL:
            said_BTD = run(convert(model, width, layout=layout), batch).last_hidden_state
            torch.testing.assert_close(said_BTD[kept_BT], wanted_BTD[kept_BT], atol=1e-4, rtol=1e-4)
        narrow = convert(model, 6)
        said_BTD, wanted_BTD = (
            run(one, batch).last_hidden_state for one in (narrow, asrlib.to_standard_attention(narrow))
        )
        torch.testing.assert_close(said_BTD[kept_BT], wanted_BTD[kept_BT], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [3_000, 5_123, 16_000])
def test_frames_of_audio_are_those_of_the_encoder(samples):
    model, noise = nemotron(), np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)
    batch = SpeechCollator(processor_of("nemotron"))([{"audio": noise, "text": "A"}])
    assert len(spoken(model, {name: batch[name] for name in ("input_features", "attention_mask")}, 1)) == frames_of(
        model
    )(samples)
