"""A button that records the microphone of the browser which shows it."""

from collections.abc import Callable
from pathlib import Path

import anywidget
import numpy as np
import traitlets

LONGEST = 60.0  # seconds, of what is recorded at once


class Microphone(anywidget.AnyWidget):
    """Calls `heard(samples_S, rate)` with what was recorded, float32 and mono, and `failed(reason)` where nothing was.

    A browser lets a page record that comes from this machine or over https, and asks its user.
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
