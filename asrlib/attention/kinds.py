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
class with `remembered`, `keys_and_values` and `cached_widths`, and one line in `KINDS`.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from asrlib.attention.chunks import Chunks, speech
from asrlib.attention.latent import LatentKV
from asrlib.attention.relative import relative_attention, sinusoids

KEPT_POSITIONS = 4096  # distances whose projections are kept from call to call: some 40 s at 50 frames a second


class RelativeAttention(ABC):
    """Attention with relative positions over what is remembered of frames: everything but the parameters.

    A subclass is a module with `linear_q`, `linear_out`, `linear_pos`, `pos_bias_u`, `pos_bias_v`, `num_heads`,
    `head_size` and `config`. It says what of a frame a stream keeps, and what keys and values are made of that.
    """

    @abstractmethod
    def remembered(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a stream keeps of frames, [B, T, numbers] each."""

    @abstractmethod
    def keys_and_values(self, *remembered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, G, T, E] each; G = H, or fewer, each serving H / G neighbouring heads."""

    def heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, heads·E] → [B, heads, T, E]"""
        return x_BTD.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        relative_position_embeddings: torch.Tensor | None = None,
        chunks: Chunks | None = None,
        past=None,
        **unused,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [B, T, D] and, under eager attention, the weights [B, H, T, T].

        Of inputs [B, T, D], which frames are speech [B, T] (all, if None), and the encodings of positions
        [1, 2T−1, D] of `attention.relative.sinusoids`. `chunks` limits who hears whom. `past`, a memory of
        `attention.memory`, goes before the inputs; it then knows masks and positions.
        """
        held = self.remembered(hidden_states)
        if past is None:
            kept_BT, positions_HPE = speech(attention_mask), self.project_positions(relative_position_embeddings)
        else:
            held, kept_BT = past.frames(held)
            positions_HPE = past.positions(self, held[0].shape[1])
        output_BHnE, weights = self.attend(
            self.heads(self.linear_q(hidden_states)),
            held,
            positions_HPE=positions_HPE,
            bias_u_HE=self.pos_bias_u,
            bias_v_HE=self.pos_bias_v,
            kept_BT=kept_BT,
            dropout=self.config.attention_dropout if self.training else 0.0,
            return_weights=self.config._attn_implementation == "eager",
            start=held[0].shape[1] - hidden_states.shape[1],
            chunks=chunks,
        )
        return self.linear_out(output_BHnE.transpose(1, 2).flatten(2)), weights

    def attend(self, query_BHnE: torch.Tensor, held: tuple[torch.Tensor, ...], **how):
        return relative_attention(query_BHnE, *self.keys_and_values(*held), **how)

    def project_positions(self, embeddings_1PD: torch.Tensor) -> torch.Tensor:
        """[H, P, E], in evaluation once for as many distances, which are the same whenever they are as many.

        Nothing is kept over training: fused optimisers change weights without a trace that could be seen here.
        """
        if torch.compiler.is_compiling():  # what is kept from call to call is no part of a graph
            return self.heads(self.linear_pos(embeddings_1PD))[0]
        if self.training or torch.is_grad_enabled():
            self.__dict__.pop("_projected", None)
            self.__dict__.pop("_distances", None)
            return self.heads(self.linear_pos(embeddings_1PD))[0]
        key = embeddings_1PD.shape[1], embeddings_1PD.dtype, *self._weight_of_positions()
        kept_key, _, kept_HPE = getattr(self, "_projected", (None, None, None))
        if key == kept_key:
            return kept_HPE
        positions_HPE = self.heads(self.linear_pos(embeddings_1PD))[0]
        if embeddings_1PD.shape[1] <= KEPT_POSITIONS:
            weight = self.linear_pos.weight.detach()  # held, or another could come to its address
            self._projected = (key, weight, positions_HPE)
        return positions_HPE

    @torch.no_grad()
    def distances(self, frames: int, ahead: int, most: int = 0) -> torch.Tensor:
        """[H, P, E]: projected encodings of the distances `frames` − 1 … −`ahead`, and maybe beyond.

        One table serves all streams of a model, and is made again only for more distances or other weights (which are
        not noticed where `.data` was written to). It reaches half as far again as needed, but not beyond `most` frames.
        """
        weight, key = self.linear_pos.weight, self._weight_of_positions()
        kept_key, _, kept_most, kept_ahead, table_HPE = getattr(self, "_distances", (None, None, 0, 0, None))
        if key != kept_key:
            kept_most, kept_ahead = 0, 0
        if frames > kept_most or ahead > kept_ahead:
            further = frames + frames // 2
            kept_most = max(kept_most, min(further, most) if frames <= most else further)
            kept_ahead = max(kept_ahead, ahead)
            table_1PD = sinusoids(kept_most, weight.shape[1], weight.device, weight.dtype, kept_ahead)
            table_HPE = self.heads(self.linear_pos(table_1PD))[0]
            self._distances = (key, weight.detach(), kept_most, kept_ahead, table_HPE)
        return table_HPE[:, kept_most - frames :]

    @property
    def position_bytes(self) -> int:
        """Of the table that `distances` keeps."""
        return self._distances[-1].nbytes if hasattr(self, "_distances") else 0

    def _weight_of_positions(self) -> tuple:
        weight = self.linear_pos.weight
        autocast = torch.is_autocast_enabled(weight.device.type) and torch.get_autocast_dtype(weight.device.type)
        return weight.device, weight.dtype, weight.data_ptr(), weight._version, autocast


