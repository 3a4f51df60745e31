"""LibriSpeech's archives from a server made here: whole, broken off, killed, wrong, or not there at all."""

import errno
import fcntl
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from commands import command

from asrlib.data import download
from asrlib.data.librispeech import find_splits
from asrlib.data.opening import open_corpus

main = command("data")

TEXTS = ["GO ON", "IT'S HERE", "AND LAST"]
SECONDS = 2.5  # of noise, which does not compress: an archive of 240 KB
MIDDLE = 160_000  # bytes of it
PATIENCE = 300  # seconds, with a process that hangs


def archive_of(split: str) -> bytes:
    """A .tar.gz as OpenSLR's, of one chapter; the transcripts come first, so that a part of it looks like a split."""
    random = np.random.default_rng(list(split.encode()))
    chapter = f"LibriSpeech/{split}/84/121/84-121"
    lines = "".join(f"84-121-{i:04d} {text}\n" for i, text in enumerate(TEXTS))
    files = {"LibriSpeech/README.TXT": b"about", "LibriSpeech/SPEAKERS.TXT": b"84 | F"}
    files[f"{chapter}.trans.txt"] = lines.encode()
    for i in range(len(TEXTS)):
        flac = io.BytesIO()
        soundfile.write(flac, random.uniform(-1, 1, round(SECONDS * 16_000)), 16_000, "PCM_16", format="FLAC")
        files[f"{chapter}-{i:04d}.flac"] = flac.getvalue()
    return tar_gz(files)


