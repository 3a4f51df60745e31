"""Intervals and tests against explicit loops, and the matched pairs against the automaton that NIST's sc_stats runs."""

import math

import numpy as np
import pytest
from test_evaluation import babble, pairs

from asrlib.measuring.resampling import resample_sums
from asrlib.measuring.significance import FEWEST_SPEAKERS, compare_errors, matched_pairs, paired_bootstrap
from asrlib.measuring.word_errors import score


def drawn(rows: int, resamples: int = 10_000):
    """The same draws one by one."""
    generator = np.random.default_rng(0)
    return [generator.integers(rows, size=rows) for _ in range(resamples)]


def test_interval_against_an_explicit_loop():
    result = score(babble(30, seed=2))
    rates = []
    for picks in drawn(30):
        errors = sum(int(result.errors_N[i]) for i in picks)
        rates.append(errors / sum(int(result.words_N[i]) for i in picks))
    assert result.wer_interval == pytest.approx((np.percentile(rates, 2.5), np.percentile(rates, 97.5)))


def test_draws_are_the_same_in_blocks():
    columns = np.arange(6_000.0).reshape(3_000, 2)  # large enough to be drawn in several blocks
    expected = [columns[picks].sum(axis=0) for picks in drawn(3_000, resamples=700)]
    assert np.array_equal(resample_sums(columns, resamples=700), np.array(expected))


def test_interval_ignores_draws_without_words():
    low, high = score(pairs(("a b", "a c"), ("", ""))).wer_interval  # one draw in four holds no word
    assert (low, high) == (0.5, 0.5)


def test_paired_bootstrap_against_an_explicit_loop():
    rows = babble(25, seed=3)
    better = [row | {"hypothesis": row["reference"]} if i % 4 == 0 else row for i, row in enumerate(rows)]
    a, b = score(rows), score(better[::-1])  # the order of the second file does not matter
    outcome = paired_bootstrap(a, b)
    errors_b = {row["id"]: error for row, error in zip(b.predictions, b.errors_N, strict=True)}
    differences = []
    for picks in drawn(25):
        more = sum(int(errors_b[f"u{i}"] - a.errors_N[i]) for i in picks)
        differences.append(more / sum(int(a.words_N[i]) for i in picks))
    not_below = np.mean([1, *(d >= 0 for d in differences)])
    assert outcome["difference"] == pytest.approx(b.wer - a.wer)
    assert outcome["difference"] < 0
    assert outcome["interval"] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())
    assert outcome["p"] == pytest.approx(2 * not_below)
    assert paired_bootstrap(b, a)["p"] == pytest.approx(outcome["p"], abs=0.01)


