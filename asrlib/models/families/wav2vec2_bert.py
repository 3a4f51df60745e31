"""The latent twin of transformers' Wav2Vec2BertForCTC: a Conformer on log-mel features.

Its usual positions, relative_key, add (q_i · e_{i−j}) / √d_h to the scores, an embedding e for each distance within
a window (Shaw et al. 2018, arXiv 1803.02155). They change neither keys nor values, which read the same input, so a
joint latent serves both. With rotary positions it cannot (`latent_twin.check_layout`).
"""

from huggingface_hub.dataclasses import strict
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from asrlib.models.family import Family
from asrlib.models.latent_twin import LatentConfig, LatentProjections

# Samples at 16 kHz of SeamlessM4TFeatureExtractor; a model's config does not hold them.
WINDOW = 400
HOP = 160
STRIDE = 2  # frames of mel energies in a frame of features


@strict
class Wav2Vec2BertMLAConfig(LatentConfig, Wav2Vec2BertConfig):
    """Wav2Vec2BertConfig with the settings of `LatentConfig`."""

    model_type = "wav2vec2-bert-mla"


def input_length(config: Wav2Vec2BertConfig, samples: int) -> int:
    """Frames of features of `samples` samples."""
    return max(0, 1 + (samples - WINDOW) // HOP) // STRIDE


def samples_per_frame(config: Wav2Vec2BertConfig) -> int:
    return HOP * STRIDE


def check_streaming(config: Wav2Vec2BertConfig) -> None:
    """Raises ValueError: the features need the whole recording."""
    raise ValueError(f"features of {config.model_type} are normalised over whole recordings, so it cannot stream")


class LatentSelfAttention(LatentProjections, Wav2Vec2BertSelfAttention):
    """Self-attention whose keys and values come from a latent."""

    def __init__(self, config: Wav2Vec2BertMLAConfig, layer: int):
        super().__init__(config)
        self.use_latent(config, layer)


class Wav2Vec2BertMLAForCTC(Wav2Vec2BertForCTC):
    """Wav2Vec2BertForCTC with latent keys and values in its encoder; an adapter keeps its own."""

    config_class = Wav2Vec2BertMLAConfig
    config: Wav2Vec2BertMLAConfig

    def __init__(self, config: Wav2Vec2BertMLAConfig, target_lang: str | None = None):
        super().__init__(config, target_lang)
        for index, layer in enumerate(self.wav2vec2_bert.encoder.layers):
            layer.self_attn = LatentSelfAttention(config, index)
        self.post_init()


WAV2VEC2_BERT = Family(
    standard_model=Wav2Vec2BertForCTC,
    latent_model=Wav2Vec2BertMLAForCTC,
    layers=lambda model: list(model.wav2vec2_bert.encoder.layers),
    check_streaming=check_streaming,
    input_length=input_length,
    samples_per_frame=samples_per_frame,
)
