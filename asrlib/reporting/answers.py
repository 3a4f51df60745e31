"""Five questions about attention in speech recognisers, answered from the figures of a sweep and from nothing else.

Answers are Markdown. A question that the members cannot answer says so.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from asrlib.measuring.systems import ATTENTION, AUDIO_SECONDS, LATENT
from asrlib.reporting.member_tables import headline, kind, points, significant, tested, verdict
from asrlib.reporting.members import SIGNIFICANT, Comparison
from asrlib.reporting.numbers import change, duration, percent, size
from asrlib.reporting.tables import save_table
from asrlib.runs import Run

# ---- files -------------------------------------------------------------------------------------------------


def write_member_comparison(run: Run, found: Comparison, figures: Iterable[str]) -> None:
    """Write tables/ranking.csv, tables/tests.csv and metrics/compare.json, which names the `figures` that were kept."""
    from asrlib.reporting.answers import answers

    save_table(found.table, run.tables / "ranking.csv")
    save_table(found.tests.rename_axis("number"), run.tables / "tests.csv")
    run.write_metrics(
        "compare",
        {
            "table": records(found.table.reset_index()),
            "tests": records(found.tests),
            "headline": headline(found),
            "answers": answers(found),
            "figures": list(figures),
        },
    )


def records(table: pd.DataFrame) -> list[dict]:
    """Rows as plain data, None for what is unknown."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


EQUAL_CACHE = 1.05  # times as large at most: then two caches are called equal


def answers(found: Comparison) -> dict[str, str]:
    """{question: answer}, in the order in which they are asked."""
    asked: dict[str, Callable[[Comparison], str]] = {
        "How much smaller does MLA make the state?": cache_answer,
        "What does that cost in word errors?": cost_answer,
        "At the same size of state, is GQA better than MLA?": grouped_answer,
        "Does linear attention work for speech, and from what length is it faster?": linear_answer,
        "Conformer or Branchformer?": encoder_answer,
    }
    return {question: answer(found) for question, answer in asked.items()}


def multiplicity(found: Comparison) -> str:
    """How the p values of the answers were come by."""
    if found.tests.empty:
        return "No two members were evaluated on the same utterances: no difference was tested."
    count = int(found.tests["split"].value_counts().max())
    if count == 1:
        return f"One paired comparison on each split; p is uncorrected, and significant below {SIGNIFICANT}."
    return (
        f"{count} paired comparisons on each split: p is that of one alone, and what is called significant has a p "
        f"corrected by Holm's method for all {count} below {SIGNIFICANT}."
    )


# ---- the state ---------------------------------------------------------------------------------------------


def cache_answer(found: Comparison) -> str:
    rows = found.table[found.table["attention"].isin(LATENT)]
    if rows.empty:
        return _none(found, "MLA")
    known = rows.dropna(subset=["cache_bytes", "mha_cache_bytes"])
    if known.empty:
        return "The state of no member has been computed yet: run 05_benchmark first."
    lines = [
        f"- {name} keeps {size(row['cache_bytes'])} of {AUDIO_SECONDS:g} s of audio, where MHA in this encoder keeps "
        f"{size(row['mha_cache_bytes'])}: {change(row['cache_bytes'], row['mha_cache_bytes'])}."
        for name, row in known.sort_values("cache_bytes").iterrows()
    ]
    return (
        "By the formula, numbers kept per frame × frames × bytes:\n\n"
        + "\n".join(lines)
        + f"\n\n{_counted_tensors(known)} {_peak_memory(found, known)}"
    )


def _counted_tensors(rows: pd.DataFrame) -> str:
    counted = rows.dropna(subset=["counted_bytes"])
    if counted.empty:
        return "The tensors of a stream were not counted."
    exact = counted[counted["counted_bytes"] == counted["formula_bytes"]]
    if len(exact) == len(counted):
        return (
            f"What is measured agrees: the tensors that a stream held in float32 after {AUDIO_SECONDS:g} s have the "
            f"formula's bytes exactly, in {_every(len(counted))}."
        )
    off = counted.drop(exact.index)
    different = ", ".join(
        f"{name} {size(row['counted_bytes'])} instead of {size(row['formula_bytes'])}" for name, row in off.iterrows()
    )
    return f"Counted on the tensors that a stream held, the bytes differ from the formula's: {different}."


def _peak_memory(found: Comparison, rows: pd.DataFrame) -> str:
    full = found.table[found.table["attention"] == "mha"].set_index("encoder")["peak_memory_bytes"].dropna()
    full = full[~full.index.duplicated()]
    changes = [
        f"{found.short[name]} {change(row['peak_memory_bytes'], full[row['encoder']])}"
        for name, row in rows.iterrows()
        if row["encoder"] in full and pd.notna(row["peak_memory_bytes"])
    ]
    if not changes:
        return "Peak memory against MHA was not measured."
    return (
        "The peak memory of a full pass over the longest utterance, which keeps no state once it is over, is another "
        f"matter; against MHA in the same encoder: {', '.join(changes)}."
    )


