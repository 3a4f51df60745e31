"""New models with random weights, for training from scratch."""

import json
import tempfile
from collections.abc import Iterable
from inspect import signature
from pathlib import Path

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperProcessor,
    set_seed,
)

from asrlib.attention.kinds import LatentAttention, SimpleLatentAttention, attention_kind
from asrlib.data.features import log_mel
from asrlib.models.blocks import BLOCKS
from asrlib.models.encoder import SpeechEncoderConfig
from asrlib.models.new_whisper import generation_config, whisper_config, whisper_processor
from asrlib.models.registry import family_of

CHARACTERS = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"  # LibriSpeech's, by frequency; | stands for the space
RAW_AUDIO, WHISPER = "wav2vec2-conformer", "whisper"


def architectures() -> tuple[str, ...]:
    """The architectures that `new_model` makes."""
    return (RAW_AUDIO, *BLOCKS, WHISPER)


def new_processor(
    architecture: str = RAW_AUDIO,
    mel_bins: int = 80,
    frame_shift_ms: float = 10.0,
    characters: str = CHARACTERS,
    texts: Iterable[str] = (),
    window_seconds: int = 30,
) -> Wav2Vec2Processor | WhisperProcessor:
    """The processor of a new model of `architecture`: its features and its symbols, by default the 32 of facebook's
    LibriSpeech models.

    Features are 16 kHz audio, normalised per utterance, or log-mel energies. `characters`, perhaps of another language,
    are in one case and include |, the space. Raises ValueError where | is missing or a character occurs twice. A
    whisper spells everything, in pieces that are frequent in `texts`, and hears windows of `window_seconds`.
    """
    _check(architecture)
    if architecture == WHISPER:
        return whisper_processor(texts, mel_bins, window_seconds)
    if "|" not in characters or len(set(characters)) < len(characters):
        raise ValueError(f"characters is {characters!r}: give each once, and | for the space")
    symbols = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary))
    if architecture == RAW_AUDIO:
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    else:
        extractor = log_mel(mel_bins, frame_shift_ms)
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def new_model(architecture: str, processor: Wav2Vec2Processor, seed: int = 0, **sizes) -> PreTrainedModel:
    """A model with random weights, reproducible by `seed`; `sizes` are those of `new_config`."""
    config = new_config(architecture, processor, **sizes)
    set_seed(seed)
    model = family_of(config).standard_model(config)
    if architecture == WHISPER:
        model.generation_config = generation_config(processor)
    return model


def new_config(
    architecture: str,
    processor: Wav2Vec2Processor,
    attention: str = "mha",
    hidden_size: int = 512,
    num_layers: int = 12,
    num_heads: int = 8,
    kv_heads: int = 2,
    latent_dim: int | None = None,
    query_latent_dim: int | None = None,
    feedforward_size: int | None = None,
    depthwise_kernel: int = 31,
    causal: bool = False,
    largest_chunk: int = 0,
    subsampling_channels: int = 256,
    dropout: float = 0.1,
    time_masks: int = 0,
    frequency_masks: int = 0,
) -> PreTrainedConfig:
    """The config of a model to train from scratch. Raises ValueError where sizes contradict each other.

    Some sizes belong to kinds of attention: `kv_heads` to gqa, `latent_dim` (None: half of `hidden_size`) to mla and
    mla_simple, `query_latent_dim` to mla. `feedforward_size` (None: 4 · `hidden_size`, in a Branchformer 3 ·),
    `causal` and `largest_chunk` (for streaming), `subsampling_channels` and the masks of SpecAugment are those of
    SpeechEncoderConfig.
    """
    _check(architecture)
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
    if architecture == RAW_AUDIO:
        if attention != "mha":
            raise ValueError(
                f"attention is {attention!r}, but a new {RAW_AUDIO} has 'mha': choose architecture "
                f"{' or '.join(BLOCKS)}, or convert the model"
            )
        if time_masks or frequency_masks:
            raise ValueError(f"a new {RAW_AUDIO} masks spans of its own: time_masks and frequency_masks must be 0")
        if causal or largest_chunk:
            raise ValueError(f"a new {RAW_AUDIO} hears whole utterances: leave causal and largest_chunk out")
        return _raw_audio_config(processor, hidden_size, num_layers, num_heads, depthwise_kernel, dropout)
    if architecture == WHISPER:
        if attention != "mha" or causal or largest_chunk or time_masks or frequency_masks:
            raise ValueError(
                "a new whisper has attention mha, hears whole windows and masks nothing: leave attention, causal, "
                "largest_chunk, time_masks and frequency_masks out"
            )
        return whisper_config(processor, hidden_size, num_layers, num_heads, feedforward_size, dropout)
    if attention == "gqa" and (kv_heads < 1 or num_heads % kv_heads):
        raise ValueError(f"num_heads {num_heads} is not divisible by kv_heads {kv_heads}")
    extractor = processor.feature_extractor
    kind = attention_kind(attention)
    latent = latent_dim is not None and issubclass(kind, SimpleLatentAttention)
    return SpeechEncoderConfig(
        encoder=architecture,
        attention=attention,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=kv_heads,
        latent_dim=[latent_dim] * num_layers if latent else [],
        query_latent_dim=query_latent_dim if issubclass(kind, LatentAttention) else None,
        intermediate_size=feedforward_size or (4 if architecture == "conformer" else 3) * hidden_size,
        conv_depthwise_kernel_size=depthwise_kernel,
        causal=causal,
        largest_chunk=largest_chunk,
        subsampling_channels=subsampling_channels,
        num_mel_bins=extractor.feature_size,
        hop_length=extractor.hop_length,
        win_length=extractor.win_length,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        time_masks=time_masks,
        frequency_masks=frequency_masks,
        vocab_size=len(processor.tokenizer),
        pad_token_id=processor.tokenizer.pad_token_id,
    )


# Sizes of new_config → the parameters of a run. The conversion has parameters latent_dim and kv_heads of its own.
SIZES = {name: name for name in tuple(signature(new_config).parameters)[2:]}
SIZES |= {"latent_dim": "new_latent_dim", "kv_heads": "new_kv_heads"}


def _raw_audio_config(
    processor: Wav2Vec2Processor, hidden_size: int, layers: int, heads: int, depthwise_kernel: int, dropout: float
) -> Wav2Vec2ConformerConfig:
    """A small wav2vec2-conformer with relative positions.

    Four convolutions give the usual 320 samples per frame at a fraction of the seven's cost.
    """
    return Wav2Vec2ConformerConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        conv_dim=(64, 96, 144, 144),
        conv_kernel=(25, 8, 8, 4),
        conv_stride=(10, 4, 4, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        conv_depthwise_kernel_size=depthwise_kernel,
        num_conv_pos_embeddings=1,  # the parent class makes it, no conformer uses it
        num_conv_pos_embedding_groups=1,
        position_embeddings_type="relative",
        hidden_dropout=dropout,
        activation_dropout=dropout,
        attention_dropout=dropout,
        conformer_conv_dropout=dropout,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.05,
        pad_token_id=processor.tokenizer.pad_token_id,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )


def _check(architecture: str) -> None:
    if architecture not in architectures():
        raise ValueError(f"architecture is {architecture!r}: choose one of {', '.join(architectures())}")
