"""What a sweep found, to read: the ranking, its tests, a headline.

Everything is computed from a `Comparison`. There error rates are fractions; shown, per cent and points.
"""

from collections.abc import Callable, Sequence
from itertools import product
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup

from asrlib.measuring.entries import UNCONVERTED, Entry
from asrlib.measuring.names import ATTENTION, AUDIO_SECONDS, SIGNIFICANT
from asrlib.reporting.figures import SYSTEMS
from asrlib.reporting.members import Comparison
from asrlib.reporting.numbers import (
    change,
    duration,
    p_number,
    percent,
    points,
    points_interval,
    rate_interval,
    size,
    tested_points,
    verdict,
)
from asrlib.reporting.tables import cell, rate_cell, small_print, speed_cell, table_html

# Cache relative to that of multi-head attention, as Sonawane, Gokhale and Tian (2025) stated and did not measure it.
CLAIMED_CACHE = {"mla": "45–55 %", "mla_simple": "45–55 %", "gqa": "25–30 %", "linear": "95–105 %"}

CLAIMS_INTRODUCTION = f"""\
## Beside what is claimed for each kind

Shares of the cache of multi-head attention, stated for other models (12 layers of width 512) and never measured. A
share depends on the sizes chosen; that of linear attention, whose state never grows, on the length of the audio as
well: here {AUDIO_SECONDS:g} s."""


# ---- one test in words -------------------------------------------------------------------------------------


def tested(test: pd.Series) -> str:
    """The difference with its interval and p, corrected where that is not the same."""
    return tested_points(test["difference"], (test["low"], test["high"]), test["p"], test["p_holm"], " points")


def significant(test: pd.Series) -> bool:
    return test["p_holm"] < SIGNIFICANT


def verdict_of(test: pd.Series) -> str:
    """Whether `b` of a test is better than `a`, in a word or two."""
    return verdict(test["difference"], test["p"], test["p_holm"])


def kind(row: pd.Series) -> str:
    """conformer, MLA"""
    return f"{row['encoder']}, {ATTENTION.get(row['attention'], row['attention'])}"


# ---- tables ------------------------------------------------------------------------------------------------


def ranking(sweep: Comparison) -> pd.DataFrame:
    """The table to read: a row per member, lowest WER first; in brackets what belongs to a figure."""
    first = sweep.splits[0] if sweep.splits else ""
    rows = []
    for name, row in sweep.table.iterrows():
        rows.append(
            {
                "member": f"{name} ({kind(row)})",
                "parameters, training": cell(row["parameters"], lambda n: f"{n / 1e6:.2f} M")
                + cell(row["training_seconds"], lambda s: f" ({duration(s)})", ""),
                "cache per second": _cache(row),
                **{f"WER {split}": rate_cell(row, split) for split in sweep.splits},
                difference_name(sweep): _difference(sweep, name, row["reference"], first),
                "ms per utterance": cell(row["latency_ms"], "{:.1f}".format)
                + cell(row["rtfx"], " (RTFx {:.0f})".format, ""),
                "speed": speed_cell(row),
            }
        )
    table = pd.DataFrame(rows, index=sweep.table.index)
    return table.loc[:, (table != "–").any()]  # what no member has yet is no column


def difference_name(sweep: Comparison) -> str:
    """What the differences of the ranking are to."""
    references = sweep.table["reference"].dropna().unique()
    kinds = {sweep.table.at[name, "attention"] for name in references}
    to = "MHA" if kinds == {"mha"} else references[0] if len(references) == 1 else "the largest cache"
    return f"points more than {to}"


def ranking_html(sweep: Comparison) -> Markup:
    """`ranking` with what stands in brackets in small print, and links to the members' pages."""
    table = ranking(sweep)
    links = {entry.name: link(entry) for entry in sweep.entries}

    def member(text: str) -> Markup:
        name, _, note = text.partition(" (")
        return Markup("{} <small>{}</small>").format(links[name], note.removesuffix(")"))

    formats = dict.fromkeys(table, small_print) | {"member": member}
    return Markup('<div class="ranking">{}</div>').format(table_html(table, "", formats, index=False))


def link(entry: Entry) -> Markup:
    """Its name, as a link from a page of the sweep to its own index page where there is one."""
    if not (entry.run.path / "index.html").is_file():
        return breakable(entry.name)
    return Markup('<a href="{}/index.html">{}</a>').format(quote(entry.run.path.name), breakable(entry.name))