def _every(count: int) -> str:
    return "the one member that has them" if count == 1 else f"all {count} members that have them"


def _none(found: Comparison, name: str) -> str:
    kinds = sorted({ATTENTION.get(a, a) for a in found.table["attention"]})
    return f"No member has {name}: the attention here is {', '.join(kinds)}."


# ---- word errors -------------------------------------------------------------------------------------------


def cost_answer(found: Comparison) -> str:
    rows = found.table[found.table["attention"].isin(LATENT)]
    if rows.empty:
        return _none(found, "MLA")
    tests = [
        (split, test)
        for split in found.splits
        for name, row in rows.iterrows()
        if pd.notna(row["reference"]) and (test := found.test(row["reference"], name, split)) is not None
    ]
    if not tests:
        return "No member with MLA was evaluated on the same utterances as what it should be compared with."
    lines = [_line(found, split, test) for split, test in tests]
    worse = [test for _, test in tests if significant(test) and test["difference"] > 0]
    better = [test for _, test in tests if significant(test) and test["difference"] < 0]
    kinds = {found.table.at[test["a"], "attention"] for _, test in tests}
    against = "MHA in the same encoder" if kinds == {"mha"} else "the largest state (no member has MHA)"
    return (
        f"Against {against}, {len(worse)} of {len(tests)} comparisons are significantly worse and {len(better)} "
        "significantly better. A difference that is not significant is not shown to be none: the interval says how "
        "large it may be.\n\n" + "\n".join(lines)
    )


def _line(found: Comparison, split: str, test: pd.Series) -> str:
    a, b = (found.table.at[name, f"wer_{split}"] for name in (test["a"], test["b"]))
    return (
        f"- {split}: {found.short[test['a']]} {percent(a)} → {found.short[test['b']]} {percent(b)}, {tested(test)}: "
        f"{verdict(test)}."
    )


def grouped_answer(found: Comparison) -> str:
    kinds = set(found.table["attention"])
    if "gqa" not in kinds or not kinds & set(LATENT):
        return _none(found, "GQA" if "gqa" not in kinds else "MLA")
    tests = _tests(found, "cache")
    if tests.empty:
        return "No member with GQA has the encoder of one with MLA and was evaluated on the same utterances."
    lines = []
    for a, b in dict.fromkeys(zip(tests["a"], tests["b"], strict=True)):
        one, other = (found.table.at[name, "cache_bytes"] for name in (a, b))
        lines.append(f"- {found.short[a]} and {found.short[b]}, which keep {_sizes(one, other)}:")
        of_pair = tests[(tests["a"] == a) & (tests["b"] == b)]
        lines += [f"    {_line(found, test['split'], test)}" for _, test in of_pair.iterrows()]
    return f"{_winner(tests, 'GQA', 'MLA')}\n\n" + "\n".join(lines)


def _sizes(one: float, other: float) -> str:
    if pd.isna(one) or pd.isna(other):
        return "an unknown amount"
    if max(one, other) <= EQUAL_CACHE * min(one, other):
        return (
            f"the same, {size(one)} and {size(other)} of {AUDIO_SECONDS:g} s" if one != other else f"{size(one)} each"
        )
    return f"{size(one)} and {size(other)} of {AUDIO_SECONDS:g} s: not the same, but the nearest there are"


def _tests(found: Comparison, question: str) -> pd.DataFrame:
    return found.tests if found.tests.empty else found.tests[found.tests["question"] == question]


def _winner(tests: pd.DataFrame, a: str, b: str) -> str:
    """Which of two is better, from tests of b against a."""
    sure = tests[tests["p_holm"] < SIGNIFICANT]
    for_a, for_b = int((sure["difference"] > 0).sum()), int((sure["difference"] < 0).sum())
    of = f"{len(tests)} comparisons" if len(tests) > 1 else "one comparison"
    if not for_a and not for_b:
        return f"**Not decided**: none of {of} is significant." if len(tests) > 1 else "**Not decided**."
    if for_a and for_b:
        return f"**It depends**: of {of}, {for_a} are significantly for {a} and {for_b} for {b}."
    winner, count = (a, for_a) if for_a else (b, for_b)
    rest = "; the others decide nothing" if count < len(tests) else ""
    return f"**{winner}**, significantly in {count} of {of}{rest}."


# ---- linear attention --------------------------------------------------------------------------------------


def linear_answer(found: Comparison) -> str:
    rows = found.table[found.table["attention"] == "linear"]
    if rows.empty:
        return _none(found, "linear attention")
    lines = []
    for name, row in rows.iterrows():
        reference = row["reference"]
        wers = [
            f"    {_line(found, split, test)}"
            for split in found.splits
            if pd.notna(reference) and (test := found.test(reference, name, split)) is not None
        ]
        lines.append(f"- {found.short[name]} keeps {_fixed(row)}.")
        lines += wers or [f"    - Word errors: {_alone(found, row)}, with nothing to be compared with."]
        if pd.notna(reference):
            lines.append(f"    - Speed: {_faster(found, reference, name)}.")
    return f"{_working(found, rows)}\n\n" + "\n".join(lines)


