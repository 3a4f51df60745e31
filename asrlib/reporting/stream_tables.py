"""Tables and figures of streams, as `measuring.stream_errors` and `measuring.stream_steps` measured them."""

import math
from typing import TYPE_CHECKING

import pandas as pd

from asrlib.attention.cache import cached_numbers, kv_cache_bytes
from asrlib.attention.formats import FORMATS
from asrlib.models.registry import frames_per_second
from asrlib.reporting.figures import SYSTEMS, drawing_style, new_figure, system_colours
from asrlib.reporting.numbers import percent, rate_interval, size, span, tested_points
from asrlib.reporting.tables import as_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERRORS_INTRODUCTION = """\
## In a stream

The models recognise the same utterances chunk by chunk, all under the same mask. A frame attends to its chunk, to some
seconds before it and, where a lookahead is given, to as much after it. The cache is that of a full left context; a
shorter utterance never fills it. Differences are to the first model in the same chunks, with its cache in float32."""

STEPS_INTRODUCTION = """\
## One chunk of a stream

What a stream keeps, counted on its tensors, and how long one chunk takes, against the left context. The encoders have
this size and random weights; they differ in their attention alone, and take turns. They start from frames, because the
step from audio to frames is the same for all. Speeds are against multi-head attention with a cache and everything that
this library does for speed: the difference is what the kind of attention brings. Multi-head attention without a cache
stands beside it and shows what a cache brings to every kind: with each chunk it computes its left context again, and
attends to nothing before that, while a cache reaches back so far in every layer. Linear attention sums over everything
it has heard, whatever the left context. Multiplications are those of matrices."""


# ---- word errors -------------------------------------------------------------------------------------------


def errors_table(errors: pd.DataFrame) -> pd.DataFrame:
    """Of `streaming_errors`: a row per chunk, left context and format, the systems side by side.

    Each is compared with the first in the same chunks, whose cache is in float32.
    """
    first, *others = dict.fromkeys(errors["system"])
    rows, setting = [], ["chunk_ms", "left_seconds", "cache"]
    for (chunk, left, held_as), group in errors.groupby(setting, sort=False, dropna=False):
        full, by_system = pd.isna(chunk), group.set_index("system").to_dict("index")
        row = {
            "chunk": "full context" if full else f"{chunk:.0f} ms",
            "left context": "–" if full else f"{left:.2g} s",
            "cache in": "–" if full else held_as,
        }
        for name, measured in by_system.items():
            known = SYSTEMS.get(name, name)
            wer = f"{100 * measured['wer']:.2f} ({rate_interval((measured['wer_low'], measured['wer_high']))})"
            row |= {f"{known}: WER %": wer, f"{known}: cache": "–" if full else size(measured["cache_bytes"])}
        for name in [name for name in others if name in by_system]:
            difference, low, high, p = (
                by_system[name][column] for column in ("difference", "difference_low", "difference_high", "p")
            )
            pair = f"{SYSTEMS.get(name, name)} − {SYSTEMS.get(first, first)}, points"
            row[pair] = tested_points(difference, (low, high), p)
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def errors_figure(errors: pd.DataFrame) -> "Figure":
    """WER against the chunk: a line for each system, a panel for each left context. Full context comes last."""
    compared = errors[errors["cache"] == errors["cache"].iloc[0]]
    lefts = sorted(compared["left_seconds"].dropna().unique()) or [math.inf]  # full context alone
    with drawing_style():
        fig, axes = new_figure(8, 3.4, 1, len(lefts), sharey=True)
        for ax, left in zip(axes[0], lefts, strict=True):
            for place, (name, rows) in enumerate(compared.groupby("system", sort=False)):
                chunked = rows[rows["left_seconds"] == left].sort_values("chunk_ms")
                rows = pd.concat([chunked, rows[rows["chunk_ms"].isna()]])
                wer = 100 * rows["wer"]
                ax.errorbar(
                    [i + 0.08 * place for i in range(len(rows))],
                    wer,
                    yerr=[wer - 100 * rows["wer_low"], 100 * rows["wer_high"] - wer],
                    marker="os^D"[place % 4],
                    color=system_colours().get(name),
                    capsize=2,
                    label=SYSTEMS.get(name, name),
                )
                ticks = ["full" if pd.isna(chunk) else f"{chunk:.0f}" for chunk in rows["chunk_ms"]]
                ax.set_xticks(range(len(rows)), ticks)
            ax.set(xlabel="chunk, ms", title=f"left context {left:.2g} s", ylim=(0, None))
        axes[0][0].set_ylabel("word error rate, %")
        axes[0][-1].legend(fontsize="small")
    fig.set_label(
        "Word error rate against the length of a chunk. " + "; ".join(map(_error_in_words, as_rows(compared)))
    )
    return fig


