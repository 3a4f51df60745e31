"""Multi-head latent attention for speech recognisers: convert, fine-tune, and measure what it cost.

Importing asrlib is quick and registers the latent model types, so that transformers' `AutoModelForCTC` loads
a converted model wherever asrlib has been imported.
"""

from importlib import import_module

from asrlib.models.registration import register_with_transformers

_PUBLIC = {
    "load": "asrlib.models.families",
    "open_corpus": "asrlib.data.opening",
    "analyze_compression_quality": "asrlib.conversion.quality",
    "collect_statistics": "asrlib.conversion.statistics",
    "convert": "asrlib.conversion.convert",
    "to_standard_attention": "asrlib.conversion.convert",
    "evaluate": "asrlib.measuring.transcribing",
    "kv_cache_bytes": "asrlib.attention.cache",
    "stream": "asrlib.streaming.streams",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'asrlib' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


register_with_transformers()
