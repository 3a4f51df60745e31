"""What a sweep found, for people: the ranking, a headline, sentences about time, and the page over its members.

Everything is computed from a `Comparison`. There error rates are fractions; shown, per cent and points.
"""

from collections.abc import Sequence
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup

from asrlib.measuring.systems import ATTENTION, AUDIO_SECONDS, UNCONVERTED, Entry
from asrlib.reporting.members import SIGNIFICANT, Comparison
from asrlib.reporting.numbers import change, duration, percent, size
from asrlib.reporting.tables import small_print, table_html

# Cache relative to that of multi-head attention, as Sonawane, Gokhale and Tian (2025) stated and did not measure it.
CLAIMED_CACHE = {"mla": "45–55 %", "mla_simple": "45–55 %", "gqa": "25–30 %", "linear": "95–105 %"}

CLAIMS_INTRODUCTION = f"""\
## Beside what is claimed for each kind

Shares of the cache of multi-head attention, stated for other models (12 layers of width 512) and never measured. A
share depends on the sizes chosen; that of linear attention, whose state never grows, on the length of the audio as
well: here {AUDIO_SECONDS:g} s."""


# ---- numbers as text ---------------------------------------------------------------------------------------


def points(difference: float) -> str:
    """+0.26, −1.40."""
    return f"{100 * difference:+.2f}".replace("-", "−").replace("+0.00", "±0.00")


def tested(test: pd.Series) -> str:
    """The difference with its interval and p, corrected where that is not the same."""
    interval = f"{points(test['low'])} to {points(test['high'])}"
    corrected = "" if test["p_holm"] == test["p"] else f", corrected p {_p(test['p_holm'])}"
    return f"{points(test['difference'])} points ({interval}; p {_p(test['p'])}{corrected})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def significant(test: pd.Series) -> bool:
    return test["p_holm"] < SIGNIFICANT


def verdict(test: pd.Series) -> str:
    """Whether `b` of a test is better than `a`, in a word or two."""
    if significant(test):
        return "worse" if test["difference"] > 0 else "better"
    weak = test["p"] < SIGNIFICANT
    return "not significant once all comparisons are counted" if weak else "no significant difference"


def kind(row: pd.Series) -> str:
    """conformer, MLA"""
    return f"{row['encoder']}, {ATTENTION.get(row['attention'], row['attention'])}"


# ---- tables ------------------------------------------------------------------------------------------------


def ranking(found: Comparison) -> pd.DataFrame:
    """The table to read: a row per member, lowest WER first; in brackets what belongs to a figure."""
    first = found.splits[0] if found.splits else ""
    rows = []
    for name, row in found.table.iterrows():
        rows.append(
            {
                "member": f"{name} ({kind(row)})",
                "parameters, training": _shown(row["parameters"], lambda n: f"{n / 1e6:.2f} M")
                + _shown(row["training_seconds"], lambda s: f" ({duration(s)})", ""),
                "cache per second": _cache(row),
                **{f"WER {split}": _rate(row, split) for split in found.splits},
                difference_name(found): _difference(found, name, row["reference"], first),
                "ms per utterance": _shown(row["latency_ms"], "{:.1f}".format)
                + _shown(row["rtfx"], " (RTFx {:.0f})".format, ""),
                "speed": _shown(row["speed_ratio"], "×{:.2f}".format)
                + _interval(row["speed_ratio_low"], row["speed_ratio_high"]),
            }
        )
    table = pd.DataFrame(rows, index=found.table.index)
    return table.loc[:, (table != "–").any()]  # what no member has yet is no column


def difference_name(found: Comparison) -> str:
    """What the differences of the ranking are to."""
    references = found.table["reference"].dropna().unique()
    kinds = {found.table.at[name, "attention"] for name in references}
    to = "MHA" if kinds == {"mha"} else references[0] if len(references) == 1 else "the largest cache"
    return f"points more than {to}"


