"""The embedded corpus: rich enough, the same bytes everywhere, and no split knows another's voices or sentences."""

import hashlib
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import soundfile

from asrlib import open_corpus
from asrlib.data import synthetic
from asrlib.data.synthetic import ACCENTS, SAMPLE_RATE, SPLITS, VARIANTS, add_noise, make_split, open_synthetic, script
from asrlib.models.scratch import CHARACTERS

TESTS = {"test-clean", "test-other"}


@pytest.fixture(scope="module")
def scripts() -> dict[str, list]:
    return {split: list(script(split)) for split in SPLITS}


@pytest.fixture
def few(monkeypatch):
    """Five utterances a split, in two blocks, each a process of its own."""
    monkeypatch.setattr(synthetic, "SPLITS", {name: replace(plan, utterances=5) for name, plan in SPLITS.items()})
    monkeypatch.setattr(synthetic, "BLOCK", 3)


def bytes_below(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- what is said, and by whom -----------------------------------------------------------------------------


def test_the_grammar_is_rich(scripts):
    assert len(synthetic.vocabulary()) >= 130
    assert len(synthetic.FORMS) == len(set(synthetic.FORMS)) >= 10
    said = {word for one in scripts["train"] for word in one.text.split()}
    assert said == set(synthetic.vocabulary())
    assert set("".join(said).upper()) <= set(CHARACTERS)
    assert len({one.text for one in scripts["train"]}) > 0.9 * len(scripts["train"])


def family(variant: str) -> str:
    """`steph2` is a relative of `steph`, but `f2` of none: there is no `f`."""
    known = {name.casefold() for names in VARIANTS.values() for name in names.split()}
    base = variant.casefold().rstrip("0123456789")
    return base if base in known else variant.casefold()


def test_no_two_splits_share_a_voice_or_a_relative_of_it(scripts):
    assert family("Gene2") == family("Gene") == "gene" and family("mike2") == family("Mike") and family("f2") == "f2"
    for one, other in combinations(SPLITS, 2):
        relatives = [{family(name) for name in VARIANTS[split].split()} for split in (one, other)]
        assert not relatives[0] & relatives[1], (one, other)
        voices = [{spoken.voice.partition("+")[2] for spoken in scripts[split]} for split in (one, other)]
        assert not voices[0] & voices[1], (one, other)
        assert not {s.speaker for s in scripts[one]} & {s.speaker for s in scripts[other]}, (one, other)


def test_a_speaker_is_one_voice(scripts):
    for split, spoken in scripts.items():
        speakers = {one.speaker for one in spoken}
        assert len(speakers) == len({(one.speaker, one.voice) for one in spoken}) == len({one.voice for one in spoken})
        assert len(speakers) >= (100 if split == "train" else 20)


def test_every_voice_is_installed():
    """Of a variant it does not have, espeak-ng says nothing and takes the accent's own voice: one for all splits."""
    data = Path(espeakng_loader.get_data_path())
    assert all((data / "lang" / "gmw" / accent).is_file() for accent in ACCENTS)
    variants = [data / "voices" / "!v" / name for names in VARIANTS.values() for name in names.split()]
    assert len(variants) == len({path.read_bytes() for path in variants if path.is_file()})


def test_no_split_says_what_another_says(scripts):
    sentences = {split: {one.text for one in spoken} for split, spoken in scripts.items()}
    for one, other in combinations(SPLITS, 2):
        if {one, other} != TESTS:
            assert not sentences[one] & sentences[other], (one, other)


def test_the_second_test_is_faster_and_noisy(scripts):
    clean, other = scripts["test-clean"], scripts["test-other"]
    assert all(one.snr_db is None for one in clean) and all(one.snr_db is not None for one in other)
    assert max(one.words_per_minute for one in clean) <= min(one.words_per_minute for one in other)


def test_the_script_is_a_function_of_the_seed(monkeypatch, scripts):
    assert list(script("validation")) == scripts["validation"]
    monkeypatch.setattr(synthetic, "SEED", 961)
    assert list(script("validation")) != scripts["validation"]


# ---- what is heard -----------------------------------------------------------------------------------------


def test_fresh_processes_speak_the_same_bytes(few, tmp_path, monkeypatch):
    assert any(one.voice.endswith("+victor") for one in script("test-other"))  # whose breath is noise
    first = bytes_below(make_split("test-other", tmp_path / "one"))
    time.sleep(1.1)  # espeak-ng would seed that noise by the second
    second = bytes_below(make_split("test-other", tmp_path / "two"))
    assert first == second
    assert sum(name.endswith(".flac") for name in first) == 5


def test_the_corpus_is_what_the_script_says(few, asrlib_cache, monkeypatch):
    corpus = open_corpus("synthetic", split="validation")
    spoken = list(script("validation"))
    assert {u.text for u in corpus} == {one.text.upper() for one in spoken} and len(corpus) == 5
    assert {u.speaker for u in corpus} == {str(one.speaker) for one in spoken}
    assert corpus.split == "validation" and not corpus.rejected
    for utterance in corpus:
        header = soundfile.info(utterance.where)
        assert (header.samplerate, header.channels) == (SAMPLE_RATE, 1)
        audio = utterance.audio()
        assert 0.5 < len(audio) / SAMPLE_RATE == utterance.seconds < 10
        assert np.sqrt(np.mean(audio**2)) > 0.01 and np.abs(audio).max() <= 1

    monkeypatch.setattr(synthetic, "ProcessPoolExecutor", None)  # from now on it is read, not spoken
    assert open_synthetic("validation").fingerprint() == corpus.fingerprint()
    assert asrlib_cache in Path(corpus[0].where).parents


@pytest.mark.parametrize("snr_db", [0.0, 5.0, 20.0])
def test_noise_is_as_loud_as_asked(snr_db):
    tone = 0.1 * np.sin(np.arange(SAMPLE_RATE) / 7).astype(np.float32)
    noisy = add_noise(tone, snr_db, np.random.default_rng(0))
    ratio = np.mean(tone**2) / np.mean((noisy - tone) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.01)
    assert noisy.dtype == np.float32


# ---- whole or absent ---------------------------------------------------------------------------------------


def test_a_split_that_fails_half_way_is_not_there(few, tmp_path, monkeypatch):
    spoken = list(script("validation"))
    spoken[-1] = replace(spoken[-1], voice="gmw/nowhere+f1")  # in the second block
    monkeypatch.setattr(synthetic, "script", lambda split: iter(spoken))
    with pytest.raises(ValueError, match=r"no voice 'gmw/nowhere\+f1'"):
        make_split("validation", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_not_taken_for_a_split(few, asrlib_cache):
    left = synthetic.cache_folder() / ".validation-1" / "validation" / "2000" / "1"
    left.mkdir(parents=True)
    (left / "2000-1-0000.flac").write_bytes(b"half")
    assert len(open_synthetic("validation")) == 5


def test_an_unknown_split_is_refused(asrlib_cache):
    with pytest.raises(ValueError, match="no split 'dev': choose one of train, validation, test-clean, test-other"):
        open_corpus("synthetic", split="dev")
    assert not asrlib_cache.exists()
