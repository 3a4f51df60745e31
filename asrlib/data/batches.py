"""Utterances of like length in batches of bounded padded length, and the tensors made of them."""

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
BATCHES_TO_MIX = 4  # at least so many batches share a bucket, or a small corpus would never be reshuffled


class BucketBatchSampler(Sampler[list[int]]):
    """Index lists whose padded audio (count × longest) never exceeds `batch_seconds`.

    Utterances are sorted into buckets of like length. A batch is drawn at random from one bucket and sized
    for the bucket's longest, so batches are composed anew in every epoch while their number stays the same.
    Deterministic in (seed, epoch). Without shuffling: longest first, the same every epoch, least padding.

    `groups`: of streamed speech, the row group of each utterance. As many of them as can be held in memory at once
    are a window, the same in every epoch, and buckets and batches are made within it; epochs shuffle the windows too.
    Thus each row group is fetched once an epoch. Without shuffling the window with the longest utterance is first.

    An utterance longer than `batch_seconds` is a batch of its own; `.oversized` counts them, and a warning tells.

    `spoken`: seconds without padding, by which utterances are sorted that are padded alike.

    Of several `processes` that train together, it gives the batches of one, `process`: batch i belongs to process
    i % processes, so that a step of all of them has the batches of as many accumulated ones of a single process. All
    have equally many, as they must work in step. With shuffling each utterance is still there once an epoch: where the
    batches do not come out even, the largest are halved. Without, batches stay as they are, and the first `.repeated`
    ones come again at the end: whoever gathers results leaves those out.
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
                window = max(windows, key=lambda batches: max(map(len, batches)))
                largest = max(window, key=len)
                half = len(largest) // 2
                window.append(largest[half:])
                del largest[half:]
        batches = list(itertools.chain.from_iterable(windows))
        batches += itertools.islice(itertools.cycle(batches[:]), self.repeated)
        return iter(batches[self.process :: self.processes])

    def _batches(self, buckets: list["Bucket"], order: random.Random) -> list[list[int]]:
        """Those of one window."""
        batches = []
        for indices, size in buckets:
            if self.shuffle:
                indices = order.sample(indices, len(indices))
            batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        if self.shuffle:
            order.shuffle(batches)
        return batches


Bucket = tuple[list[int], int]  # indices, how many of them make a batch


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
    """Indices of what is dealt together, each list longest first: of row groups that fit into memory side by side."""
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
    """{"audio": float32 [samples] at 16 kHz, "text": normalised transcript, "id"} per utterance and speed.

    The speeds of an utterance follow each other: item i is utterance i // len(speeds) at speed i % len(speeds), and
    lasts `.seconds[i]`, or what it is padded to if that is more; `.groups[i]` is the row group that it is fetched with,
    None of speech at hand. Faster speech may be too short for its text: under `ctc_zero_infinity`, which `train` sets,
    it costs nothing and teaches nothing. Raises ValueError for no speed, or one that is not positive, and for
    speech longer than what the processor pads to: its end would not be heard.
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
        return {"audio": audio, "text": normalise_text(utterance.text, self.processor), "id": utterance.id}

    def batches(
        self, batch_seconds: float, seed: int = 0, shuffle: bool = True, process: int = 0, processes: int = 1
    ) -> BucketBatchSampler:
        """The items in batches; see there."""
        return BucketBatchSampler(
            self.seconds, batch_seconds, seed, shuffle, process, processes, self.groups, self.spoken
        )

    def workers(self, wished: int) -> int:
        """How many processes of a DataLoader to read it in. Streamed speech: one, or each would fetch all of it."""
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
    """Samples that every utterance is padded to, however short: of Whisper's features; 0 of all others."""
    return getattr(getattr(processor, "feature_extractor", None), "n_samples", 0)


class SpeechCollator:
    """Items of SpeechDataset → {NAME, attention_mask, labels}.

    NAME is what the processor's feature extractor calls that which a model reads: input_values [B, S] for samples of
    audio, input_features [B, T, F] for frames of features (Whisper's: [B, F, T], always of 30 s). attention_mask [B, S]
    or [B, T] is 0, or False, where they are padded; labels [B, L] are padded with −100. `named`: also utterances, a
    list of (id, seconds of audio), to say which they are where something goes wrong; no model takes it.
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
        labels = [torch.tensor(label_ids(item["text"], self.processor)) for item in items]
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
