"""What an attention layer holds of the past while streaming, in numbers and in bytes: the formula."""

from asrlib.attention.formats import cache_format
from asrlib.attention.kinds import attention_kind
from asrlib.attention.names import encoder_config


def cached_widths(config) -> list[tuple[int, ...]]:
    """Numbers per frame of each tensor that each layer keeps."""
    if hasattr(config, "attention"):
        kind = attention_kind(config.attention)
        return [kind.cached_widths(config, layer) for layer in range(config.num_hidden_layers)]
    if not getattr(config, "latent_dim", None):
        encoder = encoder_config(config)
        return [(encoder.hidden_size, encoder.hidden_size)] * encoder.num_hidden_layers
    keys = config.latent_key_dim or [None] * len(config.latent_dim)
    each = zip(config.latent_dim, keys, strict=True)
    return [(width,) if key is None else (key, width - key) for width, key in each]


def cached_numbers(config, frames: int) -> list[int]:
    """Numbers that each layer keeps of `frames` encoder frames, by the formula of its kind of attention."""
    if hasattr(config, "attention"):
        kind = attention_kind(config.attention)
        return [kind.cached_numbers(config, layer, frames) for layer in range(config.num_hidden_layers)]
    return [frames * sum(widths) for widths in cached_widths(config)]


def kv_cache_bytes(config, frames: int, dtype: str = "float32") -> int:
    """Bytes the key/value state of one stream takes over `frames` encoder frames, all layers together.

    Exact for a cache that holds these frames and no more, as `asrlib.stream` does; a full-context pass keeps none.
    `dtype` is a format of `attention.formats`: float32, bfloat16, float16, int8 or int4; the latter two with a scale of
    two bytes for each frame of a tensor. Sums of linear attention are float32, and do not grow, whatever the format.
    """
    if frames < 0:
        raise ValueError(f"frames is {frames}: it can not be negative")
    held_as = cache_format(dtype)
    growing = sum(frames * held_as.frame_bytes(width) for widths in cached_widths(config) for width in widths)
    fixed = sum(cached_numbers(config, frames=0))
    return growing + 4 * fixed
