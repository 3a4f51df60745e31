"""Log-mel features of 16 kHz audio, and their mean and spread over a corpus.

Shapes: T frames, F mel bins.
"""

import torch
from tqdm import tqdm
from transformers import LasrFeatureExtractor

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus

WINDOW_MS = 25
SMALLEST_STD = 0.01  # of a log energy, nepers: a bin that was constant must not amplify later input without bound


def log_mel(mel_bins: int = 80, frame_shift_ms: float = 10.0) -> LasrFeatureExtractor:
    """The feature extractor of log mel energies [T, F], one frame every `frame_shift_ms`, not normalised.

    Each window of 25 ms that fits into the audio makes a frame; the extractor refuses audio shorter than a window.
    Raises ValueError where the shift is no whole number of samples.
    """
    shift = frame_shift_ms * SAMPLE_RATE / 1000
    if shift < 1 or not float(shift).is_integer():
        raise ValueError(
            f"frame_shift_ms is {frame_shift_ms}: at {SAMPLE_RATE} Hz give a multiple of {1000 / SAMPLE_RATE} ms"
        )
    return LasrFeatureExtractor(
        feature_size=mel_bins,
        sampling_rate=SAMPLE_RATE,
        hop_length=int(shift),
        win_length=WINDOW_MS * SAMPLE_RATE // 1000,
    )


def feature_statistics(corpus: Corpus, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [F] of each feature over all frames of `corpus`, float32, for normalisation.

    Reads one utterance at a time, so memory does not grow with the corpus. Raises ValueError where the corpus is empty,
    and UnusableAudio where an utterance cannot be decoded.
    """
    if not len(corpus):
        raise ValueError(f"{corpus.name} {corpus.split} is empty: its features have no mean")
    name = processor.feature_extractor.model_input_names[0]
    frames, total_F, squares_F = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for utterance in tqdm(corpus, desc="feature statistics", unit="utt", leave=None):
        heard = processor(utterance.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        x_TF = heard[name][0].double()
        frames += len(x_TF)
        total_F = total_F + x_TF.sum(0)
        squares_F = squares_F + x_TF.square().sum(0)
    mean_F = total_F / frames
    variance_F = (squares_F / frames - mean_F.square()).clamp(min=0)
    return mean_F.float(), variance_F.sqrt().clamp(min=SMALLEST_STD).float()
