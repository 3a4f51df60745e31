"""What the panels share: a run, its recogniser, what it was converted to, and an utterance."""

from pathlib import Path

import pandas as pd
import torch
import traitlets
from transformers import PreTrainedModel

import asrlib
from asrlib.conversion.convert import decompose
from asrlib.conversion.quality import analyze_compression_quality
from asrlib.conversion.statistics import Statistics, collect_statistics
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, Utterance
from asrlib.measuring.transcribing import transcribe
from asrlib.models.inference import choose_device
from asrlib.models.loading import PRETRAINED, load
from asrlib.runs import project_root

FIRST_RUN = "demo"


def found_runs(root: Path | None = None) -> dict[str, Path]:
    """{name: folder of its models} of all runs under reports/ that keep a baseline, and of the shipped models.

    The demo run comes first, then the newest; shipped models come last.
    """
    reports = (root or project_root(Path.cwd())) / "reports"
    kept = sorted(reports.glob("**/models/baseline/config.json"), key=lambda path: -path.stat().st_mtime)
    runs = {str(path.parents[2].relative_to(reports)): path.parents[1] for path in kept}
    shipped = {f"{path.parent.name} (shipped)": path.parent for path in sorted(PRETRAINED.glob("*/config.json"))}
    return {name: runs[name] for name in [FIRST_RUN] if name in runs} | runs | shipped


class Workbench(traitlets.HasTraits):
    """Panels read what lies here, and observe what another panel lays down.

    `utterances` are to choose from, of speech that no model at hand was trained on; `calibration` is training speech,
    of which `calibration_seconds` tell what matters in keys and values.
    """

    models = traitlets.Dict()  # of the run, name → folder
    baseline = traitlets.Any()  # the run's recogniser with standard attention; None before one is open
    converted = traitlets.Any()  # what it was converted to; None before that
    place = traitlets.Int(0)  # of the utterance

    def __init__(self, utterances: Corpus, calibration: Corpus, calibration_seconds: float = 120.0):
        super().__init__()
        self.utterances, self.calibration = utterances, calibration
        self.calibration_seconds = calibration_seconds
        self._forget()

    def _forget(self) -> None:
        self.processor = None
        self._statistics: Statistics | None = None
        self._decompositions: dict[tuple[str, str], list] = {}
        self._heard: dict[int, str] = {}

    @property
    def utterance(self) -> Utterance:
        return self.utterances[self.place]

    def open(self, folder: Path) -> None:
        """Takes up the run whose models lie in `folder`, or the one model that it is.

        Raises OSError or ValueError where the recogniser cannot be loaded; there is none then.
        """
        kept = sorted(path.parent for path in folder.glob("*/config.json"))
        models = {path.name: path for path in kept} or {folder.name: folder}
        self.baseline = self.converted = None
        self._forget()
        self.models = models
        model, self.processor = load(models.get("baseline", folder))
        self.baseline = model.to(choose_device("auto", model))

    def required(self) -> PreTrainedModel:
        """The baseline; ValueError where there is none."""
        if self.baseline is None:
            raise ValueError("no recogniser is loaded: choose a run that has one")
        return self.baseline

    @property
    def statistics(self) -> Statistics:
        """Of the calibration speech, collected when they are first asked for: enough for every method."""
        if self._statistics is None:
            self._statistics = collect_statistics(
                self.required(), self.processor, self.calibration, self.calibration_seconds, attention=True
            )
        return self._statistics

    def latent(self, latent_dim: int, method: str, layout: str) -> PreTrainedModel:
        """The baseline converted; what does not depend on the width is computed once."""
        model, statistics = self.required(), self.statistics
        if (method, layout) not in self._decompositions:
            self._decompositions[method, layout] = decompose(model, layout, method, statistics)
        latent = asrlib.convert(
            model,
            latent_dim,
            layout=layout,
            method=method,
            statistics=statistics,
            decomposition=self._decompositions[method, layout],
        )
        return latent.to(choose_device(None, model))

    def inputs(self) -> dict[str, torch.Tensor]:
        """What models read of the utterance, a batch of one."""
        chosen = SpeechDataset(self.utterances[self.place : self.place + 1], self.processor)
        return SpeechCollator(self.processor)([chosen[0]])

    def errors(self, latent: PreTrainedModel) -> pd.DataFrame:
        """Of `latent` against the baseline on the utterance, layer by layer."""
        return analyze_compression_quality(self.required(), latent, self.inputs())

    def heard(self, model: PreTrainedModel) -> str:
        """The transcript of the utterance by `model`."""
        if model is self.baseline and self.place in self._heard:
            return self._heard[self.place]
        (transcript,) = transcribe(model, self.processor, self.utterances[self.place : self.place + 1])
        if model is self.baseline:
            self._heard[self.place] = transcript["hypothesis"]
        return transcript["hypothesis"]
