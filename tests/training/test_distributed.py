"""Two processes do what one does with twice as many batches a step, and end, fail and resume together.

Most trainings here run in children of a server that has imported torch once for all of them.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import soundfile
import tiny
import torch
from accelerate.state import DistributedType, PartialState
from IPython import display

from asrlib import convert, load, open_corpus
from asrlib.data.batches import BucketBatchSampler
from asrlib.models.scratch import new_processor
from asrlib.reporting import figures
from asrlib.running.preflight import check_surroundings
from asrlib.runs import BadParameter, read_json, write_json
from asrlib.training import distributed, training
from asrlib.training.checkpoints import checkpoint_folder, last_checkpoint
from asrlib.training.job import main
from asrlib.training.launching import (
    TrainingFailed,
    launch,
    launch_command,
    read_history,
    train_in_processes,
    write_job,
)
from asrlib.training.training import SpeechTrainer, TrainingSettings, train

BATCH_SECONDS = 3.0
UNSHAKEN = dict(  # by dropout and masks
    hidden_dropout=0, activation_dropout=0, attention_dropout=0, conformer_conv_dropout=0, final_dropout=0,
    mask_time_prob=0,
)  # fmt: skip


# ---- trainings, to be run in one process or in several -----------------------------------------------------


def settings(**changes):
    usual = dict(
        trainable="all", epochs=2, learning_rate=0.02, batch_seconds=BATCH_SECONDS, evaluations_per_epoch=2,
        patience=100, device="cpu",
    )  # fmt: skip
    return TrainingSettings(**usual | changes)


def make(kind: str):
    """(model, its processor, its teacher or None)."""

    if kind == "latent":
        return convert(tiny.conformer(**UNSHAKEN), [5, 12]), new_processor(), tiny.conformer(**UNSHAKEN)
    if kind == "layerdrop":
        return tiny.conformer(layerdrop=0.3), new_processor(), None
    masks = dict(time_masks=2, time_mask_share=0.2, frequency_masks=1, hidden_dropout=0.1)
    return tiny.encoder(**masks), new_processor("conformer", tiny.MEL_BINS), None


def trained(folder: Path, kind: str, **changes) -> dict[str, Any]:
    """What came of a training in `folder`, of 4 batches an epoch, and of 3 in validation."""

    model, processor, teacher = make(kind)
    validation = tiny.corpus(11, "validation", seed=100)
    result = train(model, processor, tiny.corpus(), validation, folder, settings(**changes), teacher)
    told = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_wer")
    weights = {} if changes.get("training_strategy") == "fsdp" else model.state_dict()
    return {
        "history": [{name: row[name] for name in told if name in row} for row in result.history],
        "steps": (result.steps, result.best_step, result.stopped_early),
        "weights": {name: weight.numpy() for name, weight in weights.items()},
        "seed": torch.initial_seed(),
    }


def trained_until(step: int, act: Callable, *args, training_of: Callable = trained, **changes) -> dict[str, Any]:
    """The same, but `act` is called with the model when so many steps are behind it."""

    original = SpeechTrainer.training_step

    def training_step(self, *inputs):
        if self.state.global_step == step:
            act(self.model)
        return original(self, *inputs)

    SpeechTrainer.training_step = training_step
    return training_of(*args, **changes)


def trained_in_parts(*args, **changes) -> dict[str, Any]:
    """By FSDP on the CPU, which torch can, and accelerate can where it takes this for an accelerator."""

    original = training._arguments

    def arguments(*given, **named):
        made = original(*given, **named)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return made

    training._arguments, distributed.check_sharding = arguments, lambda *given: None
    return trained(*args, training_strategy="fsdp", **changes)


def trained_in_parts_until(step: int, act: Callable, *args, **changes) -> dict[str, Any]:
    return trained_until(step, act, *args, training_of=trained_in_parts, **changes)


def quit_at_once(model) -> None:
    os._exit(9)


def poison_second(model) -> None:
    if os.environ["RANK"] == "1":
        model.lm_head.bias.data.fill_(float("nan"))


# ---- several processes -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def act_as(rank: int, count: int, port: int, answer, function: Callable, args: tuple, changes: dict) -> None:

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TQDM_DISABLE": "1"}
    try:
        answer.send(function(*args, **changes))
    except Exception as error:
        answer.send(error)
        os._exit(1)  # as a process that fails: it says nothing more to the others


def in_processes(count: int, function: Callable, *args, **changes) -> list[Any]:
    """What `function` gives or raises in each of `count` processes; None where it ends without a word."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["asrlib.training.training", "asrlib.conversion.convert", "torch.utils.tensorboard", "tiny"]
    )
    port, processes, answers = free_port(), [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=act_as, args=(rank, count, port, theirs, function, args, changes))
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(ours)
    try:
        return [_answer(answer) for answer in answers]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def _answer(connection) -> Any:
    assert connection.poll(300), "no process answered"
    try:
        return connection.recv()
    except EOFError:
        return None


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["history"] == other["history"] and one["steps"] == other["steps"]
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        assert (weight == other["weights"][name]).all(), name


def assert_close(one: list[dict], other: list[dict]) -> None:
    assert [row.keys() for row in one] == [row.keys() for row in other]
    for row, same in zip(one, other, strict=True):
        assert row == pytest.approx(same, rel=1e-4)


# ---- batches -----------------------------------------------------------------------------------------------


def batches_of_all(seconds, processes: int, **kwargs) -> list[list[list[int]]]:

    samplers = [BucketBatchSampler(seconds, 60.0, processes=processes, process=p, **kwargs) for p in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(1)
    assert {len(sampler) for sampler in samplers} == {len(list(sampler)) for sampler in samplers}
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [37, 500])
def test_every_utterance_is_trained_on_once_an_epoch_and_all_have_equally_many_batches(count, processes):
    order = random.Random(0)
    seconds = [order.uniform(0.5, 16.0) for _ in range(count)]
    shares = batches_of_all(seconds, processes)
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))
    assert all(len(batch) * max(seconds[i] for i in batch) <= 60.0 for share in shares for batch in share)
    alone = batches_of_all(seconds, 1)[0]
    dealt = [share[step] for step in range(len(shares[0])) for share in shares]
    same = [batch == other for batch, other in zip(dealt, alone, strict=False)]
    assert same.count(False) <= -len(alone) % processes  # those that were halved


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 40])
def test_validation_has_the_batches_of_one_process_and_repeats_the_first_ones_at_the_end(processes):
    order = random.Random(0)
    seconds = [order.uniform(0.5, 16.0) for _ in range(37)]
    shares = batches_of_all(seconds, processes, shuffle=False)
    dealt = [share[step] for step in range(len(shares[0])) for share in shares]
    alone = batches_of_all(seconds, 1, shuffle=False)[0]
    assert dealt[: len(alone)] == alone
    assert len({len(share) for share in shares}) == 1
    assert all(batch in alone for batch in dealt) and len(dealt) - len(alone) < processes


def test_too_few_utterances_for_so_many_processes_are_refused():

    BucketBatchSampler([50.0] * 4, 20.0, processes=2)
    with pytest.raises(ValueError, match="5 utterances in 5 batches cannot be dealt out evenly to 2 processes: raise"):
        BucketBatchSampler([50.0] * 5, 20.0, processes=2)


# ---- two processes and one ---------------------------------------------------------------------------------


TAUGHT = dict(trainable="attention", kl_weight=1.0, hidden_weight=1.0)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return in_processes(2, trained, tmp_path_factory.mktemp("taught"), "latent", **TAUGHT)


def test_two_processes_learn_what_one_does_of_twice_the_batches(taught, tmp_path):
    [alone] = in_processes(1, trained, tmp_path, "latent", gradient_accumulation=2, **TAUGHT)
    first, second = taught
    assert len({row["eval_wer"] for row in alone["history"] if "eval_wer" in row}) > 1
    assert_close(first["history"], alone["history"])
    assert first["steps"] == alone["steps"]
    for name, weight in alone["weights"].items():
        assert weight == pytest.approx(first["weights"][name], rel=1e-4, abs=1e-6), name
    assert_same(first, second)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return in_processes(2, trained, tmp_path_factory.mktemp("undisturbed"), "encoder")


def test_an_interruption_in_the_middle_of_an_epoch_leaves_no_trace(undisturbed, tmp_path):

    assert in_processes(2, trained_until, 3, quit_at_once, tmp_path, "encoder") == [None, None]
    assert last_checkpoint(tmp_path).name == "checkpoint-3"  # an epoch has two steps
    for one, other in zip(in_processes(2, trained, tmp_path, "encoder"), undisturbed, strict=True):
        assert_same(one, other)


def test_processes_have_the_same_model_but_masks_of_their_own(undisturbed):
    first, second = undisturbed
    assert_same(first, second)  # BatchNorm's moments too
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["weights"]["layers.0.conv_module.batch_norm.num_batches_tracked"] > 0


def test_another_number_of_processes_does_not_go_on_where_these_have_ended(tmp_path):
    facts = {"step": 3, "seconds": 1.0, "finished": False, "processes": 2}
    write_json(tmp_path / "checkpoint-3" / ".completed.json", facts)
    with pytest.raises(
        ValueError, match="checkpoint-3 comes from a training in 2 processes, and this one has 1: start"
    ):
        trained(tmp_path, "encoder")


