"""Speech at a URL is the speech of the folder behind it, and is fetched once where once is enough."""

import copy
import io
import pickle
import random
import threading
import time
from collections import Counter
from itertools import chain, groupby
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
import soundfile
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from pyarrow import parquet
from torch.utils.data import DataLoader

from asrlib.data import batches, remote
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.batches import SpeechDataset
from asrlib.data.corpus import Corpus
from asrlib.data.opening import check_splits, open_corpus
from asrlib.data.remote import UnreadableShard
from asrlib.running.preflight import check_surroundings
from asrlib.runs import BadParameter
from asrlib.training.training import SpeechTrainer, TrainingSettings, train

SHARDS = {  # of the layout of openslr/librispeech_asr: number of utterances
    "all/train.clean.100/0000.parquet": 5,
    "all/train.clean.100/0001.parquet": 4,
    "all/train.clean.100/0002.parquet": 4,
    "all/test.clean/0000.parquet": 3,
    "clean/test/0000.parquet": 3,
}
ROWS = 2  # in a row group, of which train-clean-100 so has 7
GROUPS = 7
URL = "memory://speech"


@pytest.fixture(autouse=True)
def _private(tmp_path, monkeypatch, asrlib_cache):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(remote, "row_groups", remote.RowGroups())
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0, 0, 0))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def flac(seconds: float, seed: int) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE))
    soundfile.write(file, samples, SAMPLE_RATE, "PCM_16", format="FLAC")
    return file.getvalue()


def rows(shard: str, count: int) -> list[dict]:
    order, start = random.Random(shard), 10 * list(SHARDS).index(shard)
    return [
        {
            "audio": {"bytes": flac(order.uniform(0.4, 0.9), start + i), "path": f"{start + i}.flac"},
            "text": " ".join(order.choices("AETO", k=2)),
            "speaker_id": start % 3,
            "id": f"{start % 3}-1-{start + i:04d}",
        }
        for i in range(count)
    ]


