"""Converting the recogniser with chosen settings, and what that costs and saves."""

import ipywidgets as widgets
import traitlets
from markupsafe import Markup
from transformers import PreTrainedModel

from asrlib.attention.names import encoder_config
from asrlib.attention.widths import LAYOUTS
from asrlib.conversion.convert import exact_latent_dim
from asrlib.conversion.methods import latent_methods
from asrlib.conversion.quality import EXCELLENT, GOOD, summarise_quality
from asrlib.data.text import folded
from asrlib.explore.panel import NAMED, WIDE, Panel, html, player, rows
from asrlib.explore.workbench import Workbench
from asrlib.measuring.speed import cache_bytes_per_second
from asrlib.reporting.figures import as_image
from asrlib.reporting.method_figures import error_by_layer
from asrlib.reporting.numbers import change, percent, size
from asrlib.reporting.tables import diff_transcripts

FIRST_CUT = 16  # at the start, the cache is MHA's divided by this
LIMITS = {f"excellent: below {percent(EXCELLENT, 0)}": EXCELLENT, f"good: below {percent(GOOD, 0)}": GOOD}


class ConversionPanel(Panel):
    def __init__(self, bench: Workbench):
        self.bench, self.width = bench, 0
        self.latent_dim = widgets.IntSlider(
            min=1, max=1, description="latent_dim", continuous_update=False, style=NAMED, layout=WIDE
        )
        self.method = widgets.Dropdown(options=latent_methods(), value="attended", description="method", style=NAMED)
        self.latent_layout = widgets.Dropdown(options=LAYOUTS, description="layout", style=NAMED)
        self.utterance = utterance_dropdown(bench)
        self.speech = widgets.HBox()
        self.cache, self.transcripts, self.figure = widgets.HTML(), widgets.HTML(), widgets.HTML()
        controls = {
            "latent_dim": self.latent_dim,
            "method": self.method,
            "layout": self.latent_layout,
            "utterance": self.utterance,
        }
        super().__init__(controls, [self.cache, self.speech, self.transcripts, self.figure])
        for control in (self.latent_dim, self.method, self.latent_layout):
            control.observe(self.refresh, "value")
        bench.observe(self.refresh, "baseline")
        bench.observe(self.measure, "place")

    def refresh(self, change=None) -> None:
        """Converts anew."""
        if self.busy:  # the limits of the slider are changing
            return
        for output in (self.cache, self.transcripts, self.figure):
            output.value = ""
        with self.working("collecting statistics of calibration speech"):
            self._limit_width()
            latent = self.bench.latent(self.latent_dim.value, self.method.value, self.latent_layout.value)
            self._measure(latent)
            self.bench.converted = latent

    def measure(self, change=None) -> None:
        """Shows the results on another utterance."""
        if self.bench.converted is not None:
            with self.working("transcribing"):
                self._measure(self.bench.converted)

    def _limit_width(self) -> None:
        config, layout = self.bench.required().config, self.latent_layout.value
        self.latent_dim.min = 1  # first, so that the minimum never exceeds the maximum
        self.latent_dim.max = exact_latent_dim(config, layout)
        self.latent_dim.min = 2 if layout == "split" else 1
        width = encoder_config(config).hidden_size
        if width != self.width:
            self.width, self.latent_dim.value = width, 2 * width // FIRST_CUT

    def _measure(self, latent: PreTrainedModel) -> None:
        self.advance("transcribing", 0.2)
        self.cache.value = html(_cache(self.bench.required(), latent))
        self.speech.children = [player(self.bench.utterance.audio())]
        before, after = self.bench.heard(self.bench.baseline), self.bench.heard(latent)
        self.transcripts.value = html(_compared(self.bench.utterance.text, before, after))
        self.advance("measuring the layers", 0.5)
        errors = self.bench.errors(latent)
        self.advance("drawing", 0.8)
        verdict = summarise_quality(errors)["verdict"]
        note = Markup("<p>Quality by the error of the attention outputs on this utterance: {}.</p>").format(verdict)
        self.figure.value = html(note + as_image(error_by_layer(errors, LIMITS)))


def utterance_dropdown(bench: Workbench) -> widgets.Dropdown:
    """A choice of the utterance for all panels."""
    options = [(f"{utterance.id}: {utterance.text}", place) for place, utterance in enumerate(bench.utterances)]
    dropdown = widgets.Dropdown(options=options, description="utterance", style=NAMED, layout=WIDE)
    traitlets.link((bench, "place"), (dropdown, "value"))
    return dropdown


def _cache(mha: PreTrainedModel, mla: PreTrainedModel) -> Markup:
    theirs, ours = (cache_bytes_per_second(model.config) for model in (mha, mla))
    return Markup("<p>Cache per second of audio: <b>{}</b> instead of {} ({}).</p>").format(
        size(ours), size(theirs), change(ours, theirs)
    )


def _compared(reference: str, before: str, after: str) -> Markup:
    """The reference and the transcripts, with errors marked."""
    reference, before, after = (folded(text) for text in (reference, before, after))
    return rows(
        {
            "said": reference,
            "heard by MHA": diff_transcripts(reference, before),
            "heard by MLA": diff_transcripts(reference, after),
            "from MHA to MLA": diff_transcripts(before, after) if before != after else "no word changes",
        }
    )


def conversion_panel(bench: Workbench) -> None:
    """Width, method and layout of a conversion, with the resulting cache, transcripts and errors of the layers."""
    ConversionPanel(bench).show()
