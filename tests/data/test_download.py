"""LibriSpeech from the hub, which is a folder of tiny shards here: whole, partly there, out of reach, or refused."""

import errno
import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from asrlib.data import download
from asrlib.data.opening import open_corpus
from asrlib.data.prepare import main

SPLITS = {
    "dev-clean": "all/validation.clean",
    "train-clean-100": "all/train.clean.100",
    "test-other": "all/test.other",
}


class Hub:
    """Stands for snapshot_download: copies what `allow_patterns` ask for, and reports it for dry_run=True."""

    def __init__(self, folder: Path):
        self.folder, self.copied, self.error, self.goes_away, self.stated = folder, [], None, False, None

    def __call__(self, repo_id, *, repo_type, local_dir, allow_patterns, dry_run=False):
        assert (repo_id, repo_type) == ("openslr/librispeech_asr", "dataset")
        if self.error:
            raise self.error
        names = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.*") if path.is_file())
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        new = [name for name in names if not (Path(local_dir) / name).exists()]
        if dry_run:
            size = self.stated or 1
            return [SimpleNamespace(filename=n, file_size=size, will_download=n in new) for n in names]
        for name in [] if self.goes_away else new:
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, Path(local_dir) / name)
            self.copied.append(name)
        return str(local_dir)


@pytest.fixture
def hub(tmp_path, tmp_path_factory, monkeypatch):
    import datasets
    import soundfile

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    folder, audio = tmp_path_factory.mktemp("hub"), tmp_path / "noise.flac"
    soundfile.write(audio, np.random.default_rng(0).uniform(-1, 1, 16_000), 16_000)
    for split, place in SPLITS.items():
        (folder / place).mkdir(parents=True)
        for shard in range(2):
            row = {"audio": {"bytes": audio.read_bytes(), "path": "a.flac"}, "text": f"{split} {shard}"}
            rows = [row | {"speaker_id": 84, "id": f"84-121-{shard:04d}"}]
            datasets.Dataset.from_list(rows).to_parquet(folder / place / f"{shard:04d}.parquet")
    stand_in = Hub(folder)
    monkeypatch.setattr(download, "snapshot_download", stand_in)
    return stand_in


def call(root: Path, *splits: str) -> int:
    return main(["prepare", "librispeech", "--root", str(root), "--splits", *splits])


def test_splits_are_brought_counted_and_named_for_params(hub, tmp_path, capsys):
    root = tmp_path / "speech: mine"
    assert call(root, "dev-clean", "train-clean-100", "dev-clean") == 0
    for split in ("dev-clean", "train-clean-100"):
        corpus = open_corpus(root, split)
        assert [(u.id, u.text, u.speaker) for u in corpus] == [
            (f"84-121-{i:04d}", f"{split} {i}", "84") for i in range(2)
        ]
    assert len(hub.copied) == 4 and not (root / SPLITS["test-other"]).exists()
    printed = capsys.readouterr().out
    assert printed.startswith("dev-clean: 2 utterances, 0.00 hours\ntrain-clean-100: 2 utterances, 0.00 hours\n\n")
    assert yaml.safe_load(printed.splitlines()[-1]) == {"corpus": str(root)}


def test_what_is_there_is_left_alone_and_what_is_missing_comes(hub, tmp_path):
    assert call(tmp_path / "new", "dev-clean") == 0
    (tmp_path / "new" / SPLITS["dev-clean"] / "0001.parquet").unlink()
    assert call(tmp_path / "new", "dev-clean", "test-other") == 0
    assert hub.copied[2:] == [
        f"{SPLITS[s]}/{n}.parquet" for s, n in [("test-other", "0000"), ("test-other", "0001"), ("dev-clean", "0001")]
    ]


def test_every_split_of_the_hub_has_one_folder():
    assert len(set(download.HUB_FOLDERS.values())) == 7 and SPLITS.items() <= download.HUB_FOLDERS.items()


def refused(root: Path, kind: type[Exception], *splits: str) -> str:
    with pytest.raises(kind) as error:
        call(root, *(splits or ["dev-clean"]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_split_is_answered_with_those_there_are(hub, tmp_path):
    said = refused(tmp_path / "new", ValueError, "dev-clean", "train-clean")
    assert "no split 'train-clean': it has train-clean-100, train-clean-360, train-other-500, dev-clean" in said
    assert not (tmp_path / "new").exists()


def test_no_network_is_said(hub, tmp_path):
    hub.error = ConnectionError("no\nroute")
    said = refused(tmp_path, ConnectionError)
    assert "openslr/librispeech_asr cannot be downloaded: no route" in said and "Is there a network" in said


def test_a_network_that_goes_away_leaves_no_split_that_is_taken_for_whole(hub, tmp_path):
    hub.goes_away = True
    assert "all/validation.clean/0000.parquet of openslr" in refused(tmp_path, ConnectionError)


def test_a_disk_too_small_is_known_before_anything_is_downloaded(hub, tmp_path):
    hub.stated = 10**15
    assert f"bytes are free, and {2 * 10**15:,} are needed. Make room" in refused(tmp_path, OSError)
    assert hub.copied == []


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "is too small: "), (errno.EACCES, "cannot be written to: ")]
)
def test_a_full_disk_and_a_folder_of_others_are_said(hub, tmp_path, number, said):
    hub.error = OSError(number, "as the system says")
    assert f"{tmp_path} {said}as the system says. " in refused(tmp_path, OSError)


def test_a_file_in_the_way_is_said(hub, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "notes.txt cannot be written to: " in refused(tmp_path / "notes.txt", OSError)


def test_unpacked_archives_are_used_and_not_mixed_with_shards(hub, tmp_path):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121"
    chapter.mkdir(parents=True)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO ON\n")
    shutil.copy(tmp_path / "noise.flac", chapter / "84-121-0000.flac")
    assert call(tmp_path, "dev-clean") == 0 and hub.copied == []
    assert "give another --root for test-other" in refused(tmp_path, ValueError, "dev-clean", "test-other")
