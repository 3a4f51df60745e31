"""A button that records from the browser's microphone."""

from collections.abc import Callable
from pathlib import Path

import anywidget
import numpy as np
import traitlets

LONGEST = 60.0  # seconds of a recording


class Microphone(anywidget.AnyWidget):
    """Calls `heard(samples_S, rate)` with the recording, float32 and mono, or `failed(reason)` if there is none.

    A browser allows recording only in pages from this machine or over https, and asks its user.
    """

    _esm = Path(__file__).with_name("microphone.js")
    disabled = traitlets.Bool(False).tag(sync=True)
    longest = traitlets.Float(LONGEST).tag(sync=True)

    def __init__(self, heard: Callable[[np.ndarray, int], None], failed: Callable[[str], None]):
        super().__init__()
        self.heard, self.failed = heard, failed
        self.on_msg(self._receive)

    def _receive(self, widget, content: dict, buffers: list) -> None:
        if "problem" in content:
            self.failed(content["problem"])
        else:
            self.heard(np.frombuffer(buffers[0], "<f4"), content["rate"])
