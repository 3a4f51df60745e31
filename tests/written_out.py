"""Formulas of attention written out over single frames and heads, float64: slow, and plain to see through.

Shapes: T frames, D width, H heads, E = D / H, R latent width.
"""

import math

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


# ---- encoders, in streams ----------------------------------------------------------------------------------


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def layer_norm(weights: Weights, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    centred_TD = x_TD - x_TD.mean(-1, keepdim=True)
    scaled_TD = centred_TD / (centred_TD.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled_TD * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def feed_forward(weights: Weights, x_TD: torch.Tensor) -> torch.Tensor:
    return linear(weights, "4", swish(linear(weights, "1", layer_norm(weights, "0", x_TD))))


class StreamedEncoder:
    """What one stream should hear, frame by frame.

    `heard[k]` are the frames that chunk k works on, by their place in time: its own, and behind them its lookahead.
    Of other chunks it hears the frames of their own alone, at the same layer: `left` of them in attention (in linear
    attention all), as far as the filter reaches in convolutions.
    """

    def __init__(self, weights: Weights, encoder: str, heads: int, layers: int, size: int, left, ahead: int, causal):
        self.weights, self.encoder, self.heads, self.layers = weights, encoder, heads, layers
        self.size, self.left, self.ahead, self.causal = size, left, ahead, causal

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] → what the last layer gives [T, D]."""
        frames = len(x_TD)
        self.begins = list(range(0, frames, self.size))
        heard = [
            {t: x_TD[t] for t in range(begin, min(begin + self.size + self.ahead, frames))} for begin in self.begins
        ]
        block = {"conformer": self._conformer, "branchformer": self._branchformer}[self.encoder]
        for layer in range(self.layers):
            heard = block(part(self.weights, f"layers.{layer}."), heard)
        return torch.stack([heard[t // self.size][t] for t in range(frames)])

    def _each(self, function, *heard: list) -> list:
        """`function`, of the frames of a chunk one below the other."""
        out = []
        for chunks in zip(*heard, strict=True):
            y_TD = function(*(torch.stack(list(chunk.values())) for chunk in chunks))
            out.append(dict(zip(chunks[0], y_TD, strict=True)))
        return out

    def _past(self, heard: list, chunk: int, reach: int | None) -> dict:
        begin = self.begins[chunk]
        first = 0 if reach is None else max(0, begin - reach)
        return {t: heard[t // self.size][t] for t in range(first, begin)}

    def _attend(self, weights: Weights, heard: list) -> list:
        return [
            self._attend_one(weights, self._past(heard, k, self.left if "linear_pos.weight" in weights else None), own)
            for k, own in enumerate(heard)
        ]

    def _attend_one(self, weights: Weights, past: dict, own: dict) -> dict:
        known = past | own
        x_TD, own_TD = torch.stack(list(known.values())), torch.stack(list(own.values()))
        width = x_TD.shape[1]
        query_HnE, (key_HTE, value_HTE) = (
            queries(weights, own_TD, self.heads),
            keys_and_values(weights, x_TD, self.heads),
        )
        scores_HnT = query_HnE.new_zeros(self.heads, len(own), len(known))
        for n, i in enumerate(own):
            for t, j in enumerate(known):
                if "linear_pos.weight" in weights:
                    position_HE = linear(weights, "linear_pos", sinusoid(i - j, width)[None]).view(self.heads, -1)
                    content_H = ((query_HnE[:, n] + weights["pos_bias_u"]) * key_HTE[:, t]).sum(-1)
                    place_H = ((query_HnE[:, n] + weights["pos_bias_v"]) * position_HE).sum(-1)
                    scores_HnT[:, n, t] = (content_H + place_H) / (width // self.heads) ** 0.5
                else:
                    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (query_HnE[:, n], key_HTE[:, t]))
                    scores_HnT[:, n, t] = (phi_q * phi_k).sum(-1)
        if "linear_pos.weight" in weights:
            scores_HnT = scores_HnT.exp()
        share_HnT = scores_HnT / scores_HnT.sum(-1, keepdim=True)
        output_nD = linear(weights, "linear_out", torch.einsum("hnt,hte->nhe", share_HnT, value_HTE).flatten(1))
        return dict(zip(own, output_nD, strict=True))

    def _convolve(self, weights: Weights, heard: list) -> list:
        """Σ_k w_ck x_{t+k−reach, c} + b_c; zeros for what the chunk does not hear."""
        kernel_CK = weights["depthwise.weight"][:, 0]
        width = kernel_CK.shape[1]
        reach = width - 1 if self.causal else width // 2
        out = []
        for k, own in enumerate(heard):
            known = self._past(heard, k, reach) | own
            out.append({})
            for t in own:
                near = [(at, t + at - reach) for at in range(width) if t + at - reach in known]
                out[-1][t] = weights["depthwise.bias"] + sum(kernel_CK[:, at] * known[s] for at, s in near)
        return out

    def _conformer(self, weights: Weights, heard: list) -> list:
        module = part(weights, "conv_module.")
        norm = part(module, "batch_norm.")

        def gated(x_TD):
            value_TD, gate_TD = linear(module, "pointwise1", layer_norm(module, "layer_norm", x_TD)).chunk(2, -1)
            return value_TD / (1 + (-gate_TD).exp())

        def behind(x_TD, y_TD):
            y_TD = (y_TD - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
            return x_TD + linear(module, "pointwise2", swish(y_TD))

        heard = self._each(lambda x_TD: x_TD + 0.5 * feed_forward(part(weights, "ffn1."), x_TD), heard)
        normed = self._each(lambda x_TD: layer_norm(weights, "self_attn_layer_norm", x_TD), heard)
        heard = self._each(torch.add, heard, self._attend(part(weights, "self_attn."), normed))
        heard = self._each(behind, heard, self._convolve(module, self._each(gated, heard)))
        heard = self._each(lambda x_TD: x_TD + 0.5 * feed_forward(part(weights, "ffn2."), x_TD), heard)
        return self._each(lambda x_TD: layer_norm(weights, "final_layer_norm", x_TD), heard)

    def _branchformer(self, weights: Weights, heard: list) -> list:
        mlp = part(weights, "cgmlp.")

        def widened(x_TD):
            return gelu(linear(mlp, "linear1", layer_norm(mlp, "layer_norm", x_TD)))

        def merged(x_TD, attended_TD, gate_TC):
            local_TD = linear(mlp, "linear2", widened(x_TD).chunk(2, -1)[0] * gate_TC)
            y_TD = x_TD + linear(weights, "merge", torch.cat([attended_TD, local_TD], -1))
            return layer_norm(weights, "final_layer_norm", y_TD)

        normed = self._each(lambda x_TD: layer_norm(weights, "self_attn_layer_norm", x_TD), heard)
        attended = self._attend(part(weights, "self_attn."), normed)
        gates = self._each(lambda x_TD: layer_norm(mlp, "gate_norm", widened(x_TD).chunk(2, -1)[1]), heard)
        return self._each(merged, heard, attended, self._convolve(mlp, gates))


def sinusoid(distance: int, width: int) -> torch.Tensor:
    """sin and cos of distance · 10000^(−2m/D), in turns [D]."""
    angles = [distance * 10_000 ** (-2 * pair / width) for pair in range(width // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)
