"""Normalising the samples of a stream, with mean and variance of the samples so far.

Shapes: S samples.
"""

import copy

import numpy as np
import torch

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.batches import SpeechCollator

USUAL_LEVEL = 0.05  # root mean square of speech at 16 kHz, full scale 1
USUAL_SECONDS = 1.0  # of speech at that level, assumed before the stream


class RunningNormaliser:
    """Zero mean and unit variance over the samples so far, for processors that normalise whole recordings.

    Every sample is normalised by itself and all earlier ones, so the size of the pieces does not matter. The first
    samples say little, so speech of USUAL_LEVEL is assumed for USUAL_SECONDS before the stream.
    """

    def __init__(self):
        self.count = USUAL_SECONDS * SAMPLE_RATE
        self.total, self.squares = 0.0, self.count * USUAL_LEVEL**2

    def __call__(self, samples_S: np.ndarray) -> np.ndarray:
        wide_S = samples_S.astype(np.float64)
        count_S = self.count + np.arange(1, len(wide_S) + 1)
        total_S, squares_S = self.total + wide_S.cumsum(), self.squares + np.square(wide_S).cumsum()
        if len(wide_S):
            self.count, self.total, self.squares = count_S[-1], total_S[-1], squares_S[-1]
        mean_S = total_S / count_S
        return ((wide_S - mean_S) / np.sqrt(squares_S / count_S - mean_S**2 + 1e-7)).astype(np.float32)


class HeardSoFar(SpeechCollator):
    """Batches of utterances, each normalised like a stream."""

    def __init__(self, processor):
        super().__init__(copy.deepcopy(processor))
        extractor = self.processor.feature_extractor
        self.normalises = getattr(extractor, "do_normalize", False)
        if self.normalises:
            extractor.do_normalize = False

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        if self.normalises:
            items = [item | {"audio": RunningNormaliser()(item["audio"])} for item in items]
        return super().__call__(items)
