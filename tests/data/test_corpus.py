"""Every opener on small folders made here, every kind of bad row, and real speech where it is at hand."""

import csv
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import make_processor, tone

from asrlib.data.audio import UnusableAudio
from asrlib.data.librispeech import open_librispeech
from asrlib.data.opening import open_corpus

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
STRANGE_TEXTS = [
    'he said, "hi"; it\'s',
    "<script>alert(1)</script> &amp;",
    "two\nlines\r\nand \u2028 a third",
    "emoji 🎉👩‍🔬",
    "שלום עולם مرحبا",
]


def encode(samples: np.ndarray, suffix: str = ".flac", rate: int = 16_000) -> bytes:
    container, codec = {
        ".flac": ("FLAC", "PCM_16"),
        ".wav": ("WAV", "FLOAT"),
        ".ogg": ("OGG", "VORBIS"),
        ".opus": ("OGG", "OPUS"),
        ".mp3": ("MP3", "MPEG_LAYER_III"),
    }[suffix]
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=codec)
    return file.getvalue()


TONE = encode(tone(1.0))


def write_chapter(split: Path, audio: dict[str, bytes], transcripts: str) -> None:
    chapter = split / "84" / "121"
    chapter.mkdir(parents=True)
    for name, content in audio.items():
        (chapter / name).write_bytes(content)
    (chapter / "84-121.trans.txt").write_text(transcripts, encoding="utf-8")


def reasons(corpus) -> dict[str, str]:
    return {row.id: row.reason for row in corpus.rejected}


# ---- audio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "rate"),
    [
        (".flac", 16_000),
        (".flac", 44_100),
        (".wav", 8_000),
        (".wav", 22_050),
        (".ogg", 32_000),
        (".opus", 48_000),
    ],
)
def test_any_format_becomes_mono_at_16_khz(tmp_path, suffix, rate, channels):
    heard_on_the_first = np.zeros((rate, channels), np.float32)
    heard_on_the_first[:, 0] = tone(1.0, rate)
    write_chapter(tmp_path / "dev", {f"84-121-0{suffix}": encode(heard_on_the_first, suffix, rate)}, "84-121-0 A")
    [utterance] = open_librispeech(tmp_path, "dev")
    audio = utterance.audio()
    assert (audio.dtype, audio.ndim) == (np.float32, 1)
    assert len(audio) == pytest.approx(16_000, abs=2)
    assert utterance.seconds == pytest.approx(1.0, abs=0.001)
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    assert spectrum.argmax() * 16_000 / len(audio) == pytest.approx(440, abs=1)
    assert np.abs(audio[4000:12_000]).max() == pytest.approx(0.5 / channels, rel=0.05)  # channels are averaged


def with_stated_frames(flac: bytes, frames: int) -> bytes:
    """The FLAC with another total in its STREAMINFO: the last 36 bits before the checksum."""
    bits = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
    return flac[:18] + bits.to_bytes(8, "big") + flac[26:]


