"""The size of the cache of an attention layer that streams or writes, in numbers and in bytes, by formula."""

from asrlib.attention.formats import cache_format
from asrlib.attention.kinds import attention_kind
from asrlib.attention.names import attends_across, encoder_config


def cached_widths(config) -> list[tuple[int, ...]]:
    """Numbers per frame of each tensor that each layer keeps. An encoder-decoder has first the decoder's layers, with
    numbers per token, and then those of cross-attention, with numbers per frame."""
    if attends_across(config):
        return _decoder_widths(config)
    if hasattr(config, "attention"):
        kind = attention_kind(config.attention)
        return [kind.cached_widths(config, layer) for layer in range(config.num_hidden_layers)]
    if not getattr(config, "latent_dim", None):
        encoder = encoder_config(config)
        return [(encoder.hidden_size, encoder.hidden_size)] * encoder.num_hidden_layers
    return _latent_widths(config)


def _latent_widths(config) -> list[tuple[int, ...]]:
    """The widths of the tensors that each attention module with a latent keeps."""
    keys = config.latent_key_dim or [None] * len(config.latent_dim)
    each = zip(config.latent_dim, keys, strict=True)
    return [(width,) if key is None else (key, width - key) for width, key in each]


def _decoder_widths(config) -> list[tuple[int, ...]]:
    standard, layers = (config.hidden_size, config.hidden_size), config.decoder_layers
    widths = {
        "encoder": [standard] * config.encoder_layers,
        "decoder": [standard] * layers,
        "cross": [standard] * layers,
    }
    latents = iter(_latent_widths(config) if getattr(config, "latent_dim", None) else [])
    for part in getattr(config, "latent_parts", []):
        widths[part] = [next(latents) for _ in widths[part]]
    if getattr(config, "latent_shared", False):
        widths["cross"][1:] = [()] * (layers - 1)
    return widths["decoder"] + widths["cross"]


def _lengths(config, frames: int, tokens: int) -> list[int]:
    """The length of the tensors that each layer keeps, in frames or tokens."""
    if attends_across(config):
        return [tokens] * config.decoder_layers + [frames] * config.decoder_layers
    return [frames] * len(cached_widths(config))


def cached_numbers(config, frames: int, tokens: int = 0) -> list[int]:
    """Numbers that each layer keeps of `frames` encoder frames and `tokens` tokens, by the formula of its kind of
    attention; layers are in the order of `cached_widths`."""
    if hasattr(config, "attention"):
        kind = attention_kind(config.attention)
        return [kind.cached_numbers(config, layer, frames) for layer in range(config.num_hidden_layers)]
    lengths = _lengths(config, frames, tokens)
    return [length * sum(widths) for length, widths in zip(lengths, cached_widths(config), strict=True)]


def kv_cache_bytes(config, frames: int, dtype: str = "float32", tokens: int = 0) -> int:
    """Bytes of the key/value cache of one stream over `frames` encoder frames, all layers together.

    Exact for a cache that holds just these frames, as that of `asrlib.stream`; a full-context pass keeps no cache. For
    an encoder-decoder it counts what `generate` keeps for one hypothesis: the `frames` that it attends to, padding
    included, and `tokens`, which are the prompt's and all written ones except the last.
    `dtype` is a format of `attention.formats`: float32, bfloat16, float16, int8 or int4. The latter two add a scale of
    two bytes for each frame of a tensor. Sums of linear attention are float32 in every format, and do not grow.
    """
    for name, count in (("frames", frames), ("tokens", tokens)):
        if count < 0:
            raise ValueError(f"{name} is {count}: it cannot be negative")
    held_as, lengths = cache_format(dtype), _lengths(config, frames, tokens)
    growing = sum(
        length * held_as.frame_bytes(width)
        for length, widths in zip(lengths, cached_widths(config), strict=True)
        for width in widths
    )
    fixed = sum(cached_numbers(config, frames=0))
    return growing + 4 * fixed


def held_bytes(cache) -> int:
    """Bytes that a cache of transformers holds, all hypotheses together; an EncoderDecoderCache has two parts."""
    both = [getattr(cache, f"{kind}_attention_cache", None) for kind in ("self", "cross")]
    layers = [layer for part in ([cache] if None in both else both) for layer in part.layers]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)
