"""The differences between two runs: their parameters, what they ran on, their results.

python run_all.py --diff reports/demo reports/wider
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from asrlib.reporting.comparison import comparison_table
from asrlib.reporting.numbers import change, size, tested_points
from asrlib.reporting.provenance import provenance_of
from asrlib.runs import BadParameter, Run, is_sweep, read_json

MISSING = "–"


def differences(a: Path, b: Path, defaults: Mapping[str, Any]) -> str:
    """Words and tables; `defaults` are those of the notebooks' parameters.

    Raises BadParameter where a folder is not a run, or is a sweep: its own pages compare its members.
    """
    for folder in (a, b):
        if not (folder / "params.json").is_file():
            raise BadParameter(f"{folder} holds no run: give its folder, like reports/demo")
        if is_sweep(folder):
            raise BadParameter(f"{folder} is a sweep: give one of its members, like {folder}/NAME")
    runs = Run(a), Run(b)
    sections = {
        "parameters": _table(runs, *(dict(defaults) | read_json(run.path / "params.json") for run in runs)),
        "made with": _table(runs, *(_made_with(run) for run in runs)),
        "results": "\n".join(_results(*runs)) or "nothing was measured in both",
    }
    return "\n\n".join(f"{title}\n{text}" for title, text in sections.items())


def _table(runs: tuple[Run, Run], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The names whose values differ between the two runs."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not names:
        return "the same"
    titles = [run.path.name for run in runs]
    titles = titles if titles[0] != titles[1] else [str(run.path) for run in runs]
    values = zip(titles, (before, after), strict=True)
    columns = {title: [_shown(given.get(name)) for name in names] for title, given in values}
    return pd.DataFrame(columns, index=names).to_string()


def _shown(value: Any) -> str:
    return MISSING if value is None else str(value)


def _made_with(run: Run) -> dict[str, str]:
    metrics = {name: run.metrics_so_far(name) for name in ("baseline", "benchmark")}
    return {name: value for name, value in provenance_of(run, metrics).items() if name != "finished"}


def _results(a: Run, b: Run) -> Iterator[str]:
    table_a, table_b = comparison_table(a), comparison_table(b)
    for system in table_a.index.intersection(table_b.index):
        yield system
        splits = [name.removeprefix("cer_") for name in table_a if name.startswith("cer_") and name in table_b]
        for split in splits:
            before, after = table_a.at[system, f"wer_{split}"], table_b.at[system, f"wer_{split}"]
            if pd.notna(before) and pd.notna(after):
                yield f"  WER {split:<20} {100 * before:6.2f} → {100 * after:6.2f} %  {_tested(a, b, system, split)}"
        for column, name, show in (
            ("cache_bytes_per_second", "cache per second", size),
            ("parameters", "parameters", "{:,.0f}".format),
            ("rtfx", "RTFx", "{:.1f}".format),
            ("peak_memory_bytes", "peak memory", size),
        ):
            before, after = table_a.at[system, column], table_b.at[system, column]
            if pd.notna(before) and pd.notna(after):
                changed = change(after, before) if before != after else "the same"
                yield f"  {name:<24} {show(before):>10} → {show(after):>10}  {changed}"


def _tested(a: Run, b: Run, system: str, split: str) -> str:
    """The paired bootstrap where both have transcripts of the same utterances."""
    from asrlib.measuring.significance import paired_bootstrap
    from asrlib.measuring.word_errors import load_predictions, score

    paths = [run.path / "predictions" / f"{system}_{split}.jsonl" for run in (a, b)]
    if not all(path.is_file() for path in paths):
        return "not tested: transcripts are missing"
    try:
        test = paired_bootstrap(*(score(load_predictions(path)) for path in paths))
    except ValueError as error:
        return f"not tested: {error}"
    return tested_points(test["difference"], test["interval"], test["p"], unit=" points")
