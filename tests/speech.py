"""What several tests need: a tone to hear, a CTC processor with a vocabulary of choice."""

import json
from pathlib import Path
from string import ascii_lowercase

import numpy as np


def tone(seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """float32 [samples], a sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def make_processor(folder: Path, letters: str = ascii_lowercase + "'", delimiter: str = "|"):
    """A Wav2Vec2Processor whose vocabulary, beside special tokens, is the word delimiter and `letters`."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *delimiter, *letters]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: id for id, token in enumerate(tokens)}), encoding="utf-8")
    return Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(return_attention_mask=True),
        tokenizer=Wav2Vec2CTCTokenizer(str(vocabulary)),
    )
