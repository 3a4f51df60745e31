"""Word errors and their differences as tables."""

from collections.abc import Sequence

import pandas as pd

from asrlib.measuring.word_errors import EvaluationResult


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


def in_per_cent(interval: Sequence[float] | None, form: str = ".2f") -> str:
    """An interval of fractions, written in per cent or points."""
    return "–" if interval is None else " to ".join(format(100 * end, form) for end in interval).replace("-", "−")


def in_points(change: float) -> str:
    """A change of a fraction, in points, with the minus sign, as wide as the plus."""
    return f"{100 * change:+.2f}".replace("-", "−")
