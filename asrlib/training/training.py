"""Training and fine-tuning on transformers' Trainer."""

import random
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import jiwer
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_model
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, ProgressCallback

from asrlib.attention.names import attends_across
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus
from asrlib.data.text import as_counted, languages_told, normaliser_of
from asrlib.models.heard_once import KEPT, keep_encoder_states
from asrlib.models.inference import inference, padding_silenced
from asrlib.models.out_of_memory import in_words, out_of_memory_explained
from asrlib.models.registry import family_of, frame_counts, layer_frame_counts
from asrlib.runs import read_json, resolve
from asrlib.training.checkpoints import CHECKPOINT_MARKER, CheckpointMarker, checkpoint_folder, last_checkpoint
from asrlib.training.distributed import average_batch_norm, process_count, rows_of_all, strategy_arguments
from asrlib.training.losses import posterior_divergence, relative_squared_error
from asrlib.training.modes import (
    every_layer,
    frozen_batch_norm,
    own_precision,
    select_trainable,
    updated_once,
    use_cache_kept,
)

# The scheduler reduce_lr_on_plateau halves the learning rate at the second evaluation in a row without a new lowest
# WER. EarlyStoppingCallback keeps counting, so `patience` should be larger.
PLATEAU = {"factor": 0.5, "patience": 1}


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the names are those of the params files."""

    trainable: str = "attention"  # attention | latent | all
    parts: Sequence[str] | None = None  # of a model with a decoder: whose attention is trained, all if None
    epochs: float = 5
    learning_rate: float = 1e-5  # peak
    warmup_ratio: float = 0.1  # share of all steps
    scheduler: str = "linear"  # any of transformers' SchedulerType; reduce_lr_on_plateau has no warmup: see PLATEAU
    weight_decay: float = 0.01
    batch_seconds: float = 60.0  # padded audio in a batch, on one device
    speeds: tuple[float, ...] = (1.0,)  # of the training speech: 1.1 is 10 % faster
    gradient_accumulation: int = 1  # batches per step
    gradient_checkpointing: bool = False
    evaluations_per_epoch: int = 1  # each is followed by a checkpoint
    chosen_by: str = "wer"  # wer | divergence: what the kept weights have least of, on validation
    patience: int = 3  # evaluations without less of that before stopping
    ctc_weight: float = 1.0  # of the head's loss on the transcripts (CTC or another); 0: a teacher alone
    kl_weight: float = 0.0  # of the KL divergence from a teacher's posteriors, nats per frame (or token)
    hidden_weight: float = 0.0  # of the squared error of each layer's output, relative to the teacher's
    precision: str = "fp32"  # fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda
    training_strategy: str = "ddp"  # of several processes: ddp | fsdp
    on_policy: float = 0.0  # share of batches in which a decoder learns from the teacher on what it writes itself
    encoder_memory: float = 0.0  # GiB for the states of an encoder that is not trained: see models.heard_once
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training; `as_metrics` goes into metrics/*.json."""

    history: list[dict]  # one dict per logged step or evaluation: step, epoch, loss | eval_loss, eval_wer
    seconds: float  # spent training, over all resumptions
    steps: int
    best_step: int
    best_wer: float  # fraction, on the validation corpus
    stopped_early: bool
    trainable_parameters: int
    settings: TrainingSettings = field(repr=False)

    def as_metrics(self) -> dict:
        return {**self.__dict__, "settings": self.settings.__dict__}


