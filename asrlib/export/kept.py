"""What an exported model keeps of what it heard and wrote, in a sentence for its card, with the formula."""

from asrlib.attention.cache import cached_widths, kv_cache_bytes
from asrlib.attention.names import attends_across
from asrlib.export.graphs import can_stream
from asrlib.models.registry import family_of, frames_per_second
from asrlib.reporting.numbers import size

FRAMES = 1000  # that the cache of a stream is counted over, then scaled to a second
NUMBER = 4  # bytes, in float32


def kept_sentence(config) -> str:
    """Of one utterance or one stream, beside what standard attention would keep where that is more."""
    if attends_across(config):
        return _of_writing(config)
    if getattr(getattr(config, "encoder_config", None), "sliding_window", None):
        return _of_window(config)
    seconds = FRAMES / frames_per_second(config)
    kept, standard = (kv_cache_bytes(one, FRAMES) / seconds for one in (config, _standard(config)))
    if can_stream(config):
        more = f", where its multi-head attention would keep {size(standard)}" if kept < standard else ""
        return (
            f"A stream of this model keeps {size(kept)} of keys and values, or what they are made of, for a second of "
            f"audio{more}."
        )
    more = f", of multi-head attention {size(standard)}" if kept < standard else ""
    return (
        f"Keys and values, or what they are made of, are {size(kept)} for a second of audio{more}. This model hears "
        "recordings as a whole: it keeps none of it once one is heard."
    )


def _of_writing(config) -> str:
    frames, layers = config.max_source_positions, config.decoder_layers
    widths = [sum(widths) for widths in cached_widths(config)]
    own, across = sum(widths[:layers]), sum(widths[layers:])
    token, window = (kv_cache_bytes(config, *of) for of in ((0, "float32", 1), (frames,)))
    of_token, of_window = (kv_cache_bytes(_standard(config), *of) for of in ((0, "float32", 1), (frames,)))
    more = ""
    if token + window < of_token + of_window:
        more = f" Its multi-head attention would keep {size(of_window)}, and {size(of_token)} a token."
    return (
        f"While it writes, `generate` keeps {NUMBER} · ({frames} · {across} + n · {own}) bytes in float32 for each "
        f"hypothesis: {size(window)} for cross-attention to the {frames} frames of its window of "
        f"{frames / frames_per_second(config):g} s, however little of that is speech, and {size(token)} in the decoder "
        f"for each of n tokens, the prompt's and all that it wrote but the last.{more}"
    )


def _of_window(config) -> str:
    frames = config.encoder_config.sliding_window - 1
    widths, seconds = sum(map(sum, cached_widths(config))), frames / frames_per_second(config)
    kept, standard = (kv_cache_bytes(one, frames) for one in (config, _standard(config)))
    more = f", where its multi-head attention would keep {size(standard)}" if kept < standard else ""
    return (
        f"A stream of this model keeps {NUMBER} · {frames} · {widths} bytes in float32, {size(kept)}, of keys and "
        f"values or what they are made of: of the last {frames} frames, {seconds:g} s, once it heard as many{more}. "
        "What its convolutions and its prediction network remember comes on top, and is the same for both."
    )


def _standard(config):
    return family_of(config).to_standard(config)
