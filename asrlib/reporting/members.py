"""The members of a sweep side by side: one table, and paired tests of the pairs that are worth comparing.

Everything is read from the members' metrics/*.json and predictions/*.jsonl, and from the sweep's own
metrics/benchmark.json. Error rates are fractions, times seconds (of an utterance: milliseconds), memory bytes.

A row is a member's last model: fine-tuned, else converted, else as it was trained. Models that members were converted
from are rows too, for they are what a converted model is compared with.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np
import pandas as pd

from asrlib.measuring.entries import UNCONVERTED, Entry, entries_of
from asrlib.measuring.names import LATENT, encoder_named
from asrlib.runs import Run

# ---- the comparison ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What is known of the members of a sweep, from their metrics and transcripts alone."""

    entries: list[Entry]
    benchmark: dict  # the sweep's metrics/benchmark.json; empty where it was not made
    table: pd.DataFrame  # of `member_table`
    tests: pd.DataFrame  # of `paired_tests`; empty where none was made

    @property
    def splits(self) -> list[str]:
        return splits_of(self.table)

    @property
    def short(self) -> dict[str, str]:
        """The members' names without what all of them have in common."""
        return short_names([entry.name for entry in self.entries])

    @cached_property
    def trainings(self) -> dict[str, dict]:
        return {entry.name: training for entry in self.entries if (training := entry.training()).get("history")}

    def test(self, a: str | None, b: str, split: str) -> pd.Series | None:
        """How much more wrong `b` is than `a`; None where that was not tested, or where there is no `a`."""
        if self.tests.empty or pd.isna(a):
            return None
        tests = self.tests.query("a == @a and b == @b and split == @split")
        return None if tests.empty else tests.iloc[0]


def compare_members(run: Run, members: Sequence[str], test: bool = True) -> Comparison:
    """Read all that is there. `test`: resample utterances for the paired tests (some seconds)."""
    entries, benchmark = entries_of(run, members), run.metrics_so_far("benchmark")
    table = member_table(entries, benchmark)
    return Comparison(entries, benchmark, table, paired_tests(entries, table) if test else pd.DataFrame())


def member_table(entries: Sequence[Entry], benchmark: dict) -> pd.DataFrame:
    """One row per entry, lowest WER on the first split first; NaN and None: unknown.

    encoder, attention (a name of `attention.kinds.KINDS`), system, parameters; cache_bytes (of AUDIO_SECONDS of
    speech), mha_cache_bytes, cache_cut (fraction), cache_bytes_per_second (by which it grows), counted_bytes;
    wer_<split>, its 95 % interval wer_<split>_low and _high, cer_<split>; training_seconds, epochs, validation_wer;
    latency_ms with latency_ms_low and _high, latency_ms_p95, rtfx, speed_ratio (to the first entry) with its _low and
    _high, peak_memory_bytes; reference: the row whose WER this one's is compared with.
    """
    table = entry_table(entries, benchmark).drop(columns=["cache_bytes_1000_frames", "latency_ms_p50"])
    table = table.rename_axis("member")
    table["reference"] = pd.Series(
        {entry.name: entry.origin or _reference(entry.name, table) for entry in entries}, dtype=object
    )
    errors = [column for column in table.columns if column.startswith("wer_")]
    return table.sort_values([*errors[:1], "cache_bytes"], kind="stable")


def entry_table(entries: Sequence[Entry], benchmark: dict) -> pd.DataFrame:
    """One row per entry, of a run or of a sweep: all that its metrics and `benchmark` say of it."""
    rows = {entry.name: _row(entry, benchmark) for entry in entries}
    table = pd.DataFrame.from_dict(rows, orient="index")
    words = ["encoder", "attention", "system"]
    return table.astype({column: float for column in table.columns if column not in words})


def splits_of(table: pd.DataFrame) -> list[str]:
    """The splits whose word errors stand in the columns of a table of entries."""
    return [column.removeprefix("cer_") for column in table.columns if column.startswith("cer_")]