def links_html(sweep: Comparison) -> Markup:
    """A line that leads to every member's own pages."""
    members = [link(entry) for entry in sweep.entries if not entry.name.startswith(UNCONVERTED)]
    return Markup("<p>Each member by itself: {}.</p>").format(Markup(", ").join(members))


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind each _."""
    return Markup("_<wbr>").join(name.split("_"))


def _cache(row: pd.Series) -> str:
    if pd.isna(row["cache_bytes"]):
        return "–"
    cut = f", {change(1 - row['cache_cut'], 1)}" if row["cache_cut"] > 0 else ""
    return f"{size(row['cache_bytes_per_second'])} ({AUDIO_SECONDS:g} s: {size(row['cache_bytes'])}{cut})"


def _difference(sweep: Comparison, name: str, reference: str | None, split: str) -> str:
    test = sweep.test(reference, name, split)
    if test is None:
        return "–"
    star = "*" if significant(test) else ""
    return tested_points(test["difference"], (test["low"], test["high"]), test["p"], unit=star)


def parameter_table(sweep: Comparison, parameter: str, groups: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The members that differ in `parameter` alone, by its value: cache of AUDIO_SECONDS, cut, word errors."""
    asked = {entry.name: entry.parameters() for entry in sweep.entries}
    rows = [
        {
            parameter: asked[name][parameter],
            "member": name,
            f"cache of {AUDIO_SECONDS:g} s": cell(row["cache_bytes"], size),
            "cut against MHA": cell(row["cache_cut"], lambda cut: percent(cut, 1)),
            **{f"WER {split}": rate_cell(row, split) for split in sweep.splits},
        }
        for group in groups
        for name, row in sweep.table.loc[list(group)].iterrows()
    ]
    return pd.DataFrame(rows)


def seed_table(sweep: Comparison, groups: Sequence[Sequence[str]]) -> pd.DataFrame:
    """What another seed changes: the WER of each system of the members that differ in their seed alone, and how much
    more wrong the last of their systems is than it; each the mean over seeds, with the lowest and the highest."""
    entries, rows = {entry.name: entry for entry in sweep.entries}, []
    for group, split in product(groups, sweep.splits):
        of_member = [entries[name].all_scores() for name in group]
        rates = pd.DataFrame([{s: by[split]["wer"] for s, by in scores.items() if split in by} for scores in of_member])
        last = rates.columns[-1]
        for system, column in rates.items():
            row = {"members": ", ".join(group), "split": split, "system": SYSTEMS[system].partition(" (")[0]}
            row |= {"seeds": column.count(), "WER": f"{percent(column.mean())} ({_range(column, rate_interval)})"}
            if system != last:
                more = rates[last] - column
                row[f"{SYSTEMS[last].partition(' (')[0]}, points more"] = (
                    f"{points(more.mean())} ({_range(more, points_interval)})"
                )
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _range(column: pd.Series, in_words: Callable) -> str:
    return in_words((column.min(), column.max()))


def tests_in_words(sweep: Comparison) -> pd.DataFrame:
    """Every paired test in words: what was compared, on which split, the difference, p, p by Holm, the verdict."""
    asked = {"reference": "cost of the smaller state", "cache": "GQA or MLA", "encoder": "Conformer or Branchformer"}
    return pd.DataFrame(
        {
            "question": asked[test["question"]],
            "from → to": f"{sweep.short[test['a']]} → {sweep.short[test['b']]}",
            "split": test["split"],
            "change, points": points(test["difference"]),
            "95 % interval": points_interval((test["low"], test["high"])),
            "p": p_number(test["p"]),
            "corrected p": p_number(test["p_holm"]),
            "verdict": verdict_of(test),
        }
        for _, test in sweep.tests.iterrows()
    )


def claimed_cache(sweep: Comparison) -> pd.DataFrame:
    """State kept of AUDIO_SECONDS, relative to multi-head attention, beside what was claimed for its kind."""
    rows = sweep.table[sweep.table["attention"].isin(CLAIMED_CACHE) & sweep.table["cache_cut"].notna()]
    return pd.DataFrame(
        {
            "state against MHA": [percent(1 - cut, 1) for cut in rows["cache_cut"]],
            "claimed for its kind": [CLAIMED_CACHE[kind] for kind in rows["attention"]],
        },
        index=rows.index,
    )


# ---- sentences ---------------------------------------------------------------------------------------------


