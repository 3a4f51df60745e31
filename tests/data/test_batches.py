import random
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from speech import make_processor, tone
from transformers import LasrFeatureExtractor

from asrlib.data.audio import UnusableAudio
from asrlib.data.batches import BucketBatchSampler, SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, Utterance


def durations(count: int, seed: int = 0) -> list[float]:
    order = random.Random(seed)
    return [order.uniform(0.5, 16.0) for _ in range(count)]


def epoch(sampler: BucketBatchSampler, number: int) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_seconds"), [(1, 20.0), (37, 16.0), (500, 60.0), (500, 400.0)])
def test_every_epoch_holds_each_utterance_once_in_batches_that_fit(count, batch_seconds, shuffle):
    seconds = durations(count)
    sampler = BucketBatchSampler(seconds, batch_seconds, seed=1, shuffle=shuffle)
    for number in range(3):
        batches = epoch(sampler, number)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert all(len(batch) * max(seconds[i] for i in batch) <= batch_seconds for batch in batches)
        assert len(batches) == len(sampler)


def test_the_limit_holds_where_a_quotient_is_rounded_up():
    for longest in (0.1, 0.7, 1 / 3, 1.1, 2.3):
        for times in range(1, 60):
            limit = np.nextafter(times * longest, 0)
            [*batches] = BucketBatchSampler([longest] * 60, limit, shuffle=False)
            assert all(len(batch) * longest <= limit for batch in batches if len(batch) > 1)


def test_epochs_differ_in_composition_and_are_reproducible():
    seconds = durations(40)
    sampler, again = (BucketBatchSampler(seconds, 60.0, seed=7) for _ in range(2))
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert (epoch(again, 1), epoch(again, 0)) == (second, first)
    assert epoch(BucketBatchSampler(seconds, 60.0, seed=8), 0) != first


def test_without_shuffling_the_order_is_fixed_and_little_is_padded():
    seconds = durations(500)
    sampler = BucketBatchSampler(seconds, 60.0, shuffle=False)
    batches = epoch(sampler, 0)
    assert epoch(sampler, 1) == batches
    assert batches[0][0] == max(range(500), key=seconds.__getitem__)  # memory runs out at once or never
    padded = sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)
    assert padded < 1.03 * sum(seconds)


def test_shuffled_batches_of_a_large_corpus_pad_little():
    seconds = durations(5000)
    padded = sum(len(batch) * max(seconds[i] for i in batch) for batch in BucketBatchSampler(seconds, 60.0))
    assert padded < 1.10 * sum(seconds)


def test_an_utterance_longer_than_a_batch_is_its_own_batch():
    with pytest.warns(
        UserWarning, match="2 of 4 utterances are longer than batch_seconds 20: .* the longest of 50.0 s"
    ):
        sampler = BucketBatchSampler([1.0, 50.0, 1.0, 30.0], 20.0)
    assert sampler.oversized == 2
    assert sorted(sorted(batch) for batch in sampler) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    ("seconds", "batch_seconds"), [([1.0], 0), ([1.0], float("inf")), ([0.0], 20), ([float("nan")], 20)]
)
def test_lengths_that_mean_nothing_are_refused(seconds, batch_seconds):
    with pytest.raises(ValueError, match="positive"):
        BucketBatchSampler(seconds, batch_seconds)


def test_an_epoch_resumed_half_way_goes_on_with_the_same_batches():
    """As transformers' Trainer resumes: skip first, then set the epoch."""
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    def loader() -> DataLoader:
        sampler = BucketBatchSampler(durations(60), 30.0, seed=3)
        items = DataLoader(list(range(60)), batch_sampler=sampler, collate_fn=list)
        return Accelerator(cpu=True).prepare(items)

    resumed = skip_first_batches(loader(), 4)
    resumed.set_epoch(2)
    resumed.batch_sampler.batch_sampler.set_epoch(2)
    assert list(resumed) == epoch(BucketBatchSampler(durations(60), 30.0, seed=3), 2)[4:]


def test_the_collator_pads_without_touching_what_is_there(tmp_path):
    processor = make_processor(tmp_path)
    long, short = {"audio": tone(0.5), "text": "a bee", "id": "l"}, {"audio": tone(0.2), "text": "it", "id": "s"}
    batch = SpeechCollator(processor)([long, short])
    assert batch["input_values"].shape == batch["attention_mask"].shape == (2, 8000)
    assert batch["attention_mask"].sum(1).tolist() == [8000, 3200]
    assert batch["labels"].dtype == torch.int64
    assert processor.tokenizer.convert_ids_to_tokens(batch["labels"][0]) == list("a|bee")
    assert batch["labels"][1, 2:].tolist() == [-100] * 3

    alone = SpeechCollator(processor)([short])
    torch.testing.assert_close(batch["input_values"][1, :3200], alone["input_values"][0])
    assert batch["input_values"][1, 3200:].abs().max() == 0

    named = SpeechCollator(processor, named=True)([long, short])
    assert named.pop("utterances") == [("l", 0.5), ("s", 0.2)]
    assert named.keys() == batch.keys() and all(torch.equal(named[name], batch[name]) for name in batch)


def test_inputs_are_named_by_the_feature_extractor(tmp_path):
    processor = make_processor(tmp_path)
    items = [{"audio": tone(0.5), "text": "a bee"}, {"audio": tone(0.2), "text": "it"}]
    heard = SpeechCollator(processor)(items)
    assert list(heard) == ["input_values", "attention_mask", "labels"]

    processor.feature_extractor = LasrFeatureExtractor(feature_size=80)
    seen = SpeechCollator(processor)(items)
    assert list(seen) == ["input_features", "attention_mask", "labels"]
    assert seen["input_features"].shape == (2, 48, 80) and seen["input_features"].dtype == torch.float32
    assert seen["attention_mask"].sum(1).tolist() == [48, 18]  # windows of 25 ms that fit, one every 10 ms
    assert torch.equal(seen["labels"], heard["labels"])


def test_audio_that_is_gone_since_it_was_checked_is_named(tmp_path, processor):
    path = tmp_path / "7-8-9.wav"
    soundfile.write(path, np.zeros(8000, np.float32), 16_000)
    utterance = Utterance("7-8-9", "A", "7", 0.5, str(path), partial(open, path, "rb"))
    dataset = SpeechDataset(Corpus("one", "train", (utterance,)), processor)
    assert len(dataset[0]["audio"]) == 8000
    path.write_bytes(b"")
    with pytest.raises(UnusableAudio, match=f"7-8-9 in {path}: audio cannot be decoded"):
        dataset[0]
