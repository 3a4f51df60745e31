"""The kinds of self-attention, side by side: what each computes, and what it caches.

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

The table counts attention alone: beside any kind, convolutions keep their last frames too. A new kind is a class with
`remembered`, `keys_and_values` and `cached_widths`, and one line in `KINDS`.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from asrlib.attention.chunks import Chunks, speech
from asrlib.attention.latent import LatentKV
from asrlib.attention.relative import relative_attention, sinusoids

KEPT_POSITIONS = 4096  # distances whose projections stay from call to call: some 40 s at 50 frames a second


class RelativeAttention(ABC):
    """Attention with relative positions, except for the parameters.

    A subclass is a module with `linear_q`, `linear_out`, `linear_pos`, `pos_bias_u`, `pos_bias_v`, `num_heads`,
    `head_size` and `config`. It defines what a stream keeps of a frame, and how keys and values come from that.
    """

    @abstractmethod
    def remembered(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a stream keeps of frames, [B, T, numbers] each."""

    @abstractmethod
    def keys_and_values(self, *remembered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, G, T, E] each. G is H or less; H / G neighbouring heads share a key and a value."""

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

        `hidden_states` [B, T, D] are the inputs, `attention_mask` [B, T] says which frames are speech (None: all), and
        `relative_position_embeddings` [1, 2T−1, D] come from `attention.relative.sinusoids`. `chunks` limits which
        frames attend to which. `past`, a memory of `streaming.memory`, goes before the inputs, and then knows masks and
        positions.
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

    def attend(self, query_BHnE: torch.Tensor, held: tuple[torch.Tensor, ...], **settings):
        return relative_attention(query_BHnE, *self.keys_and_values(*held), **settings)

    def project_positions(self, embeddings_1PD: torch.Tensor) -> torch.Tensor:
        """[H, P, E]. In evaluation they are computed once for each P: the same P means the same distances.

        Training keeps none: fused optimisers change weights in a way that cannot be noticed here.
        """
        if torch.compiler.is_compiling():  # a graph cannot hold what stays from call to call
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
            weight = self.linear_pos.weight.detach()  # a reference: else another tensor could take its address
            self._projected = (key, weight, positions_HPE)
        return positions_HPE

    @torch.no_grad()
    def distances(self, frames: int, ahead: int, most: int = 0) -> torch.Tensor:
        """[H, P, E]: projected encodings of the distances `frames` − 1 … −`ahead`, and perhaps further ones.

        One table serves all streams of a model. It is made anew only for more distances or other weights (writing to
        `.data` goes unnoticed). It covers half as many frames again as needed, but no more than `most`.
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
        """Bytes of the table that `distances` keeps."""
        return self._distances[-1].nbytes if hasattr(self, "_distances") else 0

    def _weight_of_positions(self) -> tuple:
        weight = self.linear_pos.weight
        autocast = torch.is_autocast_enabled(weight.device.type) and torch.get_autocast_dtype(weight.device.type)
        return weight.device, weight.dtype, weight.data_ptr(), weight._version, autocast


class SelfAttention(RelativeAttention, nn.Module):
    """Attention of the encoders of `models.encoder`: the parameters that all kinds share, and the cache's formula."""

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
        """Resets the parameters that belong to no submodule."""
        if self.position_embeddings_type == "relative":
            nn.init.zeros_(self.pos_bias_u)
            nn.init.zeros_(self.pos_bias_v)

    @staticmethod
    @abstractmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        """Numbers per frame of each tensor that `remembered` returns."""

    @classmethod
    def cached_numbers(cls, config, layer: int, frames: int) -> int:
        """Numbers that a stream keeps of `frames` frames in one layer."""
        return sum(cls.cached_widths(config, layer)) * frames


