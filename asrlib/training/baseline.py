"""The trained baseline, which a run keeps as long as its training stays the same: another test needs no new training.

models/baseline is the model, and training.json in it identifies its training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrlib.runs import TRAINED, Run, atomic_folder, project_root, read_json, write_json
from asrlib.runs.dependencies import library_files, unused_files
from asrlib.runs.fingerprints import file_state, files_fingerprint, fingerprint

TESTING = ("run_dir", "eval_splits", "eval_samples", "batch_seconds", "precision")  # parameters that no training reads
# fmt: off
TRAINING = (  # parameters that a training may read
    "model", "revision", "corpus", "architecture", "attention", "hidden_size", "num_layers", "num_heads",
    "new_kv_heads", "new_latent_dim", "query_latent_dim", "feedforward_size", "depthwise_kernel", "causal",
    "largest_chunk", "subsampling_channels", "mel_bins", "frame_shift_ms", "window_seconds", "dropout", "time_masks",
    "frequency_masks", "speeds", "train_split", "validation_split", "baseline_samples", "baseline_epochs",
    "baseline_learning_rate", "baseline_warmup_ratio", "baseline_scheduler", "baseline_patience",
    "baseline_batch_seconds", "baseline_gradient_checkpointing", "baseline_precision", "device",
    "training_processes", "training_strategy", "accelerate_config", "seed",
)
TAKEN = (  # settings of this training whose parameters have the prefix baseline_
    "epochs", "learning_rate", "warmup_ratio", "scheduler", "batch_seconds", "gradient_checkpointing", "precision",
    "patience",
)
# fmt: on
CODE = "\n".join(  # imports of the code that trains
    f"import asrlib.{name}"
    for name in ("training.baseline", "training.launching", "training.job", "data.features", "models.scratch")
)


def training_fingerprint(values: Mapping[str, Any], code: str) -> str:
    """The fingerprint of a training of the baseline: its parameters among `values`, the files that these name, the
    calling `code`, and the library's files that this training uses. Equal fingerprints mean equal trainings."""
    root = project_root()
    package = Path(__file__).parents[1]
    parameters = {name: values[name] for name in TRAINING}
    files = {name: file_state(root, value) for name, value in parameters.items()}
    library = library_files(f"{CODE}\n{code}", package, unused_files(parameters, package.parent))
    return fingerprint(parameters, files, code, files_fingerprint(library, package))


def kept_training(run: Run, training: str | None) -> dict | None:
    """The metrics of models/baseline if it comes from the training with this fingerprint, otherwise None."""
    path = run.path / "models" / "baseline" / TRAINED
    facts = read_json(path) if path.is_file() else {}
    return facts["metrics"] if facts and facts["fingerprint"] == training else None


def save_baseline(run: Run, recogniser, processor, training: str | None, metrics: dict | None) -> None:
    """Write models/baseline, whole or not at all, with the fingerprint and metrics of its training, if any."""
    with atomic_folder(run.models / "baseline") as folder:
        recogniser.save_pretrained(folder)
        processor.save_pretrained(folder)
        if metrics is not None:
            write_json(folder / TRAINED, {"fingerprint": training, "metrics": metrics})
