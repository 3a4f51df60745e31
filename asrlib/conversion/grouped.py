"""MHA → GQA: heads that share their keys and values (Ainslie et al. 2023, arXiv 2305.13245), to compare MLA with.

Names: D width, H heads, d_h = D / H, G groups of H / G neighbouring heads. A group caches one key and one value of d_h
numbers, so a frame takes 2·G·d_h in each layer. Head h of group g reads

    k_h = R_h K_g + b_h,  K_g = A_g x,        v_h = S_h V_g + c_h,  V_g = C_g x,        R_h, S_h [d_h, d_h],

which is a split latent of ranks R_k = R_v = G·d_h whose `up` is zero outside a group's block. The latent twin of a
model can hold, run and save it. A GQA layer, whose heads read K_g and V_g unchanged, computes the same if

    S_h     goes into the output projection,   W_o,h ← W_o,h S_h
    c_h     goes into its bias,                b_o ← b_o + Σ_h W_o,h c_h   (with the old W_o; weights sum to one)
    R_h     goes into the query,               W_q,h ← R_hᵀ W_q,h, and likewise b_q,h, u_h and v_h
            and out of relative positions,     W_pos,h ← R_h⁻¹ W_pos,h
    b_h     goes nowhere: it shifts all scores of a row alike, and softmax cancels that

since (q_h + u_h)·(R_h K_g) = (R_hᵀ(q_h + u_h))·K_g, and (R_hᵀ(q_h + v_h))·(R_h⁻¹ p_h) = (q_h + v_h)·p_h. With relative
positions every R_h must therefore have an inverse. It has one unless a head ignores some of its group's cached numbers.

One group (multi-query attention) is thus the split latent of ranks d_h, and several groups are a split latent with
zeros: by the measure of its own method, none is better than the split latent of the same width.

Training a grouped twin would fill its zeros, and no GQA layer would compute the same. Where the family has
grouped-query attention of its own, `to_grouped_attention` makes the GQA model above, which can be trained.
"""

from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedModel

from asrlib.attention.names import encoder_config
from asrlib.conversion.convert import convert
from asrlib.conversion.factorize import Factors, LayerWeights, Moments
from asrlib.conversion.layers import decompose_layer
from asrlib.conversion.methods import METHODS, check_method, grouping_methods
from asrlib.conversion.statistics import Statistics
from asrlib.conversion.sums import LayerStatistics
from asrlib.models.registry import attention_modules, chosen_parts, family_of, is_latent