def _error_in_words(row: dict) -> str:
    where = "full context"
    if row["chunk_ms"] is not None:
        where = f"{row['chunk_ms']:.0f} ms with {row['left_seconds']:.2g} s before"
    return f"{row['system']}, {where}: {percent(row['wer'])}"


def text_as_heard(model, processor, utterance, **chunks) -> pd.DataFrame:
    """The text of a stream after every chunk, and what its attention keeps; `chunks`: the arguments of `chunks_of`."""
    from asrlib.streaming.streams import Recognition, chunks_of

    recognition = Recognition(model, processor, chunks_of(model.config, **chunks))
    streams, rate, rows = recognition.streams, frames_per_second(model.config), []
    for steps in (recognition.hear(utterance.audio()), recognition.finish()):
        for text in steps:
            heard = min(utterance.seconds, (streams.frames + streams.chunks.lookahead) / rate)
            cache = size(sum(streams.attention_bytes))
            rows.append({"heard": f"{heard:.2f} s", "text so far": text, "cache": cache})
    return pd.DataFrame(rows)


# ---- time and bytes ----------------------------------------------------------------------------------------


def steps_table(steps: pd.DataFrame) -> pd.DataFrame:
    """Of `benchmark_steps`: milliseconds, a row per left context and chunk, a column per system.

    In brackets the quartiles; with the speed against the first system, which has the same cache and tricks.
    """
    first = steps["system"].iloc[0]
    rows = []
    for (left, chunk), group in _settings(steps):
        ms = group["ms"]
        row = {"left context": f"{left:g} s", "chunk": f"{chunk:.0f} ms"}
        for name, timed in group.iterrows():
            text = f"{timed['ms']:.1f} ({span(timed['ms_low'], timed['ms_high'], 1)})"
            row[name] = text if name == first else f"{text} ×{ms[first] / timed['ms']:.2f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def multiplications_table(steps: pd.DataFrame) -> pd.DataFrame:
    """Of `benchmark_steps`: millions, a row per left context and chunk, a column per system."""
    rows = []
    for (left, chunk), group in _settings(steps):
        counts = {name: f"{count / 1e6:,.1f}" for name, count in group["multiplications"].items()}
        rows.append({"left context": f"{left:g} s", "chunk": f"{chunk:.0f} ms", **counts})
    return pd.DataFrame(rows).fillna("–")


def _settings(steps: pd.DataFrame):
    """((left context, chunk), the rows of all systems by name) of every setting, the shortest first."""
    for setting, group in steps.groupby(["left_seconds", "chunk_ms"]):
        yield setting, group.set_index("system")


def bytes_table(steps: pd.DataFrame) -> pd.DataFrame:
    """Of `benchmark_steps`: what one stream keeps, a row per left context and system, at the shortest chunk."""
    shortest = steps[(steps["chunk_ms"] == steps["chunk_ms"].min()) & (steps["cache_bytes"] > 0)]
    first = shortest["system"].iloc[0]
    reference = shortest[shortest["system"] == first].set_index("left_seconds")["cache_bytes"]
    return pd.DataFrame(
        {
            "left context": f"{row['left_seconds']:g} s",
            "system": row["system"],
            "cache, counted": size(row["cache_bytes"]),
            "by the formula": "the same" if row["cache_bytes"] == row["formula_bytes"] else size(row["formula_bytes"]),
            f"times less than {first}": f"{reference[row['left_seconds']] / row['cache_bytes']:.1f}",
            "with room for new frames": size(row["reserved_bytes"]),
            "convolutions": size(row["convolution_bytes"]),
        }
        for row in shortest.sort_values("left_seconds", kind="stable").to_dict("records")
    )


