"""Bootstrap over utterances or speakers: the intervals of error rates."""

import numpy as np

RESAMPLES = 10_000
SEED = 0


def resample_sums(columns_GK: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Bootstrap: the sum of each column over G rows drawn with replacement, `resamples` times → [R, K]."""
    rows = len(columns_GK)
    generator = np.random.default_rng(seed)
    block = max(1, 1_000_000 // rows)  # draws at once: limits the memory, and does not change the result
    sums = []
    for start in range(0, resamples, block):
        drawn = generator.integers(rows, size=(min(block, resamples - start), rows))
        sums.append(columns_GK[drawn].sum(axis=1))
    return np.concatenate(sums)


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled values."""
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def sums_by_speaker(columns_NK: np.ndarray, predictions: list[dict]) -> np.ndarray:
    """The columns summed over the utterances of each speaker: [G, K], in the order of their first utterances."""
    places = {}
    rows = [places.setdefault(prediction["speaker"], len(places)) for prediction in predictions]
    sums_GK = np.zeros((len(places), columns_NK.shape[1]), columns_NK.dtype)
    np.add.at(sums_GK, rows, columns_NK)
    return sums_GK


def rate_interval(errors_words_G2: np.ndarray) -> tuple[float, float]:
    """95 % interval of the error rate: errors of all rows divided by words of all rows."""
    sums_R2 = resample_sums(errors_words_G2)
    return interval(error_rates(sums_R2[:, 0], sums_R2[:, 1]))


def error_rates(errors_R: np.ndarray, words_R: np.ndarray) -> np.ndarray:
    """Error rates of resamples; NaN for those that drew no reference word."""
    return np.where(words_R > 0, errors_R / np.maximum(words_R, 1), np.nan)
