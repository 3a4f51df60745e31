"""The latent twin of transformers' WhisperForConditionalGeneration.

The encoder's self-attention, the decoder's self-attention and the cross-attention can each be latent or stay standard.
The encoder processes a whole window at once and keeps nothing. `generate` caches keys and values of the decoder's
tokens and, in cross-attention of every layer, of all frames, before the first token. Keys have no bias, and positions
are added before the first layer, so keys and values read the same input in all three, and a joint latent serves both.
Cross-attention of all layers reads the encoder's output, so that one latent can serve all layers (`latent_shared`).

Shapes: B batch, H heads, n queries, T frames or tokens attended to, m = H·n, D width, E = D / H, R latent width.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward

from asrlib.attention.kinds import absorbing_pays
from asrlib.models.family import Family
from asrlib.models.heads import Decoder
from asrlib.models.latent_twin import LatentConfig, LatentProjections

PARTS = ("encoder", "decoder", "cross")  # self-attention of both, and the decoder's attention to the encoder's frames
CACHED = ("decoder", "cross")  # parts whose keys and values `generate` caches
HOP = 160  # samples
SAMPLES_PER_FRAME = 2 * HOP


@strict
class WhisperMLAConfig(LatentConfig, WhisperConfig):
    """WhisperConfig with the settings of `LatentConfig`, and `latent_parts`, whose attention is latent: any of
    encoder, decoder and cross. `latent_dim` has a width for each of their modules, in this order, first layer first.
    `latent_shared`: cross-attention of all layers shares one joint latent, and one copy of it is cached.
    """

    model_type = "whisper-mla"
    latent_parts: list[str] | tuple[str, ...] = CACHED
    latent_shared: bool = False

    def __post_init__(self, **kwargs):
        check_parts(self.latent_parts)
        self.latent_parts = [part for part in PARTS if part in self.latent_parts]
        super().__post_init__(**kwargs)

    def validate_shared(self):
        """Part of `@strict`'s validation."""
        if self.latent_shared:
            check_shared(self.latent_parts, self.latent_layout)
            if len(set(self.latent_dim[-self.decoder_layers :])) > 1:
                raise ValueError("a latent that layers share has one width: give cross-attention the same in all")

    @property
    def latent_count(self) -> int:
        """How many attention modules have a latent."""
        return sum(self.encoder_layers if part == "encoder" else self.decoder_layers for part in self.latent_parts)


def check_parts(parts: list[str] | tuple[str, ...]) -> None:
    """Raises ValueError unless `parts` are one or more of Whisper's attentions, each once."""
    if not parts or set(parts) - set(PARTS) or len(set(parts)) < len(parts):
        raise ValueError(f"latent_parts is {list(parts)}: give one or more of {', '.join(PARTS)}, each once")


def check_shared(parts: list[str] | tuple[str, ...], layout: str) -> None:
    """Raises ValueError unless cross-attention with such latents can share one."""
    if "cross" not in parts or layout != "joint":
        raise ValueError(
            f"layers can share a joint latent of cross-attention, not a {layout} latent of {', '.join(parts)}: leave "
            "shared out, or use layout: joint and parts with cross"
        )


def check_streaming(config: WhisperConfig) -> None:
    """Raises ValueError: the encoder needs whole windows."""
    seconds = config.max_source_positions * SAMPLES_PER_FRAME / 16_000
    raise ValueError(f"{config.model_type} hears windows of {seconds:g} s as a whole, so it cannot stream")


