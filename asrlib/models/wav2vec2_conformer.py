"""The latent twin of transformers' Wav2Vec2ConformerForCTC.

Only what produces keys and values is replaced; queries, relative positions and everything else are the
parent's own. In relative-position attention

    score(i, j) = ((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h        (Transformer-XL, arXiv 1901.02860, 3.3)

only k_j and v_j come from x_j, so no decoupled rotary key is needed (unlike DeepSeek-V2, 2.1.3).
"""

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCTC, Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerSelfAttention

from asrlib.attention.latent import LatentKV, check_latent_widths, split_ranks


@strict
class Wav2Vec2ConformerMLAConfig(Wav2Vec2ConformerConfig):
    """Wav2Vec2ConformerConfig plus `latent_dim`, one cached width per layer, and `latent_layout`.

    An empty `latent_dim` means the uncompressed floor: a joint latent as wide as the model in every layer
    (split: as wide as keys and values together). `latent_key_dim` says how many of each layer's numbers are the
    keys', in a split latent alone; empty: half of them, as `split_ranks` rounds it. Raises huggingface_hub's
    StrictDataclassClassValidationError where a width is impossible, or a joint latent is asked of rotary positions
    or given key widths.
    """

    model_type = "wav2vec2-conformer-mla"

    latent_dim: list[int] | tuple[int, ...] = ()
    latent_layout: str = "joint"
    latent_key_dim: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs):
        if not self.latent_dim:
            exact = self.hidden_size if self.latent_layout == "joint" else 2 * self.hidden_size
            self.latent_dim = [exact] * self.num_hidden_layers
        if self.latent_layout == "split" and not self.latent_key_dim:
            self.latent_key_dim = [split_ranks(width)[0] for width in self.latent_dim]
        self.latent_dim, self.latent_key_dim = list(self.latent_dim), list(self.latent_key_dim)
        super().__post_init__(**kwargs)

    def validate_latent(self):
        """Part of `@strict`'s validation."""
        check_layout(self, self.latent_layout)
        check_latent_widths(self)

    def key_dim(self, layer: int) -> int | None:
        """How many of a layer's numbers are the keys'; None in a joint latent, where all are."""
        return self.latent_key_dim[layer] if self.latent_key_dim else None


def check_layout(config: Wav2Vec2ConformerConfig, layout: str) -> None:
    """Raises ValueError where keys and values read different inputs, which no joint latent can serve."""
    if layout == "joint" and config.position_embeddings_type == "rotary":
        raise ValueError(
            "rotary positions turn the input of the keys but not that of the values, so one joint latent cannot "
            "serve both: use layout: split"
        )


def to_latent(config: Wav2Vec2ConformerConfig, **latent) -> Wav2Vec2ConformerMLAConfig:
    """The config of the latent twin; `latent` are latent_dim, latent_layout and latent_key_dim."""
    return Wav2Vec2ConformerMLAConfig(**_settings(config), **latent)


def to_standard(config: Wav2Vec2ConformerMLAConfig) -> Wav2Vec2ConformerConfig:
    return Wav2Vec2ConformerConfig(**_settings(config))


def _settings(config: Wav2Vec2ConformerConfig) -> dict:
    own = {"model_type", "architectures", "latent_dim", "latent_layout", "latent_key_dim"}
    return {key: value for key, value in config.to_dict().items() if key not in own}


class LatentSelfAttention(Wav2Vec2ConformerSelfAttention):
    """Self-attention whose keys and values come from a latent.

    The parent's forward calls `linear_k` and `linear_v`; here they are methods, so that forward (positions,
    masks, eager, SDPA) stays the parent's. A joint latent is computed once for each of the two: R·D
    multiplications per frame more than need be, in exchange for no copy of that forward.
    """

    def __init__(self, config: Wav2Vec2ConformerMLAConfig, layer: int):
        super().__init__(config)
        del self.linear_k, self.linear_v
        self.latent_kv = LatentKV(
            config.hidden_size, config.latent_dim[layer], config.latent_layout, config.key_dim(layer)
        )

    def linear_k(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.keys(x_BTD)

    def linear_v(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.values(x_BTD)


class Wav2Vec2ConformerMLAForCTC(Wav2Vec2ConformerForCTC):
    """Wav2Vec2ConformerForCTC with latent keys and values."""

    config_class = Wav2Vec2ConformerMLAConfig
    config: Wav2Vec2ConformerMLAConfig

    def __init__(self, config: Wav2Vec2ConformerMLAConfig, target_lang: str | None = None):
        super().__init__(config, target_lang)
        for index, layer in enumerate(self.wav2vec2_conformer.encoder.layers):
            layer.self_attn = LatentSelfAttention(config, index)
        self.post_init()


AutoConfig.register("wav2vec2-conformer-mla", Wav2Vec2ConformerMLAConfig)
AutoModelForCTC.register(Wav2Vec2ConformerMLAConfig, Wav2Vec2ConformerMLAForCTC)
