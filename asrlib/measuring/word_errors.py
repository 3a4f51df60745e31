"""Transcripts and their word errors.

Error rates are fractions over a whole corpus: errors of all utterances divided by words of all utterances. Intervals
and tests are those of significance.py.

    python -m asrlib compare A.jsonl B.jsonl    # transcripts of one corpus by two models: is B better?

Shapes: N utterances.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jiwer
import numpy as np

from asrlib.data.text import as_counted, folded, whisper_normalised
from asrlib.measuring.resampling import rate_interval, sums_by_speaker
from asrlib.runs import atomic_write, resolve

SIDES = ("reference", "hypothesis")
FIELDS = {"id", "speaker", "seconds", "reference", "hypothesis"}  # of a transcript


def write_predictions(path: str | Path, predictions: list[dict]) -> None:
    """One JSON object a line, in one atomic write."""
    with atomic_write(path) as file:
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def load_predictions(path: str | Path) -> list[dict]:
    """Reads the file of `evaluate` or `write_predictions`. Raises ValueError for a line that is no transcript."""
    predictions = []
    with open(resolve(path), encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                prediction = json.loads(line)
            except json.JSONDecodeError:
                prediction = None
            if not isinstance(prediction, dict) or FIELDS - prediction.keys():
                raise ValueError(f"line {number} of {path} is no transcript: evaluate again to write the file anew")
            predictions.append(prediction)
    return predictions


# ---- metrics of one's own ---------------------------------------------------------------------------------


def normalised_wer(predictions: list[dict]) -> float | None:
    """WER in per cent of transcripts that are counted as they stand, after Whisper's English normaliser, which changes
    the number of words; None where it is the headline, or leaves no word."""
    if any(prediction.get("normaliser") for prediction in predictions):
        return None
    return _wer(predictions, whisper_normalised)


def raw_wer(predictions: list[dict]) -> float | None:
    """WER in per cent of transcripts that are counted after normalisation, as they stand; None of others."""
    return _wer(predictions, folded) if any(prediction.get("normaliser") for prediction in predictions) else None


def _wer(predictions: list[dict], form: Callable[[str], str]) -> float | None:
    references, hypotheses = ([form(prediction[side]) for prediction in predictions] for side in SIDES)
    return 100 * jiwer.wer(references, hypotheses) if any(references) else None


REPEATED = re.compile(r"(?:^|\s)(\S+(?:\s\S+){0,7}?)(?:\s\1){3,}(?=\s|$)")  # one to eight words, four times or more


def loops(predictions: list[dict]) -> int | None:
    """In how many transcripts the model repeats itself: one to eight words, four times in a row or more often, where
    the reference does not. None of transcripts that no decoder wrote, which cannot."""
    if not any(prediction.get("normaliser") for prediction in predictions):
        return None
    repeats = [[bool(REPEATED.search(as_counted(prediction, side))) for side in SIDES] for prediction in predictions]
    return sum(hypothesis and not reference for reference, hypothesis in repeats)


# Metrics beside word and character errors: name → function of transcripts. Each appears in the tables and in
# metrics/*.json, and --verify checks it. docs/extending.md works out another one.
METRICS: dict[str, Callable[[list[dict]], float | None]] = {
    "normalised WER %": normalised_wer,
    "raw WER %": raw_wer,
    "loops": loops,
}


# ---- word errors -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Errors of one model on one corpus; `as_metrics` is what metrics/*.json holds."""

    wer: float  # fraction of the reference words; above 1 with many insertions
    wer_interval: tuple[float, float]  # 95 %, over utterances
    wer_interval_by_speaker: tuple[float, float] | None  # 95 %, over speakers; None where there is only one
    cer: float  # fraction of the reference characters, spaces between words included
    substitutions: int  # words
    deletions: int
    insertions: int
    words: int  # in the references
    utterances: int
    speakers: int
    seconds_audio: float
    others: dict[str, float | None]  # by METRICS
    predictions: list[dict] = field(repr=False)
    errors_N: np.ndarray = field(repr=False)  # word errors of each utterance, in the order of predictions
    words_N: np.ndarray = field(repr=False)  # reference words of each utterance
    alignments: list[list[jiwer.AlignmentChunk]] = field(repr=False)  # words of each utterance

    def as_metrics(self) -> dict:
        apart = ("predictions", "errors_N", "words_N", "alignments", "others")
        values = {name: value for name, value in self.__dict__.items() if name not in apart} | self.others
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def score(predictions: list[dict]) -> EvaluationResult:
    """Corpus WER and CER of transcripts as `transcribe` gives them, in the form that they name: see
    `data.text.as_counted`. Case and repeated spaces never count.

    An utterance with an empty reference counts its insertions, one with an empty hypothesis its deletions.
    Raises ValueError without any reference word, since error rates are undefined then.
    """
    references, hypotheses = ([as_counted(prediction, side) for prediction in predictions] for side in SIDES)
    if not any(references):
        raise ValueError(f"no word in the references of {len(predictions)} utterances: the WER is undefined")
    words = jiwer.process_words(references, hypotheses)
    errors_N = np.array([_word_errors(alignment) for alignment in words.alignments])
    words_N = np.array([len(reference) for reference in words.references])
    errors_words_N2 = np.stack([errors_N, words_N], axis=1)
    of_speakers_G2 = sums_by_speaker(errors_words_N2, predictions)
    return EvaluationResult(
        wer=words.wer,
        wer_interval=rate_interval(errors_words_N2),
        wer_interval_by_speaker=rate_interval(of_speakers_G2) if len(of_speakers_G2) > 1 else None,
        cer=jiwer.process_characters(references, hypotheses).cer,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=int(words_N.sum()),
        utterances=len(predictions),
        speakers=len(of_speakers_G2),
        seconds_audio=sum(p["seconds"] for p in predictions),
        others={name: value for name, metric in METRICS.items() if (value := metric(predictions)) is not None},
        predictions=predictions,
        errors_N=errors_N,
        words_N=words_N,
        alignments=words.alignments,
    )


def _word_errors(alignment: list[jiwer.AlignmentChunk]) -> int:
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )
