"""Word errors and their differences as tables."""

import argparse
import sys
from pathlib import Path

import pandas as pd

from asrlib.measuring.significance import compare_errors
from asrlib.measuring.word_errors import EvaluationResult, load_predictions, score
from asrlib.reporting.numbers import in_per_cent, in_points


def error_table(results: dict[tuple[str, str], EvaluationResult]) -> pd.DataFrame:
    """One row per (split, system): rates in per cent with their 95 % intervals, over utterances and over speakers."""
    rows = [
        {
            "split": split,
            "system": system,
            "WER %": f"{100 * result.wer:.2f} ({in_per_cent(result.wer_interval)})",
            "over speakers": f"{in_per_cent(result.wer_interval_by_speaker)} ({result.speakers})",
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
            found = "worse" if test["difference"] > 0 else "better"
            rows.append(
                {
                    "split": split,
                    "from → to": name.replace(" vs ", " → ").replace("finetuned", "fine-tuned"),
                    "change, points": f"{in_points(test['difference'])} ({in_per_cent(test['interval'], '+.2f')})",
                    "p": _shown(test["p"]),
                    "over speakers": _with_p(of_speakers) if of_speakers else "–",
                    "p matched pairs": _shown(test["matched_pairs"]["p"]),
                    "verdict": "no significant difference" if test["p"] > 0.05 else found,
                }
            )
    return pd.DataFrame(rows)


def _metric(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if name.endswith("%") else f"{value:.4g}"


def _with_p(test: dict) -> str:
    p = _shown(test["p"])
    return f"{in_per_cent(test['interval'], '+.2f')}, p {p if p.startswith('<') else f'= {p}'}"


def _shown(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asrlib compare", description="Compares transcripts, by words.")
    parser.add_argument("a", metavar="A.jsonl", help="transcripts as `evaluate` and the notebooks keep them")
    parser.add_argument("b", metavar="B.jsonl", help="another model's, of the same utterances")
    args = parser.parse_args(argv)
    a, b = (score(load_predictions(Path(name).absolute())) for name in (args.a, args.b))
    test = compare_errors(a, b)
    lines = [f"{name}: {100 * of.wer:.2f} % ({in_per_cent(of.wer_interval)})" for name, of in (("A", a), ("B", b))]
    for over, of in (("utterances", test), ("speakers", test["by_speaker"])):
        if of is not None:
            change = f"{in_points(of['difference'])} points ({in_per_cent(of['interval'], '+.2f')})"
            lines.append(f"B − A: {change}, p = {of['p']:.4f}, over {over}")
    pairs = test["matched_pairs"]
    lines.append("matched pairs: z = {z:.3f}, p = {p:.4f}, {segments:,} segments".format(**pairs))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
