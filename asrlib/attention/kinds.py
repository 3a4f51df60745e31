"""The kinds of self-attention, side by side: what each computes, and what it would cache.

Equal names mean equal things: `linear_q`, `linear_k`, `linear_v`, `linear_out`, `linear_pos`, `pos_bias_u` and
`pos_bias_v` are those of transformers' Wav2Vec2ConformerSelfAttention, `latent_kv` is that of its latent twin.

| kind         | keys and values                                    | numbers cached for T frames of a layer |
|--------------|----------------------------------------------------|----------------------------------------|
| `mha`        | k_h = W_k,h x, v_h = W_v,h x                       | 2·D·T                                  |
| `mla_simple` | k_h = U_k,h c, v_h = U_v,h c from a latent c = A x | R·T                                    |
| `mla`        | the same, and queries from a latent of their own   | R·T                                    |
| `gqa`        | G keys and values for H heads                      | 2·G·d_h·T                              |
| `linear`     | Σ_j φ(k_j) v_jᵀ and Σ_j φ(k_j), summed over frames | H·d_h·(d_h + 1), whatever T            |

Shapes: B batch, T frames, D width, H heads, E = d_h = D / H, G key/value heads, R latent width.

That is what attention keeps: the convolutions beside it keep their last frames too, whatever the kind. A new kind is a
class with `keys_and_values`, or a `forward` of its own, and `cached_numbers`, and one line in `KINDS`.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from asrlib.attention.latent import LatentKV
from asrlib.attention.relative import relative_attention


class SelfAttention(nn.Module, ABC):
    """Multi-head attention with relative positions over what a subclass gives as keys and values.

    `forward` takes inputs [B, T, D], which frames are speech [B, T] (all, if None), and the encodings of positions
    [1, 2T−1, D] of `attention.relative.sinusoids`. It gives outputs [B, T, D] and, under eager attention, the weights
    [B, H, T, T].
    """

    position_embeddings_type: str | None = "relative"

    def __init__(self, config, layer: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.config, self.head_size = config, width // self.num_heads
        self.linear_q = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        if self.position_embeddings_type == "relative":
            self.linear_pos = nn.Linear(width, width, bias=False)
            self.pos_bias_u = nn.Parameter(torch.zeros(self.num_heads, self.head_size))
            self.pos_bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_size))

    def heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, heads·E] → [B, heads, T, E]"""
        return x_BTD.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def keys_and_values(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, T, E] each."""
        return self.heads(self.linear_k(x_BTD)), self.heads(self.linear_v(x_BTD))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        relative_position_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key_BHTE, value_BHTE = self.keys_and_values(hidden_states)
        output_BHTE, weights_BHTT = relative_attention(
            self.heads(self.linear_q(hidden_states)),
            key_BHTE,
            value_BHTE,
            self.heads(self.linear_pos(relative_position_embeddings))[0],
            self.pos_bias_u,
            self.pos_bias_v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            return_weights=self.config._attn_implementation == "eager",
        )
        return self.linear_out(output_BHTE.transpose(1, 2).flatten(2)), weights_BHTT

    @staticmethod
    @abstractmethod
    def cached_numbers(config, layer: int, frames: int) -> int:
        """What a stream keeps of `frames` frames in one layer."""


class MultiHeadAttention(SelfAttention):
    """Keys and values of each head's own (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_v = nn.Linear(config.hidden_size, config.hidden_size)

    @staticmethod
    def cached_numbers(config, layer: int, frames: int) -> int:
        return 2 * config.hidden_size * frames


class SimpleLatentAttention(SelfAttention):
    """Keys and values from one cached latent (DeepSeek-V2, arXiv 2405.04434, 2.1.1), joint or split.

    One up-projection [D, R] serves all heads. An up-projection [d_h, R] for each head is the same thing written
    otherwise: stacked, the H of them are that one matrix, trained to the same values. This is what a converted model
    has, and what converts back: nothing but keys and values differs from `mha`.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        width = config.hidden_size
        self.latent_kv = LatentKV(width, config.latent_dim[layer], config.latent_layout, config.key_dim(layer))

    def keys_and_values(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BTD, value_BTD = self.latent_kv(x_BTD)
        return self.heads(key_BTD), self.heads(value_BTD)

    def linear_k(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.keys(x_BTD)

    def linear_v(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.values(x_BTD)

    @staticmethod
    def cached_numbers(config, layer: int, frames: int) -> int:
        return config.latent_dim[layer] * frames


class LatentQuery(nn.Module):
    """Queries [B, T, D] through a latent [B, T, R_q] of their own (DeepSeek-V2, 2.1.2). It is never cached."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.in_features = width
        self.down = nn.Linear(width, latent_dim, bias=False)
        self.up = nn.Linear(latent_dim, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_BTD))


