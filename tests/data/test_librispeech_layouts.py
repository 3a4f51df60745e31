"""LibriSpeech as people have it, OpenSLR's folders or the hub's parquet shards: the same speech to the last sample."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import make_processor

from asrlib.data.opening import check_splits, open_corpus

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "LibriSpeech"
ORIGINALS = {"dev-clean": 38, "test-clean": 6}  # utterances
HUB_SPLITS = {
    "dev-clean": ("all/validation.clean", "clean/validation"),
    "test-clean": ("all/test.clean", "clean/test"),
    "train-other-500": ("all/train.other.500", "other/train.500"),
}
SHARDS = 3


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_openslr(root: Path) -> Path:
    """What `tar x` leaves of OpenSLR's archives: three splits of two speakers, three chapters, six utterances each."""
    noise = np.random.default_rng(0)
    for number, split in enumerate(HUB_SPLITS):
        for speaker, chapter in (84, 121123), (84, 121550), (1272 + number, 128104):
            name = f"{speaker}-{chapter}"
            folder = root / "LibriSpeech" / split / str(speaker) / str(chapter)
            folder.mkdir(parents=True)
            lines = [f"{name}-{i:04d} {'GO ON ' * i}IT'S {split.split('-')[0].upper()}\n" for i in range(2)]
            (folder / f"{name}.trans.txt").write_text("".join(lines))
            for i in range(2):
                samples = noise.uniform(-0.5, 0.5, noise.integers(8_000, 12_000))
                soundfile.write(folder / f"{name}-{i:04d}.flac", samples, 16_000, "PCM_16")
    for about in "BOOKS", "CHAPTERS", "LICENSE", "README", "SPEAKERS":
        (root / "LibriSpeech" / f"{about}.TXT").write_text("; 84 | F | dev-clean\n")
    return root


def original(split: Path) -> dict[str, tuple[str, str, np.ndarray]]:
    """id → text, speaker, samples, read without asrlib."""
    found = {}
    for transcripts in split.glob("*/*/*.trans.txt"):
        for line in transcripts.read_text().splitlines():
            id, text = line.split(" ", 1)
            samples, rate = soundfile.read(transcripts.parent / f"{id}.flac", dtype="float32")
            assert rate == 16_000
            found[id] = text, id.split("-")[0], samples
    return found


def write_hub(tree: Path, hub: Path, splits: list[str]) -> None:
    """openslr/librispeech_asr as a clone of it lies on a disk: every split in "all", and again in "clean" or "other".

    Rows come in the order of no folder, as the archives hold them.
    """
    import datasets

    features = datasets.Features(
        file=datasets.Value("string"),
        audio=datasets.Audio(sampling_rate=16_000),
        text=datasets.Value("string"),
        speaker_id=datasets.Value("int64"),
        chapter_id=datasets.Value("int64"),
        id=datasets.Value("string"),
    )
    for split in splits:
        rows = []
        for transcripts in sorted((tree / split).glob("*/*/*.trans.txt")):
            for line in transcripts.read_text().splitlines():
                id, text = line.split(" ", 1)
                speaker, chapter, _ = map(int, id.split("-"))
                audio = {"bytes": (transcripts.parent / f"{id}.flac").read_bytes(), "path": f"{id}.flac"}
                row = {"file": f"{id}.flac", "audio": audio, "text": text}
                rows.append(row | {"speaker_id": speaker, "chapter_id": chapter, "id": id})
        random.Random(0).shuffle(rows)
        table = datasets.Dataset.from_list(rows).cast(features)
        for place in HUB_SPLITS[split]:
            (hub / place).mkdir(parents=True)
            for shard in range(SHARDS):
                part = table.shard(SHARDS, shard, contiguous=True)
                part.to_parquet(hub / place / f"{shard:04d}.parquet")
    (hub / "README.md").write_text("---\nconfigs: []\n---\n")


def same(corpus, expected: dict[str, tuple[str, str, np.ndarray]]) -> bool:
    assert not corpus.rejected and {u.id for u in corpus} == set(expected) and len(corpus) == len(expected)
    for utterance in corpus:
        text, speaker, samples = expected[utterance.id]
        assert (utterance.text, utterance.speaker) == (text, speaker)
        assert utterance.seconds == len(samples) / 16_000
        np.testing.assert_array_equal(utterance.audio(), samples)
    return True


