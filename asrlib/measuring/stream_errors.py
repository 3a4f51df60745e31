"""Word errors under streaming: the cost of chunks, limited contexts and coarser caches."""

from collections.abc import Iterator, Sequence

import pandas as pd
from torch import nn
from tqdm import tqdm

from asrlib.attention.cache import kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import LinearAttention
from asrlib.data.corpus import Corpus
from asrlib.measuring.significance import paired_bootstrap
from asrlib.measuring.transcribing import transcribe
from asrlib.measuring.word_errors import EvaluationResult, score
from asrlib.models.registry import attention_modules, frames_per_second
from asrlib.streaming.rotate import rotated
from asrlib.streaming.streams import chunks_of

ROTATED = ", rotated"


def streaming_errors(
    systems: dict[str, nn.Module],
    processor,
    corpus: Corpus,
    chunk_ms: Sequence[float | None],
    left_seconds: Sequence[float],
    caches: Sequence[str] = ("float32",),
    lookahead_ms: float = 0.0,
    batch_seconds: float = 24.0,
    device: str | None = None,
    precision: str = "fp32",
) -> pd.DataFrame:
    """One row per chunk, left context, cache format and system. The first of `systems` is the reference.

    Columns: chunk_ms (NaN: the full context of the utterance), left_seconds and lookahead_ms (then NaN too), cache,
    system, cache_bytes (of a full left context, by formula), wer with its 95 % interval wer_low and wer_high, words,
    utterances; difference from the reference in float32 in the same chunks, its interval and p (None for itself).
    Formats other than float32 are measured at the longest left context alone. Integer formats are measured twice: as
    they are and with randomly rotated caches ("int4, rotated"), except for the sums of linear attention. `precision` is
    fp32, bf16 or fp16, by autocast.
    """
    if not left_seconds or caches[:1] not in (["float32"], ("float32",)):
        raise ValueError("give a left context, and float32 as the first format: the others are compared with it")
    longest = max(left_seconds)
    settings = [(chunk, left) for chunk in chunk_ms if chunk is not None for left in left_seconds]
    settings += [(None, None)] if None in chunk_ms else []
    integers = any(cache.startswith("int") for cache in caches)
    turned = {name: rotated(model) for name, model in systems.items() if integers and _can_turn(model)}
    where = {"batch_seconds": batch_seconds, "device": device, "precision": precision}
    rows = []
    for chunk, left in tqdm(settings, desc="chunks", unit="setting"):
        reference = None
        for cache in caches if left == longest else caches[:1]:
            for name, held_as, model in _variants(systems, turned, cache):
                chunks = None if chunk is None else chunks_of(model.config, chunk, left, lookahead_ms)
                result = score(transcribe(model, processor, corpus, chunks=chunks, cache=cache, **where))
                reference = reference or result
                rows.append(_row(name, model, chunks, held_as, result) | _change(reference, result))
    return pd.DataFrame(rows)


def _can_turn(model: nn.Module) -> bool:
    return not any(isinstance(attention, LinearAttention) for attention in attention_modules(model))


def _variants(
    systems: dict[str, nn.Module], turned: dict[str, nn.Module], cache: str
) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, name of the format, model); with integer formats also the rotated model."""
    for name, model in systems.items():
        yield name, cache, model
        if cache.startswith("int") and name in turned:
            yield name, cache + ROTATED, turned[name]


def _row(name: str, model: nn.Module, chunks: Chunks | None, held_as: str, result: EvaluationResult) -> dict:
    rate = frames_per_second(model.config)
    cache = held_as.removesuffix(ROTATED)
    return {
        "chunk_ms": 1000 * chunks.size / rate if chunks else None,
        "left_seconds": chunks.left / rate if chunks else None,
        "lookahead_ms": 1000 * chunks.lookahead / rate if chunks else None,
        "cache": held_as,
        "system": name,
        "cache_bytes": kv_cache_bytes(model.config, chunks.left, cache) if chunks else None,
        "wer": result.wer,
        "wer_low": result.wer_interval[0],
        "wer_high": result.wer_interval[1],
        "words": result.words,
        "utterances": result.utterances,
    }


def _change(reference: EvaluationResult, result: EvaluationResult) -> dict:
    if result is reference:
        return {"difference": None, "difference_low": None, "difference_high": None, "p": None}
    test = paired_bootstrap(reference, result)
    low, high = test["interval"]
    return {"difference": test["difference"], "difference_low": low, "difference_high": high, "p": test["p"]}