def test_audio_cut_off_or_not_finite_is_unusable(tmp_path):
    write_chapter(
        tmp_path / "dev",
        {
            "84-121-0.flac": TONE[: len(TONE) // 2],
            "84-121-1.flac": with_stated_frames(TONE, 2**36 - 1),  # 50 days, at which memory would run out
            "84-121-2.wav": encode(np.full(16_000, np.nan, np.float32), ".wav"),
            "84-121-3.wav": encode(np.full(16_000, np.inf, np.float32), ".wav", 8_000),
        },
        "84-121-0 A\n84-121-1 A\n84-121-2 A\n84-121-3 A",
    )
    for utterance, reason in zip(
        open_librispeech(tmp_path, "dev"), ["cut off|decoded", "cut off|decoded", "NaN", "NaN"], strict=True
    ):
        with pytest.raises(UnusableAudio, match=reason):
            utterance.audio()


# ---- LibriSpeech folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["test-clean", "LibriSpeech/test-clean"])
def test_a_split_is_found_from_the_folder_that_holds_it_and_from_itself(tmp_path, place):
    write_chapter(tmp_path / place, {"84-121-0000.flac": TONE}, "84-121-0000 GO ON")
    corpora = [
        open_corpus(tmp_path, "test-clean"),
        open_corpus(tmp_path),
        open_corpus(tmp_path / place, "test-clean"),
        open_corpus(str(tmp_path / place)),
    ]
    for corpus in corpora:
        [utterance] = corpus
        assert (utterance.id, utterance.text, utterance.speaker) == ("84-121-0000", "GO ON", "84")
        assert utterance.where == str(tmp_path / place / "84" / "121" / "84-121-0000.flac")
        assert corpus.split == "test-clean"


def test_a_missing_split_names_those_there_are(tmp_path):
    for split in ("dev-clean", "train-clean-100"):
        write_chapter(tmp_path / split, {"84-121-0.flac": TONE}, "84-121-0 A")
    for root, split in (tmp_path, "test-clean"), (tmp_path, None), (tmp_path / "dev-clean", "test-clean"):
        with pytest.raises(FileNotFoundError, match=r"splits found: .*dev-clean"):
            open_corpus(root, split)


def test_rows_of_a_folder_that_cannot_be_used_are_listed(tmp_path):
    audio = dict.fromkeys(["good.flac", "good.wav", "untold.flac", "twice.flac", "blank.flac", "latin.flac"], TONE)
    audio |= {"silent.wav": encode(tone(0.0), ".wav"), "broken.flac": b"not audio", "._good.flac": b"Mac"}
    audio |= {"nothing.flac": b"", "streamed.flac": with_stated_frames(TONE, 0)}
    transcripts = "good YES\nmissing A\ntwice ONE\ntwice TWO\nblank\n\n"
    transcripts += "silent A\nbroken A\nnothing A\nstreamed A\n"
    write_chapter(tmp_path / "dev", audio, transcripts)
    with (tmp_path / "dev" / "84" / "121" / "84-121.trans.txt").open("ab") as file:
        file.write(b"latin na\xefve\n")
    corpus = open_corpus(tmp_path, "dev")
    assert [(u.id, u.text) for u in corpus] == [("good", "YES"), ("twice", "ONE")]
    expected = {
        "good": "the same utterance as good.flac",
        "untold": "audio without transcript",
        "missing": "transcript without audio",
        "twice": "a second transcript",
        "blank": "no transcript",
        "silent": "audio holds no samples",
        "broken": "audio cannot be read",
        "nothing": "audio cannot be read",
        "streamed": "audio does not state its length",
        "latin": "transcript is not valid Unicode",
    }
    assert reasons(corpus).keys() == expected.keys()
    for id, reason in expected.items():
        assert reasons(corpus)[id].startswith(reason)


def test_a_corpus_without_a_usable_row_is_an_error_that_says_why(tmp_path):
    write_chapter(tmp_path / "dev", {"84-121-0.flac": b"not audio"}, "84-121-0 A")
    with pytest.raises(ValueError, match="no usable row: 1 rejected, the first: 84-121-0: audio cannot be read"):
        open_corpus(tmp_path, "dev")


# ---- manifests ---------------------------------------------------------------------------------------------


def write_manifest(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a BOM, as spreadsheets write it
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_manifest_keeps_every_text_as_it_is(tmp_path, suffix):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "tone.flac").write_bytes(TONE)
    paths = ["clips/tone.flac", str(tmp_path / "clips" / "tone.flac")]
    rows = [{"audio": paths[i % 2], "text": text, "speaker": i, "id": f"u{i}"} for i, text in enumerate(STRANGE_TEXTS)]
    corpus = open_corpus(write_manifest(tmp_path / f"train{suffix}", rows))
    assert [(u.id, u.text, u.speaker) for u in corpus] == [(r["id"], r["text"], str(r["speaker"])) for r in rows]
    assert all(len(u.audio()) == 16_000 for u in corpus)
    assert open_corpus(tmp_path, "train").fingerprint() == corpus.fingerprint()  # a folder of SPLIT.jsonl


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_manifest_without_a_needed_column_is_refused(tmp_path, suffix):
    path = write_manifest(tmp_path / f"m{suffix}", [{"path": "a.wav", "text": "A"}])
    with pytest.raises(ValueError, match="no column audio; columns found: path, text"):
        open_corpus(path)


def test_bad_rows_of_a_manifest_are_listed(tmp_path):
    (tmp_path / "tone.flac").write_bytes(TONE)
    (tmp_path / "folder.flac").mkdir()
    lines = [
        '{"audio": "tone.flac", "text": "FIRST"}',
        "",
        '{"audio": "tone.flac", "text": "SECOND", "speaker": null}',
        '{"audio": "tone.flac", "text": ',
        '["a", "list"]',
        '{"audio": "gone.flac", "text": "A", "id": 7}',
        '{"audio": null, "text": "A"}',
        '{"audio": "tone.flac", "id": "no text"}',
        '{"audio": "tone.flac", "text": 12, "id": "number"}',
        '{"audio": "tone.flac", "text": "\\ud800", "id": "surrogate"}',
        '{"audio": "folder.flac", "text": "A"}',
        '{"audio": "nul\\u0000.flac", "text": "A", "id": "nul"}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(tmp_path / "m.jsonl")
    assert [(u.id, u.text, u.speaker) for u in corpus] == [
        ("tone.flac", "FIRST", "unknown"),
        ("tone.flac#2", "SECOND", "unknown"),  # transcripts are told apart by id
    ]
    expected = {
        "line 4": "line is not valid JSON",
        "line 5": "line is not a JSON object",
        "7": "audio file not found: gone.flac",
        "line 7": "no audio path",
        "no text": "no transcript",
        "number": "no transcript",
        "surrogate": "transcript is not valid Unicode",
        "folder.flac": "audio cannot be read",
        "nul": "audio file not found",
    }
    assert reasons(corpus).keys() == expected.keys()
    for id, reason in expected.items():
        assert reasons(corpus)[id].startswith(reason)


def test_a_text_with_an_unquoted_comma_is_not_cut_short(tmp_path):
    (tmp_path / "tone.flac").write_bytes(TONE)
    (tmp_path / "m.csv").write_text("audio,text\ntone.flac,whole\ntone.flac,half, gone\ntone.flac\n")
    corpus = open_corpus(tmp_path / "m.csv")
    assert [u.text for u in corpus] == ["whole"]
    assert [row.reason[:20] for row in corpus.rejected] == ["row has more cells t", "no transcript"]
    assert corpus.rejected[0].where == f"{tmp_path / 'm.csv'}:3"


# ---- tables: parquet, saved to disk, the hub ---------------------------------------------------------------


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def table(texts: list[str | None], content: bytes | None = TONE, first: int = 0, path: str | None = None):
    import datasets

    numbers = range(first, first + len(texts))
    columns = {
        "file": [path] * len(texts),
        "audio": [{"bytes": content, "path": path}] * len(texts),
        "text": texts,
        "speaker_id": [84] * len(texts),
        "chapter_id": [121] * len(texts),
        "id": [f"84-121-{number:04d}" for number in numbers],
    }
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))


def write_parquet(file: Path, *args, **kwargs) -> None:
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(*args, **kwargs).data.table, file)


@pytest.mark.parametrize(
    "names",
    [
        ("clean/train.100-00000-of-00002.parquet", "clean/train.100-00001-of-00002.parquet"),
        ("clean/train.100/0000.parquet", "clean/train.100/0001.parquet"),
        ("all/train.clean.100/0000.parquet", "all/train.clean.100/0001.parquet"),
        ("train.clean.100-00000-of-00002.parquet", "train.clean.100-00001-of-00002.parquet"),
        ("data/train-clean-100-00000-of-00002.parquet", "data/train-clean-100-00001-of-00002.parquet"),
    ],
)
def test_parquet_shards_are_found_by_the_names_of_librispeech(tmp_path, names):
    root = tmp_path / "librispeech [hub]"
    write_parquet(root / names[0], STRANGE_TEXTS)
    write_parquet(root / names[1], ["LAST"], first=len(STRANGE_TEXTS))
    write_parquet(root / "other" / "train.500-00000-of-00001.parquet", ["ELSEWHERE"])
    corpus = open_corpus(root, "train-clean-100")
    assert [u.text for u in corpus] == [*STRANGE_TEXTS, "LAST"]
    assert [u.id for u in corpus] == [f"84-121-{number:04d}" for number in range(len(corpus))]
    assert {u.speaker for u in corpus} == {"84"}
    assert corpus.seconds == len(corpus)
    np.testing.assert_allclose(corpus[-1].audio(), tone(1.0), atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"no split 'test-clean'.*other/train\.500"):
        open_corpus(root, "test-clean")


def test_one_configuration_may_be_opened_by_itself(tmp_path):
    for configuration in ("clean", "other"):
        write_parquet(tmp_path / configuration / "test-00000-of-00001.parquet", [configuration])
        write_parquet(tmp_path / configuration / "validation-00000-of-00001.parquet", ["dev"])
    assert open_corpus(tmp_path, "test-other")[0].text == "other"
    assert open_corpus(tmp_path / "clean", "test-clean")[0].text == "clean"
    assert open_corpus(tmp_path / "clean", "validation")[0].text == "dev"
    with pytest.raises(ValueError, match=r"more than once: open .*clean or .*other"):
        open_corpus(tmp_path, "test")


