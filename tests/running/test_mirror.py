"""A run folder's copy on storage of any kind: here in memory, which fsspec treats as it treats a bucket."""

import itertools
from pathlib import Path

import fsspec
import pytest

from asrlib.running.mirror import Mirror, check_storage
from asrlib.runs import BadParameter, Run, read_json

MARKER = ".completed/00_first.json"


@pytest.fixture
def bucket():
    fsspec.filesystem("memory").store.clear()
    yield "memory://reports/member"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "member")
    complete(run, "one")
    return run


def complete(run, version):
    """What a step leaves, all of one version."""
    run.mark_started("00_first", version)
    run.write_metrics("first", {"version": version})
    (run.models / f"{version}.bin").write_text(version)
    run.mark_completed("00_first", version, seconds=1.0)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_was_sent_is_fetched_and_replaces_what_was_there(bucket, run, tmp_path):
    Mirror(run.path, bucket).send()
    other = Run(tmp_path / "other")
    complete(other, "two")
    (other.path / ".lock").write_text("mine")
    Mirror(other.path, bucket).fetch()
    assert files(other.path) == files(run.path) | {".lock": "mine"}


def test_where_there_is_no_copy_yet_the_folder_stays(bucket, run):
    before, mirror = files(run.path), Mirror(run.path, bucket)
    mirror.fetch()
    assert files(run.path) == before and not mirror.exists()
    mirror.send()
    assert mirror.exists()


def test_only_what_changed_is_sent_and_what_is_gone_goes(bucket, run, tmp_path, monkeypatch):
    mirror = Mirror(run.path, bucket)
    mirror.send()
    put, sent = mirror.storage.put_file, []
    monkeypatch.setattr(
        mirror.storage, "put_file", lambda here, *there: (sent.append(Path(here).name), put(here, *there))
    )
    mirror.send()
    assert sent == []
    run.write_metrics("first", {"version": "changed"})
    (run.models / "one.bin").unlink()
    (run.path / ".tmp-half").touch()
    (run.path / ".lock").touch()
    mirror.send()
    assert sent == ["first.json"]
    Mirror(tmp_path / "other", bucket).fetch()
    assert sorted(files(tmp_path / "other")) == [MARKER, ".started/00_first.json", "metrics/first.json"]


def test_members_stay_out_of_the_copy_of_their_sweep(bucket, run, tmp_path):
    (run.path / "index.html").touch()
    Run(run.path / "small").write_metrics("first", {})
    Mirror(run.path, bucket, without=["small", "models"]).send()
    Mirror(tmp_path / "other", bucket).fetch()
    assert {name.split("/")[0] for name in files(tmp_path / "other")} == {
        ".started",
        ".completed",
        "metrics",
        "index.html",
    }


@pytest.mark.parametrize("redo", [False, True])
def test_whoever_looks_while_it_is_sent_finds_a_step_whole_or_not_done(bucket, run, tmp_path, monkeypatch, redo):
    """Sending breaks off at each operation in turn, and is looked at there."""
    mirror = Mirror(run.path, bucket)
    mirror.send()
    storage, begun, seen = mirror.storage, dict(mirror.sent), set()
    first = dict(storage.store)
    run.discard("00_first")
    complete(run, "two")
    if redo:
        run.discard("00_first")
    for last in itertools.count():
        storage.store.clear()
        storage.store.update(first)
        mirror.sent, left = dict(begun), iter(range(last))
        with monkeypatch.context() as patch:
            for name in ("put_file", "rm_file", "mv"):
                patch.setattr(storage, name, breaking(getattr(storage, name), left))
            try:
                mirror.send()
                broken = False
            except InterruptedError:
                broken = True
        other = Run(tmp_path / f"other-{last}")
        Mirror(other.path, bucket).fetch()
        marker = other.completed("00_first")
        if marker:
            assert (
                other.read_metrics("first")["version"]
                == marker["fingerprint"]
                == other.started("00_first")["fingerprint"]
            )
            assert (other.models / f"{marker['fingerprint']}.bin").is_file()
        seen.add(marker and marker["fingerprint"])
        if not broken:
            break
    assert seen == ({"one", None} if redo else {"one", None, "two"}) and last > 3
    assert not redo or read_json(other.path / ".started" / "00_first.json")["fingerprint"] is None


def breaking(operation, left):
    def operate(*arguments, **options):
        if next(left, None) is None:
            raise InterruptedError
        return operation(*arguments, **options)

    return operate


def test_storage_that_cannot_be_used_is_refused(bucket, tmp_path):
    check_storage("memory://reports")
    assert not fsspec.filesystem("memory").find("/")
    with pytest.raises(BadParameter, match="s4://reports cannot be used: Protocol not known: s4"):
        check_storage("s4://reports")
    (tmp_path / "file").touch()
    with pytest.raises(BadParameter, match=r"--storage file://.* cannot be written to: "):
        check_storage(f"file://{tmp_path}/file")
