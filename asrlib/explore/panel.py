"""The base of all panels: controls that are locked during work, a progress bar, and a sentence after an error."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display
from markupsafe import Markup
from tqdm import tqdm
from transformers.utils import logging

from asrlib.data.audio import as_wave

WIDE = widgets.Layout(width="auto", max_width="60rem")
NAMED = {"description_width": "9em"}
STYLE = Markup("""<style>
.asrlib { line-height: 1.5; overflow-wrap: anywhere; }
.asrlib p { margin: .3em 0; }
.asrlib img { max-width: 100%; height: auto; background: white; }
.asrlib th { text-align: right; vertical-align: top; padding: 0 .8em 0 0; font-weight: normal; white-space: nowrap;
  color: var(--jp-ui-font-color2, #555); }
.asrlib td { text-align: left; padding: 0; font-size: 1.1em; }
.asrlib del { color: #9d1c2b; background: #fbe6e6; }
.asrlib ins { color: #0c6238; background: #e0f3e7; }
.asrlib .error { border-left: 3px solid #9d1c2b; padding-left: .8em; }
</style>""")


class Panel(widgets.VBox):
    """`controls`, by name, above the `outputs` that they change.

    Subclasses define `refresh`, which a change calls. Work that takes longer than a moment runs within `working`.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget], outputs: Sequence[widgets.Widget]):
        self.controls = dict(controls)
        self.busy = False
        self.bar = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="16rem"))
        self.doing = widgets.HTML()
        self.work = widgets.HBox([self.bar, self.doing])
        self.work.layout.visibility = "hidden"  # its space stays, otherwise everything below would move
        self.failure = widgets.HTML(layout=widgets.Layout(display="none"))
        style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
        super().__init__([*self.controls.values(), self.work, self.failure, *outputs, style])
        self.add_class(type(self).__name__)

    def refresh(self, change=None) -> None:
        """Shows the results for the present values of the controls."""

    def show(self) -> None:
        """Displays the panel, and only then its first results, so that the progress bar is visible."""
        display(self)
        self.refresh()

    @contextlib.contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """Locks the controls until the block ends; shows an error as one sentence in the panel."""
        were_locked = {control: control.disabled for control in self.controls.values()}
        self.busy = True
        self.fail("")
        for control in self.controls.values():
            control.disabled = True
        self.advance(doing, 0)
        try:
            with progress_of_bars(self.advance):
                yield
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            self.fail(str(error))
        except Exception as error:  # a defect, whose traceback goes to the log
            self.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            for control, was_locked in were_locked.items():
                control.disabled = was_locked
            self.busy, self.work.layout.visibility = False, "hidden"

    def fail(self, sentence: str) -> None:
        """Shows why something failed; an empty sentence removes the message."""
        message = html(Markup('<p class="error" role="alert">Error: {}</p>').format(sentence))
        self.failure.value, self.failure.layout.display = (message, "") if sentence else ("", "none")

    def advance(self, doing: str, share: float) -> None:
        """Shows the work at hand and its finished share."""
        self.work.layout.visibility = "visible"
        self.doing.value, self.bar.value = Markup("{} …").format(doing), share


@contextlib.contextmanager
def progress_of_bars(advance: Callable[[str, float], None]) -> Iterator[None]:
    """Inside, tqdm's bars print nothing, and call `advance` with their description and finished share.

    The library's functions make bars for a terminal. tqdm documents `display` as the method to override, and since the
    functions make the bars themselves, it is replaced in the class. The bar of transformers for loading weights would
    leave a dead widget, so it is disabled.
    """
    usual, of_transformers = tqdm.display, logging.is_progress_bar_enabled()

    def tell(bar: tqdm, msg=None, pos=None) -> None:
        if msg != "" and bar.total:  # the empty message clears a line
            advance(bar.desc.removesuffix(": ") or "working", bar.n / bar.total)

    tqdm.display = tell
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the line breaks around bars
            yield
    finally:
        tqdm.display = usual
        if of_transformers:
            logging.enable_progress_bar()


def html(pieces: Markup) -> Markup:
    """`pieces` in the style of panels."""
    return Markup('<div class="asrlib">{}</div>').format(pieces)


def rows(named: Mapping[str, str | Markup]) -> Markup:
    """A table with a row for each name and value."""
    row = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
    return Markup("<table>{}</table>").format(Markup("").join(row.format(*item) for item in named.items()))


def player(samples_S: np.ndarray, autoplay: bool = False) -> widgets.Audio:
    """Plays 16 kHz audio."""
    return widgets.Audio(value=as_wave(samples_S), format="wav", autoplay=autoplay, loop=False)
