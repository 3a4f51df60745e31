"""The latent twin of transformers' Wav2Vec2ConformerForCTC.

Only the projections of keys and values are replaced; queries, relative positions and everything else are the parent's.
In relative-position attention

    score(i, j) = ((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h        (Transformer-XL, arXiv 1901.02860, 3.3)

only k_j and v_j come from x_j, so no decoupled rotary key is needed (unlike DeepSeek-V2, 2.1.3).
"""

import torch
from huggingface_hub.dataclasses import strict
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerFeatureEncoder,
    Wav2Vec2ConformerGroupNormConvLayer,
    Wav2Vec2ConformerSelfAttention,
)

from asrlib.attention.kinds import KeyValueMemory, LatentMemory, RelativeAttention
from asrlib.models.family import Family
from asrlib.models.latent_twin import LatentConfig, latent_kv, with_classes

BLOCK_FRAMES = 256  # of the feature encoder at once: 5 s, in which its widest layer takes 32 MB


@strict
class Wav2Vec2ConformerMLAConfig(LatentConfig, Wav2Vec2ConformerConfig):
    """Wav2Vec2ConformerConfig with the settings of `LatentConfig`."""

    model_type = "wav2vec2-conformer-mla"


class BlockedSelfAttention(KeyValueMemory, Wav2Vec2ConformerSelfAttention):
    """The parent's parameters and results, by `attention.relative`: in blocks of queries, with projected positions that
    stay from call to call, and able to stream. The parent handles rotary positions, or none."""

    def forward(self, hidden_states, attention_mask=None, relative_position_embeddings=None, **kwargs):
        relative = self.position_embeddings_type == "relative"
        kind = RelativeAttention if relative else Wav2Vec2ConformerSelfAttention
        return kind.forward(self, hidden_states, attention_mask, relative_position_embeddings, **kwargs)


class LatentSelfAttention(LatentMemory, BlockedSelfAttention):
    """Self-attention whose keys and values come from a latent."""

    def __init__(self, config: Wav2Vec2ConformerMLAConfig, layer: int):
        super().__init__(config)
        del self.linear_k, self.linear_v
        self.latent_kv = latent_kv(config, layer)


class BlockedFeatureEncoder(Wav2Vec2ConformerFeatureEncoder):
    """The parent's parameters and results. Evaluation works in blocks of frames: memory grows with the output's frames,
    not with the much larger outputs of the first convolutions. The parent handles an encoder that normalises over all
    frames."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        over_all_frames = isinstance(self.conv_layers[0], Wav2Vec2ConformerGroupNormConvLayer)
        if over_all_frames or self.training or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return super().forward(input_values)
        hop = reach = 1
        for layer in self.conv_layers:
            reach += (layer.conv.kernel_size[0] - 1) * hop
            hop *= layer.conv.stride[0]
        count = max(1, (input_values.shape[1] - reach) // hop + 1)
        first, *others = (
            super(BlockedFeatureEncoder, self).forward(
                input_values[:, frame * hop : (min(frame + BLOCK_FRAMES, count) - 1) * hop + reach]
            )
            for frame in range(0, count, BLOCK_FRAMES)
        )
        return torch.cat([first, *others], dim=2) if others else first


IN_BLOCKS = {
    Wav2Vec2ConformerFeatureEncoder: BlockedFeatureEncoder,
    Wav2Vec2ConformerSelfAttention: BlockedSelfAttention,
}


def frames(model: Wav2Vec2ConformerForCTC, input_values: torch.Tensor) -> torch.Tensor:
    """The layers' input: samples [B, S] → [B, T, D]."""
    base = model.wav2vec2_conformer
    return base.feature_projection(base.feature_extractor(input_values).transpose(1, 2))[0]


def logits(model: Wav2Vec2ConformerForCTC, x_BTD: torch.Tensor) -> torch.Tensor:
    """The last layer's output [B, T, D] → logits [B, T, V]."""
    return model.lm_head(model.wav2vec2_conformer.encoder.layer_norm(x_BTD))


def check_streaming(config: Wav2Vec2ConformerConfig) -> None:
    """Raises ValueError where some part of the model needs the whole recording."""
    if config.position_embeddings_type != "relative":
        raise ValueError(f"positions are {config.position_embeddings_type}: only relative ones can stream")
    if config.feat_extract_norm == "group":
        raise ValueError(
            "the feature encoder normalises over whole recordings: only feat_extract_norm: layer can stream"
        )
    if config.add_adapter:
        raise ValueError("the adapter behind the encoder cannot stream: convert a model without one")


class Wav2Vec2ConformerMLAForCTC(Wav2Vec2ConformerForCTC):
    """Wav2Vec2ConformerForCTC with latent keys and values."""

    config_class = Wav2Vec2ConformerMLAConfig
    config: Wav2Vec2ConformerMLAConfig

    def __init__(self, config: Wav2Vec2ConformerMLAConfig, target_lang: str | None = None):
        super().__init__(config, target_lang)
        for index, layer in enumerate(self.wav2vec2_conformer.encoder.layers):
            layer.self_attn = LatentSelfAttention(config, index)
        with_classes(self, IN_BLOCKS)
        self.post_init()


WAV2VEC2_CONFORMER = Family(
    standard_model=Wav2Vec2ConformerForCTC,
    latent_model=Wav2Vec2ConformerMLAForCTC,
    layers=lambda model: list(model.wav2vec2_conformer.encoder.layers),
    check_streaming=check_streaming,
    frames=frames,
    logits=logits,
    in_blocks=IN_BLOCKS,
)