def headline(sweep: Comparison) -> str:
    """What the sweep found, in one to three sentences made from its figures."""
    if not sweep.splits:
        return "No word error rate has been measured yet."
    split, table = sweep.splits[0], sweep.table.dropna(subset=[f"wer_{sweep.splits[0]}"])
    best = table.iloc[0]
    name = f"The model {best.name}" if best.name.startswith(UNCONVERTED) else best.name
    interval = rate_interval((best[f"wer_{split}_low"], best[f"wer_{split}_high"]))
    words = (
        f"{name} has the lowest WER on {split} of {len(table)} recognisers, {percent(best[f'wer_{split}'])} "
        f"(95 % interval {interval}"
    )
    overlapping = int((table[f"wer_{split}_low"].iloc[1:] <= best[f"wer_{split}_high"]).sum())
    others = "that of one other overlaps" if overlapping == 1 else f"those of {overlapping} others overlap"
    words += f"; {others})." if overlapping else ")."
    smaller = {split: _smaller_caches(sweep, split, best["encoder"]) for split in sweep.splits}
    if smaller[split].empty:
        return words
    tests = pd.concat(smaller.values())
    raised = tests.loc[[significant(test) and test["difference"] > 0 for _, test in tests.iterrows()], "b"]
    harmless = smaller[split][~smaller[split]["b"].isin(raised)]
    somewhere, everywhere = (" somewhere", " on any split") if len(sweep.splits) > 1 else ("", "")
    if harmless.empty:
        least = smaller[split].loc[smaller[split]["difference"].idxmin()]
        return (
            f"{words} In this encoder every smaller state raised it significantly{somewhere} "
            f"({_counted(sweep, split)}), that of {least['b']} least: {percent(least['cut'], 1)} less than MHA keeps "
            f"of {AUDIO_SECONDS:g} s, {tested(least)}."
        )
    least = harmless.loc[harmless["cache_bytes"].idxmin()]
    changes = [
        f"{tested(test)} on {name}" for name, of in smaller.items() for _, test in of[of["b"] == least["b"]].iterrows()
    ]
    return (
        f"{words} In this encoder the smallest state without a significant rise against {least['a']}{everywhere} is "
        f"that of {least['b']}: {percent(least['cut'], 1)} less than MHA keeps of {AUDIO_SECONDS:g} s, "
        f"{', '.join(changes)}."
    )


def _smaller_caches(sweep: Comparison, split: str, encoder: str) -> pd.DataFrame:
    """In one encoder the tests against a reference that keeps more, with cache and cut of the row that was tested."""
    if sweep.tests.empty:
        return sweep.tests
    tests = sweep.tests[(sweep.tests["question"] == "reference") & (sweep.tests["split"] == split)]
    caches = sweep.table["cache_bytes"]
    tests = tests[[sweep.table.at[name, "encoder"] == encoder for name in tests["b"]]]
    tests = tests.assign(
        cache_bytes=[caches[name] for name in tests["b"]],
        cut=[sweep.table.at[name, "cache_cut"] for name in tests["b"]],
    )
    return tests[[caches[test["b"]] < caches[test["a"]] for _, test in tests.iterrows()]]


def _counted(sweep: Comparison, split: str) -> str:
    count = int((sweep.tests["split"] == split).sum())
    return f"{count} comparisons, p corrected by Holm's method" if count > 1 else "one comparison"


def how_to_read(sweep: Comparison) -> str:
    """What the numbers of the ranking mean, and what they do not say."""
    seeds = {entry.parameters().get("seed", 0) for entry in sweep.entries}
    words = [
        "Small print: 95 % intervals (bootstrap over utterances), the time of training, the cache of "
        f"{AUDIO_SECONDS:g} s and its cut against MHA."
    ]
    if len(seeds) == 1:
        words.append(
            "Each row is one training with one seed: intervals and p tell how much depends on the choice of "
            "utterances, not how much another seed would change."
        )
    else:
        words.append(f"There are trainings with {len(seeds)} seeds; each interval and p is over utterances, of one.")
    if not sweep.tests.empty:
        split = sweep.splits[0]
        words.append(
            f"Differences are those on {split}, paired over the same utterances, each p that of one alone; * is "
            f"significant ({_counted(sweep, split)})."
        )
    words.append("The cache is what a stream keeps, by the formula. RTFx: seconds of audio per second of compute.")
    if timed := list(sweep.benchmark.get("systems", {})):
        words.append(f"Speed is against {timed[0]}.")
    return " ".join(words)
