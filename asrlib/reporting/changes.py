"""Where two recognisers differ: in which words, for which speakers, in which utterances.

`before` and `after` are `word_errors.EvaluationResult`s of the same utterances. Shapes: N utterances.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from markupsafe import Markup

from asrlib.data.text import as_counted
from asrlib.measuring.significance import holm, mcnemar, paired_bootstrap, pairing
from asrlib.measuring.word_errors import EvaluationResult, score
from asrlib.reporting.numbers import percent, points, points_interval
from asrlib.reporting.tables import as_counted_diff, audio_html

if TYPE_CHECKING:
    from asrlib.data.corpus import Corpus

LISTENED = 20  # utterances with a player
READABLE = {"heard_instead": "mostly heard instead", "p": "p, corrected"}


def changed_words(before: EvaluationResult, after: EvaluationResult) -> pd.DataFrame:
    """One row per reference word that one of the two has wrong somewhere and the other right.

    word; said: how often; lost: how often right before and wrong after; won: the other way; heard_instead: what it
    became most often where it was lost, "" where it is missing; p: of the exact McNemar test, which asks whether lost
    and won differ by more than chance, after Holm's correction for the number of words tested. Those that lost most
    come first, those that won most last. Inserted words have no reference word and do not appear.
    """
    said, lost, won, instead = Counter(), Counter(), Counter(), {}
    references, heard_before, heard_after = _references(before), _heard(before), _heard(after)
    for i, j in enumerate(pairing(before, after)):
        reference, was, now = references[i], heard_before[i], heard_after[j]
        said.update(reference)
        for word, old, new in zip(reference, was, now, strict=True):
            if old == word != new:
                lost[word] += 1
                instead.setdefault(word, Counter())[new] += 1
            elif new == word != old:
                won[word] += 1
    words = sorted(lost.keys() | won.keys(), key=lambda word: (won[word] - lost[word], -said[word], word))
    table = pd.DataFrame(
        {
            "word": words,
            "said": [said[word] for word in words],
            "lost": [lost[word] for word in words],
            "won": [won[word] for word in words],
            "heard_instead": [instead[word].most_common(1)[0][0] if word in instead else "" for word in words],
        }
    )
    return table.assign(p=holm([mcnemar(lost[word], won[word]) for word in words]))


def _references(result: EvaluationResult) -> list[list[str]]:
    return [as_counted(prediction, "reference").split() for prediction in result.predictions]


def _heard(result: EvaluationResult) -> list[list[str]]:
    """For every utterance what was heard for each reference word: "" for one that is missing."""
    heard = []
    for reference, prediction, alignment in zip(
        _references(result), result.predictions, result.alignments, strict=True
    ):
        hypothesis = as_counted(prediction, "hypothesis").split()
        words = [""] * len(reference)
        for chunk in alignment:
            if chunk.type in ("equal", "substitute"):
                words[chunk.ref_start_idx : chunk.ref_end_idx] = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        heard.append(words)
    return heard


def changed_speakers(before: EvaluationResult, after: EvaluationResult) -> pd.DataFrame:
    """One row per speaker, those who lost most first.

    speaker, utterances, words, wer_before and wer_after (fractions), change (its difference), interval (95 %, of the
    change, over the utterances of this speaker; None of fewer than two).
    """
    pairs: dict[str, list[tuple[int, int]]] = {}
    for i, j in enumerate(pairing(before, after)):
        pairs.setdefault(before.predictions[i]["speaker"], []).append((i, j))
    rows = []
    for speaker, places in pairs.items():
        if not before.words_N[[i for i, _ in places]].any():
            continue  # no word error rate
        was, now = (
            score([result.predictions[place] for place in of])
            for result, of in zip((before, after), zip(*places, strict=True), strict=True)
        )
        interval = paired_bootstrap(was, now)["interval"] if len(places) > 1 else None
        rows.append((speaker, len(places), was.words, was.wer, now.wer, now.wer - was.wer, interval))
    columns = ["speaker", "utterances", "words", "wer_before", "wer_after", "change", "interval"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["change", "speaker"], ascending=[False, True], ignore_index=True)


def readable_speakers(speakers: pd.DataFrame) -> pd.DataFrame:
    """`changed_speakers` in per cent and points."""
    return pd.DataFrame(
        {
            "speaker": speakers["speaker"],
            "utterances": speakers["utterances"],
            "words": speakers["words"],
            "WER before, %": speakers["wer_before"].map(percent).str.removesuffix(" %"),
            "after, %": speakers["wer_after"].map(percent).str.removesuffix(" %"),
            "change, points": [points(change) for change in speakers["change"]],
            "95 % interval": [points_interval(interval) for interval in speakers["interval"]],
        }
    )


def most_changed(before: EvaluationResult, after: EvaluationResult, count: int = LISTENED) -> list[int]:
    """Places in `before` of the utterances whose word errors changed most, at most `count`; those that lost first."""
    change_N = after.errors_N[pairing(before, after)] - before.errors_N
    order = np.argsort(-np.abs(change_N), kind="stable")[:count]
    return sorted((int(i) for i in order if change_N[i]), key=lambda i: -change_N[i])


def listening_table(results: Mapping[str, EvaluationResult], speech: "Corpus", places: list[int]) -> pd.DataFrame:
    """To read and to hear: one row per place with its audio and what each of `results` made of the reference.

    results: {name of a system: its result}, all over the utterances of `speech`. The columns hold Markup: utterance,
    and one named after each system. Raises ValueError where an id differs from that in `speech`.
    """
    rows = []
    for place in places:
        utterance = speech[place]
        row = {"utterance": Markup("{}<br>{}").format(utterance.id, audio_html(utterance.audio(), utterance.id))}
        for name, result in results.items():
            prediction = result.predictions[place]
            if prediction["id"] != utterance.id:
                raise ValueError(f"{name} transcribed {prediction['id']} where the corpus has {utterance.id}")
            errors, words = int(result.errors_N[place]), int(result.words_N[place])
            marked = as_counted_diff(prediction)
            row[name] = Markup("{} <small>{} of {} words wrong</small>").format(marked, errors, words)
        rows.append(row)
    return pd.DataFrame(rows, columns=["utterance", *results], dtype=object)


def extremes(table: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """The first and the last rows of a sorted table, `count` together, or all where there are no more."""
    half = count // 2
    return table if len(table) <= count else pd.concat([table.head(count - half), table.tail(half)])


def in_words(before: EvaluationResult, after: EvaluationResult, words: pd.DataFrame, speakers: pd.DataFrame) -> str:
    """What `changed_words` and `changed_speakers` found, in sentences."""
    change_N = after.errors_N[pairing(before, after)] - before.errors_N
    worse, better = int((change_N > 0).sum()), int((change_N < 0).sum())
    different = len({word for reference in _references(before) for word in reference})
    sure = words.loc[words["p"] < 0.05, "word"].tolist()
    chance = f"**{', '.join(sure)}** by more than chance" if sure else "none of them by more than chance"
    up, down = int((speakers["change"] > 0).sum()), int((speakers["change"] < 0).sum())
    return (
        f"of {before.utterances:,} utterances {worse:,} got worse and {better:,} better. Of {different:,} different "
        f"words {len(words):,} were lost or won at least once, {chance} (exact McNemar test, corrected by Holm). Of "
        f"{len(speakers):,} speaker{'s' * (len(speakers) > 1)} {up:,} got worse and {down:,} better."
    )
