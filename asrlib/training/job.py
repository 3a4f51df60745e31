"""The work of each process of a training.

    python -m asrlib.training.job FOLDER/job.json
    torchrun --nproc-per-node 8 -m asrlib.training.job FOLDER/job.json
    accelerate launch --config_file CONFIG --machine_rank 1 -m asrlib.training.job FOLDER/job.json

`training.launching` writes the job's folder, and starts the first machine's processes.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_model
from torch import distributed
from transformers import TrainerCallback

from asrlib.data.corpus import Corpus
from asrlib.data.opening import open_corpus
from asrlib.models.loading import load
from asrlib.runs import atomic_folder, read_json, write_json
from asrlib.training.checkpoints import checkpoint_folder
from asrlib.training.distributed import process_index
from asrlib.training.training import TrainingResult, TrainingSettings, train

STEPS_SECONDS = 5.0  # a step without a log entry is in the history if the last entry is at least this old


def run_job(job: Path) -> None:
    """Trains by the job's settings; the first process writes the trained model and the result.

    Raises what `train` raises, and ValueError where the speech is not that of the job.
    """
    folder, facts = job.parent, read_json(job)
    model, processor = load(folder / "model")
    teacher = load(folder / "teacher")[0] if facts["teacher"] else None
    speech = [_open(facts[name]) for name in ("training", "validation")]
    history = HistoryFile(folder / "history.jsonl")
    result = train(model, processor, *speech, folder, _settings(facts["settings"]), teacher, [history])
    if process_index() == 0:
        trained, _ = load(folder / "model")  # under fsdp, `model` itself is in parts
        if result.best_step:  # else nothing beat the weights that it came with
            load_model(trained, checkpoint_folder(folder, result.best_step) / "model.safetensors")
        with atomic_folder(folder / "trained") as written:
            trained.save_pretrained(written)
            processor.save_pretrained(written)
        write_json(folder / "result.json", result.as_metrics())
    if distributed.is_initialized():
        distributed.destroy_process_group()


def load_trained(job: Path, model) -> TrainingResult:
    """Gives `model`, of the job's architecture, the trained weights, and returns the result: as `train` does."""
    load_model(model, job.parent / "trained" / "model.safetensors")
    model.eval()
    facts = read_json(job.parent / "result.json")
    return TrainingResult(**facts | {"settings": _settings(facts["settings"])})


def _settings(facts: dict) -> TrainingSettings:
    return TrainingSettings(**facts | {"speeds": tuple(facts["speeds"])})


def _open(speech: dict) -> Corpus:
    texts = speech["texts"]
    corpus = open_corpus(speech["corpus"], speech["split"])
    here = (replace(utterance, text=texts[utterance.id]) for utterance in corpus if utterance.id in texts)
    corpus = replace(corpus, utterances=tuple(here))
    if corpus.fingerprint() != speech["fingerprint"]:
        raise ValueError(
            f"{speech['corpus']} {speech['split']} is not the speech of this job: {len(corpus):,} of {len(texts):,} "
            "utterances are here, or their lengths differ. Was it changed, or is it another copy?"
        )
    return corpus


class HistoryFile(TrainerCallback):
    """Appends logs and evaluations to a file of JSON lines, and sometimes the step alone."""

    def __init__(self, path: Path):
        self.path, self.time = path, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.unlink(missing_ok=True)
            for row in state.log_history:  # up to the checkpoint from which training resumes
                self._append(row, state)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._append(state.log_history[-1], state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and time.monotonic() > self.time + STEPS_SECONDS:
            self._append({"step": state.global_step}, state)

    def _append(self, row: dict, state) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"max_steps": state.max_steps}) + "\n")
        self.time = time.monotonic()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="the job.json of asrlib.training.launching.write_job")
    parser.add_argument("--attached", action="store_true", help="end when standard input ends")
    args = parser.parse_args(argv)
    if not args.job.is_file():
        parser.error(f"there is no job at {args.job}")
    if args.attached:
        end_with_stdin()
    with failures_reported(args.job.resolve().parent):
        run_job(args.job.resolve())


# ---- for the process that started this one -----------------------------------------------------------------


@contextmanager
def failures_reported(folder: Path) -> Iterator[None]:
    """Writes the error that ends this process to the file where `launch` looks for it."""
    try:
        yield
    except Exception as error:
        process = int(os.environ.get("RANK", 0))
        failure = {"process": process, "error": type(error).__name__, "message": str(error), "time": time.time()}
        write_json(folder / "failures" / f"{process}.json", failure)
        raise


def end_with_stdin() -> None:
    """Ends this process when its standard input ends, for whatever reason."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
