"""The transducer's loss is the sum over all alignments, and its gradient is that of this sum."""

from itertools import combinations

import pytest
import tiny
import torch
from family_models import nemotron, parakeet_rnnt, processor_of

import asrlib
from asrlib.conversion.convert import convert
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.models.registry import attention_modules, frame_counts
from asrlib.models.transducer import transducer_loss
from asrlib.training.training import TrainingSettings, train


def lattice(frames: int, labels: int, batch: int = 1, vocabulary: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, labels + 1, vocabulary, dtype=torch.float64, generator=generator).log_softmax(-1)


def over_all_alignments(log_probs_TUV: torch.Tensor, targets: list[int], blank: int) -> torch.Tensor:
    """−log Σ over every order of `targets` and a blank a frame, of which the last stands at the end."""
    frames, steps = len(log_probs_TUV), len(log_probs_TUV) - 1 + len(targets)
    paths = []
    for says in combinations(range(steps), len(targets)):
        frame, said, total = 0, 0, torch.zeros((), dtype=torch.float64)
        for step in range(steps):
            if step in says:
                total, said = total + log_probs_TUV[frame, said, targets[said]], said + 1
            else:
                total, frame = total + log_probs_TUV[frame, said, blank], frame + 1
        assert (frame, said) == (frames - 1, len(targets))
        paths.append(total + log_probs_TUV[frame, said, blank])
    return -torch.stack(paths).logsumexp(0)


@pytest.mark.parametrize(("frames", "targets"), [(1, [2]), (1, []), (4, []), (3, [1, 1]), (5, [3, 0, 2]), (2, [1] * 4)])
def test_it_is_the_sum_over_all_alignments(frames, targets):
    log_probs = lattice(frames, len(targets)).requires_grad_()
    targets_BU = torch.tensor([targets], dtype=torch.long).reshape(1, -1)
    loss = transducer_loss(log_probs, targets_BU, torch.tensor([frames]), torch.tensor([len(targets)]), blank=4)
    wanted = over_all_alignments(log_probs[0], targets, blank=4)
    torch.testing.assert_close(loss[0], wanted, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(one, log_probs)[0] for one in (loss.sum(), wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_padding_counts_for_nothing():
    log_probs = lattice(6, 4, batch=3).requires_grad_()
    targets = torch.tensor([[1, 2, 3, 0], [2, 2, -100, -100], [-100] * 4])
    frames, lengths = torch.tensor([6, 3, 2]), torch.tensor([4, 2, 0])
    losses = transducer_loss(log_probs, targets, frames, lengths, blank=4)
    for row in range(3):
        alone = log_probs[row, : frames[row], : lengths[row] + 1]
        wanted = over_all_alignments(alone, targets[row, : lengths[row]].tolist(), blank=4)
        torch.testing.assert_close(losses[row], wanted, atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    assert gradient.isfinite().all() and not gradient[1, 3:].any() and not gradient[1, :, 3:].any()


def test_long_utterances_stay_finite_in_float32():
    log_probs = lattice(300, 80, batch=2).float().requires_grad_()
    targets = torch.randint(0, 4, (2, 80))
    frames, lengths = torch.tensor([300, 120]), torch.tensor([80, 30])
    losses = transducer_loss(log_probs, targets, frames, lengths, blank=4)
    exact = transducer_loss(log_probs.double(), targets, frames, lengths, blank=4)
    torch.testing.assert_close(losses.double(), exact, atol=1e-2, rtol=1e-5)
    assert torch.autograd.grad(losses.sum(), log_probs)[0].isfinite().all()


def test_an_utterance_without_a_frame_is_refused():
    with pytest.raises(ValueError, match="shorter than one frame"):
        transducer_loss(lattice(2, 1, 2), torch.zeros(2, 1).long(), torch.tensor([2, 0]), torch.ones(2).long(), blank=4)


# ---- of a model --------------------------------------------------------------------------------------------


def transducer_logits(model, inputs: dict[str, torch.Tensor], labels_BU: torch.Tensor) -> torch.Tensor:
    """[B, T, U+1, V] of every frame after every number of labels, which may be padded with −100."""
    blank = model.config.blank_token_id
    told_BU = torch.nn.functional.pad(labels_BU.masked_fill(labels_BU < 0, blank), (1, 0), value=blank)
    logits = model(**inputs, decoder_input_ids=told_BU).logits
    return logits if logits.dim() == 4 else logits[:, :, None]  # transformers drops U+1 where no text is


def loss_of(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits = transducer_logits(model, inputs, batch["labels"])
    frames_B = frame_counts(model, batch["attention_mask"].sum(-1))
    lengths_B = (batch["labels"] >= 0).sum(-1)
    blank = model.config.blank_token_id
    return transducer_loss(logits.log_softmax(-1), batch["labels"], frames_B, lengths_B, blank)


def batch_of(count: int = 4) -> dict[str, torch.Tensor]:
    processor = processor_of("nemotron")
    return SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(), processor))[:count])


@pytest.mark.parametrize("make", [nemotron, parakeet_rnnt])
def test_an_utterance_loses_alone_what_it_loses_in_a_batch(make):
    model, processor = make(), processor_of("nemotron")
    items = list(SpeechDataset(tiny.corpus(), processor))[:3]
    with torch.no_grad():
        together = loss_of(model, SpeechCollator(processor)(items))
        alone = torch.cat([loss_of(model, SpeechCollator(processor)([item])) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


def test_its_best_first_step_is_what_generation_says():
    model, batch = nemotron(), batch_of(1)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        logits_1TUV = transducer_logits(model, inputs, torch.zeros(1, 0).long())
    said = model.generate(**inputs).sequences[0]
    assert logits_1TUV.shape[2] == 1 and logits_1TUV[0, 0, 0].argmax() == said[1]  # said[0] is what it starts from


def test_steps_down_its_gradient_lower_it():
    model, batch = convert(nemotron(), 6), batch_of()
    descent = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        losses.append(loss_of(model, batch).mean())
        descent.zero_grad()
        losses[-1].backward()
        descent.step()
    assert all(one.latent_kv.down.weight.grad.any() for one in attention_modules(model))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", [nemotron, parakeet_rnnt])
def test_a_latent_one_writes_and_is_taught(make, tmp_path):
    teacher, processor, corpus = make(), processor_of(make.__name__), tiny.corpus(6)
    latent = convert(teacher, 6)
    said = [row["hypothesis"] for row in asrlib.evaluate(latent, processor, corpus).predictions]
    assert len(said) == len(corpus) and any(said)
    settings = TrainingSettings(
        trainable="attention", epochs=3, learning_rate=2e-2, batch_seconds=60.0, hidden_weight=1.0, kl_weight=1.0,
        device="cpu",
    )  # fmt: skip
    result = train(latent, processor, corpus, tiny.corpus(2, "validation"), tmp_path, settings, teacher)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert result.steps == 3 and losses[-1] < 0.9 * losses[0]
