"""Multi-head latent attention for speech recognisers: convert, fine-tune, and measure what it cost.

Importing asrlib is quick and changes nothing of transformers. Where its Auto classes are used alone,
`asrlib.register()` tells them of the latent model types; `load`, `convert` and the rest of asrlib do so by themselves.
"""

from importlib import import_module

_PUBLIC = {
    "load": "asrlib.models.loading",
    "register": "asrlib.models.registry",
    "open_corpus": "asrlib.data.opening",
    "analyze_compression_quality": "asrlib.conversion.quality",
    "collect_statistics": "asrlib.conversion.statistics",
    "convert": "asrlib.conversion.convert",
    "to_standard_attention": "asrlib.conversion.twins",
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