def write(folder: str, changed: dict[str, list[dict]] | None = None) -> str:
    """Shards below `folder`, a URL; those in `changed` with rows of their own."""
    for shard, count in SHARDS.items():
        storage, path = fsspec.core.url_to_fs(f"{folder}/{shard}")
        storage.makedirs(path.rpartition("/")[0], exist_ok=True)
        table = pyarrow.Table.from_pylist((changed or {}).get(shard) or rows(shard, count))
        with storage.open(path, "wb") as file:
            parquet.write_table(table, file, row_group_size=ROWS)
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The file of each opening for reading, in storage in memory."""
    paths, original = [], MemoryFileSystem._open

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            paths.append(path)
        return original(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", _open)
    return paths


def failing(monkeypatch, times: int) -> list[str]:
    """Storage in memory that cannot be reached so many times; the list of tries."""
    tries, original = [], MemoryFileSystem._open

    def _open(self, path, mode="rb", **options):
        tries.append(path)
        if len(tries) <= times:
            raise TimeoutError("no answer")
        return original(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", _open)
    return tries


# ---- opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_it_is_the_speech_of_the_folder(tmp_path, kind, named):
    changed = {shard: rows(shard, count) for shard, count in SHARDS.items()}
    for row in [row for shard in changed.values() for row in shard if not named]:
        del row["id"]
    folder = write(f"file://{tmp_path}/hub", changed)
    url = folder if kind == "file" else write(URL, changed)
    for split, count in ("train-clean-100", 13), ("test-clean", 3), ("train-clean-100+test-clean", 16):
        here, there = open_corpus(tmp_path / "hub", split), open_corpus(url, split)
        assert len(there) == count and not there.rejected
        assert list(map(facts, there)) == list(map(facts, here))
        for one, other in zip(there, here, strict=True):
            np.testing.assert_array_equal(one.audio(), other.audio())
        streamed, local = (list(SpeechDataset(corpus, None).batches(2.0)) for corpus in (there, here))
        assert streamed == local  # as long as all of it fits into memory


def facts(utterance):
    return utterance.id, utterance.text, utterance.speaker, utterance.seconds


def test_a_second_opening_reads_nothing_and_a_changed_shard_is_read_again(opened):
    first = open_corpus(write(URL), "train-clean-100")
    assert len(opened) == GROUPS + 3  # and the footers
    opened.clear()
    second = open_corpus(URL, "train-clean-100")
    assert opened == [] and list(map(facts, second)) == list(map(facts, first))
    storage = fsspec.filesystem("memory")
    storage.copy("/speech/all/test.clean/0000.parquet", "/speech/all/train.clean.100/0001.parquet")
    opened.clear()
    third = open_corpus(URL, "train-clean-100")
    assert set(opened) == {"/speech/all/train.clean.100/0001.parquet"}
    assert [u.id for u in third] == [u.id for u in [*first[:5], *open_corpus(URL, "test-clean"), *first[9:]]]


def test_a_first_opening_that_is_killed_goes_on_behind_the_last_whole_shard(asrlib_cache, monkeypatch, opened):
    write(URL)
    admit, left = remote.admit, iter(range(7))
    with monkeypatch.context() as patch:
        patch.setattr(remote, "admit", lambda row: interrupt() if next(left, None) is None else admit(row))
        with pytest.raises(KeyboardInterrupt):
            open_corpus(URL, "train-clean-100")
    assert [path.suffix for path in asrlib_cache.rglob("*") if path.is_file()] == [".json"]
    opened.clear()
    assert len(open_corpus(URL, "train-clean-100")) == 13
    assert Counter(path[-12:] for path in opened) == {"0001.parquet": 3, "0002.parquet": 3}


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("url", "split", "said"),
    [
        (URL, "dev-clean", f"no split 'dev-clean' in {URL}; splits found: all/test.clean, all/train.clean.100, clean"),
        ("memory://nowhere", "train", "there is no .parquet file at memory://nowhere"),
        ("s4://speech", "train", "no corpus can be listed at s4://speech: Protocol not known: s4"),
        ("memory://down/speech", "train", "no corpus can be listed at memory://down/speech: no answer"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(monkeypatch, opened, url, split, said):
    find = MemoryFileSystem.find

    def find_unless_down(self, path, **options):
        if "down" in path:
            raise TimeoutError("no answer")
        return find(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "find", find_unless_down)
    write(URL)
    check_splits(URL, ["train-clean-100+test-clean"])
    for refuses in (lambda: check_splits(url, ["test-clean", split]), lambda: open_corpus(url, split)):
        with pytest.raises(FileNotFoundError, match=said):
            refuses()
    with pytest.raises(BadParameter, match=said):
        check_surroundings({"corpus": url, "eval_splits": [split]})
    assert opened == []


def test_columns_that_are_not_understood_are_named():
    shard = "all/train.clean.100/0000.parquet"
    write(URL, {shard: [{"audio": {"bytes": b"", "path": ""}, "words": "A"}]})
    with pytest.raises(ValueError, match=f"{shard} has no column text or .*; columns found: audio, words"):
        open_corpus(URL, "train-clean-100")
    write(URL, {shard: [{"audio": "1.flac", "text": "A"}]})
    with pytest.raises(ValueError, match=f"{shard}: column audio should hold .*, but holds string"):
        open_corpus(URL, "train-clean-100")


# ---- faults ------------------------------------------------------------------------------------------------


def test_damaged_audio_amid_a_shard_is_rejected_by_name(processor):
    shard = "all/train.clean.100/0001.parquet"
    damaged = rows(shard, 4)
    ids = [row["id"] for row in damaged]
    damaged[0]["audio"]["bytes"] = bytes(8) + damaged[0]["audio"]["bytes"][8:]
    damaged[1]["audio"]["bytes"] = damaged[1]["audio"]["bytes"][:4000]
    damaged[2]["audio"] = None
    corpus = open_corpus(write(URL, {shard: damaged}), "train-clean-100")
    assert [row.id for row in corpus.rejected] == [ids[0], ids[2]]
    usable = corpus.usable(processor, frames=lambda samples: samples // 320)
    assert [row.id for row in usable.rejected] == [ids[0], ids[2], ids[1]] and len(usable) == 10
    reasons = ["audio cannot be read: ", "audio cannot be read: the row holds no audio", "audio "]
    for row, reason, place in zip(usable.rejected, reasons, ["0, row 0", "1, row 0", "0, row 1"], strict=True):
        assert row.reason.startswith(reason) and row.where == f"memory:///speech/{shard}, row group {place}"


def test_a_shard_cut_short_is_named(asrlib_cache):
    path = "/speech/all/train.clean.100/0001.parquet"
    storage = fsspec.filesystem("memory")
    write(URL)
    storage.pipe_file(path, storage.cat_file(path)[:-1])
    with pytest.raises(UnreadableShard, match=f"the footer of memory://{path} is damaged: .* Copy it there again"):
        open_corpus(URL, "train-clean-100")


def test_a_shard_replaced_behind_an_open_corpus_is_named():
    corpus = open_corpus(write(URL), "train-clean-100")
    shard = "all/train.clean.100/0000.parquet"
    write(URL, {shard: rows(shard, 5)[::-1]})
    with pytest.raises(UnreadableShard, match=f"{shard} has changed since it was opened: open the corpus again"):
        corpus[0].audio()


def test_a_lost_connection_is_tried_again(monkeypatch):
    corpus = open_corpus(write(URL), "train-clean-100")
    expected = corpus[0].audio()
    remote.row_groups.held.clear()
    tries, slept = failing(monkeypatch, times=2), []
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (1, 4, 16))
    monkeypatch.setattr(time, "sleep", slept.append)
    np.testing.assert_array_equal(corpus[0].audio(), expected)
    assert len(tries) == 3 and slept == [0, 1, 4]


def test_a_connection_lost_for_good_is_said_and_rejects_nothing(monkeypatch, processor):
    corpus = open_corpus(write(URL), "train-clean-100")
    failing(monkeypatch, times=1000)
    said = "row group 0 of memory:///speech/all/train.clean.100/0000.parquet could not be fetched in 4 attempts: no ans"
    with pytest.raises(UnreadableShard, match=said):
        corpus.usable(processor, frames=lambda samples: samples // 320)
    with pytest.raises(UnreadableShard, match=said):
        SpeechDataset(corpus, processor)[0]


# ---- fetching ----------------------------------------------------------------------------------------------


def test_two_threads_fetch_a_row_group_once(monkeypatch):
    corpus = open_corpus(write(URL), "train-clean-100")
    reads, began, original = [], threading.Event(), MemoryFileSystem._open

    def _open(self, path, *args, **options):
        reads.append(path)
        began.wait(10)
        time.sleep(0.05)  # for the other thread to come as far, if it may
        return original(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", _open)
    threads = [threading.Thread(target=corpus[i].audio) for i in range(2)]
    for thread in threads:
        thread.start()
    began.set()
    for thread in threads:
        thread.join(10)
    assert corpus[0].group == corpus[1].group and len(reads) == 1


def test_what_goes_to_another_process_is_where_the_audio_is(tmp_path, processor):
    corpus = open_corpus(write(f"file://{tmp_path}/hub"), "train-clean-100")
    before = len(pickle.dumps(corpus))
    expected = [utterance.audio() for utterance in corpus]
    assert len(pickle.dumps(corpus)) == before < corpus.seconds * SAMPLE_RATE
    for moved in copy.deepcopy(corpus), pickle.loads(pickle.dumps(corpus)):
        np.testing.assert_array_equal(moved[12].audio(), expected[12])
    dataset = SpeechDataset(corpus, processor)
    assert dataset.workers(4) == 1 and dataset.workers(0) == 0
    assert SpeechDataset(tiny.corpus(), processor).workers(4) == 4
    for item, audio in zip(DataLoader(dataset, None, num_workers=1), expected, strict=True):
        np.testing.assert_array_equal(item["audio"], audio)


def test_audio_alone_is_fetched(monkeypatch):
    shard, count = next(iter(SHARDS.items()))
    beside = [row | {"beside": random.Random(i).randbytes(200_000)} for i, row in enumerate(rows(shard, count))]
    corpus = open_corpus(write(URL, {shard: beside}), "train-clean-100")
    fetched = []

    class RangesOfBytes(AbstractBufferedFile):  # as the hub and buckets give them
        def _fetch_range(self, start, end):
            fetched.append(end - start)
            return self.fs.cat_file(self.path, start, end)

    def _open(self, path, mode="rb", block_size=None, autocommit=True, cache_options=None, **options):
        return RangesOfBytes(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", _open)
    corpus[0].audio()
    assert corpus[0].group.bytes < sum(fetched) < corpus[0].group.bytes + 100_000  # the footer


def small_memory(monkeypatch, corpus: Corpus, groups: float) -> None:
    """Room for so many row groups of the largest size."""
    room = int(groups * max(utterance.group.bytes for utterance in corpus))
    for module in batches, remote:
        monkeypatch.setattr(module, "HELD_BYTES", room)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_fetches_each_row_group_once_and_holds_no_more_than_fit(monkeypatch, opened, processor, shuffle):
    corpus = open_corpus(write(URL), "train-clean-100")
    small_memory(monkeypatch, corpus, 2.5)
    dataset = SpeechDataset(corpus, processor, speeds=(0.9, 1.0))
    sampler, again = (dataset.batches(2.0, seed=3, shuffle=shuffle) for _ in range(2))
    assert len(sampler.windows) > 2
    epochs = []
    for epoch in range(3):
        remote.row_groups.held.clear()
        opened.clear()
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(again) == epochs[-1] and len(epochs[-1]) == len(sampler)
        assert sorted(chain(*epochs[-1])) == list(range(26))
        for batch in epochs[-1]:
            assert len(batch) * max(dataset.seconds[i] for i in batch) <= 2.0
            for index in batch:
                dataset[index]
                assert sum(group.bytes for group in remote.row_groups.held) <= remote.HELD_BYTES
        assert Counter(path[-12:] for path in opened) == {"0000.parquet": 3, "0001.parquet": 2, "0002.parquet": 2}
    contents = {frozenset(map(frozenset, epoch)) for epoch in epochs}
    window_of = {i: window for window, buckets in enumerate(sampler.windows) for among, _ in buckets for i in among}
    orders = {tuple(dict.fromkeys(window_of[i] for i in chain(*epoch))) for epoch in epochs}
    assert (len(contents), len(orders) > 1) == ((3, True) if shuffle else (1, False))
    assert shuffle or epochs[0][0][0] == int(np.argmax(dataset.seconds))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3, 13])
def test_processes_share_the_batches_of_one_and_the_halved_stay_in_their_window(
    monkeypatch, processor, processes, shuffle
):
    corpus = open_corpus(write(URL), "train-clean-100")
    small_memory(monkeypatch, corpus, 2.5)
    dataset = SpeechDataset(corpus, processor)
    shares = [dataset.batches(2.0, 1, shuffle, process, processes) for process in range(processes)]
    assert {len(list(share)) for share in shares} == {len(shares[0])}
    dealt = [batch for step in zip(*shares, strict=True) for batch in step]
    dealt = dealt[: len(dealt) - shares[0].repeated]
    assert sorted(chain(*dealt)) == list(range(13)) and all(dealt)
    window_of = {i: window for window, buckets in enumerate(shares[0].windows) for among, _ in buckets for i in among}
    runs = [window for window, _ in groupby(window_of[i] for i in chain(*dealt))]
    assert len(runs) == len(set(runs)) == len(shares[0].windows) > 2


# ---- training ----------------------------------------------------------------------------------------------


SEED = 2  # deals row groups into windows of more batches than other seeds do


def trained(folder: Path, processor) -> tuple[list[dict], dict[str, torch.Tensor]]:
    training, validation = (open_corpus(URL, split) for split in ("train-clean-100", "test-clean"))
    model = tiny.conformer()
    settings = TrainingSettings(
        trainable="all", epochs=2, learning_rate=0.02, batch_seconds=1.4, evaluations_per_epoch=3, patience=100,
        device="cpu", seed=SEED,
    )  # fmt: skip
    result = train(model, processor, training, validation, folder, settings)
    told = ("step", "loss", "grad_norm", "eval_loss", "eval_wer")
    return [{name: row[name] for name in told if name in row} for row in result.history], model.state_dict()


def test_training_interrupted_amid_an_epoch_ends_as_if_it_was_not(tmp_path, monkeypatch, processor):
    small_memory(monkeypatch, open_corpus(write(URL), "train-clean-100"), 2.5)
    history, weights = trained(tmp_path / "whole", processor)
    streamed = SpeechDataset(open_corpus(URL, "train-clean-100"), processor)
    epoch, others = (len(streamed.batches(1.4, seed)) for seed in (SEED, SEED + 1))
    assert history[-1]["step"] == 2 * epoch != 2 * others
    step, original = epoch + epoch // 2 + 1, SpeechTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SpeechTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "resumed", processor)
    [left] = [int(path.name.split("-")[1]) for path in (tmp_path / "resumed").glob("checkpoint-*")][-1:]
    assert left % epoch  # amid an epoch
    remote.row_groups.held.clear()
    again, resumed = trained(tmp_path / "resumed", processor)
    assert again == history
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name