def test_bad_rows_of_a_table_are_listed_and_audio_may_be_a_path(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "tone.flac").write_bytes(TONE)
    write_parquet(tmp_path / "train-00000-of-00004.parquet", ["PATH"], None, first=0, path="clips/tone.flac")
    write_parquet(tmp_path / "train-00001-of-00004.parquet", [None, "NOT AUDIO"], b"not audio", first=1)
    write_parquet(tmp_path / "train-00002-of-00004.parquet", ["NOTHING"], None, first=3)
    write_parquet(tmp_path / "train-00003-of-00004.parquet", ["MP3"], encode(tone(), ".mp3"), first=4)
    corpus = open_corpus(tmp_path)
    assert [(u.text, len(u.audio())) for u in corpus] == [("PATH", 16_000), ("MP3", 16_000)]
    assert reasons(corpus) == {
        "84-121-0001": "no transcript",
        "84-121-0002": "audio cannot be read: Format not recognised.",
        "84-121-0003": "audio cannot be read: the row holds no audio",
    }


@pytest.mark.parametrize("text", ["sentence", "transcription"])
def test_other_names_for_columns(tmp_path, text):
    rows = table(["A", "B"]).remove_columns(["id", "file"])
    rows = rows.rename_columns({"text": text, "speaker_id": "client_id"})
    rows.to_parquet(tmp_path / "test.parquet")
    corpus = open_corpus(tmp_path)
    assert [(u.id, u.text, u.speaker) for u in corpus] == [
        ("test-000000", "A", "84"),
        ("test-000001", "B", "84"),
    ]


@pytest.mark.parametrize(("column", "wanted"), [("audio", "audio"), ("text", "text or sentence or transcription")])
def test_a_table_without_a_needed_column_is_refused(tmp_path, column, wanted):
    table(["A"]).remove_columns([column]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=f"no column {wanted}; columns found: .*speaker_id"):
        open_corpus(tmp_path)


def test_a_damaged_table_is_an_error_that_names_it(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=f"{tmp_path / 'train.parquet'} cannot be read"):
        open_corpus(tmp_path)


def test_tables_saved_to_disk(tmp_path):
    import datasets

    table(["ONE"]).save_to_disk(tmp_path / "one")
    assert open_corpus(tmp_path / "one")[0].text == "ONE"
    datasets.DatasetDict({"train": table(["A"]), "test.clean": table(["B"])}).save_to_disk(tmp_path / "two")
    assert open_corpus(tmp_path / "two")[0].text == "A"
    assert open_corpus(tmp_path / "two", "test-clean")[0].text == "B"
    with pytest.raises(FileNotFoundError, match=r"splits found: train, test\.clean"):
        open_corpus(tmp_path / "two", "dev-clean")


HUB_README = """---
dataset_info:
- config_name: all
  features: [{name: text, dtype: string}]
  splits: [{name: train.clean.100, num_bytes: 1, num_examples: 28539}]
configs:
- config_name: all
  default: true
  data_files: [{split: train.clean.360, path: all/train.clean.360/*.parquet}]
---
"""


@pytest.mark.parametrize("source", ["openslr/librispeech_asr", "openslr/librispeech_asr:clean"])
def test_one_split_of_librispeech_is_had_from_the_hub_without_the_others(tmp_path, monkeypatch, source):
    """The hub is a folder here; a file of any other split would not load."""
    import datasets

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **rest: load_dataset(str(tmp_path / name), **rest))
    hub = tmp_path / "openslr" / "librispeech_asr"
    hub.mkdir(parents=True)
    (hub / "README.md").write_text(HUB_README)
    write_parquet(hub / "all" / "train.clean.100" / "0000.parquet", ["WANTED"])
    write_parquet(hub / "clean" / "train.100-00000-of-00001.parquet", ["WANTED"])
    for other in ("all/train.clean.360/0000.parquet", "clean/train.360-00000-of-00001.parquet"):
        (hub / other).parent.mkdir(exist_ok=True)
        (hub / other).write_bytes(b"would take hours")
    assert [u.text for u in open_corpus(source, "train-clean-100", revision="main")] == ["WANTED"]


