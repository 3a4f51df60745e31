"""The attention of a head, before conversion and after."""

import ipywidgets as widgets

from asrlib.attention.names import attends_across, encoder_config
from asrlib.explore.panel import NAMED, Panel, html
from asrlib.explore.workbench import Workbench
from asrlib.models.inference import attention_of
from asrlib.models.registry import attention_parts, frames_per_second, layer_names
from asrlib.reporting.figures import as_image
from asrlib.reporting.method_figures import attention_maps


class AttentionPanel(Panel):
    def __init__(self, bench: Workbench):
        self.bench = bench
        self.layer = widgets.IntSlider(max=0, description="layer", continuous_update=False, style=NAMED)
        self.head = widgets.IntSlider(max=0, description="head", continuous_update=False, style=NAMED)
        self.map = widgets.HTML()
        self.weights: dict = {}  # of each model, a tensor [H, T, T] a layer
        self.names: list[str] = []  # of layers
        super().__init__({"layer": self.layer, "head": self.head}, [self.map])
        for slider in (self.layer, self.head):
            slider.observe(self.redraw, "value")
        bench.observe(self.refresh, ["converted", "place"])

    def refresh(self, change=None) -> None:
        """Computes the attention anew, of the baseline and of the converted model, if there is one."""
        with self.working("attending to the utterance"):
            model, inputs = self.bench.required(), self.bench.inputs()
            self.names = layer_names(model, list(attention_parts(model)))
            self.layer.max, self.head.max = len(self.names) - 1, encoder_config(model.config).num_attention_heads - 1
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
        layer_name, titles = self.names[layer], {"MHA": "MHA"}
        if "MLA" in self.weights:
            latent = self.bench.converted
            chosen = layer_names(latent, getattr(latent.config, "latent_parts", None))
            width = dict(zip(chosen, latent.config.latent_dim, strict=True)).get(layer_name)
            titles["MLA"] = f"MLA, latent_dim {width}" if width else "MLA, unchanged in this layer"
        weights = {title: self.weights[kind][layer][head].numpy() for kind, title in titles.items()}
        about = f"layer {layer_name}, head {head} in {utterance.id}"
        tokens = layer_name.startswith(("decoder", "cross")), layer_name.startswith("decoder")
        config, seconds = self.bench.required().config, utterance.seconds
        if attends_across(config):  # its encoder always reads a whole window
            seconds = config.max_source_positions / frames_per_second(config)
        self.map.value = html(as_image(attention_maps(weights, seconds, about, tokens)))


def attention_panel(bench: Workbench) -> None:
    """Attention weights of a layer and head over the utterance, of MHA and, beside them, of the converted model."""
    AttentionPanel(bench).show()
