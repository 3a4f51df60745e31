"""One training in several processes: their number, what they exchange, and how a model is spread over them.

torchrun or `accelerate launch` starts the processes and sets their environment variables. transformers' Trainer does
the rest, except for what is here.
"""

import os

import torch
from accelerate.utils import gather_object
from torch import distributed, nn

from asrlib.models.encoder import SpeechEncoderForCTC
from asrlib.models.registry import family_of


def process_count() -> int:
    """The number of processes that train together: one, unless a launcher started this process."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    """The number of this process; the first one, 0, writes the files."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def strategy_arguments(model, settings, on_cpu: bool) -> dict:
    """The TrainingArguments that spread `model` over the processes; `settings` are TrainingSettings.

    With ddp each process holds the whole model. With fsdp each holds a part of every layer, and the parts are joined
    where they are needed. Raises ValueError for another strategy, or where fsdp is impossible.
    """
    if settings.training_strategy == "ddp":
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "accelerate's configuration asks for FSDP: set training_strategy: fsdp instead, and in the "
                "configuration distributed_type: MULTI_GPU"
            )
        return {
            "bf16": settings.precision == "bf16",
            "fp16": settings.precision == "fp16",
            "activation_checkpointing": settings.gradient_checkpointing,
            # transformers' models have parameters that some steps, or all, leave out: a convolution for absolute
            # positions, the embedding of masked frames, and whole layers under layerdrop.
            "ddp_find_unused_parameters": not isinstance(model, SpeechEncoderForCTC),
            # Tables of positions differ in length between processes; for BatchNorm's buffers see average_batch_norm.
            "ddp_broadcast_buffers": False,
        }
    check_sharding(settings, on_cpu)
    layers = sorted({type(layer).__name__ for layer in family_of(model.config).layers(model)})
    return {  # no bf16 here: FSDP would round parameters and inputs, but not buffers. SpeechTrainer uses autocast
        "fsdp": True,
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": layers,
            "activation_checkpointing": settings.gradient_checkpointing,
            "state_dict_type": "FULL_STATE_DICT",  # checkpoints hold the whole model, as safetensors
        },
    }


def check_sharding(settings, on_cpu: bool) -> None:
    """Raises ValueError where this training cannot use fsdp."""
    if settings.training_strategy != "fsdp":
        raise ValueError(f"training_strategy is {settings.training_strategy!r}: choose one of ddp, fsdp")
    if process_count() == 1:
        raise ValueError("training_strategy is fsdp, which spreads a model over processes: raise training_processes")
    if on_cpu:
        raise ValueError("training_strategy is fsdp, which accelerate knows on accelerators alone: use ddp on the CPU")
    if settings.precision == "fp16":
        raise ValueError("training_strategy is fsdp, which does not support precision: fp16: use bf16 or fp32")


def average_batch_norm(model: nn.Module) -> None:
    """Gives all processes the mean of their running statistics, for each BatchNorm that is trained.

    Every process has seen other batches, but all must validate the same model, which the first one saves.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.weight.requires_grad:
            for moments in (norm.running_mean, norm.running_var):
                distributed.all_reduce(moments)
                moments /= distributed.get_world_size()


def rows_of_all(rows: torch.Tensor, repeated: int) -> torch.Tensor:
    """The rows of all processes for a step, in the order of processes, without the last `repeated` batches.

    Batches may differ in their number of rows, which Trainer's own gathering does not support.
    """
    batches = gather_object([rows.cpu()])
    return torch.cat(batches[: len(batches) - repeated])
