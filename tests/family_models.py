"""The smallest model of every family that asrlib converts of transformers', with the processor it would have."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    HubertConfig,
    HubertForCTC,
    NemotronAsrStreamingConfig,
    NemotronAsrStreamingFeatureExtractor,
    NemotronAsrStreamingForRNNT,
    NemotronAsrStreamingProcessor,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetProcessor,
    ParakeetRNNTConfig,
    ParakeetTokenizer,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from asrlib.models.scratch import new_processor

WIDTH, LAYERS, HEADS = 16, 2, 4
WINDOW, LOOKAHEADS = 7, [2, 1, 0]  # of a stream with a cache of its own, in encoder frames
BLANK = 12.0  # its score, whatever is heard
PIECES = ["▁", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ", "▁T", "HE", "▁THE", "AN", "▁A", "ING", "▁TO"]

SIZES = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=24)
CTC = dict(vocab_size=32, pad_token_id=0, ctc_zero_infinity=True, ctc_loss_reduction="mean")
QUIET = dict(
    layerdrop=0.0, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
    final_dropout=0.0, mask_time_prob=0.0,
)  # fmt: skip
CONVOLUTIONS = dict(
    conv_dim=[8] * 4, conv_kernel=[25, 8, 8, 4], conv_stride=[10, 4, 4, 2], conv_bias=True, feat_extract_norm="layer",
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
LOG_MEL = dict(
    feature_projection_input_dim=40, conv_depthwise_kernel_size=5, left_max_position_embeddings=3,
    right_max_position_embeddings=2, max_source_positions=50, conformer_conv_dropout=0.0,
)  # fmt: skip
FAST = dict(
    num_mel_bins=24, subsampling_conv_channels=4, conv_kernel_size=5, dropout=0.0, activation_dropout=0.0,
    attention_dropout=0.0, layerdrop=0.0, initializer_range=0.3,
)  # fmt: skip

MEL_BINS, SECONDS = 20, 1  # of what the Whisper hears: more is cut off
MERGES = [("T", "H"), ("TH", "E"), ("A", "N"), ("Ġ", "A"), ("Ġ", "T")]
SPECIAL = [  # in Whisper's order: a language is looked for right behind the start
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>",
    "<|nospeech|>", "<|notimestamps|>",
]  # fmt: skip


def wav2vec2(**changes) -> Wav2Vec2ForCTC:
    return _filled(Wav2Vec2ForCTC, Wav2Vec2Config(**SIZES | CTC | QUIET | CONVOLUTIONS | changes))


def hubert(**changes) -> HubertForCTC:
    return _filled(HubertForCTC, HubertConfig(**SIZES | CTC | QUIET | CONVOLUTIONS | changes))


def wav2vec2_bert(**changes) -> Wav2Vec2BertForCTC:
    return _filled(Wav2Vec2BertForCTC, Wav2Vec2BertConfig(**SIZES | CTC | QUIET | LOG_MEL | changes))


def parakeet(**changes) -> ParakeetForCTC:
    vocabulary = len(PIECES) + 2
    encoder = SIZES | FAST | changes
    return _filled(
        ParakeetForCTC, ParakeetCTCConfig(vocab_size=vocabulary, pad_token_id=vocabulary - 1, encoder_config=encoder)
    )


def whisper(**changes) -> WhisperForConditionalGeneration:
    """It hears one second and writes 32 tokens at most."""
    ids = {token: byte_pairs().convert_tokens_to_ids(token) for token in SPECIAL}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    tokens = dict(pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start)
    settings = dict(
        d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=MEL_BINS,
        max_source_positions=50 * SECONDS, max_target_positions=32, vocab_size=len(byte_pairs()), init_std=0.3,
        suppress_tokens=None, begin_suppress_tokens=None, **tokens,
    )  # fmt: skip
    model = _filled(WhisperForConditionalGeneration, WhisperConfig(**settings | changes))
    model.generation_config = GenerationConfig(
        **tokens, max_length=32, is_multilingual=True, no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={"<|en|>": ids["<|en|>"]}, prev_sot_token_id=ids["<|startofprev|>"],
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    )  # fmt: skip
    return model


def nemotron(sliding_window: int = WINDOW, **changes) -> NemotronAsrStreamingForRNNT:
    """`sliding_window` counts a frame, and those before it that it hears."""
    streaming = dict(sliding_window=sliding_window, default_num_lookahead_tokens=LOOKAHEADS[0])
    return _transducer(NemotronAsrStreamingForRNNT, NemotronAsrStreamingConfig, SIZES | FAST | streaming | changes)


def parakeet_rnnt(**changes) -> ParakeetForRNNT:
    return _transducer(ParakeetForRNNT, ParakeetRNNTConfig, SIZES | FAST | changes)


def _transducer(kind, config_kind, encoder: dict):
    blank = len(PIECES) + 2
    config = config_kind(
        vocab_size=blank + 1, pad_token_id=blank - 1, blank_token_id=blank, decoder_hidden_size=12,
        num_decoder_layers=1, max_symbols_per_step=3, encoder_config=encoder,
    )  # fmt: skip
    model = _filled(kind, config)
    model.generation_config.decoder_start_token_id = blank
    with torch.no_grad():  # so that frames differ, some say nothing, and the others something that can be spelt
        for name, values in model.named_parameters():
            if "subsampling" in name and "conv" in name:
                values.normal_(std=0.5)
            elif name.startswith(("decoder.", "encoder_projector.weight", "joint.head.weight")):
                values.normal_()
        model.joint.head.weight[blank] = 0
        model.joint.head.bias[[0, blank - 1, blank]] = torch.tensor([-100.0, -100.0, BLANK])
    return model


FAMILIES = {"wav2vec2": wav2vec2, "hubert": hubert, "wav2vec2-bert": wav2vec2_bert, "parakeet_ctc": parakeet}


def _filled(kind: type[PreTrainedModel], config) -> PreTrainedModel:
    """Random weights, the same at every call; no bias is zero, no gain is one, and attention is not flat."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "bias_u", "bias_v", "running_mean")):
                values.normal_(std=0.3)
            elif name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                values.uniform_(0.5, 1.5)
            elif "attn" in name or "attention" in name or name.endswith(("lm_head.weight", "ctc_head.weight")):
                values.normal_(std=0.5)
    return model


