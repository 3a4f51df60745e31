"""Word errors under streaming: what chunks, bounded contexts and coarser caches cost, all under the same mask."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from torch import nn
from tqdm import tqdm

from asrlib.attention.cache import kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.conversion.rotate import rotate_latents
from asrlib.data.corpus import Corpus
from asrlib.evaluation import EvaluationResult, paired_bootstrap, score, transcribe
from asrlib.figures import SYSTEMS, size
from asrlib.models.families import frames_per_second, is_latent
from asrlib.streaming import chunks_of

ROTATED = ", rotated"


def streaming_errors(
    systems: dict[str, nn.Module],
    processors: dict,
    corpus: Corpus,
    chunk_ms: Sequence[float | None],
    left_seconds: Sequence[float],
    caches: Sequence[str] = ("float32",),
    lookahead_ms: float = 0.0,
    batch_seconds: float = 24.0,
    device: str | None = None,
) -> pd.DataFrame:
    """One row per chunk, left context, cache format and system; the first system is what others are compared with.

    chunk_ms (NaN: the full context of the utterance), left_seconds and lookahead_ms (NaN with it), cache, system,
    cache_bytes (of a full left context, by the formula), wer with its 95 % interval wer_low and wer_high, words,
    utterances; difference to the first system in float32 in the same chunks, its interval and p (None for itself).
    Integer formats are measured for latents as they are and turned at random ("int4, rotated").
    """
    settings = [(chunk, left) for chunk in chunk_ms if chunk is not None for left in left_seconds]
    settings += [(None, None)] if None in chunk_ms else []
    rows = []
    progress = tqdm(settings, desc="chunks", unit="setting")
    for chunk, left in progress:
        reference = None
        for cache in caches if chunk is not None else caches[:1]:
            for name, model in systems.items():
                variants = {cache: model}
                if cache.startswith("int") and is_latent(model.config):
                    variants[cache + ROTATED] = rotate_latents(model)
                for held_as, variant in variants.items():
                    chunks = None if chunk is None else chunks_of(model.config, chunk, left, lookahead_ms)
                    how = {"batch_seconds": batch_seconds, "device": device, "chunks": chunks, "cache": cache}
                    result = score(transcribe(variant, processors[name], corpus, **how))
                    row = _row(name, model, chunks, held_as, result)
                    if reference is None:
                        reference = result
                    else:
                        row |= _change(paired_bootstrap(reference, result))
                    rows.append(row)
    return pd.DataFrame(rows)


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


def _change(test: dict) -> dict:
    low, high = test["interval"]
    return {"difference": test["difference"], "difference_low": low, "difference_high": high, "p": test["p"]}


# ---- to read -----------------------------------------------------------------------------------------------


def errors_table(errors: pd.DataFrame) -> pd.DataFrame:
    """For people: chunk and left context down, systems and formats beside each other are rows below each other."""
    first = errors["system"].iloc[0]
    rows = []
    for row in errors.to_dict("records"):
        full = pd.isna(row["chunk_ms"])
        against = (
            ""
            if pd.isna(row.get("p"))
            else "{:+.2f} ({:+.2f} to {:+.2f}), p = {:.3f}".format(
                *(100 * row[name] for name in ("difference", "difference_low", "difference_high")), row["p"]
            )
        )
        rows.append(
            {
                "chunk": "full context" if full else f"{row['chunk_ms']:.0f} ms",
                "left context": "–" if full else f"{row['left_seconds']:.1f} s",
                "system": SYSTEMS.get(row["system"], row["system"]),
                "cache in": "–" if full else row["cache"],
                "cache": "–" if full else size(row["cache_bytes"]),
                "WER %": "{:.2f} ({:.2f}–{:.2f})".format(*(100 * row[n] for n in ("wer", "wer_low", "wer_high"))),
                f"against {SYSTEMS.get(first, first)}, points": against,
            }
        )
    return pd.DataFrame(rows)


def errors_figure(errors: pd.DataFrame):
    """WER against the chunk, a line a system, a panel a left context; the full context as the last place of each."""
    kept = errors[(errors["cache"] == errors["cache"].iloc[0])]
    lefts = sorted(kept["left_seconds"].dropna().unique())
    fig, axes = plt.subplots(1, max(1, len(lefts)), figsize=(8, 3.4), sharey=True, squeeze=False, layout="constrained")
    for ax, left in zip(axes[0], lefts, strict=False):
        for place, (name, rows) in enumerate(kept.groupby("system", sort=False)):
            chunked = rows[rows["left_seconds"] == left].sort_values("chunk_ms")
            rows = pd.concat([chunked, rows[rows["chunk_ms"].isna()]])
            x = [i + 0.06 * place for i in range(len(rows))]
            wer = 100 * rows["wer"]
            bars = [wer - 100 * rows["wer_low"], 100 * rows["wer_high"] - wer]
            ax.errorbar(x, wer, yerr=bars, marker="os^D"[place % 4], capsize=2, label=SYSTEMS.get(name, name))
            ticks = ["full" if pd.isna(chunk) else f"{chunk:.0f}" for chunk in rows["chunk_ms"]]
            ax.set_xticks(range(len(rows)), ticks)
        ax.set(xlabel="chunk, ms", title=f"left context {left:.0f} s", ylim=(0, None))
    axes[0][0].set_ylabel("WER, %")
    axes[0][-1].legend()
    points = [
        f"{row['system']} {'full context' if pd.isna(row['chunk_ms']) else format(row['chunk_ms'], '.0f') + ' ms'}"
        f"{'' if pd.isna(row['left_seconds']) else format(row['left_seconds'], ' .0f') + ' s'} {100 * row['wer']:.2f} %"
        for row in kept.to_dict("records")
    ]
    fig.set_label("Word error rate against the length of a chunk. " + "; ".join(points))
    return fig
