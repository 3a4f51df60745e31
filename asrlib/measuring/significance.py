"""Is one recogniser better than another, or was it chance? Intervals and tests of word error rates.

Errors within an utterance are correlated, and so are errors of a speaker. Resampling utterances estimates the results
on other utterances of the same speakers, and resampling speakers those on other speakers. Few speakers cannot tell:
of four there are 256 draws, and where one of them disagrees, however little the others agree on, p may be 2/256.

Shapes: N utterances, G groups (utterances or speakers), K columns, R resamples.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jiwer
import numpy as np

from asrlib.data.text import as_counted
from asrlib.measuring.resampling import error_rates, interval, resample_sums, sums_by_speaker

if TYPE_CHECKING:
    from asrlib.measuring.word_errors import EvaluationResult

FEWEST_SPEAKERS = 8  # that are resampled
RIGHT_BETWEEN_SEGMENTS = 2  # words both systems have right: `min_num_good` of NIST's sc_stats


# ---- two systems -------------------------------------------------------------------------------------------


def compare_errors(a: "EvaluationResult", b: "EvaluationResult") -> dict:
    """All tests of two systems on the same utterances.

    {difference, interval, p} of `paired_bootstrap` over utterances; by_speaker: the same over speakers, with their
    number, or None where there are fewer than FEWEST_SPEAKERS; matched_pairs: {segments, mean, z, p}. Raises ValueError
    where ids or references differ.
    """
    speakers, by_speaker = len({prediction["speaker"] for prediction in a.predictions}), None
    if speakers >= FEWEST_SPEAKERS:
        by_speaker = {"speakers": speakers, **paired_bootstrap(a, b, by_speaker=True)}
    return {**paired_bootstrap(a, b), "by_speaker": by_speaker, "matched_pairs": matched_pairs(a, b)}


def paired_bootstrap(a: "EvaluationResult", b: "EvaluationResult", by_speaker: bool = False) -> dict:
    """The difference in WER between `b` and `a` on the same utterances: {difference, interval, p}.

    `difference` is WER(b) − WER(a), `interval` its 95 % interval, `p` two-sided against no difference (Bisani
    and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004).
    by_speaker: draw speakers with all their utterances. Raises ValueError where ids or references differ.
    """
    order = pairing(a, b)
    columns_N3 = np.stack([a.errors_N, b.errors_N[order], a.words_N], axis=1)
    sums_R3 = resample_sums(sums_by_speaker(columns_N3, a.predictions) if by_speaker else columns_N3)
    differences_R = error_rates(sums_R3[:, 1] - sums_R3[:, 0], sums_R3[:, 2])
    # The sample itself counts as a resample, so that p is never 0.
    tail = 1 + min(np.sum(differences_R <= 0), np.sum(differences_R >= 0))
    return {
        "difference": b.wer - a.wer,
        "interval": list(interval(differences_R)),
        "p": min(1.0, 2 * float(tail) / (1 + len(differences_R))),
    }


def matched_pairs(a: "EvaluationResult", b: "EvaluationResult") -> dict:
    """The matched-pairs test on segments of sentences, MAPSSWE: {segments, mean, z, p}.

    A segment lies between two runs of at least two words that both systems have right, or between such a run and an end
    of the utterance (Gillick and Cox, "Some statistical issues in the comparison of speech recognition algorithms",
    ICASSP 1989; Pallett, Fisher and Fiscus 1990). `mean` is the mean over segments of the errors of b minus those of a,
    z is `mean` divided by its standard error (variance over n − 1), and p is two-sided under the normal distribution.
    As in NIST's sc_stats, z is 0 where all segments have the same difference. Unlike there, words are aligned with
    equal costs, as for the WER, and an insertion at the end of an utterance counts for either system.
    Raises ValueError where ids or references differ.
    """
    segments = [
        segment
        for i, j in enumerate(pairing(a, b))
        for segment in _segments(_by_word(a.alignments[i]), _by_word(b.alignments[j]))
    ]
    differences = np.array([theirs - ours for ours, theirs in segments], dtype=float)
    mean = float(differences.mean()) if segments else 0.0
    spread = float(differences.std(ddof=1)) if len(segments) > 1 else 0.0
    z = mean / (spread / math.sqrt(len(segments))) if spread else 0.0
    return {"segments": len(segments), "mean": mean, "z": z, "p": math.erfc(abs(z) / math.sqrt(2))}


def pairing(a: "EvaluationResult", b: "EvaluationResult") -> list[int]:
    """The place in `b` of each utterance of `a`."""
    of_b = {p["id"]: i for i, p in enumerate(b.predictions)}
    ids = [p["id"] for p in a.predictions]
    if len(ids) != len(of_b) or set(ids) != set(of_b):
        unpaired = sorted(set(ids) ^ set(of_b)) or ["(repeated ids)"]
        raise ValueError(f"the results are not over the same utterances: {unpaired[0]!r} is not once in each")
    order = [of_b[i] for i in ids]
    for prediction, j in zip(a.predictions, order, strict=True):
        other = b.predictions[j]
        if prediction.get("normaliser") != other.get("normaliser"):
            raise ValueError(f"{prediction['id']!r} is counted after normalisation in one of the results alone")
        if as_counted(prediction, "reference") != as_counted(other, "reference"):
            raise ValueError(f"the references of {prediction['id']!r} differ: evaluate both on one corpus")
    return order


def _by_word(alignment: list[jiwer.AlignmentChunk]) -> list[int]:
    """Errors at each place of a reference of n words: before word 0, at word 0, before word 1, …, after the last."""
    errors = [0] * (2 * max((chunk.ref_end_idx for chunk in alignment), default=0) + 1)
    for chunk in alignment:
        if chunk.type == "insert":
            errors[2 * chunk.ref_start_idx] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            for word in range(chunk.ref_start_idx, chunk.ref_end_idx):
                errors[2 * word + 1] = 1
    return errors


def _segments(ours: list[int], theirs: list[int]) -> list[tuple[int, int]]:
    """Errors of both systems in each segment of an utterance."""
    # One letter a place: c for a word that both have right, x for a word that either has wrong and for insertions of
    # either. A place without insertions has no letter, so words stay neighbours. `places` maps letters to places.
    letters, places = [], []
    for place, wrong in enumerate(a + b for a, b in zip(ours, theirs, strict=True)):
        if wrong or place % 2:
            letters.append("x" if wrong else "c")
            places.append(place)
    segments = []
    for match in re.finditer(rf"(?:(?!c{{{RIGHT_BETWEEN_SEGMENTS}}}).)*x", "".join(letters)):
        inside = places[match.start() : match.end()]
        segments.append((sum(ours[place] for place in inside), sum(theirs[place] for place in inside)))
    return segments


# ---- many things at once -----------------------------------------------------------------------------------


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test (binomial with 1/2) against equal numbers lost and won."""
    count = lost + won
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm (1979): the k-th smallest of n p values is multiplied by n − k + 1, and is at least the one before it."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected
