"""Batches of utterances of similar length, bounded in padded length, and the tensors made of them."""

import itertools
import math
import random
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from asrlib.data.audio import SAMPLE_RATE, UnusableAudio, change_speed
from asrlib.data.corpus import HELD_BYTES, Corpus, RowGroup
from asrlib.data.text import label_ids, normalise_text

BUCKETS = 24  # of a large corpus: few enough to mix widely, enough to pad little
BATCHES_TO_MIX = 4  # the fewest batches in a bucket: with one, a small corpus would never be reshuffled


class BucketBatchSampler(Sampler[list[int]]):
    """Index lists whose padded audio (count × longest) never exceeds `batch_seconds`.

    Utterances are sorted into buckets of similar length. A batch comes from one bucket, and the bucket's longest
    utterance limits its size. Each epoch composes the batches anew, and their number stays the same; seed and epoch
    determine them. Without shuffling they are the same every epoch, the longest first, with the least padding.

    `groups`: the row group of each utterance of streamed speech. Row groups that fit into memory together are a window.
    Windows are the same in every epoch, buckets and batches are made within one, and epochs shuffle the windows too. So
    each row group is fetched once an epoch. Without shuffling, the window with the longest utterance comes first.

    An utterance longer than `batch_seconds` is a batch of its own. `.oversized` counts these, and a warning names them.

    `spoken`: seconds without padding. They sort utterances of equal padded length.

    Several `processes` that train together share the batches: batch i belongs to process i % processes. A step of all
    of them then equals a step of one process that accumulates gradients over `processes` batches. They work in step, so
    each has the same number. With shuffling, the largest batches are halved until their number is a multiple of
    `processes`: each utterance occurs once an epoch. Without shuffling, the first `.repeated` batches come again at the
    end, and whoever gathers results drops those.
    Raises ValueError for a duration or a `batch_seconds` that is not positive, and for too few utterances to halve.
    """

    def __init__(
        self,
        seconds: list[float],
        batch_seconds: float,
        seed: int = 0,
        shuffle: bool = True,
        process: int = 0,
        processes: int = 1,
        groups: Sequence[RowGroup | None] | None = None,
        spoken: list[float] | None = None,
    ):
        if not 0 < batch_seconds < math.inf:
            raise ValueError(f"batch_seconds must be a positive number, not {batch_seconds}")
        if not all(0 < s < math.inf for s in seconds):
            raise ValueError("every utterance must have a positive duration")
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.oversized = sum(s > batch_seconds for s in seconds)
        if self.oversized:
            warnings.warn(
                f"{self.oversized:,} of {len(seconds):,} utterances are longer than batch_seconds {batch_seconds:g}: "
                f"each is a batch of its own, the longest of {max(seconds):.1f} s",
                stacklevel=2,
            )
        spoken = spoken or seconds
        longest_first = sorted(range(len(seconds)), key=lambda i: (-seconds[i], -spoken[i]))
        windows = _windows(longest_first, groups or [None] * len(seconds), seed if shuffle else None)
        self.windows = [_buckets(window, seconds, batch_seconds, shuffle) for window in windows]
        self.process, self.processes = process, processes
        count = sum(math.ceil(len(indices) / size) for buckets in self.windows for indices, size in buckets)
        self.repeated = 0 if shuffle else -count % processes
        self.batches_each = math.ceil(count / processes)
        if shuffle and self.batches_each * processes > len(seconds):
            raise ValueError(
                f"{len(seconds)} utterances in {count} batches cannot be dealt out evenly to {processes} processes: "
                "raise batch_seconds, or train in fewer processes"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches_each

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(f"{self.seed} {self.epoch}")
        windows = [self._batches(buckets, order) for buckets in self.windows]
        if self.shuffle:
            order.shuffle(windows)
            for _ in range(-sum(map(len, windows)) % self.processes):
                _halve_largest(windows)
        batches = list(itertools.chain.from_iterable(windows))
        batches += itertools.islice(itertools.cycle(batches[:]), self.repeated)
        return iter(batches[self.process :: self.processes])

    def _batches(self, buckets: list["Bucket"], order: random.Random) -> list[list[int]]:
        """The batches of one window."""
        batches = []
        for indices, size in buckets:
            if self.shuffle:
                indices = order.sample(indices, len(indices))
            batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        if self.shuffle:
            order.shuffle(batches)
        return batches


Bucket = tuple[list[int], int]  # indices, and the size of a batch


def _halve_largest(windows: list[list[list[int]]]) -> None:
    """Splits the largest of all batches in place; the second half becomes the last batch of its window."""
    window = max(windows, key=lambda batches: max(map(len, batches)))
    largest = max(window, key=len)
    half = len(largest) // 2
    window.append(largest[half:])
    del largest[half:]


def _buckets(longest_first: list[int], seconds: list[float], batch_seconds: float, shuffle: bool) -> list[Bucket]:
    buckets, count = [], len(longest_first)
    while longest_first:
        longest = seconds[longest_first[0]]
        size = _count_that_fits(longest, batch_seconds)
        mixes = shuffle and longest <= batch_seconds
        batches = max(BATCHES_TO_MIX, math.ceil(count / BUCKETS / size)) if mixes else 1
        buckets.append((longest_first[: size * batches], size))
        longest_first = longest_first[size * batches :]
    return buckets


def _windows(longest_first: list[int], groups: Sequence[RowGroup | None], seed: int | None) -> list[list[int]]:
    """The indices of each window, longest first. A window holds row groups that fit into memory together."""
    order = list(dict.fromkeys(groups[index] for index in longest_first))
    if seed is not None:
        random.Random(seed).shuffle(order)
    window_of, count, room = {}, 0, 0
    for group in order:
        size = group.bytes if group else 0  # speech at hand is one window
        if not count or size > room:
            count, room = count + 1, HELD_BYTES
        window_of[group] = count - 1
        room -= size
    windows: list[list[int]] = [[] for _ in range(count)]
    for index in longest_first:
        windows[window_of[groups[index]]].append(index)
    return windows


def _count_that_fits(longest: float, batch_seconds: float) -> int:
    count = max(1, int(batch_seconds / longest))
    return count - 1 if count > 1 and count * longest > batch_seconds else count  # the quotient may round up


class SpeechDataset(Dataset):
    """{"audio": float32 [samples] at 16 kHz, "text": normalised transcript, "id", "language"} per utterance and speed.

    The speeds of an utterance follow each other: item i is utterance i // len(speeds) at speed i % len(speeds).
    `.seconds[i]` is its length, padding included if the processor pads to a fixed length. `.groups[i]` is the row group
    that it is fetched with, None if its audio is at hand. Faster speech may be too short for its text: under
    `ctc_zero_infinity`, which `train` sets, it costs nothing and teaches nothing. Raises ValueError for an empty list
    of speeds, for a speed that is not positive, and for speech longer than the processor's fixed length, whose end
    would be cut off.
    """

    def __init__(self, corpus: Corpus, processor, speeds: Sequence[float] = (1.0,)):
        if not len(speeds) or not all(0 < speed < math.inf for speed in speeds):
            raise ValueError(f"speeds are {list(speeds)}: give at least one, all positive; 1.0 is the speech as it is")
        self.corpus = corpus
        self.processor = processor
        self.speeds = tuple(speeds)
        padded = padded_samples(processor) / SAMPLE_RATE
        if padded:
            _check_window(corpus, padded, self.speeds)
        self.spoken = [utterance.seconds / speed for utterance in corpus for speed in self.speeds]
        self.seconds = [max(padded, seconds) for seconds in self.spoken]
        self.groups = [utterance.group for utterance in corpus for _ in self.speeds]

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
        place, speed = divmod(index, len(self.speeds))
        utterance = self.corpus[place]
        try:
            audio = change_speed(utterance.audio(), self.speeds[speed])
        except UnusableAudio as error:  # it could be read when the corpus was checked
            raise UnusableAudio(f"{utterance.id} in {utterance.where}: {error}") from error
        text = normalise_text(utterance.text, self.processor)
        return {"audio": audio, "text": text, "id": utterance.id, "language": utterance.language}

    def batches(
        self, batch_seconds: float, seed: int = 0, shuffle: bool = True, process: int = 0, processes: int = 1
    ) -> BucketBatchSampler:
        """The items in batches: see BucketBatchSampler."""
        return BucketBatchSampler(
            self.seconds, batch_seconds, seed, shuffle, process, processes, self.groups, self.spoken
        )

    def workers(self, wished: int) -> int:
        """The number of DataLoader processes. Streamed speech takes one at most: each process would fetch all of it."""
        return min(wished, 1) if any(self.groups) else wished


def _check_window(corpus: Corpus, window: float, speeds: Sequence[float]) -> None:
    slowest, longest = min(speeds), max(corpus, key=lambda utterance: utterance.seconds, default=None)
    if longest is not None and round(longest.seconds / slowest * SAMPLE_RATE) > round(window * SAMPLE_RATE):
        at_speed = f" at speed {slowest:g}" if slowest != 1 else ""
        advice = "leave this speed out" if longest.seconds <= window else "Corpus.usable leaves such speech out"
        raise ValueError(
            f"{longest.id} lasts {longest.seconds / slowest:.1f} s{at_speed}, and this model hears {window:g} s at "
            f"once: {advice}"
        )


def padded_samples(processor) -> int:
    """The fixed number of samples that Whisper's features pad every utterance to; 0 for all other processors."""
    return getattr(getattr(processor, "feature_extractor", None), "n_samples", 0)


class SpeechCollator:
    """Items of SpeechDataset → {NAME, attention_mask, labels}.

    NAME is the feature extractor's name for the model's input: input_values [B, S] for samples of audio, input_features
    [B, T, F] for frames of features (Whisper's: [B, F, T], always of 30 s). attention_mask [B, S] or [B, T] is 0, or
    False, where they are padded; labels [B, L] are padded with −100. `named` adds utterances, a list of (id, seconds of
    audio), for error messages; no model takes it.
    """

    def __init__(self, processor, named: bool = False):
        self.processor = processor
        self.named = named
        self.name = processor.feature_extractor.model_input_names[0]
        self.padded = padded_samples(processor)

    def __call__(self, items: list[dict[str, np.ndarray | str]]) -> dict[str, torch.Tensor | list]:
        with torch.autocast("cpu", enabled=False):  # some extractors compute features with torch, and would round them
            inputs = self.processor.feature_extractor(
                [item["audio"] for item in items],
                sampling_rate=SAMPLE_RATE,
                padding="max_length" if self.padded else True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        spelt = [label_ids(item["text"], self.processor, item.get("language")) for item in items]
        labels = [torch.tensor(ids) for ids in spelt]
        batch = {
            self.name: inputs[self.name],
            "attention_mask": inputs["attention_mask"],
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).long(),
        }
        if not self.padded:
            longest = int(inputs["attention_mask"].sum(-1).max())  # some extractors pad the longest too
            batch |= {name: batch[name][:, :longest] for name in (self.name, "attention_mask")}
        if self.named:
            batch["utterances"] = [(item["id"], len(item["audio"]) / SAMPLE_RATE) for item in items]
        return batch
