"""Audio in any format soundfile knows, sampling rate and channel count → float32, mono, 16 kHz."""

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, of all audio that leaves this room
BLOCK = 1 << 20  # audio frames decoded at a time
UNSTATED = 1 << 62  # frames libsndfile reports where a header states none, as a FLAC's from a pipe

# What soundfile can open: a path, or a file object. Called once per reading, so nothing is held open.
Source = Callable[[], bytes | BinaryIO]


class UnusableAudio(ValueError):
    """Audio that cannot be decoded to at least one finite sample; the message is the reason."""


def read_audio(source: Source) -> np.ndarray:
    """float32 [samples] at 16 kHz, channels averaged. Raises UnusableAudio."""
    samples, rate = _decode(source)
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    if not len(samples):
        raise UnusableAudio("audio holds no samples")
    if not np.isfinite(samples).all():
        raise UnusableAudio("audio holds NaN or infinite samples")
    return samples


def read_pieces(source: Source, seconds: float) -> Iterator[np.ndarray]:
    """The samples of `read_audio` in pieces of about `seconds`, each decoded on demand. Raises UnusableAudio."""
    count = 0
    try:
        with soundfile.SoundFile(source()) as file:
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1)
            frames = max(1, round(seconds * file.samplerate))
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                piece = block.mean(axis=1)
                if not np.isfinite(piece).all():
                    raise UnusableAudio("audio holds NaN or infinite samples")
                count += len(piece)
                yield piece if file.samplerate == SAMPLE_RATE else resampler.resample_chunk(piece)
            if file.samplerate != SAMPLE_RATE:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (OSError, RuntimeError) as error:
        raise UnusableAudio(f"audio cannot be decoded: {_words(error)}") from error
    if not count:
        raise UnusableAudio("audio holds no samples")


def as_wave(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    """The bytes of a WAV file with 16 bits a sample, of float [samples]; values beyond ±1 are clipped."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Speech made faster, and its pitch higher, by the factor `speed`: [samples] → [samples / speed].

    By resampling (Ko et al. 2015, "Audio augmentation for speech recognition"). Speed 1 changes nothing.
    """
    return samples if speed == 1 else soxr.resample(samples, speed * SAMPLE_RATE, SAMPLE_RATE)


def duration(source: Source) -> float:
    """Seconds that the header states. Raises UnusableAudio."""
    try:
        with soundfile.SoundFile(source()) as file:
            frames, rate = file.frames, file.samplerate
    except (OSError, RuntimeError, ValueError) as error:
        raise UnusableAudio(f"audio cannot be read: {_words(error)}") from error
    if frames >= UNSTATED:
        raise UnusableAudio("audio does not state its length in its header: encode it again")
    if frames <= 0:
        raise UnusableAudio("audio holds no samples")
    return frames / rate


def _decode(source: Source) -> tuple[np.ndarray, int]:
    """float32 [frames] and the sampling rate in Hz."""
    try:
        with soundfile.SoundFile(source()) as file:
            blocks = [np.zeros(0, np.float32)]
            # In blocks: a damaged header may claim a year of audio, and must not reserve memory for it.
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):  # [frames, channels]
                blocks.append(block.mean(axis=1))
            return np.concatenate(blocks), file.samplerate
    except (OSError, RuntimeError, ValueError) as error:
        raise UnusableAudio(f"audio cannot be decoded: {_words(error)}") from error


def _words(error: Exception) -> str:
    return getattr(error, "error_string", str(error))  # libsndfile's own words, without the path