class KeyValueMemory(RelativeAttention):
    """A stream keeps keys and values as `linear_k` and `linear_v` return them."""

    def remembered(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear_k(x_BTD), self.linear_v(x_BTD)

    def keys_and_values(self, *remembered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BTC, value_BTC = remembered
        return self.heads(key_BTC), self.heads(value_BTC)


class MultiHeadAttention(KeyValueMemory, SelfAttention):
    """Each head has keys and values of its own (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_v = nn.Linear(config.hidden_size, config.hidden_size)

    @staticmethod
    def cached_widths(config, layer: int) -> tuple[int, ...]:
        return config.hidden_size, config.hidden_size


class LatentMemory(RelativeAttention):
    """A stream keeps the latent of `latent_kv`.

    `form` is "expanded" (keys and values are computed from the latents of every frame), "absorbed" (queries and outputs
    are projected instead: DeepSeek-V2, arXiv 2405.04434, 2.1.2), or "auto", the one with fewer multiplications. Both
    give the same result.
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

    def attend(self, query_BHnE: torch.Tensor, held: tuple[torch.Tensor, ...], **settings):
        form = self.form
        if form == "auto":
            ranks = self.latent_kv.ranks
            fewer = absorbing_pays(query_BHnE.shape[2], held[0].shape[1], self.num_heads, self.head_size, ranks)
            form = "absorbed" if fewer and not self.training else "expanded"
        if form == "expanded":
            return super().attend(query_BHnE, held, **settings)
        up_k, up_v = self.latent_kv.up_k, self.latent_kv.up_v
        # b_k adds the same to all scores of a query, and softmax cancels it. b_v is added at the end: weights sum to 1.
        absorbed_HER = up_k.weight.unflatten(0, (self.num_heads, self.head_size))
        latent_BHnR, weights = relative_attention(
            query_BHnE, held[0][:, None], held[-1][:, None], absorbed_HER=absorbed_HER, **settings
        )
        up_HRE = up_v.weight.unflatten(0, (self.num_heads, self.head_size)).transpose(1, 2)
        return latent_BHnR @ up_HRE + up_v.bias.unflatten(0, (self.num_heads, 1, self.head_size)), weights


def absorbing_pays(queries: int, frames: int, heads: int, head_size: int, ranks: tuple[int, int]) -> bool:
    """Whether the absorbed form multiplies less than the expanded form.

    Expanded takes D·(R_k + R_v) multiplications a frame and 2·D a score, absorbed D·(R_k + R_v) a query and
    H·(R_k + R_v) a score. `python -m asrlib steps --forms` measures how well this predicts the faster form.
    """
    width, both = heads * head_size, sum(ranks)
    absorbed = queries * both * (width + frames * heads)
    return absorbed < frames * width * (both + 2 * queries)


class SimpleLatentAttention(LatentMemory, SelfAttention):
    """Keys and values from one cached latent (DeepSeek-V2, arXiv 2405.04434, 2.1.1), joint or split.

    One up-projection [D, R] serves all heads. It equals the H up-projections [d_h, R] of single heads, stacked. A
    converted model has this kind, and it converts back: only keys and values differ from `mha`.
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
    """Queries [B, T, D] from a latent [B, T, R_q] of their own, which is never cached (DeepSeek-V2, 2.1.2)."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.in_features = width
        self.down = nn.Linear(width, latent_dim, bias=False)
        self.up = nn.Linear(latent_dim, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_BTD))


class LatentAttention(SimpleLatentAttention):
    """`mla_simple` with queries from a latent too: DeepSeek-V2's attention without its rotary part and RMSNorms.

    The cache is the same. The queries' latent saves 2·D·(D/2 − R_q) parameters a layer and as many multiplications a
    frame: none at the default R_q = D/2. It limits the heads' queries to R_q directions, which may cost accuracy.
    DeepSeek's decoupled rotary key is not needed: relative positions enter the score without changing the keys.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.linear_q = LatentQuery(config.hidden_size, config.query_latent_dim)


class GroupedQueryAttention(KeyValueMemory, SelfAttention):
    """G keys and values; H / G neighbouring heads share each (Ainslie et al. 2023, arXiv 2305.13245)."""

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

    Time grows with T, the cache does not grow. Positions do not enter: the sums have no order, and only the
    convolutions around them know it. There are no weights to return or drop out. The sums are over all frames; in
    chunks, over all frames up to the chunk's end, because no frame can be taken out of a sum again.
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
        with torch.autocast(query_BHTE.device.type, enabled=False):  # sums over many frames exceed float16's range
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
    sums = (of_chunks.cumsum(2) for of_chunks in _sums(key, value))
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