def _row(entry: Entry, benchmark: dict) -> dict:
    before, convert, training = entry.metrics("baseline"), entry.metrics("convert"), entry.training()
    facts = benchmark.get("members", {}).get(entry.name, {})
    timing = benchmark.get("systems", {}).get(entry.name, {})
    latent = entry.system not in ("baseline", "control")
    cache, full = facts.get("cache_bytes"), facts.get("mha_cache_bytes")
    history = training.get("history") or [{}]
    row = {
        "encoder": facts.get("encoder") or encoder_named(f"{before.get('model')} {before.get('model_type')}"),
        "attention": facts.get("attention") or ("mla_simple" if latent else before.get("attention", "mha")),
        "system": entry.system,
        "parameters": timing.get("parameters") or (convert if latent else before).get("parameters", math.nan),
        "cache_bytes": cache,
        "mha_cache_bytes": full,
        "cache_cut": 1 - cache / full if full else None,
        "cache_bytes_per_second": timing.get("cache_bytes_per_second"),
        "cache_bytes_1000_frames": timing.get("cache_bytes_1000_frames"),
        "counted_bytes": facts.get("counted", {}).get("bytes"),
        "formula_bytes": facts.get("counted", {}).get("formula_bytes"),
    }
    for split, score in entry.scores().items():
        row[f"wer_{split}"] = score.get("wer")
        row[f"wer_{split}_low"], row[f"wer_{split}_high"] = score.get("wer_interval") or (None, None)
        row[f"cer_{split}"] = score.get("cer")
    row |= {
        "training_seconds": training.get("seconds"),
        "epochs": history[-1].get("epoch"),
        "validation_wer": training.get("best_wer"),
        "latency_ms": timing.get("latency_ms_mean"),
        "latency_ms_p50": timing.get("latency_ms_p50"),
        "latency_ms_p95": timing.get("latency_ms_p95"),
        "rtfx": timing.get("rtfx"),
        "speed_ratio": timing.get("speed_ratio"),
        "peak_memory_bytes": timing.get("peak_memory_bytes"),
    }
    row["latency_ms_low"], row["latency_ms_high"] = timing.get("latency_ms_interval") or (None, None)
    row["speed_ratio_low"], row["speed_ratio_high"] = timing.get("speed_ratio_interval") or (None, None)
    return row


def _reference(name: str, table: pd.DataFrame) -> str | None:
    """The multi-head attention of the same encoder; where no member has it, the largest cache of the same encoder."""
    if name.startswith(UNCONVERTED) or table.at[name, "attention"] == "mha":
        return None
    same = table[(table["encoder"] == table.at[name, "encoder"]) & (table["system"] == "baseline")]
    full = same[same["attention"] == "mha"]
    if len(full):
        return full.index[0]
    largest = same["cache_bytes"].dropna()
    return largest.idxmax() if len(largest) > 1 and largest.idxmax() != name else None


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the words all share: architecture-conformer_attention-mha, architecture-conformer_attention-gqa
    → mha, gqa. Names of which too little would be left, latent_dim-8 and latent_dim-16, stay whole."""
    words = {name: re.findall(r"[^_-]+[_-]*|^[_-]+", name) for name in names if not name.startswith(UNCONVERTED)}
    if len(words) < 2:
        return {name: name for name in names}
    fewest = min(map(len, words.values()))
    head = next((i for i in range(fewest) if len({w[i] for w in words.values()}) > 1), fewest - 1)
    tail = next((i for i in range(fewest - head) if len({w[-1 - i] for w in words.values()}) > 1), 0)
    words = {name: w[head : len(w) - tail] for name, w in words.items()}
    if len(set(map(len, words.values()))) == 1:  # word stands under word: what all share in between goes, too
        differ = [len(set(column)) > 1 for column in zip(*words.values(), strict=True)]
        words = {name: list(compress(w, differ)) for name, w in words.items()}
    short = {name: "".join(w).rstrip("_-") for name, w in words.items()}
    if not all(re.search(r"[^\W\d_]", name) for name in short.values()):
        short = {}
    return {name: short.get(name, name) for name in names}


# ---- which differences are more than chance ----------------------------------------------------------------


def pairs_to_test(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(question, a, b): how much more wrong is b than a?

    reference: every row against what it is compared with. cache: each grouped-query attention against the latent
    attention of the same encoder whose cache is nearest in size. encoder: each Branchformer against the Conformer of
    the same attention, the nearest in cache.
    """
    pairs = [("reference", row["reference"], name) for name, row in table.iterrows() if pd.notna(row["reference"])]
    for name, row in table[table["attention"] == "gqa"].iterrows():
        rivals = table[table["attention"].isin(LATENT) & (table["encoder"] == row["encoder"])]
        pairs += [("cache", name, nearest) for nearest in _nearest_cache(row, rivals)]
    for name, row in table[table["encoder"] == "branchformer"].iterrows():
        rivals = table[(table["encoder"] == "conformer") & (table["attention"] == row["attention"])]
        rivals = rivals[rivals["system"] == row["system"]]
        pairs += [("encoder", nearest, name) for nearest in _nearest_cache(row, rivals)]
    return pairs


