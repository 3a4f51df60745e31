"""A teacher's word counts as its settings say, on unpadded frames alone."""

import family_models
import pytest
import tiny
import torch

from asrlib import convert
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.models.registry import family_of
from asrlib.models.scratch import new_processor
from asrlib.training.checkpoints import last_checkpoint
from asrlib.training.launching import TrainingFailed
from asrlib.training.rates import try_learning_rates
from asrlib.training.training import (
    SpeechTrainer,
    TrainingSettings,
    posterior_divergence,
    relative_squared_error,
    train,
)

QUIET = dict(hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, conformer_conv_dropout=0.0,
             feat_proj_dropout=0.0, final_dropout=0.0, mask_time_prob=0.0)  # fmt: skip


def settings(**changes) -> TrainingSettings:
    usual = dict(epochs=6, learning_rate=5e-3, batch_seconds=3.0, patience=100, device="cpu")
    return TrainingSettings(**usual | changes)


def test_the_divergence_is_that_of_the_posteriors():
    ours, theirs = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = sum((p[n] * (p[n] / q[n]).log()).sum() for n in range(7)) / 7
    assert posterior_divergence(ours, theirs).item() == pytest.approx(expected.item(), rel=1e-5)
    assert posterior_divergence(theirs, theirs).item() == pytest.approx(0, abs=1e-6)


def test_the_squared_error_is_relative():
    theirs = torch.tensor([[3.0, 4.0]])
    assert relative_squared_error(torch.zeros(1, 2), theirs) == 1
    assert relative_squared_error(10 * theirs + 1, 10 * theirs) == pytest.approx(2 / 2500)


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The loss of a first step, for given weights."""

    def first(latent_dim: int, **weights) -> float:
        teacher, seen = tiny.conformer(**QUIET), []
        model = convert(teacher, latent_dim)
        original = SpeechTrainer.compute_loss

        def compute_loss(self, model, *args, **kwargs):
            loss = original(self, model, *args, **kwargs)
            seen.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

        monkeypatch.setattr(SpeechTrainer, "compute_loss", compute_loss)
        chosen = settings(trainable="attention", epochs=0.01, batch_seconds=60.0, **weights)
        train(
            model,
            new_processor(),
            tiny.corpus(),
            tiny.corpus(2, "validation"),
            tmp_path / str(weights),
            chosen,
            teacher,
        )
        monkeypatch.undo()
        return seen[0]

    return first


def test_the_losses_add_up_as_weighed(losses):
    ctc = losses(3, kl_weight=1e-9)
    kl = losses(3, ctc_weight=0.0, kl_weight=1.0)
    hidden = losses(3, ctc_weight=0.0, hidden_weight=1.0)
    assert min(ctc, kl, hidden) > 1e-3
    total = losses(3, ctc_weight=0.5, kl_weight=2.0, hidden_weight=3.0)
    assert total == pytest.approx(0.5 * ctc + 2 * kl + 3 * hidden, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(losses):
    assert losses(tiny.WIDTH, ctc_weight=0.0, kl_weight=1.0, hidden_weight=1.0) < 1e-6


def test_a_student_comes_nearer_to_its_teacher_and_leaves_it_as_it_is(tmp_path):
    teacher, twin = tiny.conformer(**QUIET), tiny.conformer(**QUIET)
    student, batch = convert(teacher, 3), tiny.padded_batch()

    def distance() -> float:
        with torch.no_grad():
            return (student(**batch).logits - teacher(**batch).logits).norm().item()

    before = distance()
    weights = dict(ctc_weight=0.0, kl_weight=1.0, hidden_weight=1.0)
    train(student, new_processor(), tiny.corpus(), tiny.corpus(2, "validation"), tmp_path, settings(**weights), teacher)
    assert distance() < 0.9 * before
    for (name, ours), theirs in zip(teacher.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"kl_weight": 1.0}, "no teacher was given"),
        ({"hidden_weight": 1.0}, "no teacher was given"),
        ({"ctc_weight": 0.0}, "nothing to learn from"),
        ({"chosen_by": "divergence"}, "that from a teacher"),
    ],
)
def test_weights_that_cannot_be_are_refused(tmp_path, weights, said):
    with pytest.raises(ValueError, match=said):
        train(tiny.conformer(), new_processor(), tiny.corpus(), tiny.corpus(), tmp_path, settings(**weights))


# ---- what is kept, and at which learning rate --------------------------------------------------------------


@pytest.mark.parametrize("name", ["conformer", "whisper"])
def test_the_weights_nearest_to_the_teacher_are_kept(tmp_path, name):
    processor = family_models.processor_of("whisper") if name == "whisper" else new_processor()
    teacher = family_models.whisper() if name == "whisper" else tiny.conformer(**QUIET)
    student, speech = convert(teacher, 3), tiny.corpus(3, "validation")
    collate, heard = SpeechCollator(processor), SpeechDataset(speech, processor)
    batches = [collate([heard[i]]) for i in range(len(speech))]  # without padding
    if name == "whisper":  # on its own words, not on the references
        head = family_of(teacher.config).head
        for batch in batches:
            batch["labels"] = head.own_labels(teacher.eval(), processor, batch)

    def divergence() -> float:
        with torch.no_grad():
            logits = [[model.eval()(**batch).logits[0] for batch in batches] for model in (student, teacher)]
        ours, theirs = (torch.cat(each).double().log_softmax(-1) for each in logits)
        return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()

    before = divergence()
    chosen = settings(kl_weight=1.0, ctc_weight=0.0, chosen_by="divergence", batch_seconds=100.0, epochs=4)
    result = train(student, processor, tiny.corpus(), speech, tmp_path, chosen, teacher)
    seen = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert seen[0] == pytest.approx(before, rel=1e-3)
    assert result.best_step == min(seen, key=seen.get) > 0
    assert seen[result.best_step] == pytest.approx(divergence(), rel=1e-3) and divergence() < before


def test_of_learning_rates_the_best_comes_first_and_nothing_is_left_in_the_model(tmp_path):
    teacher = tiny.conformer(**QUIET)
    student = convert(teacher, 3)
    before = {name: values.clone() for name, values in student.state_dict().items()}
    chosen = settings(kl_weight=1.0, ctc_weight=0.0, chosen_by="divergence", epochs=20)
    speech = new_processor(), tiny.corpus(), tiny.corpus(2, "validation"), tmp_path, chosen, teacher
    rates = [1e-7, 5e-3, 1e-5]
    tried = try_learning_rates(rates, student, *speech, corpus="noise")
    assert [row["learning_rate"] for row in tried] == [5e-3, 1e-5, 1e-7]
    assert tried[0]["eval_loss"] < tried[1]["eval_loss"] < tried[2]["eval_loss"]
    assert all(torch.equal(values, before[name]) for name, values in student.state_dict().items())
    written = [last_checkpoint(tmp_path / f"rate-{rate:g}") for rate in rates]
    at = [folder.stat().st_mtime_ns for folder in written]
    again = try_learning_rates(rates, student, *speech, corpus="noise")
    assert again == tried and [folder.stat().st_mtime_ns for folder in written] == at


def test_a_rate_that_breaks_training_comes_last(tmp_path, monkeypatch):
    original = SpeechTrainer.training_step

    def breaks(self, *args, **kwargs):
        if self.settings.learning_rate > 1:
            raise FloatingPointError("the loss is nan")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SpeechTrainer, "training_step", breaks)
    speech = new_processor(), tiny.corpus(), tiny.corpus(2, "validation"), tmp_path, settings(epochs=1)
    tried = try_learning_rates([2.0, 1e-3], tiny.conformer(**QUIET), *speech, corpus="noise")
    assert [row["learning_rate"] for row in tried] == [1e-3, 2.0] and tried[1]["eval_wer"] is None
    model = family_models.whisper()
    heard = family_models.processor_of("whisper"), *speech[1:3], tmp_path / "whisper", settings(epochs=1)
    try_learning_rates([2.0, 1e-3], model, *heard, corpus="noise")
    assert model.config.use_cache  # Trainer switches it off
    with pytest.raises(FloatingPointError, match="any of"):
        try_learning_rates([2.0], tiny.conformer(**QUIET), *speech, corpus="noise")


def test_a_rate_that_breaks_several_processes_comes_last_and_another_failure_is_told(tmp_path, monkeypatch):
    kinds = iter(["FloatingPointError", "OSError"])

    def fails(*args, **how):
        raise TrainingFailed("it says why", next(kinds))

    monkeypatch.setattr("asrlib.training.rates.train_in_processes", fails)
    model = tiny.conformer(**QUIET)
    with pytest.raises(TrainingFailed, match="it says why"):
        try_learning_rates([2.0, 1.0], model, None, None, None, tmp_path, settings(), processes=2)
    assert next(kinds, None) is None
