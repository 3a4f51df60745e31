"""The choice of a run for the other panels."""

from collections.abc import Mapping
from pathlib import Path

import ipywidgets as widgets
from markupsafe import Markup

from asrlib.attention.names import encoder_config
from asrlib.explore.panel import NAMED, WIDE, Panel, html
from asrlib.explore.workbench import Workbench
from asrlib.measuring.speed import cache_bytes_per_second
from asrlib.models.registry import frames_per_second
from asrlib.reporting.numbers import size


class RunPanel(Panel):
    def __init__(self, bench: Workbench, runs: Mapping[str, Path]):
        self.bench = bench
        self.run = widgets.Dropdown(options=runs, description="run", style=NAMED, layout=WIDE)
        self.about = widgets.HTML()
        super().__init__({"run": self.run}, [self.about])
        self.run.observe(self.refresh, "value")

    def refresh(self, change=None) -> None:
        self.about.value = ""
        with self.working("loading the model"):
            self.bench.open(self.run.value)
            self.about.value = html(self._about())

    def _about(self) -> Markup:
        model, config = self.bench.baseline, self.bench.baseline.config
        encoder = encoder_config(config)
        return Markup(
            "<p>{:.3g} million parameters, {} layers of width {}, {} heads, {:.4g} frames a second. A stream keeps {} "
            "per second of audio. Models of this run: {}.</p>"
        ).format(
            model.num_parameters() / 1e6,
            encoder.num_hidden_layers,
            encoder.hidden_size,
            encoder.num_attention_heads,
            frames_per_second(config),
            size(cache_bytes_per_second(config)),
            ", ".join(self.bench.models),
        )


def run_panel(bench: Workbench, runs: Mapping[str, Path]) -> None:
    """A choice among `runs` (of `found_runs`); the first is open at the start."""
    RunPanel(bench, runs).show()
