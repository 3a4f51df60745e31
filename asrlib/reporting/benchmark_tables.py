"""What metrics/benchmark.json says, for people: of a single run's three models, or of the members of a sweep."""

import pandas as pd

from asrlib.measuring.names import ATTENTION, AUDIO_SECONDS, LONG_PASS, PROFILED_AUDIO
from asrlib.reporting.figures import SYSTEMS
from asrlib.reporting.members import short_names
from asrlib.reporting.numbers import percent, size, span
from asrlib.reporting.tables import small_print

WRITING_INTRODUCTION = """\
## What writing keeps

While `generate` writes the text of an utterance, it keeps keys and values, or latents: of every frame of the window for
cross-attention, and of every token for the decoder's own attention. They are counted in the cache that `generate`
filled, as a mean over the utterances. The last column is the formula of `asrlib.kv_cache_bytes` for both together."""
STATE_INTRODUCTION = f"""\
## What a stream keeps

What a stream keeps of {AUDIO_SECONDS:g} s of audio if it forgets nothing: by the formula, and counted on the tensors
that a stream in float32 held at the end. These are keys and values, latents, or the sums of linear attention. The last
frames that convolutions keep are added, whatever the attention."""


def speed_sentence(measured: dict) -> str:
    """Speed and cache of a single run's fine-tuned model, or who is fastest of the members of a sweep."""
    systems = measured["systems"]
    if "members" not in measured:
        mha, mla = systems["baseline"], systems["finetuned"]
        low, high = mla["speed_ratio_interval"]
        faster = f"{mla['speed_ratio']:.2f} times as fast as"
        kept = f"{mla['cache_bytes_per_second'] / 1024:.1f} instead of {mha['cache_bytes_per_second'] / 1024:.1f} KiB"
        what = "keeps {}, for cross-attention, of a second of its window" if "writing" in measured else "would cache {}"
        return (
            f"The fine-tuned latent model is {'not measurably faster or slower than' if low <= 1 <= high else faster} "
            f"the baseline (95 % interval {span(low, high)}) and {what.format(kept)}"
            f"{'' if 'writing' in measured else ' per second of audio'}."
        )
    first, *others = systems
    if not others:
        return f"{first} takes {systems[first]['latency_ms_mean']:.1f} ms per utterance."
    fastest, slowest = (choose(systems, key=lambda n: systems[n]["latency_ms_mean"]) for choose in (min, max))
    same = [n for n in others if systems[n]["speed_ratio_interval"][0] <= 1 <= systems[n]["speed_ratio_interval"][1]]
    alike = f" Not measurably faster or slower than {first}: {', '.join(same)}." if same else ""
    return (
        f"The fastest is {fastest}, {systems[fastest]['latency_ms_mean']:.1f} ms per utterance, the slowest {slowest}, "
        f"{systems[slowest]['latency_ms_mean']:.1f} ms.{alike}"
    )


