"""Five questions about attention in speech recognisers, answered from the figures of a sweep and from nothing else.

Answers are Markdown. A question that the members cannot answer says so.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from asrlib.measuring.names import ATTENTION, AUDIO_SECONDS, LATENT, SIGNIFICANT
from asrlib.reporting.member_tables import headline, kind, tested, verdict_of
from asrlib.reporting.members import Comparison
from asrlib.reporting.numbers import change, duration, percent, points, points_interval, size
from asrlib.reporting.tables import as_rows, save_table
from asrlib.runs import Run

# ---- files -------------------------------------------------------------------------------------------------


def write_member_comparison(run: Run, sweep: Comparison, figures: Iterable[str]) -> None:
    """Write tables/ranking.csv, tables/tests.csv and metrics/compare.json, which names the `figures` that were kept."""
    save_table(sweep.table, run.tables / "ranking.csv")
    save_table(sweep.tests.rename_axis("number"), run.tables / "tests.csv")
    run.write_metrics(
        "compare",
        {
            "table": as_rows(sweep.table.reset_index()),
            "tests": as_rows(sweep.tests),
            "headline": headline(sweep),
            "answers": answers(sweep),
            "figures": list(figures),
        },
    )


EQUAL_CACHE = 1.05  # times as large at most: then two caches are called equal


def answers(sweep: Comparison) -> dict[str, str]:
    """{question: answer}, in the order in which they are asked."""
    asked: dict[str, Callable[[Comparison], str]] = {
        "How much smaller does MLA make the state?": cache_answer,
        "What does that cost in word errors?": cost_answer,
        "At the same size of state, is GQA better than MLA?": grouped_answer,
        "Does linear attention work for speech, and from what length is it faster?": linear_answer,
        "Conformer or Branchformer?": encoder_answer,
    }
    return {question: answer(sweep) for question, answer in asked.items()}


def multiplicity(sweep: Comparison) -> str:
    """How the p values of the answers were computed."""
    if sweep.tests.empty:
        return "No two members were evaluated on the same utterances: no difference was tested."
    count = int(sweep.tests["split"].value_counts().max())
    if count == 1:
        return f"One paired comparison on each split; p is uncorrected, and significant below {SIGNIFICANT}."
    return (
        f"{count} paired comparisons on each split: p is that of one alone, and what is called significant has a p "
        f"corrected by Holm's method for all {count} below {SIGNIFICANT}."
    )


# ---- the state ---------------------------------------------------------------------------------------------


def cache_answer(sweep: Comparison) -> str:
    rows = sweep.table[sweep.table["attention"].isin(LATENT)]
    if rows.empty:
        return _none(sweep, "MLA")
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
        + f"\n\n{_counted_tensors(known)} {_peak_memory(sweep, known)}"
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


def _peak_memory(sweep: Comparison, rows: pd.DataFrame) -> str:
    full = sweep.table[sweep.table["attention"] == "mha"].set_index("encoder")["peak_memory_bytes"].dropna()
    full = full[~full.index.duplicated()]
    changes = [
        f"{sweep.short[name]} {change(row['peak_memory_bytes'], full[row['encoder']])}"
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


def _none(sweep: Comparison, name: str) -> str:
    kinds = sorted({ATTENTION.get(a, a) for a in sweep.table["attention"]})
    return f"No member has {name}: the attention here is {', '.join(kinds)}."


# ---- word errors -------------------------------------------------------------------------------------------


def cost_answer(sweep: Comparison) -> str:
    rows = sweep.table[sweep.table["attention"].isin(LATENT)]
    if rows.empty:
        return _none(sweep, "MLA")
    tests = _against_reference(sweep, rows.index)
    if not tests:
        return "No member with MLA was evaluated on the same utterances as what it should be compared with."
    verdicts = [verdict_of(test) for test in tests]
    kinds = {sweep.table.at[test["a"], "attention"] for test in tests}
    against = "MHA in the same encoder" if kinds == {"mha"} else "the largest state (no member has MHA)"
    return (
        f"Against {against}, {verdicts.count('worse')} of {len(tests)} comparisons are significantly worse and "
        f"{verdicts.count('better')} significantly better. A difference that is not significant is not shown to be "
        "none: the interval says how large it may be.\n\n" + "\n".join(_line(sweep, test) for test in tests)
    )


def _against_reference(sweep: Comparison, names: Iterable[str]) -> list[pd.Series]:
    """The tests of these members against what they are compared with, split by split."""
    return [test for _, test in _tests(sweep, "reference").iterrows() if test["b"] in names]


def _line(sweep: Comparison, test: pd.Series) -> str:
    a, b = (sweep.table.at[test[side], f"wer_{test['split']}"] for side in ("a", "b"))
    return (
        f"- {test['split']}: {sweep.short[test['a']]} {percent(a)} → {sweep.short[test['b']]} {percent(b)}, "
        f"{tested(test)}: {verdict_of(test)}."
    )


def _decided(sweep: Comparison, tests: pd.DataFrame, sides: tuple[str, str], heading: Callable[[str, str], str]) -> str:
    """Which of two `sides` is better, then for each pair of members its heading (of their names) and its tests."""
    lines = []
    for (a, b), of_pair in tests.groupby(["a", "b"], sort=False):
        lines += [f"- {heading(a, b)}", *(f"    {_line(sweep, test)}" for _, test in of_pair.iterrows())]
    return f"{_winner(tests, *sides)}\n\n" + "\n".join(lines)


def grouped_answer(sweep: Comparison) -> str:
    kinds = set(sweep.table["attention"])
    if "gqa" not in kinds or not kinds & set(LATENT):
        return _none(sweep, "GQA" if "gqa" not in kinds else "MLA")
    tests, caches = _tests(sweep, "cache"), sweep.table["cache_bytes"]
    if tests.empty:
        return "No member with GQA has the encoder of one with MLA and was evaluated on the same utterances."

    def heading(a: str, b: str) -> str:
        return f"{sweep.short[a]} and {sweep.short[b]}, which keep {_sizes(*caches[[a, b]])}:"

    return _decided(sweep, tests, ("GQA", "MLA"), heading)


def _sizes(a: float, b: float) -> str:
    if pd.isna(a) or pd.isna(b):
        return "an unknown amount"
    if a == b:
        return f"{size(a)} each"
    both = f"{size(a)} and {size(b)} of {AUDIO_SECONDS:g} s"
    alike = max(a, b) <= EQUAL_CACHE * min(a, b)
    return f"the same, {both}" if alike else f"{both}: not the same, but the nearest there are"


def _tests(sweep: Comparison, question: str) -> pd.DataFrame:
    return sweep.tests if sweep.tests.empty else sweep.tests[sweep.tests["question"] == question]


def _winner(tests: pd.DataFrame, a: str, b: str) -> str:
    """Which of two is better, from tests of b against a."""
    verdicts = [verdict_of(test) for _, test in tests.iterrows()]
    for_a, for_b = verdicts.count("worse"), verdicts.count("better")
    of = f"{len(tests)} comparisons" if len(tests) > 1 else "one comparison"
    if not for_a and not for_b:
        return f"**Not decided**: none of {of} is significant." if len(tests) > 1 else "**Not decided**."
    if for_a and for_b:
        return f"**It depends**: of {of}, {for_a} are significantly for {a} and {for_b} for {b}."
    winner, count = (a, for_a) if for_a else (b, for_b)
    rest = "; the others decide nothing" if count < len(tests) else ""
    return f"**{winner}**, significantly in {count} of {of}{rest}."


# ---- linear attention --------------------------------------------------------------------------------------


def linear_answer(sweep: Comparison) -> str:
    rows = sweep.table[sweep.table["attention"] == "linear"]
    if rows.empty:
        return _none(sweep, "linear attention")
    lines = []
    for name, row in rows.iterrows():
        changes = [f"    {_line(sweep, test)}" for test in _against_reference(sweep, [name])]
        lines.append(f"- {sweep.short[name]} keeps {_fixed(row)}.")
        lines += changes or [f"    - Word errors: {_alone(sweep, row)}, with nothing to be compared with."]
        if pd.notna(row["reference"]):
            lines.append(f"    - Speed: {_faster(sweep, row['reference'], name)}.")
    return f"{_working(sweep, rows)}\n\n" + "\n".join(lines)


def _working(sweep: Comparison, rows: pd.DataFrame) -> str:
    tests = _against_reference(sweep, rows.index)
    if not tests:
        return "How well it works was not tested against another attention."
    worse = [test["difference"] for test in tests if verdict_of(test) == "worse"]
    if not worse:
        return f"**As well as MHA, as far as {len(tests)} comparisons can tell**: none is significantly worse."
    losses = points_interval((min(worse), max(worse))) if len(worse) > 1 else points(worse[0])
    return (
        f"**It costs word errors**: {len(worse)} of {len(tests)} comparisons find it significantly worse, "
        f"by {losses} points."
    )


def _fixed(row: pd.Series) -> str:
    if pd.isna(row["cache_bytes"]):
        return "a state of fixed size"
    known = f"a state of {size(row['cache_bytes'])}, whatever the length of the audio"
    if pd.isna(row["mha_cache_bytes"]):
        return known
    equal = AUDIO_SECONDS * row["cache_bytes"] / row["mha_cache_bytes"]
    return f"{known}: as much as MHA after {equal:.2g} s"


def _alone(sweep: Comparison, row: pd.Series) -> str:
    return ", ".join(f"{percent(row[f'wer_{split}'])} on {split}" for split in sweep.splits)


def _faster(sweep: Comparison, reference: str, name: str) -> str:
    lengths = sweep.benchmark.get("lengths")
    timed = lengths["systems"] if lengths else {}
    if reference not in timed or name not in timed:
        return "not timed at different lengths"
    slow, fast = timed[reference], timed[name]
    where = crossover(lengths["seconds"], slow["ms"], fast["ms"])
    against = sweep.short[reference]
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


def encoder_answer(sweep: Comparison) -> str:
    encoders = set(sweep.table["encoder"].dropna())
    if not {"conformer", "branchformer"} <= encoders:
        return f"All members have one encoder, {', '.join(sorted(encoders)) or 'unknown'}: nothing to compare."
    tests = _tests(sweep, "encoder")
    if tests.empty:
        return "No two members of equal attention were evaluated on the same utterances in both encoders."

    def heading(*names: str) -> str:
        a, b = (sweep.table.loc[name] for name in names)
        return f"{kind(a)} → {kind(b)}: {_beside(a, b)}"

    return _decided(sweep, tests, ("Conformer", "Branchformer"), heading)


def _beside(a: pd.Series, b: pd.Series) -> str:
    """What else differs: size, training, speed."""
    columns = {
        "parameters": ("", lambda n: f"{n / 1e6:.2f} M parameters"),
        "training_seconds": ("training ", duration),
        "latency_ms": ("", "{:.1f} ms per utterance".format),
    }
    parts = [
        f"{word}{show(a[column])} → {show(b[column])} ({change(b[column], a[column])})"
        for column, (word, show) in columns.items()
        if pd.notna(a[column]) and pd.notna(b[column])
    ]
    return ", ".join(parts) or "size and time unknown"
