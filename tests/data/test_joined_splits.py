"""`a+b` is both splits, and a folder of corpora is searched one folder deeper."""

from pathlib import Path

import pytest
import soundfile
from speech import tone

from asrlib.data.opening import check_splits, open_corpus


def write_split(folder: Path, ids: list[str]) -> None:
    """A LibriSpeech split of one chapter, and a transcript without audio."""
    chapter = folder / "7" / "1"
    chapter.mkdir(parents=True)
    for id in ids:
        soundfile.write(chapter / f"{id}.flac", tone(0.2), 16_000)
    lines = [f"{id} TEXT OF {id.upper()}" for id in [*ids, f"no-audio-{folder.name}"]]
    (chapter / "7-1.trans.txt").write_text("\n".join(lines))


@pytest.fixture
def corpora(tmp_path) -> Path:
    write_split(tmp_path / "letters" / "letters-train", ["a", "b"])
    write_split(tmp_path / "LibriSpeech" / "train-clean-100", ["b", "c"])
    write_split(tmp_path / "LibriSpeech" / "test-clean", ["d"])
    return tmp_path


def test_joined_splits_are_all_their_utterances_told_apart(corpora):
    corpus = open_corpus(corpora, "letters-train+train-clean-100")
    assert [u.id for u in corpus] == ["a", "b", "b#2", "c"]
    assert [u.text[-1] for u in corpus] == ["A", "B", "B", "C"]
    assert sorted(row.id for row in corpus.rejected) == ["no-audio-letters-train", "no-audio-train-clean-100"]
    assert corpus.split == "letters-train+train-clean-100"
    assert len(corpus[2].audio()) == 3_200


def test_joining_needs_no_folder():
    assert {u.id for u in open_corpus("synthetic", "validation+test-clean")} >= {
        u.id for split in ("validation", "test-clean") for u in open_corpus("synthetic", split)[:5]
    }


@pytest.mark.parametrize("split", ["a+", "+a", "train-clean-100+train-clean-100", "+"])
def test_a_split_left_out_or_given_twice_is_refused(corpora, split):
    for refuses in (lambda: open_corpus(corpora, split), lambda: check_splits(corpora, [split])):
        with pytest.raises(ValueError, match="join different splits like"):
            refuses()


def test_a_missing_part_is_named_before_anything_is_read(corpora):
    check_splits(corpora, ["letters-train+test-clean"])
    with pytest.raises(ValueError, match="has no split 'dev-clean': it has letters-train, test-clean, train-clean-100"):
        check_splits(corpora, ["letters-train+dev-clean"])


def test_of_two_splits_of_one_name_the_nearer_counts(corpora):
    write_split(corpora / "test-clean", ["near"])
    assert [u.id for u in open_corpus(corpora, "test-clean")] == ["near"]