def _nearest_cache(row: pd.Series, rivals: pd.DataFrame) -> list[str]:
    """The one of `rivals` whose cache is nearest to that of `row` in ratio; none where there are no rivals."""
    if rivals.empty:
        return []
    ratios = np.log(rivals["cache_bytes"] / row["cache_bytes"]).abs()
    return [ratios.idxmin() if ratios.notna().any() else rivals.index[0]]


def paired_tests(entries: Sequence[Entry], table: pd.DataFrame) -> pd.DataFrame:
    """The paired bootstrap of `pairs_to_test` on every split: question, a, b, split, difference (WER(b) − WER(a)) with
    its 95 % interval low and high, p, and p_holm: p corrected by Holm's method for all tests on that split.

    Pairs that were not evaluated on the same utterances are left out.
    """
    from asrlib.measuring.significance import holm, paired_bootstrap
    from asrlib.measuring.word_errors import load_predictions, score

    by_name, rows, scored = {entry.name: entry for entry in entries}, [], {}

    def result(name: str, split: str):
        if (name, split) not in scored:
            path = by_name[name].run.path / "predictions" / f"{by_name[name].system}_{split}.jsonl"
            scored[name, split] = score(load_predictions(path)) if path.is_file() else None
        return scored[name, split]

    for split in splits_of(table):
        tested = []
        for question, a, b in pairs_to_test(table):
            of_a, of_b = result(a, split), result(b, split)
            if of_a is None or of_b is None or not _same_utterances(of_a, of_b):
                continue
            test = paired_bootstrap(of_a, of_b)
            low, high = test.pop("interval")
            tested.append({"question": question, "a": a, "b": b, "split": split, **test, "low": low, "high": high})
        corrected = holm([test["p"] for test in tested])
        rows += [test | {"p_holm": p} for test, p in zip(tested, corrected, strict=True)]
    return pd.DataFrame(rows)


def _same_utterances(a, b) -> bool:
    said_a, said_b = ({(p["id"], p["reference"], p.get("normaliser")) for p in each.predictions} for each in (a, b))
    return said_a == said_b and len(a.predictions) == len(b.predictions)


# ---- members that differ in one parameter ------------------------------------------------------------------


def varied_parameters(entries: Sequence[Entry]) -> dict[str, list[list[str]]]:
    """{parameter: groups of at least two members that differ in this number and in no other parameter}."""
    asked = {entry.name: entry.parameters() for entry in entries if not entry.name.startswith(UNCONVERTED)}
    varied = {}
    for parameter in dict.fromkeys(name for values in asked.values() for name in values):
        groups: dict[str, list[str]] = {}
        for member, values in asked.items():
            if isinstance(values.get(parameter), int | float) and not isinstance(values[parameter], bool):
                others = json.dumps({n: v for n, v in values.items() if n != parameter}, sort_keys=True)
                groups.setdefault(others, []).append(member)
        several = [sorted(group, key=lambda m: asked[m][parameter]) for group in groups.values() if len(group) > 1]
        if several:
            varied[parameter] = several
    return varied
