"""Where a head looks, before conversion and after."""

import ipywidgets as widgets

from asrlib.attention.names import encoder_config
from asrlib.conversion_figures import attention_maps
from asrlib.explore.panel import NAMED, Panel, html
from asrlib.explore.workbench import Workbench
from asrlib.figures import as_image
from asrlib.models.inference import attention_of


class AttentionPanel(Panel):
    def __init__(self, bench: Workbench):
        self.bench = bench
        self.layer = widgets.IntSlider(max=0, description="layer", continuous_update=False, style=NAMED)
        self.head = widgets.IntSlider(max=0, description="head", continuous_update=False, style=NAMED)
        self.map = widgets.HTML()
        self.weights: dict = {}  # of each model, a tensor [H, T, T] a layer
        super().__init__({"layer": self.layer, "head": self.head}, [self.map])
        for slider in (self.layer, self.head):
            slider.observe(self.redraw, "value")
        bench.observe(self.refresh, ["converted", "place"])

    def refresh(self, change=None) -> None:
        """Lets the models attend anew; without a converted one, the baseline alone."""
        with self.working("attending to the utterance"):
            config, inputs = encoder_config(self.bench.required().config), self.bench.inputs()
            self.layer.max, self.head.max = config.num_hidden_layers - 1, config.num_attention_heads - 1
            self.weights = {"MHA": attention_of(self.bench.baseline, inputs)}
            if self.bench.converted is not None:
                self.weights["MLA"] = attention_of(self.bench.converted, inputs)
            self._draw()

    def redraw(self, change=None) -> None:
        """Shows another layer or head."""
        if not self.busy and self.weights:
            with self.working("drawing"):
                self._draw()

    def _draw(self) -> None:
        self.advance("drawing", 0.7)
        layer, head, utterance = self.layer.value, self.head.value, self.bench.utterance
        names = {"MHA": "MHA"}
        if "MLA" in self.weights:
            names["MLA"] = f"MLA, latent_dim {self.bench.converted.config.latent_dim[layer]}"
        weights = {name: self.weights[kind][layer][head].numpy() for kind, name in names.items()}
        about = f"layer {layer}, head {head} in {utterance.id}"
        self.map.value = html(as_image(attention_maps(weights, utterance.seconds, about)))


def attention_panel(bench: Workbench) -> None:
    """Attention weights of a layer and head over the utterance, of MHA and beside them of what it was converted to."""
    AttentionPanel(bench).show()
