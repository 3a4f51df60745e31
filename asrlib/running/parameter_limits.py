"""The values that a parameter may have, beyond its type.

The docstring of a validator is the limit in words, as docs/parameters.md shows it.
"""

import math
import re
from collections.abc import Collection
from typing import Any

from pydantic import AfterValidator, Field

from asrlib.conversion.methods import METHODS
from asrlib.runs import nearest


def one_of(*choices: str) -> AfterValidator:
    return name_in(choices)


def name_in(choices: Collection[str]) -> AfterValidator:
    """`choices` are read anew at each check: a registry may grow."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise ValueError(f"should be one of {', '.join(choices)}{nearest(str(value), choices)}")
        return value

    check.__doc__ = f"one of {', '.join(choices)}"
    return AfterValidator(check)


def numbers(above: float, below: float = math.inf, null: bool = False, empty: bool = True) -> AfterValidator:
    """Items between the two or, with `null`, nothing; with `empty`, perhaps none. There may be no list if its type says
    so."""
    limit = f"numbers above {above:g}" + f" and below {below:g}" * (below < math.inf) + " or null" * null

    def check(values: list | None) -> list | None:
        if values is None:
            return None
        if not values and not empty:
            raise ValueError(f"should hold {limit}")
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (null and value is None) and not (number and above < value < below):
                raise ValueError(f"should hold {limit}, not {value!r}")
        return values

    check.__doc__ = limit + ", at least one" * (not empty)
    return AfterValidator(check)


def some_of(*choices: str) -> AfterValidator:
    """Of a list, where there is one."""
    check_item = one_of(*choices).func

    def check(values: list | None) -> list | None:
        return values and [check_item(value) for value in values]

    check.__doc__ = f"some of {', '.join(choices)}"
    return AfterValidator(check)


def check_device(value: str) -> str:
    """auto, cpu, mps, cuda or cuda:N"""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(f"should be auto, cpu, mps, cuda or cuda:N{nearest(value, ('auto', 'cpu', 'mps', 'cuda'))}")
    return value


def in_words(limit: Any) -> str:
    """What one of LIMITS says, as `more than 0, less than 1`."""
    if isinstance(limit, AfterValidator):
        return limit.func.__doc__
    names = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "min_length": "items: at least"}
    bounds = [(name, getattr(bound, name)) for bound in limit.metadata for name in names if hasattr(bound, name)]
    return ", ".join(f"{names[name]} {value}" for name, value in bounds)


PRECISION = one_of("fp32", "bf16", "fp16")
SCHEDULER = one_of(
    "linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"
)

LIMITS: dict[str, Any] = {
    "eval_splits": Field(min_length=1),
    "analysis_cuts": numbers(0, below=1, empty=False),
    "analysis_methods": Field(min_length=1),
    "benchmark_seconds": numbers(0),
    "stream_chunks_ms": numbers(0, null=True),
    "stream_left_seconds": numbers(0),
    "stream_caches": some_of("float32", "bfloat16", "float16", "int8", "int4"),
    "benchmark_left_seconds": numbers(0),
    "benchmark_stream_size": one_of("shipped", "published"),
    "window_seconds": Field(ge=1, le=30),
    "mel_bins": Field(ge=8),  # two convolutions of stride 2 leave one of them
    "dropout": Field(ge=0, lt=1),
    "speeds": numbers(0, empty=False),
    "baseline_warmup_ratio": Field(ge=0, le=1),
    "baseline_scheduler": SCHEDULER,
    "baseline_precision": PRECISION,
    "cache_cut": Field(gt=0, lt=1),
    "layout": one_of("joint", "split"),
    "convert_to": one_of("mla", "gqa"),
    "method": name_in(METHODS),
    "parts": some_of("encoder", "decoder", "cross"),
    "ranks": one_of("uniform", "energy", "sensitivity"),
    "trainable": one_of("attention", "latent", "all"),
    "warmup_ratio": Field(ge=0, le=1),
    "on_policy": Field(ge=0, le=1),
    "encoder_memory": Field(ge=0),
    "scheduler": SCHEDULER,
    "precision": PRECISION,
    "chosen_by": one_of("wer", "divergence"),
    "learning_rates": numbers(0, empty=False),
    "training_strategy": one_of("ddp", "fsdp"),
    "device": AfterValidator(check_device),
}
# fmt: off
AT_LEAST_ONE = (
    "train_samples", "validation_samples", "eval_samples", "analysis_samples", "analysis_eval_samples",
    "benchmark_samples", "hidden_size", "num_layers", "num_heads", "kv_heads", "new_kv_heads", "latent_dim",
    "new_latent_dim", "query_latent_dim", "feedforward_size", "depthwise_kernel", "subsampling_channels",
    "baseline_samples", "baseline_patience", "rank_multiple", "gradient_accumulation", "evaluations_per_epoch",
    "patience", "training_processes",
)
POSITIVE = (
    "benchmark_pass_seconds", "benchmark_stream_gib", "frame_shift_ms", "baseline_epochs", "baseline_learning_rate",
    "baseline_batch_seconds", "calibration_seconds", "epochs", "learning_rate", "batch_seconds",
    "statistics_memory",
)
NOT_NEGATIVE = (
    "stream_lookahead_ms", "largest_chunk", "time_masks", "frequency_masks", "ctc_weight", "kl_weight",
    "hidden_weight", "weight_decay", "seed",
)
# fmt: on
LIMITS |= dict.fromkeys(AT_LEAST_ONE, Field(ge=1))
LIMITS |= dict.fromkeys(POSITIVE, Field(gt=0))
LIMITS |= dict.fromkeys(NOT_NEGATIVE, Field(ge=0))
