"""The trained baseline, which a run keeps as long as its training stays the same: another test needs no new training.

models/baseline is the model, and training.json in it identifies its training.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from asrlib.data.features import feature_statistics
from asrlib.data.opening import open_corpus, open_usable
from asrlib.models.loading import load
from asrlib.models.registry import frames_of
from asrlib.models.scratch import SIZES, WHISPER, new_model, new_processor
from asrlib.runs import TRAINED, Run, atomic_folder, project_root, read_json, write_json
from asrlib.runs.dependencies import library_files, unused_files
from asrlib.runs.fingerprints import file_state, files_fingerprint, fingerprint
from asrlib.training.launching import Show, train_in_processes
from asrlib.training.training import TrainingSettings

TESTING = (
    "run_dir",
    "eval_splits",
    "eval_samples",
    "batch_seconds",
    "precision",
    "encoder_memory",
)  # parameters that no training reads
# fmt: off
TRAINING = (  # parameters that a training may read
    "model", "revision", "language", "corpus", "architecture", "attention", "hidden_size", "num_layers", "num_heads",
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


@dataclass(frozen=True)
class Baseline:
    """What a run starts from."""

    model: PreTrainedModel
    processor: Any
    training: dict | None  # metrics of the training that made it here; None where it was only loaded
    kept: bool  # whether that training was done by an earlier call


def make_baseline(run: Run, values: Mapping[str, Any], shown: Callable[[], AbstractContextManager[Show]]) -> Baseline:
    """The model that the parameters `values` of 00_baseline ask for, loaded or new, trained where `baseline_epochs`
    says so, and written to models/baseline. One that the same training made before is read back.

    `shown`: see `train_in_processes`. Raises what loading, opening a corpus and training raise.
    """
    training = training_fingerprint(values) if values["baseline_epochs"] else None
    metrics = kept_training(run, training)
    if metrics is not None:
        return Baseline(*load(run.models / "baseline"), metrics, kept=True)
    model, processor = _untrained(values)
    if training is not None:
        metrics = _train(run, model, processor, values, shown)
    save_baseline(run, model, processor, training, metrics)
    return Baseline(model, processor, metrics, kept=False)


def _untrained(values: Mapping[str, Any]) -> tuple:
    architecture = values["architecture"]
    if architecture is None:
        return load(values["model"], values["revision"], values["language"])
    spoken = open_corpus(values["corpus"], values["train_split"]) if architecture == WHISPER else []
    texts = [utterance.text for utterance in spoken]
    window = values["window_seconds"]
    processor = new_processor(
        architecture, values["mel_bins"], values["frame_shift_ms"], texts=texts, window_seconds=window
    )
    sizes = {size: values[name] for size, name in SIZES.items()}
    return new_model(architecture, processor, values["seed"], **sizes), processor


def _train(run: Run, model, processor, values: Mapping[str, Any], shown) -> dict:
    """Trains `model` in place; the metrics of that."""
    speech = [
        open_usable(values["corpus"], values[split], processor, frames_of(model), samples, values["seed"], run.rejected)
        for split, samples in [("train_split", values["baseline_samples"]), ("validation_split", None)]
    ]
    if values["architecture"] and hasattr(model, "normalise_by"):
        hour = speech[0].excerpt(3600, values["seed"])
        model.normalise_by(*feature_statistics(hour, processor))
    same = {name: values[name] for name in ("device", "training_strategy", "seed")}
    taken = {name: values[f"baseline_{name}"] for name in TAKEN}
    settings = TrainingSettings(trainable="all", speeds=tuple(values["speeds"]), **taken, **same)
    result = train_in_processes(
        model,
        processor,
        *speech,
        run.checkpoints("00_baseline"),
        settings,
        corpus=values["corpus"],
        processes=values["training_processes"],
        accelerate_config=values["accelerate_config"],
        shown=shown,
    )
    return result.as_metrics()


def training_fingerprint(values: Mapping[str, Any]) -> str:
    """Of a training of the baseline: its parameters among `values`, the files that these name, and what of the library
    this run's training reaches. Equal fingerprints: training again would make the same."""
    root, package = project_root(), Path(__file__).parents[1]
    parameters = {name: values[name] for name in TRAINING}
    files = {name: file_state(root, value) for name, value in parameters.items()}
    code = "import asrlib.training.baseline, asrlib.training.job"
    library = library_files(code, package, unused_files(parameters, package.parent))
    return fingerprint(parameters, files, files_fingerprint(library, package))


def kept_training(run: Run, training: str | None) -> dict | None:
    """The metrics of models/baseline if it comes from the training with this fingerprint, otherwise None."""
    path = run.path / "models" / "baseline" / TRAINED
    facts = read_json(path) if path.is_file() else {}
    return facts["metrics"] if facts and facts["fingerprint"] == training else None


def save_baseline(run: Run, recogniser, processor, training: str | None, metrics: dict | None) -> None:
    """Write models/baseline, whole or not at all, with the fingerprint and metrics of its training, if any."""
    with atomic_folder(run.models / "baseline") as folder:  # together with what says of which training it is
        recogniser.save_pretrained(folder)
        processor.save_pretrained(folder)
        if metrics is not None:
            write_json(folder / TRAINED, {"fingerprint": training, "metrics": metrics})
