"""What values a parameter may have, beyond its type: the schema's limits, by name.

The docstring of a validator is the limit in words, as docs/parameters.md shows it.
"""

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


def numbers(more_than: float, null: bool = False) -> AfterValidator:
    """Of a list: every item a number above that; or, with `null`, nothing."""

    def check(values: list) -> list:
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (null and value is None) and not (number and value > more_than):
                raise ValueError(f"should hold numbers above {more_than:g}{' or null' if null else ''}, not {value!r}")
        return values

    check.__doc__ = f"numbers above {more_than:g}{' or null' if null else ''}"
    return AfterValidator(check)


def some_of(*choices: str) -> AfterValidator:
    """Of a list, where there is one."""
    one = one_of(*choices)

    def check(values: list | None) -> list | None:
        return values and [one.func(value) for value in values]

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
    found = [(name, getattr(one, name)) for one in limit.metadata for name in names if hasattr(one, name)]
    return ", ".join(f"{names[name]} {value}" for name, value in found)


AT_LEAST_ONE, POSITIVE, NOT_NEGATIVE = Field(ge=1), Field(gt=0), Field(ge=0)
PRECISION = one_of("fp32", "bf16", "fp16")
SCHEDULER = one_of(
    "linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"
)

LIMITS: dict[str, Any] = {
    "eval_splits": Field(min_length=1),
    "train_samples": AT_LEAST_ONE,
    "validation_samples": AT_LEAST_ONE,
    "eval_samples": AT_LEAST_ONE,
    "analysis_samples": AT_LEAST_ONE,
    "analysis_eval_samples": AT_LEAST_ONE,
    "analysis_cuts": Field(min_length=1),
    "analysis_methods": Field(min_length=1),
    "benchmark_samples": AT_LEAST_ONE,
    "benchmark_pass_seconds": POSITIVE,
    "stream_chunks_ms": numbers(0, null=True),
    "stream_left_seconds": numbers(0),
    "stream_lookahead_ms": NOT_NEGATIVE,
    "stream_caches": some_of("float32", "bfloat16", "float16", "int8", "int4"),
    "benchmark_left_seconds": numbers(0),
    "benchmark_stream_size": one_of("shipped", "published"),
    "benchmark_stream_gib": POSITIVE,
    "hidden_size": AT_LEAST_ONE,
    "num_layers": AT_LEAST_ONE,
    "num_heads": AT_LEAST_ONE,
    "kv_heads": AT_LEAST_ONE,
    "new_kv_heads": AT_LEAST_ONE,
    "new_latent_dim": AT_LEAST_ONE,
    "query_latent_dim": AT_LEAST_ONE,
    "feedforward_size": AT_LEAST_ONE,
    "depthwise_kernel": AT_LEAST_ONE,
    "largest_chunk": NOT_NEGATIVE,
    "subsampling_channels": AT_LEAST_ONE,
    "window_seconds": Field(ge=1, le=30),
    "mel_bins": Field(ge=8),  # two convolutions of stride 2 leave one of them
    "frame_shift_ms": POSITIVE,
    "dropout": Field(ge=0, lt=1),
    "time_masks": NOT_NEGATIVE,
    "frequency_masks": NOT_NEGATIVE,
    "speeds": Field(min_length=1),
    "baseline_samples": AT_LEAST_ONE,
    "baseline_epochs": POSITIVE,
    "baseline_learning_rate": POSITIVE,
    "baseline_warmup_ratio": Field(ge=0, le=1),
    "baseline_scheduler": SCHEDULER,
    "baseline_patience": AT_LEAST_ONE,
    "baseline_batch_seconds": POSITIVE,
    "baseline_precision": PRECISION,
    "latent_dim": AT_LEAST_ONE,
    "cache_cut": Field(gt=0, lt=1),
    "layout": one_of("joint", "split"),
    "convert_to": one_of("mla", "gqa"),
    "method": name_in(METHODS),
    "ctc_weight": NOT_NEGATIVE,
    "kl_weight": NOT_NEGATIVE,
    "hidden_weight": NOT_NEGATIVE,
    "calibration_seconds": POSITIVE,
    "parts": some_of("encoder", "decoder", "cross"),
    "ranks": one_of("uniform", "energy", "sensitivity"),
    "rank_multiple": AT_LEAST_ONE,
    "trainable": one_of("attention", "latent", "all"),
    "epochs": POSITIVE,
    "learning_rate": POSITIVE,
    "warmup_ratio": Field(ge=0, le=1),
    "scheduler": SCHEDULER,
    "weight_decay": NOT_NEGATIVE,
    "batch_seconds": POSITIVE,
    "gradient_accumulation": AT_LEAST_ONE,
    "evaluations_per_epoch": AT_LEAST_ONE,
    "patience": AT_LEAST_ONE,
    "precision": PRECISION,
    "training_processes": AT_LEAST_ONE,
    "training_strategy": one_of("ddp", "fsdp"),
    "device": AfterValidator(check_device),
    "seed": NOT_NEGATIVE,
}
