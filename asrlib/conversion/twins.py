"""A latent model and its standard twin: what moves weights from one to the other."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from asrlib.attention.kinds import LatentQuery
from asrlib.attention.latent import LatentKV
from asrlib.attention.names import NAMES, projections
from asrlib.conversion.factorize import Factors
from asrlib.models.registry import attention_modules, family_of, is_latent, latent_modules


def to_standard_attention(latent: PreTrainedModel) -> PreTrainedModel:
    """The MHA model that computes what `latent` computes: W_k = up_k @ down, W_v = up_v @ down, and W_q likewise."""
    if not is_latent(latent.config):
        raise ValueError(f"the model has no latent attention ({latent.config.model_type}): there is nothing to undo")
    family = family_of(latent.config)
    model = twin(family.standard_model, family.to_standard(latent.config), latent)
    replaced = model.load_state_dict(latent.state_dict(), strict=False)
    check_replaced(replaced.unexpected_keys, replaced.missing_keys)
    with torch.no_grad():
        parts = getattr(latent.config, "latent_parts", None)
        for ours, theirs in zip(attention_modules(model, parts), latent_modules(latent), strict=True):
            factors, our, query = factors_of(theirs.latent_kv), projections(ours), projections(theirs).query
            our.key.weight.copy_(factors.key_weight)
            our.value.weight.copy_(factors.value_weight)
            if our.key.bias is not None:  # else nothing is lost: softmax cancels it
                our.key.bias.copy_(factors.key_bias)
            if our.value.bias is not None:
                our.value.bias.copy_(factors.value_bias)
            elif factors.value_bias.any():
                raise ValueError(
                    f"this {latent.config.model_type} has values with a bias, but its standard attention has none "
                    "(attention_bias: false): keep the latent model"
                )
            if isinstance(query, LatentQuery):
                our.query.weight.copy_(query.up.weight.double() @ query.down.weight.double())
                our.query.bias.copy_(query.up.bias)
    return model.eval()


def twin(kind: type[PreTrainedModel], config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    """A model of `kind` with random weights. What a config's dict does not hold is taken from `model`."""
    twin = kind(config).to(model.dtype)
    twin.set_attn_implementation(model.config._attn_implementation)
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def check_replaced(latent_keys: list[str], standard_keys: list[str]) -> None:
    """Raises ValueError unless the two state dicts differ in keys, values and latent queries alone: any other
    difference would leave random weights."""
    replaced = [f".{name}." for _, key, value, _ in NAMES for name in (key, value)]
    if any(".linear_q.down." in key for key in latent_keys):
        replaced.append(".linear_q.")
    strangers = [key for key in latent_keys if ".latent_kv." not in key and ".linear_q." not in key]
    strangers += [key for key in standard_keys if not any(name in key for name in replaced)]
    if strangers:
        raise ValueError(f"the two models differ in more than keys and values: {', '.join(strangers[:5])}")


def factors_of(layer: LatentKV) -> Factors:
    """The factors a latent layer holds, float64."""
    joint = layer.layout == "joint"
    down_k, down_v = (layer.down, layer.down) if joint else (layer.down_k, layer.down_v)
    weights = (down_k.weight, down_v.weight, layer.up_k.weight, layer.up_v.weight)
    biases = (layer.up_k.bias, layer.up_v.bias)
    return Factors(*(tensor.detach().double().cpu() for tensor in (*weights, *biases)))


@torch.no_grad()
def fill(layer: LatentKV, factors: Factors) -> None:
    if layer.layout == "joint":
        layer.down.weight.copy_(factors.down_k)
    else:
        layer.down_k.weight.copy_(factors.down_k)
        layer.down_v.weight.copy_(factors.down_v)
    layer.up_k.weight.copy_(factors.up_k)
    layer.up_v.weight.copy_(factors.up_v)
    # Softmax cancels b_k, which shifts all scores of a row alike. It stays so that keys remain comparable.
    layer.up_k.bias.copy_(factors.key_bias)
    layer.up_v.bias.copy_(factors.value_bias)
