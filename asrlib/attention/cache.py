"""What an attention layer would hold of the past while streaming, in numbers and in bytes."""

import torch

from asrlib.attention.kinds import attention_kind


def cached_numbers(config, frames: int) -> list[int]:
    """Numbers that each layer keeps of `frames` encoder frames, by the formula of its kind of attention."""
    if hasattr(config, "attention"):
        kind = attention_kind(config.attention)
        return [kind.cached_numbers(config, layer, frames) for layer in range(config.num_hidden_layers)]
    per_frame = getattr(config, "latent_dim", None) or [2 * config.hidden_size] * config.num_hidden_layers
    return [frames * numbers for numbers in per_frame]


def kv_cache_bytes(config, frames: int, dtype: str = "float32") -> int:
    """Bytes the key/value state of one stream takes over `frames` encoder frames, all layers together.

    A formula, exact for a cache that holds these frames and no more: numbers × bytes per number. A full-context pass
    keeps no cache at all; this is what chunked streaming would hold. `dtype` is a torch name: float32, bfloat16,
    float16, int8.
    """
    if frames < 0:
        raise ValueError(f"frames is {frames}: it can not be negative")
    number_type = getattr(torch, dtype, None)
    if not isinstance(number_type, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is no torch number type: use float32, bfloat16, float16 or int8")
    return sum(cached_numbers(config, frames)) * number_type.itemsize