def ranking_html(found: Comparison) -> Markup:
    """`ranking` with what stands in brackets in small print, and links to the members' pages."""
    table = ranking(found)
    links = {entry.name: link(entry) for entry in found.entries}

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


def links_html(found: Comparison) -> Markup:
    """A line that leads to every member's own pages."""
    members = [link(entry) for entry in found.entries if not entry.name.startswith(UNCONVERTED)]
    return Markup("<p>Each member by itself: {}.</p>").format(Markup(", ").join(members))


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind each _."""
    return Markup("_<wbr>").join(name.split("_"))


def _shown(value: float, show, missing: str = "–") -> str:
    return missing if pd.isna(value) else show(value)


def _interval(low: float, high: float, scale: float = 1.0) -> str:
    return "" if pd.isna(low) or low == high else f" ({scale * low:.2f}–{scale * high:.2f})"


def _rate(row: pd.Series, split: str) -> str:
    wer = row[f"wer_{split}"]
    return _shown(wer, percent) + _interval(row[f"wer_{split}_low"], row[f"wer_{split}_high"], 100)


def _cache(row: pd.Series) -> str:
    if pd.isna(row["cache_bytes"]):
        return "–"
    cut = f", {change(1 - row['cache_cut'], 1)}" if row["cache_cut"] > 0 else ""
    return f"{size(row['cache_bytes_per_second'])} ({AUDIO_SECONDS:g} s: {size(row['cache_bytes'])}{cut})"


def _difference(found: Comparison, name: str, reference: str | None, split: str) -> str:
    test = None if pd.isna(reference) else found.test(reference, name, split)
    if test is None:
        return "–"
    star = "*" if significant(test) else ""
    interval = f"{points(test['low'])} to {points(test['high'])}"
    return f"{points(test['difference'])}{star} ({interval}; p {_p(test['p'])})"


def parameter_table(found: Comparison, parameter: str, groups: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The members that differ in `parameter` alone, by its value: cache of AUDIO_SECONDS, cut, word errors."""
    asked = {entry.name: entry.parameters() for entry in found.entries}
    rows = [
        {
            parameter: asked[name][parameter],
            "member": name,
            f"cache of {AUDIO_SECONDS:g} s": _shown(row["cache_bytes"], size),
            "cut against MHA": _shown(row["cache_cut"], lambda cut: percent(cut, 1)),
            **{f"WER {split}": _rate(row, split) for split in found.splits},
        }
        for group in groups
        for name, row in found.table.loc[list(group)].iterrows()
    ]
    return pd.DataFrame(rows)


def tests_in_words(found: Comparison) -> pd.DataFrame:
    """Every paired test in words: what was compared, on which split, the difference, p, p by Holm, the verdict."""
    asked = {"reference": "cost of the smaller state", "cache": "GQA or MLA", "encoder": "Conformer or Branchformer"}
    return pd.DataFrame(
        {
            "question": asked[test["question"]],
            "from → to": f"{found.short[test['a']]} → {found.short[test['b']]}",
            "split": test["split"],
            "change, points": points(test["difference"]),
            "95 % interval": f"{points(test['low'])} to {points(test['high'])}",
            "p": _p(test["p"]).removeprefix("= "),
            "corrected p": _p(test["p_holm"]).removeprefix("= "),
            "verdict": verdict(test),
        }
        for _, test in found.tests.iterrows()
    )


def claimed_cache(found: Comparison) -> pd.DataFrame:
    """State kept of AUDIO_SECONDS, relative to multi-head attention, beside what was claimed for its kind."""
    rows = found.table[found.table["attention"].isin(CLAIMED_CACHE) & found.table["cache_cut"].notna()]
    return pd.DataFrame(
        {
            "state against MHA": [percent(1 - cut, 1) for cut in rows["cache_cut"]],
            "claimed for its kind": [CLAIMED_CACHE[kind] for kind in rows["attention"]],
        },
        index=rows.index,
    )


# ---- sentences ---------------------------------------------------------------------------------------------


