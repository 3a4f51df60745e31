"""The systems of a comparison: loading them, describing them, and the metrics of their runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from asrlib.runs import Run, read_json

ATTENTION = {"mha": "MHA", "mla": "MLA", "mla_simple": "MLA-simple", "gqa": "GQA", "linear": "linear"}
LATENT = ("mla", "mla_simple")
AUDIO_SECONDS = 30.0  # of audio, whose caches are compared: a fixed length, since some caches grow and some do not
UNCONVERTED = "before conversion"


@dataclass(frozen=True)
class Entry:
    """One recogniser of the comparison: a model of a run."""

    name: str
    run: Run
    system: str  # baseline, converted or finetuned
    origin: str | None = None  # name of the entry that it was converted from

    def metrics(self, name: str) -> dict:
        """metrics/<name>.json of the run; empty where there is none."""
        path = self.run.path / "metrics" / f"{name}.json"
        return read_json(path) if path.is_file() else {}

    def scores(self) -> dict[str, dict]:
        """{split: {wer, wer_interval, cer, …}}; empty if it was not evaluated."""
        scores = self.metrics("evaluate").get("systems", {}).get(self.system, {})
        return scores or (self.metrics("baseline").get("splits", {}) if self.system == "baseline" else {})

    def training(self) -> dict:
        """{history, seconds, steps, best_wer, …} of its training; empty if it was not trained."""
        if self.system == "finetuned":
            return self.metrics("finetune")
        return self.metrics("baseline").get("training") or {} if self.system == "baseline" else {}

    def parameters(self) -> dict:
        """The parameters of the member, from its params.json."""
        path = self.run.path / "params.json"
        return read_json(path) if path.is_file() else {}


def entries_of(run: Run, members: Sequence[str]) -> list[Entry]:
    """The members in their order, then the models that they were converted from, each once."""
    entries, origins = [], {}
    for name in members:
        member = Entry(name, Run(run.path / name), "baseline")
        converted = member.metrics("convert")
        if not converted:
            entries.append(member)
            continue
        before = json.dumps([member.metrics("baseline").get(fact) for fact in ("model", "revision", "splits")])
        if before not in origins:
            number = f" {len(origins) + 1}" if origins else ""
            origins[before] = Entry(UNCONVERTED + number, member.run, "baseline")
        system = "finetuned" if member.metrics("finetune") else "converted"
        entries.append(Entry(name, member.run, system, origins[before].name))
    return entries + list(origins.values())


# ---- models, for the benchmark -----------------------------------------------------------------------------


def load_systems(run: Run, members: Sequence[str]) -> tuple[dict, dict]:
    """({name: model}, {name: its processor}): all entries of a sweep, or the three models of a single run.

    Raises MissingStep, which names the notebook that makes the missing model.
    """
    from asrlib.models.loading import load

    folders = {entry.name: entry.run.require_model(entry.system) for entry in entries_of(run, members)}
    if not members:
        folders = {name: run.require_model(name) for name in ("baseline", "converted", "finetuned")}
    loaded = {name: load(folder) for name, folder in folders.items()}
    models, processors = zip(*loaded.values(), strict=True)
    return dict(zip(loaded, models, strict=True)), dict(zip(loaded, processors, strict=True))


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
        "encoder": getattr(config, "encoder", None) or _encoder_named(config.model_type),
        "attention": getattr(config, "attention", "mla_simple" if is_latent(config) else "mha"),
        "layers": encoder_config(config).num_hidden_layers,
        "hidden_size": encoder_config(config).hidden_size,
        "audio_seconds": AUDIO_SECONDS,
        "cache_bytes": kv_cache_bytes(config, frames, dtype),
        "mha_cache_bytes": kv_cache_bytes(family_of(config).to_standard(config), frames, dtype),
        "counted": counted,
    }


def _encoder_named(model_type: str) -> str | None:
    """conformer for wav2vec2-conformer and wav2vec2-conformer-mla."""
    return next((name for name in ("branchformer", "conformer") if name in model_type), None)
