"""Word errors and their differences as tables."""

import argparse
import sys
from pathlib import Path

import pandas as pd

from asrlib.measuring.significance import compare_errors
from asrlib.measuring.word_errors import EvaluationResult, load_predictions, score
from asrlib.reporting.numbers import interval_with_p, p_number, p_value, percent, rate_interval, tested_points, verdict

PAIRED = {"finetuned": "fine-tuned", "control": "MHA trained alike"}


def error_table(results: dict[tuple[str, str], EvaluationResult]) -> pd.DataFrame:
    """One row per (split, system): rates in per cent with their 95 % intervals, over utterances and over speakers."""
    rows = [
        {
            "split": split,
            "system": system,
            "WER %": f"{100 * result.wer:.2f} ({rate_interval(result.wer_interval)})",
            "over speakers": f"{rate_interval(result.wer_interval_by_speaker)} ({result.speakers})",
            "CER %": f"{100 * result.cer:.2f}",
            **{name: _metric(name, value) for name, value in result.others.items()},
            "sub / del / ins": f"{result.substitutions} / {result.deletions} / {result.insertions}",
            "words": result.words,
            "utterances": result.utterances,
        }
        for (split, system), result in results.items()
    ]
    return pd.DataFrame(rows)


def paired_table(paired: dict[str, dict[str, dict]]) -> pd.DataFrame:
    """One row per split and pair of systems, changes in points; `paired[split]["a vs b"]` is of `compare_errors`."""
    rows = []
    for split, tests in paired.items():
        for name, test in tests.items():
            of_speakers = test["by_speaker"]
            rows.append(
                {
                    "split": split,
                    "from → to": " → ".join(PAIRED.get(system, system) for system in name.split(" vs ")),
                    "change, points": tested_points(test["difference"], test["interval"]),
                    "p": p_number(test["p"]),
                    "over speakers": interval_with_p(of_speakers["interval"], of_speakers["p"])
                    if of_speakers
                    else "too few",
                    "p matched pairs": p_number(test["matched_pairs"]["p"]),
                    "verdict": verdict(test["difference"], test["p"]),
                }
            )
    return pd.DataFrame(rows)


def _metric(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if name.endswith("%") else f"{value:.4g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asrlib compare", description="Compares transcripts, by words.")
    parser.add_argument("a", metavar="A.jsonl", help="transcripts as `evaluate` and the notebooks keep them")
    parser.add_argument("b", metavar="B.jsonl", help="another model's, of the same utterances")
    args = parser.parse_args(argv)
    a, b = (score(load_predictions(Path(name).absolute())) for name in (args.a, args.b))
    test = compare_errors(a, b)
    lines = [
        f"{name}: {percent(result.wer)} ({rate_interval(result.wer_interval)})" for name, result in (("A", a), ("B", b))
    ]
    for over, of in (("utterances", test), ("speakers", test["by_speaker"])):
        if of is not None:
            difference = tested_points(of["difference"], of["interval"], of["p"], unit=" points")
            lines.append(f"B − A: {difference}, over {over}")
    pairs = test["matched_pairs"]
    lines.append(f"matched pairs: z = {pairs['z']:.3f}, {p_value(pairs['p'])}, {pairs['segments']:,} segments")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
