"""Samples of audio brought to zero mean and unit variance by what was heard so far, as a stream must.

Shapes: S samples.
"""

import copy

import numpy as np
import torch

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.batches import SpeechCollator

USUAL_LEVEL = 0.05  # root mean square of speech at 16 kHz, full scale 1
USUAL_SECONDS = 1.0  # for how much heard speech that level stands


class RunningNormaliser:
    """Zero mean and unit variance by what was heard so far, for processors that take them of the whole recording.

    Every sample is normalised by itself and all before it, however the audio comes in pieces. At first that says
    little: speech of USUAL_LEVEL for USUAL_SECONDS is taken as heard before.
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
    """Batches of utterances each of which was normalised as a stream must."""

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