class SelfAttention(RelativeAttention, nn.Module):
    """Of the encoders of `models.encoder`: the parameters that all kinds have, and the formula of the cache."""

    position_embeddings_type: str | None = "relative"

    def __init__(self, config, layer: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.config, self.head_size = config, width // self.num_heads
        self.linear_q = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        if self.position_embeddings_type == "relative":
            self.linear_pos = nn.Linear(width, width, bias=False)
            self.pos_bias_u = nn.Parameter(torch.empty(self.num_heads, self.head_size))
            self.pos_bias_v = nn.Parameter(torch.empty(self.num_heads, self.head_size))
            SelfAttention.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Of the parameters that are no module's."""
        if self.position_embeddings_type == "relative":
            nn.init.zeros_(self.pos_bias_u)
            nn.init.zeros_(self.pos_bias_v)

    @staticmethod
    @abstractmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        """Numbers per frame of each tensor that `remembered` gives."""

    @classmethod
    def cached_numbers(cls, config, layer: int, frames: int) -> int:
        """What a stream keeps of `frames` frames in one layer."""
        return sum(cls.cached_widths(config, layer)) * frames


class KeyValueMemory(RelativeAttention):
    """Keys and values are kept as they are, from `linear_k` and `linear_v`."""

    def remembered(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear_k(x_BTD), self.linear_v(x_BTD)

    def keys_and_values(self, *remembered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BTC, value_BTC = remembered
        return self.heads(key_BTC), self.heads(value_BTC)


class MultiHeadAttention(KeyValueMemory, SelfAttention):
    """Keys and values of each head's own (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_v = nn.Linear(config.hidden_size, config.hidden_size)

    @staticmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        return config.hidden_size, config.hidden_size


class LatentMemory(RelativeAttention):
    """The latent is kept, of a `latent_kv`; keys and values are made of it, or the queries brought to it.

    `form` is "expanded" (keys and values are made for every frame), "absorbed" (queries and outputs change sides
    instead, DeepSeek-V2, arXiv 2405.04434, 2.1.2), or "auto": whichever multiplies less. Both give the same.
    """

    form = "auto"

    def remembered(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.latent_kv.latents(x_BTD)

    def keys_and_values(self, *remembered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BTD, value_BTD = self.latent_kv.expand(*remembered)
        return self.heads(key_BTD), self.heads(value_BTD)

    def linear_k(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.keys(x_BTD)

    def linear_v(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.latent_kv.values(x_BTD)

    def attend(self, query_BHnE: torch.Tensor, held: tuple[torch.Tensor, ...], **how):
        form = self.form
        if form == "auto":
            ranks = self.latent_kv.ranks
            fewer = absorbing_pays(query_BHnE.shape[2], held[0].shape[1], self.num_heads, self.head_size, ranks)
            form = "absorbed" if fewer and not self.training else "expanded"
        if form == "expanded":
            return super().attend(query_BHnE, held, **how)
        up_k, up_v = self.latent_kv.up_k, self.latent_kv.up_v
        # b_k adds the same to all scores of a query, which softmax takes away; b_v passes, as weights add up to one.
        absorbed_HER = up_k.weight.unflatten(0, (self.num_heads, self.head_size))
        latent_BHnR, weights = relative_attention(
            query_BHnE, held[0][:, None], held[-1][:, None], absorbed_HER=absorbed_HER, **how
        )
        up_HRE = up_v.weight.unflatten(0, (self.num_heads, self.head_size)).transpose(1, 2)
        return latent_BHnR @ up_HRE + up_v.bias.unflatten(0, (self.num_heads, 1, self.head_size)), weights


def absorbing_pays(queries: int, frames: int, heads: int, head_size: int, ranks: tuple[int, int]) -> bool:
    """Whether bringing queries to the latents takes less time than making keys and values of all frames.

    By multiplications: expanded D·(R_k + R_v) a frame and 2·D a score, absorbed D·(R_k + R_v) a query and
    H·(R_k + R_v) a score. `python -m asrlib steps --forms` measures whether that tells.
    """
    width, both = heads * head_size, sum(ranks)
    absorbed = queries * both * (width + frames * heads)
    return absorbed < frames * width * (both + 2 * queries)


class SimpleLatentAttention(LatentMemory, SelfAttention):
    """Keys and values from one cached latent (DeepSeek-V2, arXiv 2405.04434, 2.1.1), joint or split.

    One up-projection [D, R] serves all heads. An up-projection [d_h, R] for each head is the same thing written
    otherwise: stacked, the H of them are that one matrix, trained to the same values. This is what a converted model
    has, and what converts back: nothing but keys and values differs from `mha`.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        width = config.hidden_size
        self.latent_kv = LatentKV(width, config.latent_dim[layer], config.latent_layout, config.key_dim(layer))

    @staticmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        key_dim, width = config.key_dim(layer), config.latent_dim[layer]
        return (width,) if key_dim is None else (key_dim, width - key_dim)


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


class GroupedQueryAttention(KeyValueMemory, SelfAttention):
    """G keys and values, each shared by H / G neighbouring heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        width = config.num_key_value_heads * self.head_size
        self.linear_k = nn.Linear(config.hidden_size, width)
        self.linear_v = nn.Linear(config.hidden_size, width)

    @staticmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        return width, width


class LinearAttention(KeyValueMemory, SelfAttention):
    """φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j), φ = elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, 3.2).

    Time grows with T, and what is kept does not grow at all. Positions do not enter: the sums know no order, and what
    order there is comes from the convolutions around it. There are no weights to return, and none to drop out. The sums
    are over all frames; in chunks, over all up to the end of the chunk, as nothing can be taken out of them again.
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
        chunks: Chunks | None = None,
        past=None,
        **unused,
    ) -> tuple[torch.Tensor, None]:
        query_BHTE = nn.functional.elu(self.heads(self.linear_q(hidden_states))) + 1
        key_BHTE, value_BHTE = self.keys_and_values(*self.remembered(hidden_states))
        key_BHTE = nn.functional.elu(key_BHTE) + 1
        if attention_mask is not None:
            key_BHTE = key_BHTE.masked_fill(~attention_mask[:, None, :, None], 0)
        with torch.autocast(query_BHTE.device.type, enabled=False):  # sums over many frames would leave float16's range
            wide = torch.promote_types(query_BHTE.dtype, torch.float32)
            query_BHTE, key_BHTE, value_BHTE = query_BHTE.to(wide), key_BHTE.to(wide), value_BHTE.to(wide)
            if chunks is not None:
                output_BHTE = _in_chunks(query_BHTE, key_BHTE, value_BHTE, chunks.size)
            else:
                sums = _sums(key_BHTE, value_BHTE)
                if past is not None:
                    before = past.sums(_sums(key_BHTE[:, :, : past.central], value_BHTE[:, :, : past.central]))
                    sums = tuple(own + earlier for own, earlier in zip(sums, before, strict=True))
                output_BHTE = _weighted(query_BHTE, *sums)
        output_BTD = output_BHTE.to(hidden_states.dtype).transpose(1, 2).flatten(2)
        return self.linear_out(output_BTD), None

    @staticmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def cached_numbers(cls, config, layer: int, frames: int) -> int:
        head_size = config.hidden_size // config.num_attention_heads
        return config.num_attention_heads * head_size * (head_size + 1)


def _sums(key_BHTE: torch.Tensor, value_BHTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_j φ(k_j) v_jᵀ [..., E, E], Σ_j φ(k_j) [..., E])"""
    return key_BHTE.transpose(-1, -2) @ value_BHTE, key_BHTE.sum(-2)


def _weighted(query_BHTE: torch.Tensor, state_BHEE: torch.Tensor, total_BHE: torch.Tensor) -> torch.Tensor:
    weight_BHT1 = (query_BHTE @ total_BHE.unsqueeze(-1)).clamp(min=torch.finfo(query_BHTE.dtype).tiny)
    return (query_BHTE @ state_BHEE) / weight_BHT1


def _in_chunks(query_BHTE: torch.Tensor, key_BHTE: torch.Tensor, value_BHTE: torch.Tensor, size: int) -> torch.Tensor:
    frames = query_BHTE.shape[2]
    query, key, value = (
        nn.functional.pad(x, (0, 0, 0, -frames % size)).unflatten(2, (-1, size))
        for x in (query_BHTE, key_BHTE, value_BHTE)
    )  # [B, H, chunks, size, E]
    sums = (one.cumsum(2) for one in _sums(key, value))
    return _weighted(query, *sums).flatten(2, 3)[:, :, :frames]


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
