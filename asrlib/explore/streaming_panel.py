"""Recognising an utterance while it is spoken."""

import copy
import time
from collections.abc import Callable, Iterator

import ipywidgets as widgets
import numpy as np
from markupsafe import Markup

from asrlib.attention.cache import kv_cache_bytes
from asrlib.attention.formats import FORMATS
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import folded
from asrlib.explore.conversion_panel import utterance_dropdown
from asrlib.explore.panel import NAMED, WIDE, Panel, html, player, rows
from asrlib.explore.workbench import Workbench
from asrlib.models.loading import load
from asrlib.models.registry import family_of
from asrlib.reporting.numbers import change, size
from asrlib.reporting.tables import diff_transcripts
from asrlib.streaming.streams import Recognition, chunks_of

CONVERTED_HERE = "converted here"
PIECE = SAMPLE_RATE // 25  # samples of speech that arrive together


class StreamingPanel(Panel):
    """`pace(seconds)` waits for speech to arrive; recognition slower than speech does not wait."""

    def __init__(self, bench: Workbench, pace: Callable[[float], None] = time.sleep):
        self.bench, self.pace = bench, pace
        self.chosen = {
            "chunk_ms": widgets.SelectionSlider(
                options=[80, 160, 320, 640, 1280, 2560], value=640, description="chunk, ms", style=NAMED
            ),
            "lookahead_ms": widgets.SelectionSlider(
                options=[0, 160, 320, 640], value=640, description="lookahead, ms", style=NAMED
            ),
            "left_seconds": widgets.SelectionSlider(
                options=[0.5, 1, 2, 5, 10, 30], value=10, description="left context, s", style=NAMED
            ),
        }
        self.model = widgets.Dropdown(description="model", style=NAMED, layout=WIDE)
        self.cache = widgets.Dropdown(options=list(FORMATS), description="cache in", style=NAMED)
        self.start = widgets.Button(description="Stream", button_style="primary", icon="play")
        self.heard = widgets.FloatProgress(min=0, max=1, description="heard", style=NAMED, layout=WIDE)
        self.text, self.account, self.speech = widgets.HTML(), widgets.HTML(), widgets.HBox()
        controls = {
            "model": self.model,
            "utterance": utterance_dropdown(bench),
            **self.chosen,
            "cache": self.cache,
            "start": self.start,
        }
        super().__init__(controls, [self.heard, self.speech, self.text, self.account])
        self.start.on_click(self.stream)
        bench.observe(self.refresh, ["models", "converted"])

    def refresh(self, change=None) -> None:
        """Offers the models of the run and the converted one, if there is one."""
        offered = list(self.bench.models)
        if self.bench.converted is not None:
            offered.append(CONVERTED_HERE)
        chosen = self.model.value
        self.model.options = offered
        self.model.value = chosen if chosen in offered else next(iter(offered), None)

    def stream(self, _=None) -> None:
        self.text.value = self.account.value = ""
        self.speech.children = ()
        with self.working("loading the model"):
            utterance = self.bench.utterance
            samples_S = utterance.audio()
            model, processor = self._loaded()
            chunks = chunks_of(model.config, **{name: control.value for name, control in self.chosen.items()})
            recognition = Recognition(model, processor, chunks, self.cache.value)
            self.work.layout.visibility = "hidden"  # the bar "heard" shows the progress from here on
            self.speech.children = [player(samples_S, autoplay=True)]
            for share, words in _as_spoken(recognition, samples_S, self.pace):
                self.heard.value, self.text.value = share, html(Markup("<p>{}</p>").format(folded(words)))
                self.account.value = html(_account(recognition))
            reference, transcript = folded(utterance.text), folded(recognition.text)
            self.text.value = html(rows({"said": reference, "heard": diff_transcripts(reference, transcript)}))

    def _loaded(self):
        if self.model.value is None:
            raise ValueError("there is no model: choose a run that has one")
        if self.model.value == CONVERTED_HERE:  # a copy, because streams change the attention modules
            return copy.deepcopy(self.bench.converted), self.bench.processor
        return load(self.bench.models[self.model.value])


def _as_spoken(
    recognition: Recognition, samples_S: np.ndarray, pace: Callable[[float], None]
) -> Iterator[tuple[float, str]]:
    """(share of the audio heard, text so far), after every piece and chunk."""
    words = ""
    for start in range(0, len(samples_S), PIECE):
        began = time.perf_counter()
        *_, words = [words, *recognition.hear(samples_S[start : start + PIECE])]
        yield min(1.0, (start + PIECE) / len(samples_S)), words
        pace(max(0.0, PIECE / SAMPLE_RATE - (time.perf_counter() - began)))
    for words in recognition.finish():
        yield 1.0, words


def _account(recognition: Recognition) -> Markup:
    streams = recognition.streams
    kept, convolutions = sum(streams.attention_bytes), sum(streams.convolution_bytes)
    config = streams.model.config
    standard = kv_cache_bytes(family_of(config).to_standard(config), streams.held_frames)
    compared = Markup(" ({} against MHA in float32)").format(change(kept, standard)) if kept < standard else ""
    return Markup("<p>{} frames kept: attention {}{}, convolutions {}</p>").format(
        streams.held_frames, size(kept), compared, size(convolutions)
    )


def streaming_panel(bench: Workbench) -> None:
    """Recognises the utterance while it is spoken, with text and cache after every chunk."""
    StreamingPanel(bench).show()