def positions_sentence(steps: pd.DataFrame) -> str:
    """What the projected positions take beside the cache."""
    longest = steps[steps["left_seconds"] == steps["left_seconds"].max()]
    return (
        f"Projected positions take {size(longest['position_bytes'].max())} more at {longest['left_seconds'].iloc[0]:g} "
        "s of left context: once for all streams of a model, whatever its attention, and not at all where it is linear."
    )


def steps_figure(steps: pd.DataFrame) -> "Figure":
    """Bytes kept and time of a chunk (the shortest) against the left context, a line a system."""
    import seaborn as sns

    shortest = steps[steps["chunk_ms"] == steps["chunk_ms"].min()]
    names = list(dict.fromkeys(shortest["system"]))
    looks = dict(zip(names, zip(sns.color_palette("colorblind", len(names)), "os^Dv<>P", strict=False), strict=False))
    with drawing_style():
        fig, axes = new_figure(8, 3.6, 1, 2)
        for ax, column, scale in ((axes[0][0], "cache_bytes", 2**20), (axes[0][1], "ms", 1)):
            for name, rows in shortest.groupby("system", sort=False):
                rows = rows[rows[column] > 0].sort_values("left_seconds")
                colour, marker = looks[name]
                ax.plot(rows["left_seconds"], rows[column] / scale, color=colour, marker=marker, label=name)
            ax.set(xscale="log", yscale="log", xlabel="left context, s")
        axes[0][0].set_ylabel("cache of one stream, MiB")
        axes[0][1].set_ylabel(f"one chunk of {shortest['chunk_ms'].iloc[0]:.0f} ms takes, ms")
        axes[0][1].axhline(shortest["chunk_ms"].iloc[0], color="0.6", linestyle=":", linewidth=1)
        fig.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    points = [
        f"{row['system']} at {row['left_seconds']:g} s {size(row['cache_bytes'])}, {row['ms']:.1f} ms"
        for row in as_rows(shortest)
    ]
    fig.set_label("Cache of a stream and time of a chunk against the left context. " + "; ".join(points))
    return fig


def formats_table(systems: dict) -> pd.DataFrame:
    """A row per system and format, of {name: model}. All are compared with the first model in float32."""
    rows, reference = [], None
    for name, model in systems.items():
        for held_as in FORMATS:
            rate = frames_per_second(model.config)
            n_bytes = [kv_cache_bytes(model.config, frames, held_as) for frames in (0, 1000)]
            numbers = sum(cached_numbers(model.config, 1000)) - sum(cached_numbers(model.config, 0))
            growth = (n_bytes[1] - n_bytes[0]) * rate / 1000
            reference = reference or growth
            rows.append(
                {
                    "system": name,
                    "numbers per frame": f"{numbers / 1000:.0f}",
                    "held in": held_as,
                    "bits per number": f"{8 * (n_bytes[1] - n_bytes[0]) / numbers:.2f}" if numbers else "–",
                    "bytes per second": size(growth) if growth else f"{size(n_bytes[0])} in all",
                    "times less": f"{reference / growth:.1f}" if growth else "–",
                }
            )
    return pd.DataFrame(rows)


def streams_table(streams: pd.DataFrame, memory_bytes: int) -> pd.DataFrame:
    """Of `streams_in_real_time`."""
    first = streams.iloc[0]
    return pd.DataFrame(
        {
            "system": streams["system"],
            f"fit into {size(memory_bytes)}": streams["in_memory"],
            "in real time": streams["in_real_time"],
            "a chunk of all takes, ms": streams["ms"].map("{:.0f}".format),
            f"in real time, against {first['system']}": [
                f"×{count / first['in_real_time']:.1f}" if first["in_real_time"] else "–"
                for count in streams["in_real_time"]
            ],
        }
    )
