"""Panels for JupyterLab: controls to try out, whose effects can be seen or heard at once.

They share a `Workbench`: a run, its recogniser, its conversion, and an utterance.
"""

from asrlib.explore.attention_panel import attention_panel
from asrlib.explore.conversion_panel import conversion_panel
from asrlib.explore.own_speech_panel import own_speech_panel
from asrlib.explore.run_panel import run_panel
from asrlib.explore.streaming_panel import streaming_panel
from asrlib.explore.workbench import Workbench, found_runs

__all__ = [
    "Workbench",
    "attention_panel",
    "conversion_panel",
    "found_runs",
    "own_speech_panel",
    "run_panel",
    "streaming_panel",
]