def test_a_system_does_not_differ_from_itself_and_does_from_a_perfect_one():
    rows = babble(25, seed=4)
    result, perfect = score(rows), score([row | {"hypothesis": row["reference"]} for row in rows])
    assert paired_bootstrap(result, result) == {"difference": 0, "interval": [0, 0], "p": 1}
    assert paired_bootstrap(result, perfect)["p"] < 0.001


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pairs(("a", "a")), "'u1' is not once in each"),
        (pairs(("a", "a"), ("b", "b"), first_id=1), "'u0' is not once in each"),
        (pairs(("a", "a"), ("c", "b")), "references of 'u1' differ"),
        ([*pairs(("a", "a")), *pairs(("a", "a"))], "'u1' is not once in each"),
    ],
)
def test_only_the_same_utterances_can_be_compared(other, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(score(pairs(("a", "a"), ("b", "b"))), score(other))


# ---- speakers ----------------------------------------------------------------------------------------------


def of_speakers(rows, count):
    return [row | {"speaker": f"s{i % count}"} for i, row in enumerate(rows)]


def test_the_interval_by_speaker_against_an_explicit_loop():
    result = score(of_speakers(babble(30, seed=5), 7))
    errors, words = ([int(values[i::7].sum()) for i in range(7)] for values in (result.errors_N, result.words_N))
    rates = [sum(errors[i] for i in picks) / sum(words[i] for i in picks) for picks in drawn(7)]
    expected = np.percentile(rates, 2.5), np.percentile(rates, 97.5)
    assert result.speakers == 7 and result.wer_interval_by_speaker == pytest.approx(expected)


def test_one_speaker_is_no_sample_of_speakers():
    assert score(of_speakers(babble(30, seed=5), 1)).wer_interval_by_speaker is None


@pytest.mark.parametrize("speakers", [1, 4, FEWEST_SPEAKERS - 1, FEWEST_SPEAKERS])
def test_few_speakers_cannot_tell(speakers):
    result = score(of_speakers(babble(30, seed=5), speakers))
    assert (compare_errors(result, result)["by_speaker"] is None) == (speakers < FEWEST_SPEAKERS)


def test_utterances_of_a_speaker_that_err_together_widen_the_interval():
    rows = [row | {"speaker": f"s{i // 10}"} for i, row in enumerate(babble(90, seed=6))]
    better = [row | {"hypothesis": row["reference"]} if i // 10 in (1, 2) else row for i, row in enumerate(rows)]
    outcome = compare_errors(score(rows), score(better))
    widths = [high - low for low, high in (outcome["interval"], outcome["by_speaker"]["interval"])]
    assert widths[1] > 1.5 * widths[0] and outcome["by_speaker"]["p"] > outcome["p"]
    assert outcome["by_speaker"]["speakers"] == 9
    assert outcome["difference"] == outcome["by_speaker"]["difference"]


# ---- matched pairs -----------------------------------------------------------------------------------------


def by_automaton(reference, ours, theirs):
    """[(errors, errors)] of the segments of one utterance, by the states of sc_stats: b (no error yet), e (an error),
    g (one right word after it). `ours` and `theirs`: (words inserted before, wrong) of each reference word."""
    found, state, begin = [], "b", 0

    def close(end):
        found.append(tuple(sum(i + w for i, w in one[begin : end + 1]) for one in (ours, theirs)))

    for place in range(len(reference)):
        if ours[place][0] or theirs[place][0]:
            state = "e"
        right = not ours[place][1] and not theirs[place][1]
        if state == "b":
            begin, state = (place, "b") if right else (begin, "e")
        elif state == "e":
            state = "g" if right else "e"
        elif right:
            close(place)
            begin, state = place, "b"
        else:
            state = "e"
    if state != "b":
        close(len(reference) - 1)
    return [one for one in found if one != (0, 0)]


def corrupted(words, errors):
    """What is heard where so many words are inserted before each word, and where some words are other ones."""
    heard = []
    for word, (inserted, wrong) in zip(words, errors, strict=True):
        heard += [f"+{word}{i}" for i in range(inserted)] + [f"-{word}" if wrong else word]
    return " ".join(heard)


def test_segments_are_those_of_the_automaton():
    draw, texts, expected = np.random.default_rng(0), [], []
    for _ in range(400):
        words = [f"w{i}" for i in range(draw.integers(1, 15))]
        # No insertion beside a wrong word: which of them a hypothesis' word is would be the aligner's choice.
        both = []
        for _ in range(2):
            wrong = draw.random(len(words)) < 0.2
            inserted = (draw.random(len(words)) < 0.1) * draw.integers(1, 3, len(words))
            inserted[wrong | np.roll(wrong, 1)] = 0
            both.append(list(zip(inserted.tolist(), wrong.tolist(), strict=True)))
        texts.append([" ".join(words), *(corrupted(words, one) for one in both)])
        expected += by_automaton(words, *both)
    a, b = (score(pairs(*((reference, heard[which]) for reference, *heard in texts))) for which in (0, 1))
    assert (a.errors_N.sum(), b.errors_N.sum()) == tuple(np.sum(expected, axis=0))
    differences = np.array([theirs - ours for ours, theirs in expected])
    z = differences.mean() / (differences.std(ddof=1) / math.sqrt(len(differences)))
    outcome = matched_pairs(a, b)
    assert outcome["segments"] == len(expected) > 400 and outcome["mean"] == pytest.approx(differences.mean())
    assert outcome["z"] == pytest.approx(z) and matched_pairs(b, a)["z"] == pytest.approx(-z)


@pytest.mark.parametrize(
    ("reference", "a", "b", "segments"),
    [
        ("a b c d e", "a b c d e", "a b c d e", []),
        ("a b c d e", "x b c d e", "a b c d y", [(1, 0), (0, 1)]),  # two right words part them
        ("a b c d", "x b c d", "a b y d", [(1, 1)]),  # one does not
        ("a b c", "a b c x y", "a b c", [(2, 0)]),
        ("a b c", "a b c", "a b c x y", [(0, 2)]),  # sc_stats overlooks these
        ("a b c d", "a b + c d", "a b c d", [(1, 0)]),
        ("a b c d", "", "a b", [(4, 2)]),
        ("", "x", "", [(1, 0)]),
    ],
)
def test_segments_by_hand(reference, a, b, segments):
    differences = [theirs - ours for ours, theirs in segments]
    rest = "u v w x y z", "q v w x y z", "u v w x y q"  # an error of each: there is a spread then
    one, other = (score(pairs((reference, heard), (rest[0], said))) for heard, said in ((a, rest[1]), (b, rest[2])))
    outcome = matched_pairs(one, other)
    assert outcome["segments"] == len(segments) + 2
    assert outcome["mean"] == pytest.approx((sum(differences) + 0) / (len(segments) + 2))


def test_p_is_that_of_the_normal_distribution():
    rows = babble(300, seed=8)
    better = [row | {"hypothesis": row["reference"]} if i % 9 == 0 else row for i, row in enumerate(rows)]
    a, b = score(rows), score(better)
    outcome = matched_pairs(a, b)
    drawn_z = np.abs(np.random.default_rng(0).standard_normal(400_000))
    assert outcome["p"] == pytest.approx(np.mean(drawn_z >= abs(outcome["z"])), abs=0.003)
    assert matched_pairs(a, a)["p"] == 1
