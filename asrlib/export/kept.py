"""The cache of an exported model, in a sentence for its card, with the formula."""

from asrlib.attention.cache import cached_widths, kv_cache_bytes
from asrlib.attention.names import attends_across
from asrlib.export.graphs import can_stream
from asrlib.models.registry import family_of, frames_per_second
from asrlib.reporting.numbers import size

FRAMES = 1000  # over which the cache of a stream is counted, then scaled to a second
NUMBER = 4  # bytes, in float32


def kept_sentence(config) -> str:
    """The cache of one utterance or one stream, and that of standard attention if it is larger."""
    if attends_across(config):
        return _of_writing(config)
    if getattr(getattr(config, "encoder_config", None), "sliding_window", None):
        return _of_window(config)
    seconds = FRAMES / frames_per_second(config)
    kept, standard = (kv_cache_bytes(either, FRAMES) / seconds for either in (config, _standard(config)))
    if can_stream(config):
        more = f", where its multi-head attention would keep {size(standard)}" if kept < standard else ""
        return (
            f"A stream of this model keeps {size(kept)} of keys and values, or of latents for them, for a second of "
            f"audio{more}."
        )
    more = f", and {size(standard)} in multi-head attention" if kept < standard else ""
    return (
        f"Keys and values, or latents for them, take {size(kept)} for a second of audio{more}. This model processes "
        "whole recordings, and keeps none of it afterwards."
    )


def _of_writing(config) -> str:
    frames, layers = config.max_source_positions, config.decoder_layers
    widths = [sum(widths) for widths in cached_widths(config)]
    own, across = sum(widths[:layers]), sum(widths[layers:])
    token, standard_token = (kv_cache_bytes(either, 0, tokens=1) for either in (config, _standard(config)))
    window, standard_window = (kv_cache_bytes(either, frames) for either in (config, _standard(config)))
    more = ""
    if token + window < standard_token + standard_window:
        more = f" Its multi-head attention would keep {size(standard_window)}, and {size(standard_token)} a token."
    return (
        f"While it writes, `generate` keeps {NUMBER} · ({frames} · {across} + n · {own}) bytes in float32 for each "
        f"hypothesis: {size(window)} for cross-attention to the {frames} frames of its window of "
        f"{frames / frames_per_second(config):g} s, padding included, and {size(token)} in the decoder for each of n "
        f"tokens, which are the prompt's and all written ones except the last.{more}"
    )


def _of_window(config) -> str:
    frames = config.encoder_config.sliding_window - 1
    widths, seconds = sum(map(sum, cached_widths(config))), frames / frames_per_second(config)
    kept, standard = (kv_cache_bytes(either, frames) for either in (config, _standard(config)))
    more = f", where its multi-head attention would keep {size(standard)}" if kept < standard else ""
    return (
        f"A stream of this model keeps {NUMBER} · {frames} · {widths} bytes in float32, {size(kept)}, of keys and "
        f"values or of latents for them, for the last {frames} frames ({seconds:g} s){more}. The states of its "
        "convolutions and its prediction network come on top, and are the same for both."
    )


def _standard(config):
    return family_of(config).to_standard(config)