def parts(model: WhisperForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """{part: attention modules, first layer first}"""
    return {part: [getattr(layer, name) for layer, name in _places(model, part)] for part in PARTS}


def _places(model: WhisperForConditionalGeneration, part: str) -> list[tuple[nn.Module, str]]:
    """(layer, name of its attention)"""
    layers = model.model.encoder.layers if part == "encoder" else model.model.decoder.layers
    return [(layer, "encoder_attn" if part == "cross" else "self_attn") for layer in layers]


def generate_and_keep(
    model: WhisperForConditionalGeneration, features_BFS: torch.Tensor, **how
) -> tuple[torch.Tensor, EncoderDecoderCache]:
    """(output of `model.generate` for a batch of features, the cache that it filled, with all hypotheses)."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return model.generate(features_BFS, past_key_values=cache, **how), cache


class LatentWhisperAttention(LatentProjections, WhisperAttention):
    """Attention whose keys and values come from a latent.

    A cache of transformers then holds the latent in place of the keys [B, 1, T, R]. In place of the values it holds no
    numbers [B, 1, T, 0], or the second half of a split latent. `form`: see `kinds.LatentMemory`. `kept_by` is the layer
    whose place in the cache holds this layer's latent: its own, unless layers share one.
    """

    form = "auto"
    kept_by: int | None = None

    def __init__(self, replaced: WhisperAttention, config: WhisperMLAConfig, index: int):
        super().__init__(
            replaced.embed_dim,
            replaced.num_heads,
            replaced.dropout,
            replaced.is_decoder,
            is_causal=replaced.is_causal,
            layer_idx=replaced.layer_idx,
            config=config,
        )
        self.use_latent(config, index)
        self.kept_by = self.layer_idx

    def share(self, first: "LatentWhisperAttention") -> None:
        """Reads the latent of `first`, an earlier layer."""
        self.latent_kv.down, self.kept_by = first.latent_kv.down, first.layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [B, n, D], weights [B, H, n, T] of eager attention) of queries [B, n, D] and, in cross-attention,
        `key_value_states` [B, T, D]."""
        query_BHnE = self._by_head(self.q_proj(hidden_states) * self.scaling)
        latents = self._latents(hidden_states, key_value_states, past_key_values)
        attend = self._absorbed if self._absorbs(query_BHnE, latents[0].shape[1], attention_mask) else self._expanded
        output_BnHE, weights = attend(query_BHnE, latents, attention_mask, **kwargs)
        return self.out_proj(output_BnHE.flatten(2)), weights

    def _latents(self, x_BnD, frames_BTD, cache: Cache | None) -> tuple[torch.Tensor, ...]:
        """The latents [B, T, R] of all frames or tokens attended to; the cache keeps them."""
        crossed, there = frames_BTD is not None, False
        if isinstance(cache, EncoderDecoderCache):
            if crossed:
                there, cache.is_updated[self.layer_idx] = cache.is_updated.get(self.layer_idx), True
            cache = cache.cross_attention_cache if crossed else cache.self_attention_cache
        if there:
            return _held(cache, self.kept_by)
        read_BTD = frames_BTD if crossed else x_BnD
        if cache is not None and self.kept_by != self.layer_idx:
            latents = (read_BTD[..., :0],)
        else:
            latents = self.latent_kv.latents(read_BTD)
        if cache is None:
            return latents
        cache.update(*(one[:, None] for one in (*latents, latents[0][..., :0])[:2]), self.layer_idx)
        return _held(cache, self.kept_by)

    def _absorbs(self, query_BHnE: torch.Tensor, frames: int, mask_B1nT: torch.Tensor | None) -> bool:
        queries = query_BHnE.shape[2]
        if self.config._attn_implementation not in ("eager", "sdpa") or (
            self.is_causal and mask_B1nT is None and queries > 1  # the mask is the kernel's, which knows heads only
        ):
            return False
        if self.form != "auto":
            return self.form == "absorbed"
        fewer = absorbing_pays(queries, frames, self.num_heads, self.head_dim, self.latent_kv.ranks)
        return fewer and not self.training

    def _expanded(self, query_BHnE, latents, mask_B1nT, **kwargs):
        key_BHTE, value_BHTE = (self._by_head(one) for one in self.latent_kv.expand(*latents))
        how = {"dropout": self.dropout if self.training else 0.0, "scaling": 1.0} | kwargs
        return self._kernel(self, query_BHnE, key_BHTE, value_BHTE, mask_B1nT, **how)

    def _absorbed(self, query_BHnE, latents, mask_B1nT, **kwargs):
        """Projects queries to the latents. Those of all heads are rows of one matrix, which reads the latents once.

        b_k adds the same to all scores of a query, and softmax cancels it. b_v is added at the end: weights sum to 1.
        """
        heads = (self.num_heads, self.head_dim)
        up_k_HER, up_v_HER = (up.weight.unflatten(0, heads) for up in (self.latent_kv.up_k, self.latent_kv.up_v))
        rows_B1mR = torch.einsum("bhne,her->bhnr", query_BHnE, up_k_HER).flatten(1, 2)[:, None]
        if mask_B1nT is not None:
            mask_B1nT = mask_B1nT.expand(-1, self.num_heads, -1, -1).flatten(1, 2)[:, None]  # [B, 1, m, T]
        how = kwargs | {"dropout": 0.0, "scaling": 1.0, "is_causal": False}
        latent_Bm1R, weights = self._kernel(
            self, rows_B1mR, latents[0][:, None], latents[-1][:, None], mask_B1nT, **how
        )
        by_head = (1, (self.num_heads, -1))
        latent_BHnR = latent_Bm1R[:, :, 0].unflatten(*by_head)
        output_BnHE = torch.einsum("bhnr,her->bnhe", latent_BHnR, up_v_HER) + self.latent_kv.up_v.bias.unflatten(
            0, heads
        )
        return output_BnHE, None if weights is None else weights[:, 0].unflatten(*by_head)

    def _by_head(self, x_BND: torch.Tensor) -> torch.Tensor:
        return x_BND.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2).contiguous()

    @property
    def _kernel(self):
        """transformers' function for the attention that the config asks for; its output is [B, n, H, E]."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)


def _held(cache: Cache, layer: int) -> tuple[torch.Tensor, ...]:
    """The latents [B, T, R] in a layer's place of the cache."""
    return tuple(one[:, 0] for one in (cache.layers[layer].keys, cache.layers[layer].values) if one.shape[-1])


class WhisperMLAForConditionalGeneration(WhisperForConditionalGeneration):
    """WhisperForConditionalGeneration with latent keys and values."""

    config_class = WhisperMLAConfig
    config: WhisperMLAConfig

    def __init__(self, config: WhisperMLAConfig):
        super().__init__(config)
        places = [place for part in config.latent_parts for place in _places(self, part)]
        for index, (layer, name) in enumerate(places):
            setattr(layer, name, LatentWhisperAttention(getattr(layer, name), config, index))
        if config.latent_shared:
            first, *others = parts(self)["cross"]
            for attention in others:
                attention.share(first)
            down = "model.decoder.layers.{}.encoder_attn.latent_kv.down.weight"
            shared = {down.format(attention.layer_idx): down.format(0) for attention in others}
            self._tied_weights_keys = self._tied_weights_keys | shared
        self.post_init()


WHISPER = Family(
    standard_model=WhisperForConditionalGeneration,
    latent_model=WhisperMLAForConditionalGeneration,
    layers=lambda model: list(model.model.encoder.layers),
    check_streaming=check_streaming,
    head=Decoder(),
    positions=lambda config: "sinusoidal",
    input_length=lambda config, samples: samples // HOP,
    samples_per_frame=lambda config: SAMPLES_PER_FRAME,
    parts=parts,
    part_names=PARTS,
    cached_parts=CACHED,
    encoder=lambda model: model.model.encoder,
    frame_counts=lambda model, lengths: torch.full_like(lengths, model.config.max_source_positions),
)
