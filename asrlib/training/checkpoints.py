"""The checkpoints of a training: which are complete, and which are kept."""

import shutil
import time
from collections.abc import Collection
from pathlib import Path

from transformers import TrainerCallback

from asrlib.runs import write_json
from asrlib.training.distributed import wait_for_all

CHECKPOINT_MARKER = ".completed.json"  # Trainer writes a checkpoint file by file; the marker says that it is complete


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as complete once all its files are written, with the seconds spent so far.

    Only then removes the earlier ones, except the best: a kill leaves a complete checkpoint at any moment.
    """

    def __init__(self, seconds_before: float):
        self.start = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:  # a checkpoint does not hold the loss since the last log
            control.should_log = True
        return control

    def on_save(self, args, state, control, **kwargs):
        wait_for_all()  # each process writes the state of its own random numbers
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            facts = {"step": state.global_step, "seconds": self.seconds, "finished": control.should_training_stop}
            facts["processes"] = args.world_size
            write_json(checkpoint_folder(folder, state.global_step) / CHECKPOINT_MARKER, facts)
            kept = {checkpoint_folder(folder, step) for step in (state.global_step, state.best_global_step)}
            remove_checkpoints(folder, kept)


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKPOINT_MARKER}")]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def remove_checkpoints(folder: Path, kept: Collection[Path] = ()) -> None:
    """Removes the checkpoints below `folder` (weights and optimizer states); the TensorBoard logs stay."""
    removed = set(folder.glob("checkpoint-*")) - set(kept)
    for checkpoint in sorted(removed, key=_step_of, reverse=True):  # a later one may refer to an earlier best one
        (checkpoint / CHECKPOINT_MARKER).unlink(missing_ok=True)  # first, since a half-removed one is not complete
        shutil.rmtree(checkpoint)