def group_heads(
    model: PreTrainedModel, kv_heads: int, method: str = "mean", statistics: Statistics | None = None
) -> PreTrainedModel:
    """A latent twin of `model` in which all heads share `kv_heads` keys and values; `model` stays unchanged.

    `mean` averages the projections of a group, weights and biases (section 2.1 of the paper): R_h = S_h = I. The other
    methods choose A_g, C_g and R_h, S_h to minimise their objective in factorize.py, summed over the heads of a group;
    `whitened` and `two_sided` need `statistics` (of `collect_statistics`). With one key and value for each head nothing
    is lost. Each group takes as long as a split latent of the whole layer. Raises ValueError where `kv_heads` does not
    divide the heads, for an unknown method, missing statistics, and a model that is latent already.
    """
    encoder = encoder_config(model.config)
    heads = encoder.num_attention_heads
    if not isinstance(kv_heads, Integral) or kv_heads < 1 or heads % kv_heads:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ValueError(
            f"kv_heads is {kv_heads!r}, but {heads} heads fall into equal groups: choose one of {divisors}"
        )
    check_method(method, grouping_methods())
    kv_heads = int(kv_heads)  # numpy's integers too
    parts = chosen_parts(model.config, None)
    modules = attention_modules(model, parts)
    of_layers = statistics.of(parts) if statistics else [None] * len(modules)
    grouped = [
        (GroupedHeads(attention, kv_heads, method, layer),) for attention, layer in zip(modules, of_layers, strict=True)
    ]
    latent_dim = 2 * kv_heads * (encoder.hidden_size // heads)
    return convert(model, latent_dim, layout="split", decomposition=grouped)


@dataclass(frozen=True)
class GroupedHeads:
    """Stands in for a `Decomposition` of one layer, and can be cut at one width only."""

    attention: nn.Module
    kv_heads: int
    method: str
    statistics: LayerStatistics | None
    layout: str = "split"

    def cut(self, rank_k: int, rank_v: int, steps: int | None = None) -> Factors:
        """The factors, float64. Both ranks are G·d_h; the parameters are those of `Decomposition.cut`."""
        weights = LayerWeights.of(self.attention)
        if METHODS[self.method].group:
            return METHODS[self.method].group(weights, self.kv_heads)
        return least_squares(weights, self.kv_heads, self.method, self.statistics and self.statistics.moments())


def least_squares(weights: LayerWeights, kv_heads: int, method: str, moments: Moments | None) -> Factors:
    """The best A_g, C_g [d_h, D], R_h, S_h and biases: each group's factors of rank d_h, by factorize.py.

    A group alone is the layer with the keys and values of all other heads at zero, so that they cost nothing. The
    layer's error is the sum over its groups, so the best of each group is the best of all.
    """
    width, size = len(weights.key), len(weights.key) // weights.heads
    factors = []
    for rows in torch.arange(width).chunk(kv_heads):
        alone = torch.zeros(width, dtype=torch.float64).index_fill(0, rows, 1)  # [D]
        group = replace(
            weights,
            key=alone[:, None] * weights.key,
            value=alone[:, None] * weights.value,
            key_bias=alone * weights.key_bias,
            value_bias=alone * weights.value_bias,
        )
        factors.append(decompose_layer(group, "split", method, moments).cut(size, size))
    return Factors(
        torch.cat([group.down_k for group in factors]),
        torch.cat([group.down_v for group in factors]),
        torch.cat([group.up_k for group in factors], dim=1),
        torch.cat([group.up_v for group in factors], dim=1),
        sum(group.key_bias for group in factors),
        sum(group.value_bias for group in factors),
    )


@torch.no_grad()
def to_grouped_attention(twin: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """The GQA model equal to `twin`, which `group_heads(…, kv_heads)` made: see the top of this file.

    Raises ValueError where the family has no grouped-query attention, or `twin` caches another number of heads.
    """
    family, config = family_of(twin.config), twin.config
    if family.to_grouped is None:
        raise ValueError(f"{config.model_type} has no grouped-query attention: keep the latent twin")
    size = config.hidden_size // config.num_attention_heads
    if not is_latent(config) or any(
        layer.latent_kv.ranks != (kv_heads * size,) * 2 for layer in attention_modules(twin)
    ):
        raise ValueError(f"the model does not cache {kv_heads} keys and values: apply group_heads to it first")
    grouped = family.standard_model(family.to_grouped(config, kv_heads)).to(twin.dtype)
    grouped.set_attn_implementation(config._attn_implementation)
    grouped.load_state_dict(twin.state_dict(), strict=False)
    for ours, theirs in zip(attention_modules(grouped), attention_modules(twin), strict=True):
        _fold(ours, theirs, kv_heads)
    return grouped.eval()


def _fold(ours: nn.Module, theirs: nn.Module, kv_heads: int) -> None:
    """Moves R_h, S_h and c_h of a twin's heads into queries, positions and output: see the top of this file."""
    latent, heads, size = theirs.latent_kv, theirs.num_heads, theirs.head_size
    weight = {name: p.double() for name, p in theirs.named_parameters()}
    turned_q, turned_pos = weight["linear_q.weight"].clone(), weight["linear_pos.weight"].clone()
    bias_q, out = weight["linear_q.bias"].clone(), weight["linear_out.weight"].clone()
    bias_u, bias_v = weight["pos_bias_u"].clone(), weight["pos_bias_v"].clone()
    for head in range(heads):
        group = head * kv_heads // heads
        rows, columns = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        of_key = latent.up_k.weight[rows, columns].double()  # R_h
        of_value = latent.up_v.weight[rows, columns].double()  # S_h
        turned_q[rows], bias_q[rows] = of_key.T @ turned_q[rows], of_key.T @ bias_q[rows]
        bias_u[head], bias_v[head] = of_key.T @ bias_u[head], of_key.T @ bias_v[head]
        turned_pos[rows] = torch.linalg.solve(of_key, turned_pos[rows])
        out[:, rows] = out[:, rows] @ of_value
    ours.linear_q.weight.copy_(turned_q)
    ours.linear_q.bias.copy_(bias_q)
    ours.linear_pos.weight.copy_(turned_pos)
    ours.pos_bias_u.copy_(bias_u)
    ours.pos_bias_v.copy_(bias_v)
    ours.linear_out.weight.copy_(out)
    ours.linear_out.bias.copy_(weight["linear_out.bias"] + weight["linear_out.weight"] @ weight["latent_kv.up_v.bias"])
    ours.linear_k.weight.copy_(latent.down_k.weight)
    ours.linear_v.weight.copy_(latent.down_v.weight)
    ours.linear_k.bias.zero_()
    ours.linear_v.bias.zero_()