class LatentAttention(SimpleLatentAttention):
    """`mla_simple` with queries from a latent too, as DeepSeek-V2 has it, without its rotary part and its RMSNorms.

    The cache is the same. The latent of the queries saves 2·D·(D/2 − R_q) parameters a layer and as much computation:
    nothing at the default R_q = D/2, more where D is in the thousands and R_q below that. It ties the heads' queries to
    R_q directions, which may cost accuracy. DeepSeek's decoupled rotary key is not needed: relative positions enter the
    score without touching the keys.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_q = LatentQuery(config.hidden_size, config.query_latent_dim)


class GroupedQueryAttention(SelfAttention):
    """G keys and values, each shared by H / G neighbouring heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        width = config.num_key_value_heads * self.head_size
        self.linear_k = nn.Linear(config.hidden_size, width)
        self.linear_v = nn.Linear(config.hidden_size, width)

    def keys_and_values(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BGTE, value_BGTE = super().keys_and_values(x_BTD)
        group = self.num_heads // self.config.num_key_value_heads
        return key_BGTE.repeat_interleave(group, dim=1), value_BGTE.repeat_interleave(group, dim=1)

    @staticmethod
    def cached_numbers(config, layer: int, frames: int) -> int:
        head_size = config.hidden_size // config.num_attention_heads
        return 2 * config.num_key_value_heads * head_size * frames


class LinearAttention(SelfAttention):
    """φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j), φ = elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, 3.2).

    Time grows with T, and what is kept does not grow at all. Positions do not enter: the sums know no order, and what
    order there is comes from the convolutions around it. There are no weights to return, and none to drop out. The sums
    here are over all frames; a stream would add up what it has heard.
    """

    position_embeddings_type = None

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_v = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        relative_position_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        key_BHTE, value_BHTE = self.keys_and_values(hidden_states)
        query_BHTE = nn.functional.elu(self.heads(self.linear_q(hidden_states))) + 1
        key_BHTE = nn.functional.elu(key_BHTE) + 1
        if attention_mask is not None:
            key_BHTE = key_BHTE.masked_fill(~attention_mask[:, None, :, None], 0)
        with torch.autocast(query_BHTE.device.type, enabled=False):  # sums over many frames would leave float16's range
            wide = torch.promote_types(query_BHTE.dtype, torch.float32)
            query_BHTE, key_BHTE, value_BHTE = query_BHTE.to(wide), key_BHTE.to(wide), value_BHTE.to(wide)
            state_BHEE = key_BHTE.transpose(2, 3) @ value_BHTE
            total_BHE1 = key_BHTE.sum(2).unsqueeze(-1)
            weight_BHT1 = (query_BHTE @ total_BHE1).clamp(min=torch.finfo(wide).tiny)
            output_BHTE = ((query_BHTE @ state_BHEE) / weight_BHT1).to(hidden_states.dtype)
        return self.linear_out(output_BHTE.transpose(1, 2).flatten(2)), None

    @staticmethod
    def cached_numbers(config, layer: int, frames: int) -> int:
        head_size = config.hidden_size // config.num_attention_heads
        return config.num_attention_heads * head_size * (head_size + 1)


KINDS: dict[str, type[SelfAttention]] = {
    "mha": MultiHeadAttention,
    "mla": LatentAttention,
    "mla_simple": SimpleLatentAttention,
    "gqa": GroupedQueryAttention,
    "linear": LinearAttention,
}


def attention_kind(name: str) -> type[SelfAttention]:
    """Raises ValueError, which names the known kinds."""
    if name not in KINDS:
        raise ValueError(f"attention is {name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name]