def test_folders_and_shards_hold_the_same_speech(tmp_path):
    root = write_openslr(tmp_path)
    write_hub(root / "LibriSpeech", tmp_path / "hub", list(HUB_SPLITS))
    check_splits(root, HUB_SPLITS)
    for split, (_, configured) in HUB_SPLITS.items():
        expected = original(root / "LibriSpeech" / split)
        assert len(expected) == 6
        for folder in root, root / "LibriSpeech", root / "LibriSpeech" / split:
            assert same(open_corpus(folder, split), expected)
        configuration = Path(configured).parent
        for folder in tmp_path / "hub", tmp_path / "hub" / "all", tmp_path / "hub" / configuration:
            assert same(open_corpus(folder, split), expected)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real speech beside the repository: ../shared/data is absent")
def test_original_files_are_the_same_speech_in_place_and_in_shards(tmp_path):
    write_hub(SHARED, tmp_path / "hub", list(ORIGINALS))
    for split, count in ORIGINALS.items():
        expected = original(SHARED / split)
        assert len(expected) == count
        assert same(open_corpus(SHARED, split), expected)
        assert same(open_corpus(tmp_path / "hub", split), expected)


def test_shards_as_the_hubs_cache_keeps_them_are_links_to_files_named_by_their_hash(tmp_path):
    root = write_openslr(tmp_path)
    write_hub(root / "LibriSpeech", tmp_path / "hub", ["dev-clean"])
    snapshot, blobs = tmp_path / "snapshots" / "71cacbfb", tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted((tmp_path / "hub").rglob("*.parquet"))):
        link = snapshot / shard.relative_to(tmp_path / "hub")
        link.parent.mkdir(parents=True, exist_ok=True)
        os.replace(shard, blobs / f"{number:064x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    assert same(open_corpus(snapshot, "dev-clean"), original(root / "LibriSpeech" / "dev-clean"))


def test_a_shard_that_was_not_copied_to_its_end_is_named(tmp_path):
    write_hub(write_openslr(tmp_path) / "LibriSpeech", tmp_path / "hub", ["dev-clean"])
    shard = tmp_path / "hub" / "all" / "validation.clean" / "0001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    for refuses in (check_splits, lambda hub, splits: open_corpus(hub, *splits)):
        with pytest.raises(ValueError, match=f"{shard} cannot be read: .* Copy or download it again"):
            refuses(tmp_path / "hub", ["dev-clean"])


# ---- damaged audio -----------------------------------------------------------------------------------------


DAMAGES = {
    "beginning": lambda flac: bytes(8) + flac[8:],
    "one byte": lambda flac: flac[: len(flac) // 2] + bytes([flac[len(flac) // 2] ^ 255]) + flac[len(flac) // 2 + 1 :],
    "end": lambda flac: flac[: len(flac) // 2],
    "all": lambda flac: b"",
}


@pytest.mark.parametrize("layout", ["folder", "shards"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_audio_is_rejected_by_name_and_the_others_go_on(tmp_path, layout, damage):
    root = write_openslr(tmp_path)
    split, victim = root / "LibriSpeech" / "dev-clean", "84-121550-0000"
    others = original(split)
    del others[victim]
    flac = split / "84" / "121550" / f"{victim}.flac"
    flac.write_bytes(DAMAGES[damage](flac.read_bytes()))
    if layout == "shards":
        write_hub(root / "LibriSpeech", root := tmp_path / "hub", ["dev-clean"])
    corpus = open_corpus(root, "dev-clean")
    usable = corpus.usable(make_processor(tmp_path), frames=lambda samples: samples // 320)
    [rejected] = usable.rejected
    assert rejected.id == victim
    assert rejected.reason.startswith(("audio cannot be read: ", "audio cannot be decoded: ", "audio is cut off: "))
    assert rejected.where == str(flac) if layout == "folder" else "hub dev-clean, row " in rejected.where
    assert not rejected.reason.endswith(": ")
    assert {u.id for u in usable} == set(others)
    for utterance in usable:
        np.testing.assert_array_equal(utterance.audio(), others[utterance.id][2])
