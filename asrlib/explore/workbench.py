"""The state that panels share: a run, its recogniser, the converted model, and an utterance."""

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
    """{name: folder of its models} of all runs under reports/ with a baseline, and of the shipped models.

    The demo run comes first, then other runs, newest first, and shipped models last.
    """
    reports = (root or project_root(Path.cwd())) / "reports"
    configs = sorted(reports.glob("**/models/baseline/config.json"), key=lambda path: -path.stat().st_mtime)
    runs = {str(path.parents[2].relative_to(reports)): path.parents[1] for path in configs}
    shipped = {f"{path.parent.name} (shipped)": path.parent for path in sorted(PRETRAINED.glob("*/config.json"))}
    return {name: runs[name] for name in [FIRST_RUN] if name in runs} | runs | shipped


class Workbench(traitlets.HasTraits):
    """Panels read the state here, and observe changes by other panels.

    The user chooses among `utterances`, of speech that no model was trained on. `calibration` is training speech;
    conversion takes statistics of `calibration_seconds` of it.
    """

    models = traitlets.Dict()  # of the run, name → folder
    baseline = traitlets.Any()  # the run's recogniser with standard attention; None before a run is open
    converted = traitlets.Any()  # the converted recogniser; None before a conversion
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
        """Opens the run whose models lie in `folder`, or the single model in `folder`.

        Raises OSError or ValueError where the recogniser cannot be loaded; then no recogniser is open.
        """
        folders = sorted(path.parent for path in folder.glob("*/config.json"))
        models = {path.name: path for path in folders} or {folder.name: folder}
        self.baseline = self.converted = None
        self._forget()
        self.models = models
        model, self.processor = load(models.get("baseline", folder))
        self.baseline = model.to(choose_device("auto", model))

    def required(self) -> PreTrainedModel:
        """The baseline. Raises ValueError where none is open."""
        if self.baseline is None:
            raise ValueError("no recogniser is loaded: choose a run that has one")
        return self.baseline

    @property
    def statistics(self) -> Statistics:
        """Statistics of the calibration speech for every method, collected at the first use."""
        if self._statistics is None:
            self._statistics = collect_statistics(
                self.required(), self.processor, self.calibration, self.calibration_seconds, attention=True
            )
        return self._statistics

    def latent(self, latent_dim: int, method: str, layout: str) -> PreTrainedModel:
        """The converted baseline. The decomposition, which does not depend on the width, is computed once."""
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
        """The models' input for the utterance, a batch of one."""
        chosen = SpeechDataset(self.utterances[self.place : self.place + 1], self.processor)
        return SpeechCollator(self.processor)([chosen[0]])

    def errors(self, latent: PreTrainedModel) -> pd.DataFrame:
        """The errors of `latent` against the baseline on the utterance, layer by layer."""
        return analyze_compression_quality(self.required(), latent, self.inputs())

    def heard(self, model: PreTrainedModel) -> str:
        """The transcript of the utterance by `model`."""
        if model is self.baseline and self.place in self._heard:
            return self._heard[self.place]
        (transcript,) = transcribe(model, self.processor, self.utterances[self.place : self.place + 1])
        if model is self.baseline:
            self._heard[self.place] = transcript["hypothesis"]
        return transcript["hypothesis"]
