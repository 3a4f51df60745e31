"""What an attention layer would hold of the past while streaming, in numbers and in bytes."""

import torch


def cached_numbers_per_frame(config) -> list[int]:
    """Numbers each layer keeps per encoder frame: 2·D for MHA (keys and values), the latent width for MLA."""
    latent_dim = getattr(config, "latent_dim", None)
    return list(latent_dim) if latent_dim else [2 * config.hidden_size] * config.num_hidden_layers


def kv_cache_bytes(config, frames: int, dtype: str = "float32") -> int:
    """Bytes the key/value state of one stream takes over `frames` encoder frames, all layers together.

    A formula, exact for a cache that holds these frames and no more: frames × numbers per frame × bytes per
    number. A full-context pass keeps no cache at all; this is what chunked streaming would hold. `dtype` is
    a torch name: float32, bfloat16, float16, int8.
    """
    if frames < 0:
        raise ValueError(f"frames is {frames}: it can not be negative")
    number_type = getattr(torch, dtype, None)
    if not isinstance(number_type, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is no torch number type: use float32, bfloat16, float16 or int8")
    return frames * sum(cached_numbers_per_frame(config)) * number_type.itemsize
