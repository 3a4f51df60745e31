"""What a model does to every utterance by itself, without batches or padding: the reference for sums over speech."""

import copy
from collections import defaultdict

import torch

from asrlib.data.corpus import Corpus
from asrlib.models.registry import attention_modules, family_of
from asrlib.models.scratch import new_processor


@torch.no_grad()
def run_alone(model, corpus: Corpus) -> list[dict[str, list[torch.Tensor]]]:
    """For each encoder layer, by name, a tensor an utterance of T frames, float64.

    keys_read, values_read [T, D], queries [T, H, d_h] (plus the bias u of relative positions), weights [H, T, T] of
    transformers' eager attention, attended [T, D] what the attention module gives, normed [C, T] what BatchNorm gives,
    output [T, D] of the layer.
    """
    model, processor = copy.deepcopy(model).eval(), new_processor()
    model.set_attn_implementation("eager")
    layers = zip(family_of(model.config).layers(model), attention_modules(model), strict=True)
    seen = [_watch(layer, attention) for layer, attention in layers]
    for utterance in corpus:
        model(**processor(utterance.audio(), sampling_rate=16_000, return_tensors="pt"))
    return seen


def _watch(layer, attention) -> dict[str, list[torch.Tensor]]:
    seen = defaultdict(list)

    def keep(name: str, tensor_1: torch.Tensor) -> None:
        seen[name].append(tensor_1[0].double())

    if isinstance(attention.linear_k, torch.nn.Module):
        keys, values = attention.linear_k, attention.linear_v
    elif attention.latent_kv.layout == "split":
        keys, values = attention.latent_kv.down_k, attention.latent_kv.down_v
    else:
        keys = values = attention.linear_q  # reads the same, and is called but once
    bias = attention.pos_bias_u if attention.position_embeddings_type == "relative" else 0
    keys.register_forward_hook(lambda _, args, output: keep("keys_read", args[0]))
    values.register_forward_hook(lambda _, args, output: keep("values_read", args[0]))
    attention.linear_q.register_forward_hook(
        lambda _, args, output: keep("queries", output.unflatten(-1, (attention.num_heads, -1)) + bias)
    )
    attention.register_forward_hook(
        lambda _, args, output: (keep("attended", output[0]), keep("weights", output[1]))[0]
    )
    layer.conv_module.batch_norm.register_forward_hook(lambda _, args, output: keep("normed", output))
    layer.register_forward_hook(lambda _, args, output: keep("output", output))
    return seen
