"""Memory that runs out: the batch is named, and what to change with its present value."""

import pytest
import tiny
import torch

from asrlib.conversion.statistics import collect_statistics
from asrlib.measuring.speed import benchmark_speed
from asrlib.measuring.transcribing import transcribe
from asrlib.models.out_of_memory import in_words, is_out_of_memory, out_of_memory_explained
from asrlib.models.scratch import new_processor
from asrlib.training.training import TrainingSettings, train

MORE_THAN_THERE_IS = 2**60  # bytes: no machine can address so many


@pytest.fixture
def greedy():
    """A model that asks for too much memory whenever its output layer has run."""
    model = tiny.conformer()
    model.lm_head.register_forward_hook(lambda *_: torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8))
    return model


@pytest.fixture
def greedy_in_training():
    """One that has enough for its evaluation."""
    model = tiny.conformer()

    def ask(module, inputs, output):
        if module.training:
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    model.lm_head.register_forward_hook(ask)
    return model


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(trainable="all", epochs=1, batch_seconds=3.0, device="cpu", **changes)


def test_training_names_what_to_lower_and_the_batch(greedy_in_training, tmp_path):
    corpus = tiny.corpus()
    with pytest.raises(torch.OutOfMemoryError) as error:
        train(greedy_in_training, new_processor(), corpus, tiny.corpus(2, "validation"), tmp_path, settings())
    said = str(error.value)
    assert "out of memory in training, on a batch of 3 utterances, the longest of " in said
    assert (
        "lower batch_seconds (now 3), or set gradient_checkpointing: true (now false), or use precision: bf16" in said
    )
    assert "the names begin with baseline_" in said and f"you tried to allocate {MORE_THAN_THERE_IS} bytes" in said
    named = said.partition("padded (")[2].partition(")")[0].split(", ")
    assert len(named) == 3 and set(named) <= {utterance.id for utterance in corpus}
    longest = max(utterance.seconds for utterance in corpus if utterance.id in named)
    assert f"the longest of {longest:.1f} s, {3 * longest:.1f} s padded" in said


def test_what_is_set_already_is_no_advice(greedy_in_training, tmp_path):
    frugal = settings(gradient_checkpointing=True, precision="bf16")
    with pytest.raises(torch.OutOfMemoryError, match=r"lower batch_seconds \(now 3\) \(for the training of"):
        train(greedy_in_training, new_processor(), tiny.corpus(), tiny.corpus(2, "validation"), tmp_path, frugal)


def test_validation_before_training_says_so(greedy, tmp_path):
    with pytest.raises(
        torch.OutOfMemoryError, match=r"in validation, on a batch of 2 .* lower batch_seconds \(now 3\)"
    ):
        train(greedy, new_processor(), tiny.corpus(), tiny.corpus(2, "validation"), tmp_path, settings())


def test_evaluation_names_what_to_lower_and_the_batch(greedy, processor):
    corpus = tiny.corpus(5, "test-clean")
    with pytest.raises(torch.OutOfMemoryError) as error:
        transcribe(greedy, processor, corpus, batch_seconds=2.0)
    said = str(error.value)
    assert "out of memory in transcribing test-clean, on a batch of 2 utterances" in said
    assert "lower batch_seconds (now 2), or use precision: bf16 (now fp32)" in said
    assert max(corpus, key=lambda utterance: utterance.seconds).id in said, "the longest come first"


def test_an_utterance_alone_cannot_be_made_a_smaller_batch(greedy, processor):
    with pytest.raises(torch.OutOfMemoryError) as error:
        transcribe(greedy, processor, tiny.corpus(1), batch_seconds=2.0, precision="bf16")
    assert "on one utterance of " in str(error.value)
    assert "(train-0): leave out utterances this long" in str(error.value)


def test_calibration_and_benchmark_say_it_too(greedy, processor):
    with pytest.raises(torch.OutOfMemoryError, match=r"calibration, on a batch of .* or choose method: two_sided"):
        collect_statistics(greedy, processor, tiny.corpus(), attention=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"the benchmark of mha, on one utterance of .* precision: bf16"):
        benchmark_speed({"mha": greedy}, processor, tiny.corpus(2), warmup=1, repeats=1)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), out_of_memory_explained("training", [("a", 1.0)], {}):
        raise RuntimeError("shapes differ")
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
    ):
        assert is_out_of_memory(error)


def test_many_utterances_are_counted():
    batch = [(f"u{i}", float(i)) for i in range(12)]
    names = ", ".join(f"u{i}" for i in range(10))
    assert in_words(batch) == f"a batch of 12 utterances, the longest of 11.0 s, 132.0 s padded ({names}, 2 more)"
