"""Which words, speakers and utterances changed: counted by hand, and against scipy's tests where they are there."""

import base64
import io
import math

import numpy as np
import pytest
import soundfile
import tiny
from bs4 import BeautifulSoup
from markupsafe import Markup

from asrlib.measuring.significance import holm, mcnemar
from asrlib.measuring.word_errors import score
from asrlib.reporting.changes import (
    changed_speakers,
    changed_words,
    extremes,
    in_words,
    listening_table,
    most_changed,
    readable_speakers,
)


def result(*rows):
    """Of (speaker, reference, hypothesis)."""
    return score(
        [
            {"id": f"u{i}", "speaker": speaker, "seconds": 1.0, "reference": reference, "hypothesis": hypothesis}
            for i, (speaker, reference, hypothesis) in enumerate(rows)
        ]
    )


BEFORE = result(
    ("ann", "the cat sat", "the cat sat"),
    ("ann", "a cat ran", "a cut ran"),
    ("bob", "the dog", "the dog"),
    ("bob", "the end", "end"),
)
AFTER = result(
    ("ann", "the cat sat", "the cut sat on"),
    ("ann", "a cat ran", "a cat ran"),
    ("bob", "the dog", "the fog"),
    ("bob", "the end", "the end"),
)


def test_words_are_counted_where_one_system_has_them_right_and_the_other_not():
    table = changed_words(BEFORE, AFTER).set_index("word")
    assert table[["said", "lost", "won"]].to_dict("index") == {
        "dog": {"said": 1, "lost": 1, "won": 0},
        "cat": {"said": 2, "lost": 1, "won": 1},
        "the": {"said": 3, "lost": 0, "won": 1},
    }
    assert list(table.index) == ["dog", "cat", "the"], "those that lost most first"
    assert table["heard_instead"].to_dict() == {"dog": "fog", "cat": "cut", "the": ""}


def test_a_word_that_is_missing_was_heard_as_nothing():
    table = changed_words(result(("a", "x y", "x y")), result(("a", "x y", "x")))
    assert table.loc[0, ["word", "lost", "heard_instead"]].tolist() == ["y", 1, ""]


def test_results_in_another_order_are_paired_by_id():
    turned = score(AFTER.predictions[::-1])
    assert changed_words(BEFORE, turned).equals(changed_words(BEFORE, AFTER))
    assert changed_speakers(BEFORE, turned).equals(changed_speakers(BEFORE, AFTER))
    assert most_changed(BEFORE, turned) == most_changed(BEFORE, AFTER) == [0, 2, 1, 3]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (6, 0), (3, 3), (12, 4), (1, 9)])
def test_mcnemars_exact_test_sums_the_binomial(lost, won):
    count = lost + won
    as_rare = [k for k in range(count + 1) if math.comb(count, k) <= math.comb(count, lost)]
    assert mcnemar(lost, won) == pytest.approx(sum(math.comb(count, k) for k in as_rare) / 2**count)


def test_holms_correction_is_that_of_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_speakers_are_scored_apart_with_an_interval_of_their_own():
    table = changed_speakers(BEFORE, AFTER).set_index("speaker")
    assert table.loc["ann", ["utterances", "words"]].tolist() == [2, 6]
    assert table.loc["ann", "change"] == pytest.approx(1 / 6) and table.loc["bob", "change"] == 0
    low, high = table.loc["ann", "interval"]
    assert low == pytest.approx(-1 / 3) and high == pytest.approx(2 / 3)
    shown = readable_speakers(changed_speakers(BEFORE, AFTER)).loc[0]
    assert shown.tolist() == ["ann", 2, 6, "16.67", "33.33", "+16.67", "−33.33 to +66.67"]


def test_a_speaker_of_one_utterance_has_no_interval_and_one_of_no_words_no_row():
    rows = [("one", "a b", "a"), ("mute", "", "noise"), ("two", "a b", "a b"), ("two", "b", "b")]
    table = changed_speakers(result(*rows), result(*rows)).set_index("speaker")
    assert sorted(table.index) == ["one", "two"] and table.loc["one", "interval"] is None


def test_the_sentences_say_how_many_changed_and_whether_it_is_more_than_chance():
    words, speakers = changed_words(BEFORE, AFTER), changed_speakers(BEFORE, AFTER)
    said = in_words(BEFORE, AFTER, words, speakers)
    assert said.startswith("of 4 utterances 2 got worse and 2 better. Of 7 different words 3 were lost or won at")
    assert "none of them by more than chance" in said and said.endswith("Of 2 speakers 1 got worse and 0 better.")
    rows = [("a", "yes no", "yes no")] * 9
    lost = result(*[("a", "yes no", "yes know")] * 9)
    assert "**no** by more than chance" in in_words(
        result(*rows), lost, changed_words(result(*rows), lost), changed_speakers(result(*rows), lost)
    )


def test_of_many_rows_both_ends_are_shown():
    table = changed_words(BEFORE, AFTER)
    assert extremes(table, 2)["word"].tolist() == ["dog", "the"] and extremes(table, 3) is table


def test_the_audio_of_an_utterance_comes_back_from_its_player():
    speech = tiny.corpus(2)
    rows = [(u.speaker, u.text, "") for u in speech]
    predictions = [p | {"id": u.id} for p, u in zip(result(*rows).predictions, speech, strict=True)]
    table = listening_table({"baseline": score(predictions)}, speech, [1])
    cell = BeautifulSoup(table.loc[0, "utterance"], "html.parser")
    kind, _, data = cell.audio["src"].partition(";base64,")
    assert kind == "data:audio/mpeg" and isinstance(table.loc[0, "baseline"], Markup)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16_000 and abs(len(samples) / rate - speech[1].seconds) < 0.2
    assert len(data) < 4_500 * speech[1].seconds + 2_000, "some 3 KB a second, in base64"
    words = len(speech[1].text.split())
    assert f"{words} of {words} words wrong" in table.loc[0, "baseline"]
    assert np.abs(samples).max() > 0.01


def test_transcripts_of_other_speech_are_refused():
    speech = tiny.corpus(1)
    with pytest.raises(ValueError, match=f"transcribed u0 where the corpus has {speech[0].id}"):
        listening_table({"baseline": result(("a", "x", "y"))}, speech, [0])
