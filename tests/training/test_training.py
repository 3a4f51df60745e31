"""What trains is what was chosen, what is best is what remains, and an interruption leaves no trace.

Run as a script it is the process that `test_a_killed_process_leaves_no_trace` kills.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, EvalPrediction, Wav2Vec2ConformerForCTC

from asrlib import convert, evaluate
from asrlib.data.batches import BucketBatchSampler
from asrlib.data.corpus import Corpus
from asrlib.models.heads import CTC
from asrlib.models.scratch import new_processor
from asrlib.runs import read_json, resolve, write_json
from asrlib.training import training
from asrlib.training.checkpoints import CHECKPOINT_MARKER, last_checkpoint, remove_checkpoints
from asrlib.training.modes import select_trainable
from asrlib.training.training import (
    SpeechTrainer,
    TrainingResult,
    TrainingSettings,
    train,
)

BATCH_SECONDS = 3.0
VALIDATION = tiny.corpus(6, "validation", seed=100)
STEPS_PER_EPOCH = len(BucketBatchSampler([u.seconds for u in tiny.corpus()], BATCH_SECONDS))
TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # differ from run to run


def settings(**changes) -> TrainingSettings:
    usual = dict(
        trainable="all", epochs=3, learning_rate=0.02, batch_seconds=BATCH_SECONDS, evaluations_per_epoch=2,
        patience=100, device="cpu",
    )  # fmt: skip
    return TrainingSettings(**usual | changes)


class Outcome(NamedTuple):
    model: Wav2Vec2ConformerForCTC
    result: TrainingResult
    last: dict[str, torch.Tensor]  # weights after the last step; the model has those of the best


def run(folder, model=None, count: int = 12, **changes) -> Outcome:
    """A training in `folder`, from the same random weights at every call."""
    model = model or tiny.conformer()
    result = train(model, new_processor(), tiny.corpus(count), VALIDATION, folder, settings(**changes))
    return Outcome(model, result, load_file(last_checkpoint(resolve(folder)) / "model.safetensors"))


def at_step(step: int, act):
    """A training step that does `act` first, once `step` steps are behind it."""
    original = SpeechTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            act()
        return original(self, *args, **kwargs)

    return training_step


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def remove_half(folder, *args, rmtree=shutil.rmtree, **kwargs) -> None:
    """shutil.rmtree, interrupted where it removes a checkpoint."""
    if not Path(folder).name.startswith("checkpoint-"):
        return rmtree(folder, *args, **kwargs)
    (Path(folder) / "model.safetensors").unlink()
    raise KeyboardInterrupt


def assert_same_weights(weights: dict, others: dict) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def metrics(outcome: Outcome) -> dict:
    """As they are written, the time it took aside."""
    whole = outcome.result.as_metrics()
    history = [{name: v for name, v in row.items() if name not in TIMES} for row in whole["history"]]
    return {name: v for name, v in whole.items() if name != "seconds"} | {"history": history}


def assert_same_run(one: Outcome, other: Outcome) -> None:
    assert metrics(one) == metrics(other)  # with the loss and the norm of the gradient at every step
    assert_same_weights(one.model.state_dict(), other.model.state_dict())
    assert_same_weights(one.last, other.last)


# ---- what trains -------------------------------------------------------------------------------------------


def latent_model():
    return convert(tiny.conformer(), [5, 12])


@pytest.mark.parametrize(
    ("make", "which", "part"),
    [
        (tiny.conformer, "all", ""),
        (tiny.conformer, "attention", ".self_attn."),
        (latent_model, "all", ""),
        (latent_model, "attention", ".self_attn."),
        (latent_model, "latent", ".latent_kv."),
    ],
)
def test_only_the_chosen_parameters_train(make, which, part, tmp_path):
    model, start = make(), make().state_dict()
    chosen = {name: p for name, p in model.named_parameters() if part in name}
    assert select_trainable(model, which) == sum(p.numel() for p in chosen.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen.keys()

    run(tmp_path, model, trainable=which, epochs=1, evaluations_per_epoch=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    # no conformer uses the convolution that the parent class makes for absolute positions
    unused = {name for name in chosen if ".pos_conv_embed." in name}
    assert chosen.keys() - moved <= unused and moved <= chosen.keys()
    if part:  # then neither may the statistics of a frozen BatchNorm
        for name, buffer in model.named_buffers():
            assert name not in start or torch.equal(buffer, start[name]), name


def test_statistics_of_a_trained_batch_norm_move(tmp_path):
    model = run(tmp_path, epochs=1).model
    assert model.wav2vec2_conformer.encoder.layers[0].conv_module.batch_norm.num_batches_tracked > 0


def test_batch_norm_can_be_trained_after_it_was_frozen_and_interrupted(tmp_path, monkeypatch):
    model = tiny.conformer()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(1, interrupt))
        run(tmp_path / "frozen", model, trainable="attention", epochs=1)
    run(tmp_path / "all", model, epochs=1)
    assert model.wav2vec2_conformer.encoder.layers[0].conv_module.batch_norm.num_batches_tracked > 0


def test_nothing_to_train_is_refused(tiny_model):
    with pytest.raises(ValueError, match="'latent', but Wav2Vec2ConformerForCTC has no such parameters"):
        select_trainable(tiny_model, "latent")
    with pytest.raises(ValueError, match="'heads': choose one of all, attention, latent"):
        select_trainable(tiny_model, "heads")


# ---- what remains ------------------------------------------------------------------------------------------


def scripted(monkeypatch, *word_error_rates: float) -> None:
    """The validation after the n-th evaluation says the n-th of these (the first is before training)."""
    left = iter(word_error_rates)
    monkeypatch.setattr(training, "_word_error_rate", lambda *args: next(left))


def evaluated_steps(result) -> list[int]:
    return [row["step"] for row in result.history if "eval_wer" in row]


def test_the_best_weights_remain_and_patience_ends_the_training(tmp_path, monkeypatch):
    scripted(monkeypatch, 0.9, 0.5, 0.4, 0.4, 0.6, 0.1)
    model, result, last = run(tmp_path, epochs=5, evaluations_per_epoch=1, patience=2)
    assert result.best_wer == 0.4 and result.best_step == 2 * STEPS_PER_EPOCH
    assert result.stopped_early and result.steps == 4 * STEPS_PER_EPOCH
    assert evaluated_steps(result) == [STEPS_PER_EPOCH * epoch for epoch in range(5)]
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{2 * STEPS_PER_EPOCH}", f"checkpoint-{4 * STEPS_PER_EPOCH}"}
    best = load_file(tmp_path / f"checkpoint-{result.best_step}" / "model.safetensors")
    assert_same_weights(model.state_dict(), best)
    assert not torch.equal(model.lm_head.weight, last["lm_head.weight"])
    assert not model.training
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_the_validation_error_is_that_of_evaluate(tmp_path, processor):
    model = tiny.conformer()
    said = processor.tokenizer.convert_tokens_to_ids(["<pad>", "|", "A", "E", "T", "O"])
    with torch.no_grad():  # of random letters, in random words
        model.lm_head.bias.fill_(-1e3)[said] = 0.0
    alone = [p["hypothesis"] for p in evaluate(model, processor, VALIDATION, batch_seconds=0.1).predictions]
    texts = [*alone[:4], "A E E", "TO A"]  # four of the references are what the model says, without any padding
    validation = Corpus("noise", "said", tuple(replace(u, text=t) for u, t in zip(VALIDATION, texts, strict=True)))
    chosen = settings(trainable="attention", learning_rate=1e-9, epochs=0.25, batch_seconds=10.0)
    result = train(model, processor, tiny.corpus(), validation, tmp_path, chosen)
    found = evaluate(model, processor, validation, batch_seconds=10.0)
    assert result.best_wer == found.wer
    wrong = sum(p["reference"] != p["hypothesis"] for p in found.predictions)
    assert wrong == 2 and 0 < found.wer < 1


@pytest.mark.parametrize(
    ("epochs", "evaluations", "steps"),
    [(1, 1, [0, 4]), (2, 2, [0, 2, 4, 6, 8]), (1, 3, [0, 2, 4]), (0.75, 1, [0, 3]), (1.25, 1, [0, 4, 5])],
)
def test_evaluations_per_epoch(tmp_path, epochs, evaluations, steps):
    assert STEPS_PER_EPOCH == 4
    result = run(tmp_path, epochs=epochs, evaluations_per_epoch=evaluations).result
    assert evaluated_steps(result) == steps
    assert result.steps == steps[-1] and not result.stopped_early


def test_a_plateau_of_word_errors_halves_the_learning_rate(tmp_path, monkeypatch):
    scripted(monkeypatch, 0.1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.7)  # what the untrained model is worth does not count
    plateau = dict(scheduler="reduce_lr_on_plateau", learning_rate=0.01, epochs=6, evaluations_per_epoch=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between the two that see no progress
        patch.setattr(SpeechTrainer, "training_step", at_step(3 * STEPS_PER_EPOCH + 1, interrupt))
        run(tmp_path, **plateau)
    result = run(tmp_path, **plateau).result
    rates = {-(-row["step"] // STEPS_PER_EPOCH): row["learning_rate"] for row in result.history if "loss" in row}
    assert rates == {1: 0.01, 2: 0.01, 3: 0.01, 4: 0.01, 5: 0.005, 6: 0.005}


def test_speech_is_trained_on_at_every_speed_and_validated_at_its_own(tmp_path, monkeypatch):
    lengths: dict[str, list[int]] = {"training_step": [], "prediction_step": []}
    for method, seen in lengths.items():
        original = getattr(SpeechTrainer, method)

        def step(self, model, inputs, *args, original=original, seen=seen, **kwargs):
            seen.extend(inputs["attention_mask"].sum(-1).tolist())
            return original(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(SpeechTrainer, method, step)
    run(tmp_path, epochs=1, evaluations_per_epoch=1, speeds=(0.9, 1.0, 1.1))
    samples = [len(utterance.audio()) for utterance in tiny.corpus()]
    assert sorted(lengths["training_step"]) == sorted(round(n / speed) for n in samples for speed in (0.9, 1.0, 1.1))
    assert sorted(lengths["prediction_step"]) == sorted(2 * [len(utterance.audio()) for utterance in VALIDATION])


def test_accumulated_batches_weigh_as_much_as_one_large_batch(tmp_path, monkeypatch):
    same = tiny.corpus(1)[:1].utterances * 8
    corpus = Corpus("noise", "train", same)
    logged, batches = [], []
    monkeypatch.setattr(SpeechTrainer, "training_step", at_step(0, lambda: batches.append(1)))
    for batch_seconds, accumulation in ((same[0].seconds, 4), (4.001 * same[0].seconds, 1)):
        quiet = dict(hidden_dropout=0, activation_dropout=0, attention_dropout=0, conformer_conv_dropout=0)
        model = tiny.conformer(**quiet, final_dropout=0, mask_time_prob=0)
        chosen = settings(
            trainable="attention", epochs=2, evaluations_per_epoch=1,
            batch_seconds=batch_seconds, gradient_accumulation=accumulation,
        )  # fmt: skip
        result = train(model, new_processor(), corpus, corpus, tmp_path / str(accumulation), chosen)
        logged.append([(row["loss"], row["grad_norm"]) for row in result.history if "loss" in row])
    assert len(batches) == 4 + 1  # in the first step
    assert len(logged[0]) == 4  # two steps an epoch, both ways
    for (loss, norm), (other_loss, other_norm) in zip(*logged, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-3) and norm == pytest.approx(other_norm, rel=1e-3)


def test_gradient_checkpointing_ends_with_the_same_weights(tmp_path):
    plain = run(tmp_path / "plain", convert(tiny.conformer(), 6), trainable="latent", epochs=1)
    frugal = run(
        tmp_path / "frugal", convert(tiny.conformer(), 6), trainable="latent", epochs=1, gradient_checkpointing=True
    )
    assert frugal.model.is_activation_checkpointing and not plain.model.is_activation_checkpointing
    assert_same_weights(plain.last, frugal.last)


def test_batches_are_composed_anew_in_every_epoch_and_by_every_seed(tmp_path, monkeypatch):
    original, seen = SpeechTrainer.training_step, []

    def training_step(self, model, inputs, *args):
        seen.append(sorted(inputs["attention_mask"].sum(-1).tolist()))  # durations tell the utterances apart
        return original(self, model, inputs, *args)

    monkeypatch.setattr(SpeechTrainer, "training_step", training_step)
    for seed in (0, 0, 1):
        run(tmp_path / str(len(seen)), epochs=2, seed=seed)
    epochs = [seen[start : start + STEPS_PER_EPOCH] for start in range(0, len(seen), STEPS_PER_EPOCH)]
    assert len(epochs) == 6
    everyone = [sorted(chain.from_iterable(epoch)) for epoch in epochs]
    assert len(everyone[0]) == 12 and all(one == everyone[0] for one in everyone)
    assert epochs[0] != epochs[1] and epochs[:2] == epochs[2:4] and epochs[0] != epochs[4]


def test_the_loss_does_not_depend_on_how_many_share_a_batch(tmp_path):
    model = run(tmp_path, tiny.conformer(ctc_loss_reduction="sum", ctc_zero_infinity=False), epochs=0.25).model
    assert model.config.ctc_loss_reduction == "mean" and model.config.ctc_zero_infinity


def test_doubled_letters_of_a_reference_are_not_merged(processor):
    blank, t, e = processor.tokenizer.convert_tokens_to_ids(["<pad>", "T", "E"])
    said = EvalPrediction(np.array([[t, t, blank, e, blank, e, -100]]), np.array([[t, e, e, -100]]))
    assert training._word_error_rate(said, processor, CTC()) == 0.0
    said = EvalPrediction(np.array([[t, t, blank, e, e, e, -100]]), np.array([[t, e, e, -100]]))
    assert training._word_error_rate(said, processor, CTC()) == 1.0


def test_a_model_trained_in_bf16_computes_in_fp32_afterwards(tmp_path):
    model = run(tmp_path / "run", epochs=1, precision="bf16").model
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(model(**tiny.padded_batch()).logits, loaded(**tiny.padded_batch()).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator here")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "precision is fp16, but training runs on the CPU: use bf16 or fp32"),
        ({"precision": "fp16", "device": "auto"}, "precision is fp16, but training runs on the CPU"),
        ({"device": "cuda"}, "device is cuda, but"),
        ({"trainable": "latent"}, "convert it first"),
        ({"speeds": ()}, "give at least one, all positive"),
        ({"speeds": (1.0, 0.0)}, "give at least one, all positive"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, monkeypatch):
    model = tiny.conformer()

    def poison():
        model.lm_head.bias.data.fill_(float("nan"))

    monkeypatch.setattr(SpeechTrainer, "training_step", at_step(STEPS_PER_EPOCH + 1, poison))
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, model, evaluations_per_epoch=1)
    assert f"the loss is nan at step {STEPS_PER_EPOCH + 1}: lower learning_rate" in str(error.value)
    assert last_checkpoint(tmp_path).name == f"checkpoint-{STEPS_PER_EPOCH}"


def test_a_loss_that_is_no_number_names_its_batch_and_leaves_the_best_checkpoint(tmp_path, monkeypatch):
    scripted(monkeypatch, 0.9, 0.2, 0.6, 0.5)  # the best is not the last
    model, batches = tiny.conformer(), []
    original = SpeechTrainer.training_step

    def training_step(self, model, inputs, *args):
        batches.append([id for id, _ in inputs["utterances"]])
        if self.state.global_step == 7:
            model.lm_head.bias.data.fill_(float("nan"))
        return original(self, model, inputs, *args)

    monkeypatch.setattr(SpeechTrainer, "training_step", training_step)
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, model)
    assert f"The loss comes from a batch of {len(batches[-1])} utterances" in str(error.value)
    assert f"({', '.join(batches[-1])})" in str(error.value) and len(batches[-1]) > 1
    assert {path.parent.name for path in tmp_path.glob(f"*/{CHECKPOINT_MARKER}")} == {"checkpoint-2", "checkpoint-6"}
    facts = read_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert facts["best_global_step"] == 2 and facts["best_metric"] == 0.2


# ---- interruptions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


def test_an_undisturbed_run_is_worth_comparing_with(undisturbed):
    result = undisturbed.result
    assert 0 < result.best_step < result.steps == 3 * STEPS_PER_EPOCH == 12
    assert 0 < result.best_wer < 1


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 11])  # checkpoints lie at the even ones, epochs end at 4, 8, 12
def test_an_interruption_leaves_no_trace(undisturbed, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(step, interrupt))
        run(tmp_path)
    assert (last_checkpoint(tmp_path) is None) == (step < 2)
    assert_same_run(run(tmp_path), undisturbed)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"gradient_accumulation": 3, "batch_seconds": 1.0, "epochs": 2}, 5),
        ({"batch_seconds": 0.1, "count": 25, "evaluations_per_epoch": 1, "epochs": 2}, 30),  # two steps a log
        ({"trainable": "attention", "precision": "bf16", "gradient_checkpointing": True}, 7),
        ({"speeds": (0.9, 1.0, 1.1), "epochs": 1}, 9),
        ({"scheduler": "reduce_lr_on_plateau"}, 7),
    ],
)
def test_an_interruption_leaves_no_trace_whatever_the_settings(tmp_path, monkeypatch, changes, step):
    whole = run(tmp_path / "whole", **changes)
    assert whole.result.steps > step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(step, interrupt))
        run(tmp_path / "cut", **changes)
    assert 0 < int(last_checkpoint(tmp_path / "cut").name.split("-")[1]) < step
    assert_same_run(run(tmp_path / "cut", **changes), whole)


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_that_is_not_whole_is_ignored(undisturbed, tmp_path, monkeypatch, method):
    """Interrupted after the weights of a checkpoint are written, before the rest of it is."""
    original = getattr(SpeechTrainer, method)

    def save(self, output_dir):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        original(self, output_dir)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, method, save)
        run(tmp_path)
    assert (tmp_path / "checkpoint-6" / "model.safetensors").is_file()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert_same_run(run(tmp_path), undisturbed)


def test_an_interruption_while_old_checkpoints_are_removed_leaves_no_trace(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", remove_half)
        run(tmp_path)
    assert_same_run(run(tmp_path), undisturbed)


def test_leftovers_of_other_checkpoints_do_not_disturb(undisturbed, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-999").mkdir()
    (tmp_path / "checkpoint-999" / "model.safetensors").write_bytes(b"half")
    assert_same_run(run(tmp_path), undisturbed)


def test_patience_is_remembered(tmp_path, monkeypatch):
    scripted(monkeypatch, 0.9, 0.5, 0.6, 0.7, 0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(5, interrupt))
        run(tmp_path, patience=2)
    result = run(tmp_path, patience=2).result
    assert result.stopped_early and evaluated_steps(result) == [0, 2, 4, 6]


@pytest.mark.parametrize("changes", [{}, {"patience": 1}, {"epochs": 1.75}])
def test_a_run_that_came_to_its_end_is_not_continued(tmp_path, monkeypatch, changes):
    """Killed after the last checkpoint, before the step was marked done: there is nothing left to train."""
    first = run(tmp_path, **changes)
    assert first.result.stopped_early == ("patience" in changes)

    def another_step(*args, **kwargs):
        raise AssertionError("there is nothing left to train")

    monkeypatch.setattr(SpeechTrainer, "training_step", another_step)
    again = run(tmp_path, tiny.conformer().train(), **changes)
    assert_same_run(again, first)
    assert not again.model.training


def test_an_interruption_while_all_checkpoints_are_removed_leaves_no_trace(undisturbed, tmp_path, monkeypatch):
    run(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", remove_half)
        remove_checkpoints(tmp_path)
    assert_same_run(run(tmp_path), undisturbed)
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*")) and list(tmp_path.rglob("events.out.tfevents*"))


def test_a_run_folder_can_be_moved(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(11, interrupt))
        run(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same_run(run(tmp_path / "there"), undisturbed)


def test_a_relative_folder_starts_at_the_project_root(tmp_path, monkeypatch):
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    run("reports/here", epochs=0.25)
    assert (tmp_path / "reports" / "here" / "checkpoint-1" / CHECKPOINT_MARKER).is_file()
    assert not list((tmp_path / "notebooks").iterdir())


def test_seconds_add_up_over_resumptions(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", at_step(3, interrupt))
        run(tmp_path, epochs=1)
    marker = last_checkpoint(tmp_path) / CHECKPOINT_MARKER
    spent = read_json(marker)
    assert 0 < spent["seconds"] < 60
    write_json(marker, spent | {"seconds": 1000.0})
    result = run(tmp_path, epochs=1).result
    assert 1000 < result.seconds < 1060


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 11:
            write_json(tmp_path / f"checkpoint-{step}" / CHECKPOINT_MARKER, {"step": step, "seconds": 1.0})
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_killed_process_leaves_no_trace(undisturbed, tmp_path):
    shared = {"PYTHONPATH": os.pathsep.join(sys.path)}  # what tests of several rooms share
    command = [sys.executable, __file__, tmp_path, "7"]
    killed = subprocess.run(command, timeout=120, capture_output=True, env=os.environ | shared)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert last_checkpoint(tmp_path).name == "checkpoint-6"  # in the middle of the second epoch
    assert_same_run(run(tmp_path), undisturbed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    SpeechTrainer.training_step = at_step(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(sys.argv[1])


# ---- the start ---------------------------------------------------------------------------------------------


def test_the_start_stays_where_no_evaluation_beats_it(tmp_path):
    better = run(tmp_path / "better")
    assert better.result.best_step > 0 and better.result.best_wer < 1
    before = {name: values.clone() for name, values in better.model.state_dict().items()}
    harmed = run(tmp_path / "harmed", better.model, learning_rate=5.0, scheduler="constant")
    assert (harmed.result.best_step, harmed.result.best_wer) == (0, better.result.best_wer)
    assert_same_weights(harmed.model.state_dict(), before)
    assert not torch.equal(harmed.last["lm_head.weight"], before["lm_head.weight"])