def test_any_other_data_set_of_the_hub_is_asked_for_by_its_own_names(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **rest: asked.append((args, rest)) or table(["A"]))
    corpus = open_corpus("someone/voices:en", "test-clean", revision="v2")
    assert asked == [(("someone/voices", "en"), {"split": "test-clean", "revision": "v2"})]
    assert (corpus.name, corpus.split) == ("someone/voices:en", "test-clean")


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    import datasets

    def offline(*_args, **_rest):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"'someone/voices' is no folder here, and split 'train'.*no route"):
        open_corpus("someone/voices")


@pytest.mark.parametrize("source", ["/no/such/folder", "missing.jsonl", "a/b/c", "word"])
def test_a_source_that_is_nothing_is_refused(source):
    with pytest.raises(FileNotFoundError, match=f"no corpus at {source}: give"):
        open_corpus(source)


# ---- the corpus itself -------------------------------------------------------------------------------------


def corpus_of(folder: Path, texts: list[str], audio: bytes = TONE, suffix: str = ".flac"):
    (folder / f"tone{suffix}").write_bytes(audio)
    rows = [{"audio": f"tone{suffix}", "text": text, "id": f"u{i}"} for i, text in enumerate(texts)]
    return open_corpus(write_manifest(folder / "m.jsonl", rows))


def test_a_sample_is_reproducible_in_order_and_part_of_a_larger_one(tmp_path):
    corpus = corpus_of(tmp_path, ["A"] * 30)
    small, large = corpus.sample(5, seed=1), corpus.sample(20, seed=1)
    assert [len(small), len(large)] == [5, 20]
    assert small == corpus.sample(5, seed=1)
    assert set(small) < set(large)
    assert [int(u.id[1:]) for u in large] == sorted(int(u.id[1:]) for u in large)
    assert small != corpus.sample(5, seed=2)
    assert corpus.sample(None) == corpus.sample(30) == corpus.sample(31) == corpus
    with pytest.raises(ValueError, match="at least one"):
        corpus.sample(0)


def test_a_corpus_is_a_sequence_that_can_be_sent_to_another_process(tmp_path):
    corpus = corpus_of(tmp_path, ["A", "B", "C"])
    assert (len(corpus), corpus[1].text, corpus.seconds, corpus.hours) == (3, "B", 3.0, 3 / 3600)
    assert [u.text for u in corpus[1:]] == ["B", "C"]
    sent = pickle.loads(pickle.dumps(corpus))
    assert sent == corpus
    np.testing.assert_array_equal(sent[0].audio(), corpus[0].audio())


def test_the_fingerprint_follows_ids_texts_and_durations(tmp_path):
    fingerprints = {
        corpus_of(tmp_path, ["A", "B"]).fingerprint(),
        corpus_of(tmp_path, ["A", "C"]).fingerprint(),
        corpus_of(tmp_path, ["A"]).fingerprint(),
        corpus_of(tmp_path, ["A", "B"], encode(tone(2.0))).fingerprint(),
    }
    assert len(fingerprints) == 4
    assert corpus_of(tmp_path, ["A", "B"]).fingerprint() in fingerprints


def frames(samples: int) -> int:
    """50 a second, as most wav2vec2 models, and below zero for no audio at all."""
    return samples // 320 - 1


