"""The models and the speech of a run, as far as they are on this machine: what an estimate is measured with.

Nothing is downloaded: a model without weights gets random ones, and in place of speech that is not here is noise.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, Wav2Vec2ConformerConfig

from asrlib import cost_measurements as measure
from asrlib.attention.cache import kv_cache_bytes
from asrlib.benchmark import DTYPES
from asrlib.conversion.convert import latent_dim_for
from asrlib.cost_card import COMPUTED
from asrlib.data.corpus import HUB_ID, Corpus, open_corpus
from asrlib.length_benchmark import PUBLISHED
from asrlib.models.families import family_of, frames_of, load, resolve_model
from asrlib.models.scratch import SIZES, new_model, new_processor
from asrlib.parameters import BadParameter
from asrlib.runs import resolve

PUBLISHED_CONFIGS = {"facebook/wav2vec2-conformer-rel-pos-large-960h-ft": PUBLISHED}  # of models not here yet
CACHE_FRAMES = 1000
NOISE_SECONDS = 16.0  # of the longest utterance, where none is known: few of LibriSpeech's are longer


@dataclass(frozen=True)
class Speech:
    """A split as a step uses it, or noise in its place."""

    corpus: Corpus
    opening: float  # seconds
    missing: str | None = None  # why it is noise

    @property
    def lengths(self) -> list[float]:
        return [utterance.seconds for utterance in self.corpus]


class Materials:
    """The models and the speech of one run. `known` keeps what was measured, for all runs of a sweep."""

    def __init__(self, values: dict[str, Any], known: dict):
        """`values`: every parameter, defaults included."""
        self.p = SimpleNamespace(**values)
        self.known = known
        self.missing: list[str] = []  # what the estimate had to do without

    def once(self, *key, work: Callable[[], Any]) -> Any:
        """What `work` gives, and gave before where it was asked for with the same key."""
        key = tuple(part.to_json_string() if hasattr(part, "to_json_string") else part for part in key)
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]

    # ---- models ----------------------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[Any, Any, float]:
        """(the baseline, its processor, seconds it took)."""
        p, begin = self.p, time.perf_counter()
        with measure.quietly():
            if p.architecture is not None:
                processor = new_processor(p.architecture, p.mel_bins, p.frame_shift_ms)
                model = new_model(p.architecture, processor, p.seed, **{name: getattr(p, name) for name in SIZES})
            else:
                model, processor = self._from_here(p.model, p.revision)
        return model.eval(), processor, time.perf_counter() - begin

    def _from_here(self, source: str, revision: str | None) -> tuple[Any, Any]:
        """The model; with random weights where there are none here, of its config."""
        try:
            with offline():
                return load(source, revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
        where = {"revision": revision or "main", "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(resolve_model(source), **where)
        except (OSError, ValueError):
            if source not in PUBLISHED_CONFIGS:
                raise BadParameter(f"{reason}. To estimate, its config.json at least must be here") from None
            config = Wav2Vec2ConformerConfig(**PUBLISHED_CONFIGS[source])
        family_of(config)
        self.missing.append(f"weights: random ones of the same size took their place, since {reason}")
        try:
            processor = AutoProcessor.from_pretrained(resolve_model(source), **where)
        except (OSError, ValueError):
            processor = new_processor()
        return AutoModelForCTC.from_config(config), processor

    @property
    def baseline(self):
        return self._loaded[0]

    @property
    def processor(self):
        return self._loaded[1]

    @property
    def loading(self) -> float:
        return self._loaded[2]

    @property
    def _grouped(self) -> bool:
        return self.p.convert_to == "gqa"

    @cached_property
    def converted(self):
        """A model as the conversion makes it, but with random weights."""
        config, p = self.baseline.config, self.p
        family = family_of(config)
        if self._grouped:
            if family.to_grouped is None:
                raise BadParameter(f"'convert_to' is gqa, of which a {config.model_type} has no twin: use mla")
            return family.standard_model(family.to_grouped(config, p.kv_heads)).eval()
        width = p.latent_dim if p.cache_cut is None else latent_dim_for(p.cache_cut, config.hidden_size)
        widths = [max(1, width // p.rank_multiple * p.rank_multiple)] * config.num_hidden_layers
        latent = family.to_latent(config, latent_dim=widths, latent_layout=p.layout, latent_key_dim=[])
        return family.latent_model(latent).eval()

    def cache(self, converts: bool) -> dict:
        """What a stream keeps, by the formula, beside the same encoder with multi-head attention."""
        config = (self.converted if converts else self.baseline).config
        dtype = DTYPES[self.p.precision]
        mha = family_of(config).to_standard(self.baseline.config)
        sizes = {
            "bytes": kv_cache_bytes(config, CACHE_FRAMES, dtype),
            "mha_bytes": kv_cache_bytes(mha, CACHE_FRAMES, dtype),
        }
        return {"frames": CACHE_FRAMES, "dtype": dtype, **sizes, "source": COMPUTED}

    # ---- speech ----------------------------------------------------------------------------------------------

    def speech(self, split: str, samples: int | None = None, seconds: float | None = None) -> Speech:
        """As `open_usable` gives it, by the headers of the audio."""
        asked = (split, samples, seconds)
        found = self.once("speech", self.baseline.config, self.p.corpus, *asked, work=lambda: self._speech(*asked))
        if found.missing and found.missing not in self.missing:
            self.missing.append(found.missing)
        return found

    def _speech(self, split: str, samples: int | None, seconds: float | None) -> Speech:
        p = self.p
        whole, opening, missing = self.once(
            "split", p.corpus, split, work=lambda: _open(p.corpus, split, p.batch_seconds)
        )
        if missing:
            return Speech(whole, 0.0, missing)
        begin = time.perf_counter()
        some = whole.sample(samples, p.seed)
        some = some if seconds is None else some.excerpt(seconds, p.seed)
        try:
            with measure.quietly():
                usable = some.usable(self.processor, frames_of(self.baseline), check_audio=False)
        except ValueError as error:
            raise BadParameter(str(error)) from None
        return Speech(usable, opening + time.perf_counter() - begin)


def _open(source: str, split: str, batch_seconds: float) -> tuple[Corpus, float, str | None]:
    """(the split, seconds that took, None), or noise and why it is noise."""
    try:
        with offline(), measure.quietly():
            if source == "synthetic":
                open_corpus(source, split)  # spoken now, where it never was
            begin = time.perf_counter()
            return open_corpus(source, split), time.perf_counter() - begin, None
    except (FileNotFoundError, ValueError) as error:
        if resolve(source).exists() or not re.fullmatch(HUB_ID, str(source)):
            raise BadParameter(str(error)) from None
    needed = "the run downloads it; to know its hours now, give a folder that holds it: --set corpus=DIR"
    return (
        measure.noise(split, min(NOISE_SECONDS, batch_seconds)),
        0.0,
        f"{source} {split} is not on this machine: {needed}",
    )


@contextmanager
def offline() -> Iterator[None]:
    """The hub's libraries look at what is on this machine, and at nothing else."""
    import datasets
    import huggingface_hub.constants

    places = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