def speed_table(measured: dict) -> pd.DataFrame:
    """Time and memory of the members of a sweep, to read; in brackets the 95th percentile, or an interval."""
    rows = {
        name: {
            "parameters": f"{row['parameters'] / 1e6:.2f} M",
            "ms per utterance": f"{row['latency_ms_mean']:.1f} (95th percentile {row['latency_ms_p95']:.1f})",
            "RTFx": f"{row['rtfx']:.0f}",
            "speed": f"×{row['speed_ratio']:.2f} ({span(*row['speed_ratio_interval'])})",
            "peak memory": "–" if row["peak_memory_bytes"] is None else size(row["peak_memory_bytes"]),
            "cache per second": size(row["cache_bytes_per_second"]),
        }
        for name, row in measured["systems"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("member")


def speeds_shown(measured: dict) -> tuple[pd.DataFrame, str, dict]:
    """What `display_table` shows of speed and memory: of a single run's models, or of the members of a sweep."""
    circumstances = (
        f"{measured['utterances']} utterances, {measured['seconds_audio']:.0f} s of audio, {measured['device']}, "
        f"{measured['threads']} threads, {measured['dtype']}"
    )
    if "members" in measured:
        table = speed_table(measured)
        return (
            table,
            f"{circumstances}; speed against {next(iter(measured['systems']))}",
            dict.fromkeys(table, small_print),
        )
    table = pd.DataFrame(measured["systems"]).T.rename(index=SYSTEMS)
    shown = pd.DataFrame(
        {
            "parameters, M": table["parameters"] / 1e6,
            "ms per utterance": table["latency_ms_mean"],
            "95th percentile": table["latency_ms_p95"],
            "RTFx": table["rtfx"],
            "speed against MHA": table["speed_ratio"],
            "its 95 % interval": [span(*ends) for ends in table["speed_ratio_interval"]],
            "peak memory, MiB": table["peak_memory_bytes"] / 2**20,
            "cache, KiB per second": table["cache_bytes_per_second"] / 1024,
        }
    )
    formats = dict.fromkeys(shown.columns.drop("its 95 % interval"), ".1f")
    return shown, circumstances, formats | {"parameters, M": ".2f", "speed against MHA": ".2f"}


def lengths_introduction(lengths: dict) -> str:
    """Heading and text of the measurement over lengths."""
    return f"## Against the length of the audio\n\n{lengths_caption(lengths)}"


def lengths_caption(lengths: dict) -> str:
    """What was timed, which model was given up at which length, and why a curve may end before the others."""
    allowed = lengths.get("budget_seconds")
    limit = f"A model that takes more than {allowed:g} s for a pass is not timed at longer ones." if allowed else ""
    drawn = "Curves that coincide lie upon each other, each narrower than the one below."
    sentences = [limit, *_given_up(lengths), _memory_ends(lengths), drawn]
    words = "Utterances joined end to end, one pass over all of it, the models taking turns."
    return " ".join([words, *filter(None, sentences)])


def _given_up(lengths: dict) -> list[str]:
    """A sentence for each length at which models were given up, and for each reason why."""
    reasons = {"time": "took longer than that", "memory": "ran out of memory"}
    names: dict[tuple[float, str], list[str]] = {}
    for name, row in lengths["systems"].items():
        if row["stopped"]:
            names.setdefault((row["stopped"]["seconds"], row["stopped"]["reason"]), []).append(name)
    return [
        f"At {seconds:g} s {_these(together, lengths)} {reasons[reason]}."
        for (seconds, reason), together in sorted(names.items())
    ]


def _memory_ends(lengths: dict) -> str:
    """Why the memory of some passes is unknown, and up to which length it is known; "" where all is known."""
    ends: dict[float, list[str]] = {}
    for name, row in lengths["systems"].items():
        passes = list(zip(lengths["seconds"], row["ms"], row["peak_memory_bytes"], strict=True))
        told = [seconds for seconds, _, peak in passes if peak is not None]
        if told and any(ms is not None and peak is None for _, ms, peak in passes):
            ends.setdefault(told[-1], []).append(name)
    if not ends:
        return ""
    where = "; ".join(f"at {seconds:g} s for {_these(names, lengths)}" for seconds, names in sorted(ends.items()))
    return (
        f"Memory is measured with the CPU's profiler, which is slow, and so not of passes over more than "
        f"{PROFILED_AUDIO:g} s of audio that take more than {LONG_PASS:g} s: its curve ends {where}."
    )


def _these(names: list[str], lengths: dict) -> str:
    """Some of the models, as the figure calls them: their names, or the names of the others where those are fewer."""
    short = short_names(list(lengths["systems"]))
    others = [short[name] for name in short if name not in names]
    if not others and len(names) > 1:
        return "all"
    return f"all but {listed(others)}" if len(others) < len(names) - 1 else listed([short[name] for name in names])


def listed(names: list[str]) -> str:
    """a, b and c"""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def lengths_table(lengths: dict) -> pd.DataFrame:
    """Milliseconds of one pass: a row per system, a column per length; NaN where it was not measured."""
    rows = {name: row["ms"] for name, row in lengths["systems"].items()}
    columns = [f"{seconds:g} s" for seconds in lengths["seconds"]]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)


COMPILED_INTRODUCTION = """\
## Compiled

What `torch.compile` makes of each model, length by length, beside the model as it is, all taking turns in one run."""


def compiled_table(compiled: dict) -> tuple[pd.DataFrame, str]:
    """(rows of each model as it is and compiled, their caption) of `compiled_benchmark`."""
    columns = [f"ms at {seconds:.1f} s" for seconds in compiled["seconds"]]
    rows = {}
    for name, row in compiled["systems"].items():
        shown = SYSTEMS.get(name, name)
        rows[shown] = dict(zip(columns, map("{:.1f}".format, row["eager_ms"]), strict=True))
        rows[shown + ", compiled"] = dict(zip(columns, map("{:.1f}".format, row["compiled_ms"]), strict=True)) | {
            "time, of the eager one's": f"×{row['ratio']:.2f} ({span(*row['ratio_range'])})",
            "to compile": f"{row['compiling_seconds']:.0f} s",
            "largest difference of logits": f"{row['largest_difference']:.1e}",
        }
    caption = (
        "Medians of single passes; brackets: the least and the greatest ratio of a round over all lengths; {device}, "
        "{threads} threads, {dtype}, {backend}"
    )
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–"), caption.format(**compiled)


def state_table(described: dict[str, dict]) -> pd.DataFrame:
    """What `measuring.systems.describe` says of each member, to read."""
    rows = {}
    for name, facts in described.items():
        counted = facts["counted"]
        agrees = "the same" if counted["bytes"] == counted["formula_bytes"] else size(counted["formula_bytes"])
        shapes = ["×".join(map(str, shape)) for shape in counted["tensors"]]
        rows[name] = {
            "attention": ATTENTION.get(facts["attention"], facts["attention"]),
            "formula": size(facts["cache_bytes"]),
            "of MHA's": percent(facts["cache_bytes"] / facts["mha_cache_bytes"], 1),
            "counted": f"{size(counted['bytes'])} (formula: {agrees})",
            "tensors of a layer": ", ".join(shapes),
            "convolutions": size(counted["convolution_bytes"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("member")


def writing_table(kept: pd.DataFrame) -> pd.DataFrame:
    """`measuring.writing.kept_while_writing` to read."""
    kib = {
        name: kept[f"{name}_bytes"].map(lambda size: f"{size / 1024:,.1f}") for name in ("cross", "decoder", "formula")
    }
    return pd.DataFrame(
        {
            "system": [SYSTEMS.get(name, name) for name in kept["system"]],
            "tokens": kept["tokens"].map("{:.1f}".format),
            "cross-attention, KiB": kib["cross"],
            "decoder, KiB": kib["decoder"],
            "times less than MHA": kept["ratio"].map("{:.2f}".format),
            "by the formula, KiB": kib["formula"],
        }
    )