def test_half_precision_checkpointing_and_layers_left_out_by_chance(tmp_path):
    first, second = in_processes(
        2, trained, tmp_path, "layerdrop", precision="bf16", gradient_checkpointing=True, evaluations_per_epoch=1
    )
    assert_same(first, second)
    losses = [row["loss"] for row in first["history"] if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_one_loss_that_is_no_number_ends_all(tmp_path):

    first, second = in_processes(2, trained_until, 3, poison_second, tmp_path, "encoder")
    assert isinstance(second, FloatingPointError) and "the loss is nan at step 3" in str(second)
    assert isinstance(first, Exception)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_model_in_parts_learns_the_same_and_is_saved_whole(taught, tmp_path):

    told, _ = in_processes(2, trained_in_parts, tmp_path, "latent", **TAUGHT)
    assert_close(told["history"], taught[0]["history"])
    assert told["steps"] == taught[0]["steps"]
    best = checkpoint_folder(tmp_path, told["steps"][1])
    make("latent")[1].save_pretrained(best)
    for name, weight in load(best)[0].state_dict().items():
        assert weight.numpy() == pytest.approx(taught[0]["weights"][name], abs=2e-3), name


def test_a_model_in_parts_in_half_precision_resumes(taught, tmp_path):
    changes = TAUGHT | {"precision": "bf16", "gradient_checkpointing": True}
    assert in_processes(2, trained_in_parts_until, 3, quit_at_once, tmp_path, "latent", **changes) == [None, None]
    told, _ = in_processes(2, trained_in_parts, tmp_path, "latent", **changes)
    losses, precisely = ([row["loss"] for row in one["history"] if "loss" in row] for one in (told, taught[0]))
    assert losses == pytest.approx(precisely, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training_strategy": "ddpp"}, "'ddpp': choose one of ddp, fsdp"),
        ({"training_strategy": "fsdp"}, "training_strategy is fsdp, which spreads a model over processes: raise"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, "encoder", **changes)


@pytest.mark.parametrize("encoder", ["conformer", "branchformer"])
def test_every_step_needs_every_parameter_of_our_encoders(encoder):
    """So that DDP need not look for those that a step has left out."""

    for name, sizes in tiny.variants().items():
        model = tiny.encoder(encoder, **sizes).train()
        model(**tiny.features()).loss.backward()
        assert [parameter for parameter, value in model.named_parameters() if value.grad is None] == [], name


# ---- started, followed and ended ---------------------------------------------------------------------------


def corpus_on_disk(folder: Path) -> None:
    """What `trained` trains on, as files with manifests."""

    for corpus in (tiny.corpus(), tiny.corpus(11, "validation", seed=100)):
        lines = []
        for utterance in corpus:
            path = folder / f"{utterance.id}.wav"
            soundfile.write(path, utterance.audio(), 16_000, subtype="FLOAT")
            lines.append(json.dumps({"id": utterance.id, "audio": path.name, "text": utterance.text}))
        (folder / f"{corpus.split}.jsonl").write_text("\n".join(lines))


def started(folder: Path, corpus: Path):
    """Arguments of `train_in_processes`."""

    model, processor, _ = make("encoder")
    speech = [open_corpus(corpus, split) for split in ("train", "validation")]
    return (model, processor, *speech, folder, settings()), dict(corpus=str(corpus), processes=2)


def processes_of(job: Path) -> list[psutil.Process]:
    """Those that were given the path of this job."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(job) in (p.info["cmdline"] or [])]


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def test_a_training_in_processes_leaves_what_one_in_this_process_leaves(undisturbed, tmp_path):
    corpus_on_disk(tmp_path)
    arguments, where = started(tmp_path / "run", tmp_path)
    result = train_in_processes(*arguments, **where)
    model, folder, told = arguments[0], arguments[4], undisturbed[0]
    assert (result.steps, result.best_step, result.stopped_early) == told["steps"]
    assert result.settings == settings() and result.trainable_parameters == sum(p.numel() for p in model.parameters())
    assert [row.get("loss") for row in result.history] == [row.get("loss") for row in told["history"]]
    for name, weight in model.state_dict().items():
        assert (weight.numpy() == told["weights"][name]).all(), name
    assert not model.training
    assert [row for row in read_history(folder / "history.jsonl") if "loss" in row or "eval_loss" in row] == [
        row | {"max_steps": result.steps} for row in result.history
    ]
    assert not {path.name for path in folder.iterdir()} & {"model", "trained", "failures"}


FAILING = """
import os, sys, time
from pathlib import Path
from asrlib.training.job import end_with_stdin, failures_reported
end_with_stdin()
with failures_reported(Path(sys.argv[1]).parent):
    if os.environ["RANK"] == "1":
        raise FloatingPointError("the loss is nan")
    time.sleep(600)
"""


TWO_BY_ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
gpu_ids: all
mixed_precision: 'no'
"""


@pytest.mark.parametrize("config", [None, TWO_BY_ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_first_error_of_any_process_ends_all_and_is_told(tmp_path, config):
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "config.yaml").write_text(config or "")
    *several, _, module = launch_command(2, config and str(tmp_path / "config.yaml"))
    assert module == "asrlib.training.job"
    with pytest.raises(
        TrainingFailed, match=r"^the loss is nan \(FloatingPointError in process 1; .*training.log"
    ) as told:
        launch(tmp_path / "job.json", [*several, str(tmp_path / "failing.py")])
    assert told.value.kind == "FloatingPointError"
    assert not processes_of(tmp_path / "job.json")


WAITING = """
import sys, time
from pathlib import Path
from asrlib.training.job import end_with_stdin
end_with_stdin()
(Path(sys.argv[1]).parent / "history.jsonl").write_text('{"step": 1, "max_steps": 5}\\n{"step": 2, "max')
time.sleep(600)
"""


def waiting(folder: Path) -> list[str]:
    (folder / "waiting.py").write_text(WAITING)
    return [str(folder / "waiting.py")]


def test_an_interruption_ends_what_was_started_which_holds_our_locks_until_then(tmp_path):
    job, seen = tmp_path / "job.json", []
    with open(tmp_path / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)  # as the pipeline's kernels find it

        def interrupt(history):
            seen.extend(history)
            [process] = processes_of(job)
            assert str(tmp_path / "lock") in [file.path for file in process.open_files()]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            launch(job, [sys.executable, *waiting(tmp_path)], interrupt)
    assert seen == [{"step": 1, "max_steps": 5}]
    assert not processes_of(job)


NOTEBOOK = """
import sys
from pathlib import Path
from asrlib.training.launching import launch
launch(Path(sys.argv[1]), sys.argv[2:])
"""


def test_a_killed_notebook_takes_its_processes_along(tmp_path):
    *several, _, _ = launch_command(2)
    job = tmp_path / "job.json"
    notebook = subprocess.Popen([sys.executable, "-c", NOTEBOOK, str(job), *several, *waiting(tmp_path)])
    wait_for(lambda: (tmp_path / "history.jsonl").is_file() and len(processes_of(job)) == 4, 120)
    notebook.kill()
    notebook.wait()
    wait_for(lambda: not processes_of(job), 60)


def test_a_process_that_is_killed_leaves_its_last_words(tmp_path):
    dies = f"print('half way', flush=True); import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    with pytest.raises(TrainingFailed, match=r"status -9 \(killed, or out of memory\?\); .* ends with: half way"):
        launch(tmp_path / "job.json", [sys.executable, "-c", dies])


def test_a_job_on_other_speech_is_refused(tmp_path):

    corpus_on_disk(tmp_path)
    arguments, where = started(tmp_path / "run", tmp_path)
    job = write_job(*arguments, corpus=where["corpus"])
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"not the speech of this job: 10 of 11 utterances are here"):
        main([str(job)])
    assert read_json(job.parent / "failures" / "0.json")["error"] == "ValueError"
    with pytest.raises(SystemExit):
        main([str(tmp_path / "missing.json")])


def test_one_process_is_this_one(tmp_path):
    corpus_on_disk(tmp_path)
    arguments, where = started(tmp_path / "run", tmp_path)
    result = train_in_processes(*arguments, **where | {"processes": 1})
    assert result.best_wer < 1 and not (tmp_path / "run" / "job.json").exists()


@pytest.mark.parametrize("watched", [True, False])
def test_curves_grow_in_their_place_for_whoever_watches(monkeypatch, watched):

    shown = []
    kernel = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=watched))
    monkeypatch.setattr("IPython.get_ipython", lambda: kernel)
    monkeypatch.setattr(display, "display", lambda data, **place: shown.append((data, place)))
    monkeypatch.setattr(figures, "LIVE_SECONDS", -1)
    history = [{"step": 1, "max_steps": 9}, {"step": 2, "loss": 3.0, "max_steps": 9}]
    with figures.LiveFigure() as figure:
        for count in (1, 2):
            figure.show(lambda count=count: figures.training_curves(history[:count]))
    assert [place.get("update", False) for _, place in shown] == ([False, True, True] if watched else [])
    assert len({place["display_id"] for _, place in shown}) == watched
    assert not watched or ("image/png" in shown[1][0] and shown[2][0] == {"text/plain": ""})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator here")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"accelerate_config": "nowhere.yaml"}, "'accelerate_config' is nowhere.yaml, which is not a file"),
        (
            {"accelerate_config": __file__, "training_processes": 2},
            "'training_processes' is 2, but 'accelerate_config'",
        ),
        ({"training_strategy": "fsdp", "training_processes": 2}, "fsdp, which needs GPUs and 'training_processes'"),
    ],
)
def test_what_cannot_start_here_is_refused_at_once(values, said):
    with pytest.raises(BadParameter, match=said):
        check_surroundings(values)
    check_surroundings({"training_processes": 2, "device": "cpu"})


def test_each_process_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_surroundings({"training_processes": 2, "training_strategy": "fsdp"})
    with pytest.raises(BadParameter, match="'training_processes' is 3, but each needs a GPU, and this machine has 2"):
        check_surroundings({"training_processes": 3})
    with pytest.raises(BadParameter, match="fsdp, which cannot train in fp16: use bf16 or fp32"):
        check_surroundings({"training_processes": 2, "training_strategy": "fsdp", "precision": "fp16"})