def processor_of(family: str):
    if family == "parakeet_ctc":
        return ParakeetProcessor(ParakeetFeatureExtractor(feature_size=24), pieces())
    if family == "whisper":
        return WhisperProcessor(WhisperFeatureExtractor(MEL_BINS, chunk_length=SECONDS), byte_pairs())
    if family == "parakeet_rnnt":
        return ParakeetProcessor(
            ParakeetFeatureExtractor(feature_size=24), pieces(additional_special_tokens=["<blank>"])
        )
    if family == "nemotron":
        extractor = NemotronAsrStreamingFeatureExtractor(feature_size=24)
        return NemotronAsrStreamingProcessor(
            extractor, pieces(additional_special_tokens=["<blank>"]), supported_num_lookahead_tokens=LOOKAHEADS
        )
    if family == "wav2vec2-bert":
        return Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(feature_size=20, num_mel_bins=20), characters())
    return new_processor()


def characters():
    return new_processor().tokenizer


def pieces(**special) -> ParakeetTokenizer:
    """Of words, as SentencePiece cuts them: the fewest that make a word."""
    vocabulary = [("<unk>", 0.0), *((piece, -10.0 / len(piece)) for piece in PIECES)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", **special)


@cache
def byte_pairs() -> WhisperTokenizer:
    """Of all bytes, so that it spells everything, and some pairs of them."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), SPECIAL[0]]
    tokenizer = WhisperTokenizer(
        vocab={piece: id for id, piece in enumerate(pieces)}, merges=MERGES, pad_token=SPECIAL[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.set_prefix_tokens(language="english", task="transcribe")
    return tokenizer