def tar_gz(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


ARCHIVES = {split: archive_of(split) for split in ("dev-clean", "test-clean")}


class Answer(BaseHTTPRequestHandler):
    """Of HTTP 1.0: the connection ends with the answer, or before."""

    def do_HEAD(self) -> None:
        self.begin()

    def do_GET(self) -> None:
        mirror = self.server
        mirror.asked.append(self.headers.get("Range", "all"))
        body = self.begin()
        sent = mirror.breaks.pop(0) if mirror.breaks else len(body)
        self.wfile.write(body[:sent])
        if sent < len(body):
            mirror.goes_on.wait(PATIENCE)

    def begin(self) -> bytes:
        """Status and headers; gives what should follow."""
        split = self.path.removeprefix("/").removesuffix(".tar.gz")
        if self.server.status or split not in self.server.archives:
            self.send_error(self.server.status or 404)
            return b""
        content = self.server.archives[split]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        start = int(asked[1]) if asked else 0
        self.send_response(200 if not asked else 206 if start < len(content) else 416)
        if self.server.states_size:
            self.send_header("Content-Length", str(self.server.stated or max(0, len(content) - start)))
        self.send_header("Content-Encoding", "gzip")  # as some servers say of any .gz: it must stay as it is
        self.end_headers()
        return content[start:]

    def log_message(self, *_args) -> None:
        pass


class Mirror(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    ranges = True  # does it begin in the middle?
    states_size = True
    stated = None  # bytes, in place of the true number
    status = None  # HTTP's, of a server that refuses

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.archives = dict(ARCHIVES)
        self.asked: list[str] = []  # the Range of every GET
        self.breaks: list[int] = []  # after so many bytes the next answers break off
        self.goes_on = threading.Event()  # cleared: they hang there instead
        self.goes_on.set()

    def handle_error(self, *_args) -> None:
        pass  # a client that hung up, or was killed


@pytest.fixture
def mirror(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    for split, archive in ARCHIVES.items():
        monkeypatch.setitem(download.LIBRISPEECH_MD5, split, hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    with Mirror() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.goes_on.set()
        server.shutdown()


def words(mirror: Mirror, root: Path, *more: str) -> list[str]:
    return ["prepare", "librispeech", "--root", str(root), "--url", mirror.url, *(more or ["--splits", "dev-clean"])]


def assert_whole(root: Path, *splits: str) -> None:
    """The splits are there, and nothing else is."""
    for split in splits:
        corpus = open_corpus(root, split)
        assert [(u.id, u.text, u.speaker) for u in corpus] == [
            (f"84-121-{i:04d}", text, "84") for i, text in enumerate(TEXTS)
        ]
        assert {len(u.audio()) for u in corpus} == {round(SECONDS * 16_000)} and not corpus.rejected
    names = {str(path.relative_to(root)) for path in [*root.glob("*"), *root.glob("LibriSpeech/*")]}
    beside = {"LibriSpeech", *(f"LibriSpeech/{name}" for name in (".lock", "README.TXT", "SPEAKERS.TXT"))}
    assert names == beside | {f"LibriSpeech/{split}" for split in splits}


def part_of(root: Path, content: bytes, split: str = "dev-clean") -> Path:
    root.mkdir(exist_ok=True)
    part = root / f"{split}.tar.gz.part"
    part.write_bytes(content)
    return part


# ---- all is well -------------------------------------------------------------------------------------------


def test_splits_are_brought_counted_and_named_for_params(mirror, tmp_path, capsys):
    root = tmp_path / "speech: mine"
    assert main(words(mirror, root, "--splits", "dev-clean", "test-clean", "dev-clean")) == 0
    assert_whole(root, "dev-clean", "test-clean")
    assert mirror.asked == ["all", "all"]
    printed = capsys.readouterr().out
    assert printed.startswith("dev-clean: 3 utterances, 0.00 hours\ntest-clean: 3 utterances, 0.00 hours\n\n")
    assert yaml.safe_load(printed.splitlines()[-1]) == {"corpus": str(root)}


def test_what_is_there_is_left_alone_without_asking_anybody(mirror, tmp_path):
    assert main(words(mirror, tmp_path)) == 0
    flac = tmp_path / "LibriSpeech/dev-clean/84/121/84-121-0001.flac"
    flac.unlink()  # as somebody may wish
    (tmp_path / "LibriSpeech/README.TXT").write_text("mine")
    assert main(words(mirror, tmp_path, "--splits", "dev-clean", "test-clean")) == 0
    assert not flac.exists() and (tmp_path / "LibriSpeech/README.TXT").read_text() == "mine"
    assert len(open_corpus(tmp_path, "test-clean")) == 3
    mirror.status = 500
    assert main(words(mirror, tmp_path, "--splits", "dev-clean", "test-clean")) == 0
    assert mirror.asked == ["all", "all"]


def test_a_folder_named_librispeech_holds_the_splits_itself(mirror, tmp_path):
    root = tmp_path / "LibriSpeech"
    assert main(words(mirror, root)) == 0
    assert (root / "dev-clean/84/121").is_dir() and len(open_corpus(root, "dev-clean")) == 3


def test_archives_stay_where_they_are_wanted(mirror, tmp_path):
    assert main(words(mirror, tmp_path, "--splits", "dev-clean", "--keep")) == 0
    assert (tmp_path / "dev-clean.tar.gz").read_bytes() == ARCHIVES["dev-clean"]
    assert not list(tmp_path.glob("*.part"))


def test_an_archive_of_ones_own_is_used_and_kept(mirror, tmp_path):
    (tmp_path / "dev-clean.tar.gz").write_bytes(ARCHIVES["dev-clean"])
    mirror.status = 500
    assert main(words(mirror, tmp_path)) == 0
    assert len(open_corpus(tmp_path, "dev-clean")) == 3
    assert (tmp_path / "dev-clean.tar.gz").exists()


# ---- interrupted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_was_or_begins_anew_where_the_server_does(mirror, tmp_path, ranges):
    mirror.ranges = ranges
    part_of(tmp_path, ARCHIVES["dev-clean"][:MIDDLE])
    assert main(words(mirror, tmp_path)) == 0
    assert mirror.asked == [f"bytes={MIDDLE}-"]
    assert_whole(tmp_path, "dev-clean")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_is_taken_up_again(mirror, tmp_path, ranges):
    mirror.ranges, mirror.breaks = ranges, [20_000, 40_000, 0, 60_000]
    assert main(words(mirror, tmp_path)) == 0
    assert len(mirror.asked) == 5 and mirror.asked[0] == "all"
    assert mirror.asked[1] == "bytes=20000-"
    assert mirror.asked[4] == ("bytes=120000-" if ranges else "bytes=60000-")
    assert_whole(tmp_path, "dev-clean")


@pytest.mark.parametrize("ranges", [True, False])
def test_one_that_brings_nothing_new_is_given_up_and_may_go_on_later(mirror, tmp_path, capsys, ranges):
    mirror.ranges, mirror.breaks = ranges, [40_000, *([0] if ranges else [40_000]) * download.TRIES]
    assert main(words(mirror, tmp_path)) == 1
    assert len(mirror.asked) == 1 + download.TRIES
    refusal = capsys.readouterr().err
    assert f"{mirror.url}/dev-clean.tar.gz does not come: " in refusal
    assert f"goes on from the 40,000 bytes in {tmp_path / 'dev-clean.tar.gz.part'}" in refusal
    assert main(words(mirror, tmp_path)) == 0
    assert_whole(tmp_path, "dev-clean")


def test_a_server_that_does_not_say_how_much_there_is(mirror, tmp_path):
    mirror.states_size = False
    part_of(tmp_path, ARCHIVES["dev-clean"])  # killed while it was verified: HTTP 416
    assert main(words(mirror, tmp_path, "--splits", "dev-clean", "test-clean")) == 0
    assert_whole(tmp_path, "dev-clean", "test-clean")


PROCESS = """
import os, signal, sys, tarfile
from asrlib import __main__
from asrlib.data import download
download.LIBRISPEECH_MD5["dev-clean"] = sys.argv.pop(1)
{before}
sys.exit(__main__.main(["data", *sys.argv[1:]]))
"""
KILLED_AT_THE_LAST_FILE = f"""
written, write = [], tarfile.TarFile.makefile
def write_or_die(self, member, target):
    written.append(target)
    if len(written) == {3 + len(TEXTS)}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, member, target)
tarfile.TarFile.makefile = write_or_die
"""


def start(mirror: Mirror, root: Path, before: str = "") -> subprocess.Popen:
    md5 = hashlib.md5(ARCHIVES["dev-clean"]).hexdigest()
    command = [sys.executable, "-c", PROCESS.format(before=before), md5, *words(mirror, root)]

    def heed_ctrl_c():  # which what a shell starts in the background ignores
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_during_the_download_it_goes_on_there(mirror, tmp_path, sent, status):
    mirror.breaks = [MIDDLE]
    mirror.goes_on.clear()
    part, process = tmp_path / "dev-clean.tar.gz.part", start(mirror, tmp_path)
    try:
        give_up = time.monotonic() + PATIENCE
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None and time.monotonic() < give_up, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == status and ("resumes here" in errors) == (status == 130)
    there = part.stat().st_size
    assert 0 < there <= MIDDLE and find_splits(tmp_path) == {}
    assert main(words(mirror, tmp_path)) == 0
    assert mirror.asked == ["all", f"bytes={there}-"]
    assert_whole(tmp_path, "dev-clean")


def test_killed_while_unpacking_it_is_no_split_and_is_not_downloaded_again(mirror, tmp_path):
    process = start(mirror, tmp_path, KILLED_AT_THE_LAST_FILE)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, errors
    assert len(list(tmp_path.rglob("*.flac"))) == len(TEXTS) - 1 and list(tmp_path.rglob("*.trans.txt"))
    for root in tmp_path, tmp_path / "LibriSpeech":
        assert find_splits(root) == {}
    [transcripts] = tmp_path.rglob("*.trans.txt")
    (transcripts.parent / "84-121-0003.flac").touch()  # of another kill
    assert main(words(mirror, tmp_path)) == 0
    assert mirror.asked == ["all"]
    assert_whole(tmp_path, "dev-clean")


# ---- refused -----------------------------------------------------------------------------------------------


def refusal(mirror: Mirror, root: Path, capsys, *more: str) -> str:
    assert main(words(mirror, root, *more)) == 1
    return capsys.readouterr().err


def test_an_unknown_split_is_answered_with_those_there_are(mirror, tmp_path, capsys):
    root = tmp_path / "new"
    said = refusal(mirror, root, capsys, "--splits", "dev-clean", "train-clean")
    assert "no split 'train-clean': it has dev-clean, dev-other, test-clean, test-other, train-clean-100" in said
    assert not root.exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_wrong_archive_is_named_and_removed_unless_it_is_ones_own(mirror, tmp_path, capsys, own):
    wrong = ARCHIVES["dev-clean"][:-1] + b"?"
    if own:
        (tmp_path / "dev-clean.tar.gz").write_bytes(wrong)
    mirror.archives["dev-clean"] = wrong
    said = refusal(mirror, tmp_path, capsys)
    where = str(tmp_path / "dev-clean.tar.gz") if own else f"{mirror.url}/dev-clean.tar.gz"
    assert f"{where} is " in said and hashlib.md5(ARCHIVES["dev-clean"]).hexdigest() in said
    assert ("Remove it" in said) if own else ("What came was removed" in said)
    assert [path.name for path in tmp_path.glob("*.tar.gz*")] == (["dev-clean.tar.gz"] if own else [])
    assert find_splits(tmp_path) == {}


def test_an_archive_that_is_not_there_is_known_before_any_is_downloaded(mirror, tmp_path, capsys):
    said = refusal(mirror, tmp_path, capsys, "--splits", "dev-clean", "train-clean-100")
    assert f"{mirror.url}/train-clean-100.tar.gz is not there (HTTP 404)" in said
    assert mirror.asked == []


def test_a_server_that_refuses_is_quoted(mirror, tmp_path, capsys):
    mirror.status = 503
    assert "dev-clean.tar.gz is refused (HTTP 503 Service Unavailable): try again" in refusal(mirror, tmp_path, capsys)


def test_no_network_is_said(mirror, tmp_path, capsys):
    mirror.url = "http://127.0.0.1:9"  # where nobody listens
    assert "dev-clean.tar.gz does not come: " in (said := refusal(mirror, tmp_path, capsys))
    assert "Is the network there" in said


@pytest.mark.parametrize("url", ["openslr.org/resources/12", "ftp://openslr.org"])
def test_an_address_that_is_none_is_said(mirror, tmp_path, capsys, url):
    mirror.url = url
    assert f"{url}/dev-clean.tar.gz cannot be had: " in refusal(mirror, tmp_path, capsys)


def test_a_disk_too_small_is_known_before_anything_is_downloaded(mirror, tmp_path, capsys):
    mirror.stated = 10**15
    there = len(part_of(tmp_path, ARCHIVES["dev-clean"][:MIDDLE]).read_bytes())
    one, both = 205 * 10**13 - there, 310 * 10**13  # of two archives one lies there at a time
    assert f"bytes free, and {one:,} are needed for dev-clean: " in refusal(mirror, tmp_path, capsys)
    splits = ["--splits", "dev-clean", "test-clean"]
    assert f" {both:,} are needed for dev-clean, test-clean: " in refusal(mirror, tmp_path, capsys, *splits)
    kept = 410 * 10**13 - there
    assert f" {kept:,} are needed" in refusal(mirror, tmp_path, capsys, *splits, "--keep")
    assert mirror.asked == []


def test_a_disk_that_fills_up_keeps_what_was_downloaded(mirror, tmp_path, capsys, monkeypatch):
    def no_space(self, path, **_rest):
        (path / "LibriSpeech/dev-clean/84/121").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", no_space)
        assert f"the disk of {tmp_path} is full: make room" in refusal(mirror, tmp_path, capsys)
    assert [path.name for path in (tmp_path / "LibriSpeech").iterdir()] == [".lock"]
    assert main(words(mirror, tmp_path)) == 0
    assert mirror.asked == ["all"]
    assert_whole(tmp_path, "dev-clean")


def test_two_at_once_would_spoil_each_others_files(mirror, tmp_path, capsys):
    (tmp_path / "LibriSpeech").mkdir()
    with open(tmp_path / "LibriSpeech/.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process prepares splits in" in refusal(mirror, tmp_path, capsys)
    assert main(words(mirror, tmp_path)) == 0


def test_folders_that_would_be_in_the_way(mirror, tmp_path, capsys):
    (tmp_path / "LibriSpeech/dev-clean/84").mkdir(parents=True)
    assert "dev-clean is there but holds no SPEAKER/CHAPTER" in refusal(mirror, tmp_path, capsys)
    assert main(words(mirror, tmp_path, "--splits", "test-clean")) == 0
    inner = tmp_path / "LibriSpeech/test-clean"
    assert f"{inner} is itself a split" in refusal(mirror, inner, capsys)


def test_an_archive_that_would_write_elsewhere_is_not_unpacked(tmp_path):
    archive, home = tmp_path / "a.tar.gz", tmp_path / "home"
    archive.write_bytes(tar_gz({"LibriSpeech/dev-clean/84/121/84-121.trans.txt": b"", "../../elsewhere": b"!"}))
    with pytest.raises(ValueError, match=r"a\.tar\.gz cannot be unpacked: .*elsewhere"):
        download.unpack(archive, home, "dev-clean")
    assert not (tmp_path / "elsewhere").exists() and not os.listdir(home)
