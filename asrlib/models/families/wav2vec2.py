"""The latent twins of transformers' Wav2Vec2ForCTC and HubertForCTC.

Both are plain transformer encoders over the same convolutions. Positions come from a convolution whose output is added
to the frames before the first layer. So keys and values read the same input, a joint latent serves both, and it can be
absorbed.
"""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.models.hubert.modeling_hubert import HubertAttention
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

from asrlib.models.family import Family
from asrlib.models.latent_twin import LatentConfig, LatentProjections


@strict
class Wav2Vec2MLAConfig(LatentConfig, Wav2Vec2Config):
    """Wav2Vec2Config with the settings of `LatentConfig`."""

    model_type = "wav2vec2-mla"


@strict
class HubertMLAConfig(LatentConfig, HubertConfig):
    """HubertConfig with the settings of `LatentConfig`."""

    model_type = "hubert-mla"


def check_streaming(config: Wav2Vec2Config | HubertConfig) -> None:
    """Raises ValueError: the convolution for positions reads later frames."""
    reach = config.num_conv_pos_embeddings // 2
    raise ValueError(
        f"positions of {config.model_type} come from a convolution that hears {reach} frames ahead: only models "
        "with relative positions can stream"
    )


class _LatentAttention(LatentProjections):
    def __init__(self, config: Wav2Vec2MLAConfig | HubertMLAConfig, layer: int):
        super().__init__(config.hidden_size, config.num_attention_heads, config.attention_dropout, config=config)
        self.use_latent(config, layer)


class LatentWav2Vec2Attention(_LatentAttention, Wav2Vec2Attention):
    """Self-attention whose keys and values come from a latent."""


class LatentHubertAttention(_LatentAttention, HubertAttention):
    """Self-attention whose keys and values come from a latent."""


class Wav2Vec2MLAForCTC(Wav2Vec2ForCTC):
    """Wav2Vec2ForCTC with latent keys and values."""

    config_class = Wav2Vec2MLAConfig
    config: Wav2Vec2MLAConfig

    def __init__(self, config: Wav2Vec2MLAConfig, target_lang: str | None = None):
        super().__init__(config, target_lang)
        for index, layer in enumerate(self.wav2vec2.encoder.layers):
            layer.attention = LatentWav2Vec2Attention(config, index)
        self.post_init()


class HubertMLAForCTC(HubertForCTC):
    """HubertForCTC with latent keys and values."""

    config_class = HubertMLAConfig
    config: HubertMLAConfig

    def __init__(self, config: HubertMLAConfig, target_lang: str | None = None):
        super().__init__(config, target_lang)
        for index, layer in enumerate(self.hubert.encoder.layers):
            layer.attention = LatentHubertAttention(config, index)
        self.post_init()


WAV2VEC2 = Family(
    standard_model=Wav2Vec2ForCTC,
    latent_model=Wav2Vec2MLAForCTC,
    layers=lambda model: list(model.base_model.encoder.layers),
    attention=lambda layer: layer.attention,
    check_streaming=check_streaming,
    positions=lambda config: "convolutional",
)

HUBERT = replace(WAV2VEC2, standard_model=HubertForCTC, latent_model=HubertMLAForCTC)
