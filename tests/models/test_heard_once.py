"""What an encoder gave is read again where it cannot differ, and computed again where it can."""

import family_models
import pytest
import tiny
import torch

import asrlib
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.measuring.speed import benchmark_speed
from asrlib.measuring.transcribing import transcribe
from asrlib.models.heard_once import KEPT, EncoderStates, keep_encoder_states, weights_fingerprint
from asrlib.models.inference import inference, zero_attention

CPU = torch.device("cpu")
ONE = 50 * family_models.WIDTH * 4  # bytes of an utterance: a second of frames


@pytest.fixture(autouse=True)
def kept() -> EncoderStates:
    """Nothing is kept before a test, nor after it."""
    keep_encoder_states(1)
    KEPT.computed = KEPT.read = 0
    yield KEPT
    keep_encoder_states(0)
    assert KEPT.bytes == 0


@pytest.fixture
def whisper():
    return family_models.whisper()


def batch(count: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    processor = family_models.processor_of("whisper")
    return SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(count, seed=seed), processor)))


def encoded(model, heard: dict[str, torch.Tensor], **asked) -> torch.Tensor:
    with inference(model, device=CPU):
        return model(**heard, **asked).encoder_last_hidden_state


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    """But for the last bits: two passes over the same numbers may differ in them, by where memory begins."""
    assert torch.allclose(ours, theirs, rtol=0, atol=atol)


def test_a_second_pass_and_a_converted_model_read_what_the_first_computed(whisper, kept):
    first = encoded(whisper, batch())
    assert_same(first, whisper.model.encoder(batch()["input_features"]).last_hidden_state)
    assert (kept.computed, kept.read) == (3, 0)
    assert torch.equal(encoded(asrlib.convert(whisper, 4), batch()), first) and (kept.computed, kept.read) == (3, 3)
    assert kept.bytes == 3 * ONE


def test_of_a_batch_only_what_is_new_is_computed(whisper, kept):
    encoded(whisper, batch(2))
    both = batch(4)
    wanted = whisper.model.encoder(both["input_features"]).last_hidden_state
    assert_same(encoded(whisper, both), wanted)
    assert (kept.computed, kept.read) == (4, 2)


@pytest.mark.parametrize("change", ["weights", "encoder converted", "precision", "attention"])
def test_what_changes_the_states_is_computed_again(whisper, kept, change):
    encoded(whisper, batch())
    model, precision = whisper, "fp32"
    if change == "weights":
        with torch.no_grad():
            whisper.model.encoder.layers[0].fc1.weight.mul_(2)
    elif change == "encoder converted":
        model = asrlib.convert(whisper, 4, parts=["encoder"])
    elif change == "precision":
        precision = "bf16"
    else:
        whisper.set_attn_implementation("eager")
    with inference(model, device=CPU, precision=precision):
        ours = model(**batch()).encoder_last_hidden_state
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        wanted = model.model.encoder(batch()["input_features"]).last_hidden_state
    assert_same(ours, wanted, atol=0.03 if precision == "bf16" else 1e-5)
    assert (kept.computed, kept.read) == (6, 0)


def test_who_looks_inside_gets_a_pass_of_its_own(whisper, kept):
    usual = encoded(whisper, batch())
    with zero_attention(whisper):
        assert not torch.allclose(encoded(whisper, batch()), usual)
    with inference(whisper, device=CPU):
        assert len(whisper(**batch(), output_hidden_states=True).encoder_hidden_states) == family_models.LAYERS + 1
    assert (kept.computed, kept.read) == (3, 0)


def test_an_encoder_that_learns_or_draws_is_not_remembered(whisper, kept):
    with kept.of(whisper):
        assert whisper(**batch()).encoder_last_hidden_state.requires_grad
        whisper.model.encoder.requires_grad_(False)
        whisper.config.dropout = whisper.model.encoder.dropout = 0.5
        whisper.train()
        assert not torch.equal(*(whisper(**batch()).encoder_last_hidden_state for _ in range(2)))
        assert kept.computed == 0
        whisper.config.dropout = whisper.model.encoder.dropout = 0.0
        assert torch.equal(*(whisper(**batch()).encoder_last_hidden_state for _ in range(2)))
    assert (kept.computed, kept.read) == (3, 3)
    assert "forward" not in vars(whisper.model.encoder)


def test_a_benchmark_computes_what_it_times(whisper, kept):
    encoded(whisper, batch())
    benchmark_speed({"it": whisper}, family_models.processor_of("whisper"), tiny.corpus(3), repeats=1, warmup=1)
    assert (kept.computed, kept.read) == (3, 0) and kept.limit_bytes


def test_a_fused_optimizer_is_noticed(whisper, kept):
    encoded(whisper, batch())
    optimizer = torch.optim.AdamW(whisper.model.encoder.parameters(), lr=0.1, fused=True)
    whisper(**batch()).loss.backward()
    optimizer.step()
    assert_same(encoded(whisper, batch()), whisper.model.encoder(batch()["input_features"]).last_hidden_state)
    assert kept.computed == 6


def test_the_limit_holds(whisper, kept):
    kept.limit_bytes = 2 * ONE
    heard = [batch(1, seed) for seed in range(3)]
    for each in (heard[0], heard[1], heard[0], heard[2]):
        encoded(whisper, each)
    assert kept.bytes == 2 * ONE and (kept.computed, kept.read) == (3, 1)
    encoded(whisper, heard[2])  # what was just computed may have gone, but one of the three is computed again at most
    encoded(whisper, heard[1])
    encoded(whisper, heard[0])
    assert kept.bytes == 2 * ONE and kept.computed + kept.read == 7 and kept.computed > 3


def test_transcripts_are_the_same_token_for_token(whisper, kept):
    processor, speech = family_models.processor_of("whisper"), tiny.corpus(6)
    latent = asrlib.convert(whisper, 6)
    first, again = (transcribe(latent, processor, speech, batch_seconds=2) for _ in range(2))
    assert kept.computed == kept.read == 6
    keep_encoder_states(0)
    assert first == again == transcribe(latent, processor, speech, batch_seconds=2)


def test_a_fingerprint_is_of_names_types_and_numbers(whisper):
    same = family_models.whisper()
    assert weights_fingerprint(whisper) == weights_fingerprint(same)
    with torch.no_grad():
        same.model.encoder.conv1.bias[0] += 1e-3
    assert weights_fingerprint(whisper) != weights_fingerprint(same)
    assert weights_fingerprint(torch.nn.Linear(2, 2).double()) != weights_fingerprint(torch.nn.Linear(2, 2))
