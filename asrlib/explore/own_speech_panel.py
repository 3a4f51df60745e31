"""The user's own speech, transcribed by both models."""

import io

import ipywidgets as widgets
import numpy as np
from markupsafe import Markup

from asrlib.data.audio import SAMPLE_RATE, as_wave, read_audio
from asrlib.data.corpus import Corpus, Utterance
from asrlib.data.text import folded
from asrlib.explore.microphone import LONGEST, Microphone
from asrlib.explore.panel import Panel, html, player, rows
from asrlib.explore.workbench import Workbench
from asrlib.measuring.transcribing import transcribe
from asrlib.models.registry import frames_of
from asrlib.reporting.tables import diff_transcripts


class OwnSpeechPanel(Panel):
    def __init__(self, bench: Workbench):
        self.bench = bench
        self.upload = widgets.FileUpload(accept="audio/*", description="Upload audio")
        self.microphone = Microphone(self.recorded, self.not_recorded)
        self.speech, self.transcripts = widgets.HBox(), widgets.HTML()
        self.samples_S: np.ndarray | None = None
        super().__init__({"upload": self.upload, "microphone": self.microphone}, [self.speech, self.transcripts])
        self.upload.observe(self.uploaded, "value")
        bench.observe(self.refresh, ["baseline", "converted"])

    def refresh(self, change=None) -> None:
        """Transcribes the recording with both models, if there is one yet."""
        if self.samples_S is not None and self.bench.baseline is not None:
            with self.working("transcribing"):
                self._transcribe()

    def uploaded(self, change) -> None:
        if not change["new"]:
            return
        (file,) = change["new"]
        self.upload.value = ()  # so that uploading the same file again is a change
        self._take_up(bytes(file["content"]), file["name"])

    def recorded(self, samples_S: np.ndarray, rate: int) -> None:
        self._take_up(as_wave(samples_S, rate), "the recording")

    def not_recorded(self, reason: str) -> None:
        self.fail(f"nothing was recorded: {reason}")

    def _take_up(self, content: bytes, name: str) -> None:
        self.samples_S, self.speech.children, self.transcripts.value = None, (), ""
        with self.working("decoding"):
            try:
                samples_S = read_audio(lambda: io.BytesIO(content))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self._check_length(samples_S, name)
            self.samples_S = samples_S
            self.speech.children = [player(samples_S)]
            self._transcribe()

    def _check_length(self, samples_S: np.ndarray, name: str) -> None:
        seconds = len(samples_S) / SAMPLE_RATE
        if seconds > LONGEST:
            raise ValueError(f"{name} is {seconds:.0f} s long: give {LONGEST:.0f} s at most")
        if not frames_of(self.bench.required())(len(samples_S)):
            raise ValueError(f"{name} is {seconds:.3f} s long, less than a frame of the model: give a longer one")

    def _transcribe(self) -> None:
        wave = as_wave(self.samples_S)
        seconds = len(self.samples_S) / SAMPLE_RATE
        own = Utterance("own speech", "", "own", seconds, "here", lambda: io.BytesIO(wave))
        corpus, models = Corpus("own speech", "own", (own,)), [self.bench.required(), self.bench.converted]
        before, *after = (
            folded(transcribe(model, self.bench.processor, corpus)[0]["hypothesis"]) for model in models if model
        )
        nothing = Markup("<i>nothing</i>")
        texts = {"heard by MHA": before or nothing}
        if after:
            texts["heard by MLA"] = diff_transcripts(before, after[0]) if before or after[0] else nothing
        self.transcripts.value = html(rows(texts))


def own_speech_panel(bench: Workbench) -> None:
    """Speech that is uploaded (any format of soundfile) or recorded, transcribed before and after conversion."""
    OwnSpeechPanel(bench).show()
