"""A small Whisper with random weights, and a tokenizer for its training text.

Its layout is OpenAI's: a model trained on a small corpus, with a window of a few seconds, converts, loads and generates
like the published models.
"""

import json
from collections.abc import Iterable

from tokenizers import ByteLevelBPETokenizer
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

SPECIAL = (  # in Whisper's order: the language follows the start
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>",
    "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
PIECES = 512  # bytes and pairs of them, without the special tokens
FRAMES_PER_SECOND = 50
TOKENS_PER_FIVE_SECONDS = 64  # the most that it writes; Whisper's 448 for 30 s are 75


def whisper_processor(texts: Iterable[str], mel_bins: int = 80, window_seconds: int = 30) -> WhisperProcessor:
    """Log-mel features of windows of `window_seconds`, and the byte pairs that are frequent in `texts` (English).

    Raises ValueError where a window is shorter than a second.
    """
    if window_seconds < 1:
        raise ValueError(f"window_seconds is {window_seconds}: a window lasts at least 1 s")
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, vocab_size=PIECES, show_progress=False)
    trained = json.loads(pairs._tokenizer.to_str())["model"]
    vocabulary = trained["vocab"] | {SPECIAL[0]: len(trained["vocab"])}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges, pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.set_prefix_tokens(language="english", task="transcribe")
    return WhisperProcessor(WhisperFeatureExtractor(mel_bins, chunk_length=window_seconds), tokenizer)


def whisper_config(
    processor: WhisperProcessor, hidden_size: int, layers: int, heads: int, feedforward_size: int | None, dropout: float
) -> WhisperConfig:
    """Encoder and decoder have `layers` layers each. `feedforward_size`: None means 4 · `hidden_size`."""
    window_seconds = processor.feature_extractor.chunk_length
    return WhisperConfig(
        d_model=hidden_size,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feedforward_size or 4 * hidden_size,
        decoder_ffn_dim=feedforward_size or 4 * hidden_size,
        num_mel_bins=processor.feature_extractor.feature_size,
        max_source_positions=FRAMES_PER_SECOND * window_seconds,
        max_target_positions=_most_tokens(window_seconds),
        vocab_size=len(processor.tokenizer),
        dropout=dropout,
        init_std=0.05,  # 0.02 is for wider models
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **_special(processor),
    )


def generation_config(processor: WhisperProcessor) -> GenerationConfig:
    """The special tokens for `generate`."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    return GenerationConfig(
        max_length=_most_tokens(processor.feature_extractor.chunk_length),
        is_multilingual=True,  # it knows one language, and its prompt names it
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        **_special(processor),
    )


def _special(processor: WhisperProcessor) -> dict[str, int]:
    end, start = (processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[:2])
    return {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}


def _most_tokens(window_seconds: int) -> int:
    return TOKENS_PER_FIVE_SECONDS * -(-window_seconds // 5)
