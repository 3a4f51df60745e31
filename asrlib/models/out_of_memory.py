"""Errors of memory that name the utterances at hand and say what to change.

An utterance is named by (id, seconds of audio).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

NAMED_UTTERANCES = 10  # of a batch; the others are counted


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an error that torch or numpy raises where an allocation fails."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    parts = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of the CPU, MPS, cuBLAS
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)


@contextmanager
def out_of_memory_explained(
    work: str, utterances: Sequence[tuple[str, float]], settings: Mapping[str, Any]
) -> Iterator[None]:
    """If memory runs out inside, raises torch.OutOfMemoryError with the utterances and the settings to change.

    `work` names the work, `utterances` are the batch at hand. `settings` have the names of a run's parameters; the
    message names those that memory depends on, with their present values: batch_seconds, gradient_checkpointing,
    precision. The setting `attention` says whether all attention weights are kept.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise torch.OutOfMemoryError(
            f"out of memory in {work}, on {in_words(utterances)}: {_remedies(utterances, settings)}. "
            f"What failed: {cause}"
        ) from error


def in_words(utterances: Sequence[tuple[str, float]]) -> str:
    """`a batch of 2 utterances, the longest of 3.1 s, 6.2 s padded (1089-0001, 1089-0002)`."""
    names = [name for name, _ in utterances[:NAMED_UTTERANCES]]
    if more := len(utterances) - len(names):
        names.append(f"{more} more")
    longest = max((seconds for _, seconds in utterances), default=0.0)
    if len(utterances) == 1:
        return f"one utterance of {longest:.1f} s ({names[0]})"
    padded = len(utterances) * longest
    count = f"a batch of {len(utterances)} utterances, the longest of {longest:.1f} s, {padded:.1f} s padded"
    return f"{count} ({', '.join(names)})"


def _remedies(utterances: Sequence[tuple[str, float]], settings: Mapping[str, Any]) -> str:
    alone, remedies = len(utterances) == 1, []
    if "batch_seconds" in settings and not alone:
        remedies.append(f"lower batch_seconds (now {settings['batch_seconds']:g})")
    if settings.get("gradient_checkpointing") is False:
        remedies.append("set gradient_checkpointing: true (now false)")
    if settings.get("precision") == "fp32":
        remedies.append("use precision: bf16 (now fp32)")
    if settings.get("attention"):
        remedies.append("choose method: two_sided (the present one needs all attention weights)")
    if alone:
        remedies.append("leave out utterances this long, since no batch_seconds makes a smaller batch")
    text = ", or ".join(remedies)
    if "gradient_checkpointing" in settings:
        text += " (for the training of the baseline, the names begin with baseline_)"
    return text
