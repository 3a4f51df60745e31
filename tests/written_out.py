"""Formulas of attention written out over single frames and heads, float64: slow, and plain to see through.

Shapes: T frames, D width, H heads, E = D / H, R latent width.
"""

import torch

Weights = dict[str, torch.Tensor]  # a state dict, by the names of `attention.kinds`


def linear(weights: Weights, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    """W x + b, or W x where there is no bias."""
    y_TD = torch.einsum("oi,ti->to", weights[f"{name}.weight"], x_TD)
    return y_TD + weights[f"{name}.bias"] if f"{name}.bias" in weights else y_TD


def keys_and_values(weights: Weights, x_TD: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, T, E] each."""
    if "latent_kv.down.weight" in weights:
        latents = [linear(weights, "latent_kv.down", x_TD)] * 2
    elif "latent_kv.down_k.weight" in weights:
        latents = [linear(weights, f"latent_kv.down_{which}", x_TD) for which in "kv"]
    else:
        return tuple(of_heads(linear(weights, f"linear_{which}", x_TD), heads, len(x_TD[0])) for which in "kv")
    return tuple(
        of_heads(linear(weights, f"latent_kv.up_{which}", latent), heads, len(x_TD[0]))
        for which, latent in zip("kv", latents, strict=True)
    )


def of_heads(y_TC: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """[T, G·E] → [H, T, E]: neighbouring heads share one of the G that there are."""
    size = width // heads
    shared_by = heads // (y_TC.shape[1] // size)
    return torch.stack([y_TC[:, h // shared_by * size :][:, :size] for h in range(heads)])


def queries(weights: Weights, x_TD: torch.Tensor, heads: int) -> torch.Tensor:
    """[H, T, E]"""
    if "linear_q.down.weight" in weights:
        x_TD, name, width = linear(weights, "linear_q.down", x_TD), "linear_q.up", x_TD.shape[1]
    else:
        name, width = "linear_q", x_TD.shape[1]
    return of_heads(linear(weights, name, x_TD), heads, width)


def relative_scores(query_TE, key_TE, positions_PE, u_E, v_E) -> torch.Tensor:
    """((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √d_h [T, T]; p_{T−1} stands first of the P = 2T−1."""
    frames, size = query_TE.shape
    scores_TT = query_TE.new_zeros(frames, frames)
    for i in range(frames):
        for j in range(frames):
            content = torch.dot(query_TE[i] + u_E, key_TE[j])
            position = torch.dot(query_TE[i] + v_E, positions_PE[frames - 1 - (i - j)])
            scores_TT[i, j] = (content + position) / size**0.5
    return scores_TT


def attention(weights: Weights, x_TD: torch.Tensor, positions_PD: torch.Tensor, heads: int):
    """(output [T, D], weights of attention [H, T, T]) of one utterance without padding, of any kind of attention."""
    query_HTE = queries(weights, x_TD, heads)
    key_HTE, value_HTE = keys_and_values(weights, x_TD, heads)
    if "linear_pos.weight" in weights:
        positions_HPE = of_heads(linear(weights, "linear_pos", positions_PD), heads, x_TD.shape[1])
        each = zip(query_HTE, key_HTE, positions_HPE, weights["pos_bias_u"], weights["pos_bias_v"], strict=True)
        weights_HTT = torch.stack([relative_scores(*one).softmax(-1) for one in each])
    else:  # φ(q_i)·φ(k_j), with φ(x) = x + 1 above zero and eˣ below
        query_HTE, key_HTE = (torch.where(x > 0, x + 1, x.exp()) for x in (query_HTE, key_HTE))
        weights_HTT = torch.einsum("hie,hje->hij", query_HTE, key_HTE)
        weights_HTT = weights_HTT / weights_HTT.sum(-1, keepdim=True)
    output_THE = torch.einsum("hij,hje->ihe", weights_HTT, value_HTE)
    return linear(weights, "linear_out", output_THE.flatten(1)), weights_HTT