def headline(found: Comparison) -> str:
    """What the sweep found, in one to three sentences made from its figures."""
    if not found.splits:
        return "No word error rate has been measured yet."
    split, table = found.splits[0], found.table.dropna(subset=[f"wer_{found.splits[0]}"])
    best = table.iloc[0]
    name = f"The model {best.name}" if best.name.startswith(UNCONVERTED) else best.name
    low, high = 100 * best[f"wer_{split}_low"], 100 * best[f"wer_{split}_high"]
    words = (
        f"{name} has the lowest WER on {split} of {len(table)} recognisers, {percent(best[f'wer_{split}'])} "
        f"(95 % interval {low:.2f}–{high:.2f}"
    )
    overlapping = int((table[f"wer_{split}_low"].iloc[1:] <= best[f"wer_{split}_high"]).sum())
    others = "that of one other overlaps" if overlapping == 1 else f"those of {overlapping} others overlap"
    words += f"; {others})." if overlapping else ")."
    smaller = {split: _smaller_caches(found, split, best["encoder"]) for split in found.splits}
    if smaller[split].empty:
        return words
    tests = pd.concat(smaller.values())
    raised = tests.loc[[significant(test) and test["difference"] > 0 for _, test in tests.iterrows()], "b"]
    kept = smaller[split][~smaller[split]["b"].isin(raised)]
    everywhere = " on any split" * (len(found.splits) > 1)
    if kept.empty:
        least = smaller[split].loc[smaller[split]["difference"].idxmin()]
        return (
            f"{words} In this encoder every smaller state raised it significantly{' somewhere' * bool(everywhere)} "
            f"({_counted(found, split)}), that of {least['b']} least: {percent(least['cut'], 1)} less than MHA keeps "
            f"of {AUDIO_SECONDS:g} s, {tested(least)}."
        )
    least = kept.loc[kept["cache_bytes"].idxmin()]
    shown = [
        f"{tested(test)} on {name}" for name, of in smaller.items() for _, test in of[of["b"] == least["b"]].iterrows()
    ]
    return (
        f"{words} In this encoder the smallest state without a significant rise against {least['a']}{everywhere} is "
        f"that of {least['b']}: {percent(least['cut'], 1)} less than MHA keeps of {AUDIO_SECONDS:g} s, "
        f"{', '.join(shown)}."
    )


def _smaller_caches(found: Comparison, split: str, encoder: str) -> pd.DataFrame:
    """In one encoder the tests against a reference that keeps more, with cache and cut of the row that was tested."""
    if found.tests.empty:
        return found.tests
    tests = found.tests[(found.tests["question"] == "reference") & (found.tests["split"] == split)]
    caches = found.table["cache_bytes"]
    tests = tests[[found.table.at[name, "encoder"] == encoder for name in tests["b"]]]
    tests = tests.assign(
        cache_bytes=[caches[name] for name in tests["b"]],
        cut=[found.table.at[name, "cache_cut"] for name in tests["b"]],
    )
    return tests[[caches[test["b"]] < caches[test["a"]] for _, test in tests.iterrows()]]


def _counted(found: Comparison, split: str) -> str:
    count = int((found.tests["split"] == split).sum())
    return f"{count} comparisons, p corrected by Holm's method" if count > 1 else "one comparison"


def how_to_read(found: Comparison) -> str:
    """What the numbers of the ranking mean, and what they do not say."""
    seeds = {entry.parameters().get("seed", 0) for entry in found.entries}
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
    if not found.tests.empty:
        split = found.splits[0]
        words.append(
            f"Differences are those on {split}, paired over the same utterances, each p that of one alone; * is "
            f"significant ({_counted(found, split)})."
        )
    words.append("The cache is what a stream keeps, by the formula. RTFx: seconds of audio per second of compute.")
    if timed := list(found.benchmark.get("systems", {})):
        words.append(f"Speed is against {timed[0]}.")
    return " ".join(words)