class SpeechTrainer(Trainer):
    """Trainer with batches limited by seconds of audio, greedy transcripts as predictions, and a teacher."""

    def __init__(self, *args, settings: TrainingSettings, processor, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        # Trainer assumes that a forward with **kwargs divides its loss by the labels of all accumulated batches. Ours
        # do not: without this, accumulated gradients would be summed instead of averaged.
        self.model_accepts_loss_kwargs = False
        self.settings = settings
        self.processor = processor
        self.head = family_of(self.model.config).head
        self.teacher = teacher and teacher.to(self.args.device).eval().requires_grad_(False)

    def _loader(self, dataset: SpeechDataset, shuffle: bool) -> DataLoader:
        share = self.args.process_index, self.args.world_size
        loader = DataLoader(
            dataset,
            batch_sampler=dataset.batches(self.settings.batch_seconds, self.settings.seed, shuffle, *share),
            collate_fn=self.data_collator,
            num_workers=dataset.workers(self.args.dataloader_num_workers),
            pin_memory=self.args.dataloader_pin_memory,
        )
        # Prepared as for one process, because the sampler shares out the batches. Accelerate's wrapper would repeat
        # some of them, and forget the epoch when training resumes within one.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, shuffle=True)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, shuffle=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            ours = self.head.forward(model, inputs)
            return (ours.loss, ours) if return_outputs else ours.loss
        chance = random.Random(f"{self.settings.seed} {self.state.global_step}").random()  # the same when it resumes
        on_policy = model.training and chance < self.settings.on_policy
        if on_policy:
            with inference(self.model, device=self.args.device, precision=self.settings.precision):
                inputs = inputs | {"labels": self.head.own_labels(self.model, self.processor, inputs)}
        layers = {"output_hidden_states": True} if self.settings.hidden_weight else {}
        ours, theirs, divergence = self._compare(model, inputs, **layers)
        settings = self.settings
        loss = settings.ctc_weight * ours.loss * (not on_policy)  # its own words are no truth
        loss = loss + settings.kl_weight * divergence
        if layers:
            frames_B = layer_frame_counts(self.teacher, inputs["attention_mask"].sum(-1))
            states = (self.head.layers(inputs, output, frames_B) for output in (ours, theirs))
            errors = [relative_squared_error(*pair) for pair in zip(*states, strict=True)]
            loss = loss + settings.hidden_weight * sum(errors) / len(errors)
        return (loss, ours) if return_outputs else loss

    def _compare(self, model, inputs, **how) -> tuple:
        """The outputs of the model and of its teacher, and how far their posteriors are apart."""
        unlabelled = inputs if self.head.reads_labels else {k: v for k, v in inputs.items() if k != "labels"}
        with inference(self.teacher, device=self.args.device, precision=self.settings.precision):
            theirs = self.head.forward(self.teacher, unlabelled, **how)
        ours = self.head.forward(model, inputs, **how)
        frames_B = frame_counts(self.teacher, inputs["attention_mask"].sum(-1))
        logits, wanted = (torch.cat(self.head.spoken(inputs, output, frames_B)) for output in (ours, theirs))
        return ours, theirs, posterior_divergence(logits, wanted)

    def _divergence(self, model, inputs) -> torch.Tensor:
        """From the teacher: of a decoder, on what the teacher writes, since the references may be spelt otherwise."""
        if attends_across(self.model.config):
            with inference(self.teacher, device=self.args.device, precision=self.settings.precision):
                inputs = inputs | {"labels": self.head.own_labels(self.teacher, self.processor, inputs)}
        with padding_silenced(self.teacher, layer_frame_counts(self.teacher, inputs["attention_mask"].sum(-1))):
            return self._compare(model, inputs)[-1]

    def autocast_smart_context_manager(self, cache_enabled=True):
        if self.is_fsdp_enabled and self.settings.precision == "bf16":
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return super().autocast_smart_context_manager(cache_enabled)

    def training_step(self, model, inputs, num_items_in_batch=None):
        utterances = inputs.pop("utterances", [])
        with out_of_memory_explained("training", utterances, vars(self.settings)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower learning_rate, or use precision: "
                f"fp32. Earlier checkpoints are kept, the best among them. The loss comes from {in_words(utterances)}."
            )
        return loss

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if self.args.world_size > 1:
            average_batch_norm(self.model)

            def gather(rows: torch.Tensor) -> torch.Tensor:
                at_the_end = self.accelerator.gradient_state.end_of_dataloader
                return rows_of_all(rows, dataloader.batch_sampler.repeated if at_the_end else 0)

            self.gather_function = gather  # for this loop, which then restores Trainer's own
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        utterances = inputs.pop("utterances", [])
        limits = {name: getattr(self.settings, name) for name in ("batch_seconds", "precision")}
        inputs = self._prepare_inputs(inputs)
        lengths_B = inputs["attention_mask"].sum(-1)
        frames_B, layer_frames_B = frame_counts(self.model, lengths_B), layer_frame_counts(self.model, lengths_B)
        explained = out_of_memory_explained("validation", utterances, limits)
        with explained, torch.no_grad(), self.compute_loss_context_manager(), padding_silenced(model, layer_frames_B):
            output = self.head.forward(model, inputs)
            ids_BK = self.head.recognised(self.model, self.processor, inputs, output, frames_B)
            loss = self._divergence(model, inputs) if self.settings.chosen_by == "divergence" else output.loss
        return loss.detach(), ids_BK, inputs["labels"]


class Progress(ProgressCallback):
    """A progress bar without log lines: the losses are in the history and in TensorBoard."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def train(
    model,
    processor,
    training: Corpus,
    validation: Corpus,
    folder: str | Path,
    settings: TrainingSettings = TrainingSettings(),
    teacher=None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Trains `model` in place on the loss of its head and leaves it with the weights of the lowest validation WER, or
    of the lowest KL divergence from the teacher (`chosen_by`): those of an evaluation, or those that it came with (step
    0), unless training has brought less; between equals, the loss or the WER decides.

    Checkpoints and TensorBoard logs go to `folder`. Called again with the same folder, training resumes after the last
    complete checkpoint and, on the CPU, ends with the same weights as an undisturbed run. A relative `folder` starts at
    the project root. A `teacher` is a model with the same layers and vocabulary, usually the one that `model` was
    converted from; `settings` weigh its losses. `callbacks` are those of Trainer.

    Where a launcher has started several processes (`asrlib.training.job`), each calls this with the same arguments. A
    step then takes `batch_seconds` of audio from each: the number of processes acts as a factor of
    `gradient_accumulation`. fsdp leaves `model` in parts, and the trained weights are in the checkpoint of `best_step`.
    Raises ValueError where settings contradict each other, the device or the checkpoints, and FloatingPointError where
    the loss is not finite.
    """
    with use_cache_kept(model):
        return _train(model, processor, training, validation, resolve(folder), settings, teacher, callbacks)


def _train(model, processor, training, validation, folder, settings, teacher, callbacks) -> TrainingResult:
    if settings.encoder_memory:
        keep_encoder_states(settings.encoder_memory)
    if not (settings.ctc_weight or settings.kl_weight or settings.hidden_weight):
        raise ValueError("ctc_weight, kl_weight and hidden_weight are all 0: there is nothing to learn from")
    if not (settings.kl_weight or settings.hidden_weight):
        teacher = None
    elif teacher is None:
        raise ValueError("kl_weight and hidden_weight are the weights of a teacher's losses, and no teacher was given")
    if settings.chosen_by == "divergence" and not (teacher and settings.kl_weight):
        raise ValueError("chosen_by is divergence, that from a teacher: give kl_weight, or choose by wer")
    head = family_of(model.config).head
    if settings.on_policy and (teacher is None or not attends_across(model.config)):
        raise ValueError("on_policy is for a model with a decoder and a teacher: give kl_weight, or leave it out")
    model.config.ctc_zero_infinity = True
    model.config.ctc_loss_reduction = "mean"  # a sum would tie the learning rate to the batch size
    if tied := getattr(model, "_tied_weights_keys", None):
        model._keys_to_ignore_on_save = set(tied)  # otherwise Trainer warns that checkpoints lack the tied copies
    start = {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}
    trainable_parameters = select_trainable(model, settings.trainable, settings.parts)
    checkpoint = last_checkpoint(folder)
    facts = read_json(checkpoint / CHECKPOINT_MARKER) if checkpoint else {"seconds": 0.0, "finished": False}
    if checkpoint and facts.get("processes", 1) != process_count():
        raise ValueError(
            f"{checkpoint} comes from a training in {facts.get('processes', 1)} processes, and this one has "
            f"{process_count()}: start as many, or remove it to begin afresh"
        )
    marker = CheckpointMarker(facts["seconds"])
    train_dataset = SpeechDataset(training, processor, settings.speeds)
    batches = train_dataset.batches(settings.batch_seconds, settings.seed, processes=process_count())
    steps_per_epoch = -(-len(batches) // settings.gradient_accumulation)
    trainer = SpeechTrainer(
        model=model,
        args=_arguments(folder, model, settings, steps_per_epoch, afresh=checkpoint is None),
        data_collator=SpeechCollator(processor, named=True),
        train_dataset=train_dataset,
        eval_dataset=SpeechDataset(validation, processor),
        compute_metrics=lambda prediction: {"wer": _word_error_rate(prediction, processor, head)},
        callbacks=[marker, EarlyStoppingCallback(early_stopping_patience=settings.patience), *callbacks],
        settings=settings,
        processor=processor,
        teacher=teacher,
    )
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(Progress)
    if settings.training_strategy == "fsdp":
        model.get_input_embeddings = lambda: None  # accelerate shards embeddings separately; speech has none
    if trainer.args.process_index:  # otherwise all processes would draw the same masks
        set_seed(settings.seed + trainer.args.process_index)
    if facts["finished"]:  # it was killed after its last step, and Trainer would add another step
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        load_model(model, checkpoint_folder(folder, state.best_global_step) / "model.safetensors")
    else:
        with ExitStack() as around:
            around.enter_context(KEPT.of(model) if settings.training_strategy != "fsdp" else nullcontext())
            around.enter_context(frozen_batch_norm(model))
            around.enter_context(own_precision(model, trainer))
            if settings.hidden_weight or trainer.args.world_size > 1:
                around.enter_context(every_layer(model))
            if settings.gradient_checkpointing:
                around.enter_context(updated_once(model))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
    model.eval()
    evaluations = {row["step"]: (row["eval_wer"], row["eval_loss"]) for row in state.log_history if "eval_wer" in row}
    order = (lambda row: row[::-1]) if settings.chosen_by == "divergence" else tuple  # the other decides a tie
    best_step = state.best_global_step or state.global_step
    if 0 in evaluations and order(evaluations[0]) <= order(evaluations.get(best_step, evaluations[0])):
        best_step = 0
        if settings.training_strategy != "fsdp":
            model.load_state_dict(start)
    return TrainingResult(
        history=[row for row in state.log_history if "loss" in row or "eval_loss" in row],
        seconds=marker.seconds,
        steps=state.global_step,
        best_step=best_step,
        best_wer=evaluations[best_step][0],
        stopped_early=state.global_step < state.max_steps,
        trainable_parameters=trainable_parameters,
        settings=settings,
    )


def _arguments(
    folder: Path, model, settings: TrainingSettings, steps_per_epoch: int, afresh: bool
) -> TrainingArguments:
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device here: use auto or cpu")
    if settings.precision == "fp16" and on_cpu:
        raise ValueError("precision is fp16, but training runs on the CPU: use bf16 or fp32")
    strategy = strategy_arguments(model, settings, on_cpu)
    total_steps = max(1, round(steps_per_epoch * settings.epochs))
    every = min(total_steps, -(-steps_per_epoch // settings.evaluations_per_epoch))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        lr_scheduler_kwargs=PLATEAU if settings.scheduler == "reduce_lr_on_plateau" else None,
        warmup_steps=round(settings.warmup_ratio * total_steps),
        weight_decay=settings.weight_decay,
        gradient_accumulation_steps=settings.gradient_accumulation,
        **strategy,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=0 if on_cpu else 4,  # decode the next batches while the accelerator computes
        eval_on_start=afresh,  # the WER at step 0
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=None,  # CheckpointMarker removes them
        restore_callback_states_from_checkpoint=True,  # how much patience is left
        load_best_model_at_end=True,
        metric_for_best_model={"wer": "wer", "divergence": "loss"}[settings.chosen_by],
        greater_is_better=False,
        logging_steps=max(1, every // 10),
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
    )
    # On several GPUs Trainer would split each batch (DataParallel), but `batch_seconds` and the hooks that silence
    # padding need whole batches. `n_gpu` detects the devices, so it is read first.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _word_error_rate(prediction, processor, head) -> float:
    pad = processor.tokenizer.pad_token_id
    ids, labels = (np.where(given == -100, pad, given) for given in (prediction.predictions, prediction.label_ids))
    texts = head.references(processor, labels), head.texts(processor, ids)
    forms = [normaliser_of(processor, language) for language in languages_told(labels, processor)]
    rows = ([{"text": t, "normaliser": form} for t, form in zip(side, forms, strict=True)] for side in texts)
    return jiwer.wer(*([as_counted(row, "text") for row in side] for side in rows))