def _working(found: Comparison, rows: pd.DataFrame) -> str:
    tests = _tests(found, "reference")
    tests = tests if tests.empty else tests[tests["b"].isin(rows.index)]
    if tests.empty:
        return "How well it works was not tested against another attention."
    worse = tests[(tests["p_holm"] < SIGNIFICANT) & (tests["difference"] > 0)]
    if worse.empty:
        return f"**As well as MHA, as far as {len(tests)} comparisons can tell**: none is significantly worse."
    losses = f"{points(worse['difference'].min())} to {points(worse['difference'].max())}"
    return (
        f"**It costs word errors**: {len(worse)} of {len(tests)} comparisons find it significantly worse, "
        f"by {losses if len(worse) > 1 else points(worse['difference'].max())} points."
    )


def _fixed(row: pd.Series) -> str:
    if pd.isna(row["cache_bytes"]):
        return "a state of fixed size"
    known = f"a state of {size(row['cache_bytes'])}, whatever the length of the audio"
    if pd.isna(row["mha_cache_bytes"]):
        return known
    equal = AUDIO_SECONDS * row["cache_bytes"] / row["mha_cache_bytes"]
    return f"{known}: as much as MHA after {equal:.2g} s"


def _alone(found: Comparison, row: pd.Series) -> str:
    return ", ".join(f"{percent(row[f'wer_{split}'])} on {split}" for split in found.splits)


def _faster(found: Comparison, reference: str, name: str) -> str:
    lengths = found.benchmark.get("lengths")
    timed = lengths["systems"] if lengths else {}
    if reference not in timed or name not in timed:
        return "not timed at different lengths"
    slow, fast = timed[reference], timed[name]
    where = crossover(lengths["seconds"], slow["ms"], fast["ms"])
    against = found.short[reference]
    both = [i for i, pair in enumerate(zip(slow["ms"], fast["ms"], strict=True)) if None not in pair]
    last = f"; at {lengths['seconds'][both[-1]]:g} s ×{slow['ms'][both[-1]] / fast['ms'][both[-1]]:.2f}" if both else ""
    if where is None:
        return f"not faster than {against} up to {lengths['seconds'][both[-1]]:g} s{last}" if both else "not measured"
    if where <= lengths["seconds"][0]:
        return f"faster than {against} from the shortest length measured on, {lengths['seconds'][0]:g} s{last}"
    return f"faster than {against} from about {where:.2g} s on, between the lengths measured{last}"


def crossover(
    seconds: Sequence[float], slow_ms: Sequence[float | None], fast_ms: Sequence[float | None]
) -> float | None:
    """Length from which `fast` is the faster at every length measured, interpolated where both axes are logarithmic.

    The shortest length where it is so at all of them; None where it is not at the longest. `slow` that was given up is
    slower than `fast` that was not; lengths at which `fast` was given up do not count.
    """
    leads = [
        (length, math.inf if slow is None else math.log(slow / fast))
        for length, slow, fast in zip(seconds, slow_ms, fast_ms, strict=True)
        if fast is not None
    ]
    behind = [index for index, (_, lead) in enumerate(leads) if lead <= 0]
    if not leads or (behind and behind[-1] == len(leads) - 1):
        return None
    if not behind:
        return leads[0][0]
    (before, deficit), (after, lead) = leads[behind[-1] : behind[-1] + 2]
    if math.isinf(lead):
        return after
    return before * (after / before) ** (deficit / (deficit - lead))


# ---- encoders ----------------------------------------------------------------------------------------------


def encoder_answer(found: Comparison) -> str:
    encoders = set(found.table["encoder"].dropna())
    if not {"conformer", "branchformer"} <= encoders:
        return f"All members have one encoder, {', '.join(sorted(encoders)) or 'unknown'}: nothing to compare."
    tests = _tests(found, "encoder")
    if tests.empty:
        return "No two members of equal attention were evaluated on the same utterances in both encoders."
    lines = []
    for a, b in dict.fromkeys(zip(tests["a"], tests["b"], strict=True)):
        one, other = found.table.loc[a], found.table.loc[b]
        lines.append(f"- {kind(one)} → {kind(other)}: {_beside(one, other)}")
        of_pair = tests[(tests["a"] == a) & (tests["b"] == b)]
        lines += [f"    {_line(found, test['split'], test)}" for _, test in of_pair.iterrows()]
    return f"{_winner(tests, 'Conformer', 'Branchformer')}\n\n" + "\n".join(lines)


def _beside(one: pd.Series, other: pd.Series) -> str:
    """What else differs: size, training, speed."""
    shown = {
        "parameters": ("", lambda n: f"{n / 1e6:.2f} M parameters"),
        "training_seconds": ("training ", duration),
        "latency_ms": ("", "{:.1f} ms per utterance".format),
    }
    parts = [
        f"{word}{show(one[column])} → {show(other[column])} ({change(other[column], one[column])})"
        for column, (word, show) in shown.items()
        if pd.notna(one[column]) and pd.notna(other[column])
    ]
    return ", ".join(parts) or "size and time unknown"