def test_what_a_model_cannot_use_is_dropped_with_its_reason(tmp_path):
    processor = make_processor(tmp_path)
    audio = dict.fromkeys(["fits.flac", "long.flac", "twins.flac", "digits.flac", "emoji.flac"], TONE)
    audio |= {
        "nan.wav": encode(np.full(16_000, np.nan, np.float32), ".wav"),
        "cut.flac": TONE[: len(TONE) // 2],
    }
    audio |= {"short.wav": encode(tone(0.01), ".wav")}
    texts = {
        "fits": "AB" * 24 + "A",  # 49 frames in a second
        "long": "AB" * 25,
        "twins": "A" * 26,  # a blank between equal neighbours: 51
        "digits": "ROOM 101",
        "emoji": "A 🎉\u200d",
        "nan": "A",
        "cut": "A",
        "short": "A",
    }
    transcripts = "".join(f"{id} {text}\n" for id, text in texts.items()) + "lost A\n"
    write_chapter(tmp_path / "dev", audio, transcripts)
    corpus = open_corpus(tmp_path, "dev")
    usable = corpus.usable(processor, frames)
    assert [u.id for u in usable] == ["fits"]
    cut = reasons(usable).pop("cut")
    assert "cut off" in cut or "decoded" in cut
    assert reasons(usable) == {
        "lost": "transcript without audio",
        "long": "text too long for its audio: CTC needs 50 frames, 1.00 s give 49",
        "twins": "text too long for its audio: CTC needs 51 frames, 1.00 s give 49",
        "digits": "characters outside the vocabulary: '0', '1'",
        "emoji": r"characters outside the vocabulary: '\u200d', '🎉'",
        "nan": "audio holds NaN or infinite samples",
        "short": "text too long for its audio: CTC needs 1 frames, 0.01 s give 0",
        "cut": cut,
    }
    assert len(corpus) + len(corpus.rejected) == len(usable) + len(usable.rejected)

    believed = corpus.usable(processor, frames, check_audio=False)
    assert {u.id for u in believed} == {"fits", "nan", "cut"}

    usable.write_rejected(tmp_path / "rejected" / "dev.jsonl")
    lines = (tmp_path / "rejected" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [vars(row) for row in usable.rejected]


def test_nothing_usable_for_the_model_is_an_error(tmp_path):
    corpus = corpus_of(tmp_path, ["123", "456"])
    with pytest.raises(ValueError, match="no usable row: 2 rejected, the first: u0: characters outside"):
        corpus.usable(make_processor(tmp_path), frames)


def test_names_that_are_no_unicode_reach_the_list_of_rejected_rows(tmp_path):
    write_chapter(tmp_path / "dev", {"84-121-0.flac": TONE}, "84-121-0 A")
    (tmp_path / "dev" / "84" / "121" / "caf\udce9.flac").write_bytes(TONE)
    corpus = open_corpus(tmp_path, "dev")
    corpus.write_rejected(tmp_path / "rejected.jsonl")
    [row] = map(json.loads, (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["id"] == r"caf\udce9"


def test_opening_decodes_nothing(tmp_path, monkeypatch):
    def refuse(*_args):
        raise AssertionError("decoded while opening")

    monkeypatch.setattr("asrlib.data.audio._decode", refuse)
    write_chapter(tmp_path / "dev", {"84-121-0.flac": TONE}, "84-121-0 A")
    write_parquet(tmp_path / "tables" / "train.parquet", ["A"])
    assert open_corpus(tmp_path, "dev").seconds == open_corpus(tmp_path / "tables").seconds == 1.0


# ---- real speech -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real speech beside the repository: ../shared/data is absent")
@pytest.mark.parametrize(
    ("root", "split", "suffix", "count", "speakers"),
    [
        ("", "test-clean", ".flac", 6, 3),
        ("LibriSpeech", "dev-4-speakers", ".opus", 193, 4),
        ("an4/an4-test", None, ".flac", 130, 10),
        ("an4", "an4-train", ".opus", 948, 74),
    ],
)
def test_real_speech(root, split, suffix, count, speakers):
    corpus = open_corpus(SHARED / root, split)
    assert (len(corpus), len({u.speaker for u in corpus}), len(corpus.rejected)) == (count, speakers, 0)
    assert {Path(u.where).suffix for u in corpus} == {suffix}
    for utterance in corpus.sample(3):
        audio = utterance.audio()
        assert len(audio) == pytest.approx(utterance.seconds * 16_000, abs=2)
        assert 0.005 < audio.std() < 0.5


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_one_manifest_serves_several_splits_only_by_a_column(tmp_path, suffix):
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", tone(), 16_000)
    rows = [
        {"audio": f"{name}.wav", "text": "HI", "split": split}
        for name, split in zip("abc", ["train", "train", "test"], strict=True)
    ]
    manifest = tmp_path / f"speech{suffix}"

    def write(rows):
        if suffix == ".jsonl":
            manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            manifest.write_text("\n".join(lines) + "\n")

    write(rows)
    assert [u.id for u in open_corpus(manifest, "train")] == ["a.wav", "b.wav"]
    assert [u.id for u in open_corpus(manifest, "test")] == ["c.wav"]
    with pytest.raises(ValueError, match="no rows of split 'dev'; splits found: test, train"):
        open_corpus(manifest, "dev")
    write([{key: row[key] for key in ("audio", "text")} for row in rows])
    assert len(open_corpus(manifest)) == len(open_corpus(manifest, "speech")) == 3
    with pytest.raises(ValueError, match="is one split, 'speech', and 'test' was asked for"):
        open_corpus(manifest, "test")
