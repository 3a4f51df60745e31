"""The models that a benchmark compares: loaded, and described by what a stream keeps of them."""

from collections.abc import Sequence

from asrlib.measuring.entries import entries_of
from asrlib.measuring.names import AUDIO_SECONDS, encoder_named
from asrlib.runs import Run


def load_systems(run: Run, members: Sequence[str]) -> tuple[dict, dict]:
    """({name: model}, {name: its processor}) of all entries.

    Raises MissingStep, which names the notebook that makes the missing model.
    """
    from asrlib.models.loading import load

    folders = {entry.name: entry.run.require_model(entry.system) for entry in entries_of(run, members)}
    loaded = {name: load(folder) for name, folder in folders.items()}
    models = {name: model for name, (model, _) in loaded.items()}
    return models, {name: processor for name, (_, processor) in loaded.items()}


def describe(model, processor, corpus, precision: str = "fp32") -> dict:
    """The encoder and attention of a model, and the cache of a stream over the first AUDIO_SECONDS of speech.

    `cache_bytes` and `mha_cache_bytes` (of the same encoder with multi-head attention) come from the formula, in
    `precision`; `counted` is the cache of a real stream in float32 (`streams.what_is_kept`).
    """
    from asrlib.attention.cache import kv_cache_bytes
    from asrlib.attention.names import encoder_config
    from asrlib.measuring.lengths import joined
    from asrlib.measuring.timing import DTYPES
    from asrlib.models.registry import family_of, is_latent
    from asrlib.streaming.streams import what_is_kept

    config = model.config
    counted = what_is_kept(model, processor, joined(corpus, AUDIO_SECONDS))
    frames, dtype = counted["frames"], DTYPES[precision]
    return {
        "encoder": getattr(config, "encoder", None) or encoder_named(config.model_type),
        "attention": getattr(config, "attention", "mla_simple" if is_latent(config) else "mha"),
        "layers": encoder_config(config).num_hidden_layers,
        "hidden_size": encoder_config(config).hidden_size,
        "audio_seconds": AUDIO_SECONDS,
        "cache_bytes": kv_cache_bytes(config, frames, dtype),
        "mha_cache_bytes": kv_cache_bytes(family_of(config).to_standard(config), frames, dtype),
        "counted": counted,
    }
