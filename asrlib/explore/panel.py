"""What all panels have: controls that are locked while it works, a bar that moves, and a sentence if it fails."""

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
    """`controls`, by name, above what `shown` they change; `refresh` is what a change calls.

    Subclasses say what it does. What takes longer than a moment it does within `working`.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget], shown: Sequence[widgets.Widget]):
        self.controls = dict(controls)
        self.busy = False
        self.bar = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="16rem"))
        self.doing = widgets.HTML()
        self.work = widgets.HBox([self.bar, self.doing])
        self.work.layout.visibility = "hidden"  # its room stays, or all below it would jump
        self.failure = widgets.HTML(layout=widgets.Layout(display="none"))
        style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
        super().__init__([*self.controls.values(), self.work, self.failure, *shown, style])
        self.add_class(type(self).__name__)

    def refresh(self, change=None) -> None:
        """Shows what goes with the controls as they are."""

    def show(self) -> None:
        """Displays the panel, then what it opens with: a bar can be seen only where there is a panel."""
        display(self)
        self.refresh()

    @contextlib.contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """Locks the controls until the block ends; an error ends it with one sentence in the panel."""
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
        except Exception as error:  # a defect: the log has its traceback
            self.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            for control, was_locked in were_locked.items():
                control.disabled = was_locked
            self.busy, self.work.layout.visibility = False, "hidden"

    def fail(self, sentence: str) -> None:
        """Says why something does not work; an empty sentence, that all is well."""
        said = html(Markup('<p class="error" role="alert">This does not work: {}</p>').format(sentence))
        self.failure.value, self.failure.layout.display = (said, "") if sentence else ("", "none")

    def advance(self, doing: str, share: float) -> None:
        """What is being done, and how much of it is done."""
        self.work.layout.visibility = "visible"
        self.doing.value, self.bar.value = Markup("{} …").format(doing), share


@contextlib.contextmanager
def progress_of_bars(advance: Callable[[str, float], None]) -> Iterator[None]:
    """Meanwhile bars of tqdm call `advance` with what they describe and the share that is done, and print nothing.

    The functions that panels call have their bars in a terminal. `tqdm.display` is what tqdm wants overloaded to show
    them elsewhere; those functions make the bars themselves, so it is exchanged in the class. That of transformers, of
    weights being loaded, would leave a dead widget.
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
    """What a panel shows, in its style."""
    return Markup('<div class="asrlib">{}</div>').format(pieces)


def rows(named: Mapping[str, str | Markup]) -> Markup:
    """A line for each, its name before it."""
    row = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
    return Markup("<table>{}</table>").format(Markup("").join(row.format(*one) for one in named.items()))


def player(samples_S: np.ndarray, autoplay: bool = False) -> widgets.Audio:
    """Plays 16 kHz audio."""
    return widgets.Audio(value=as_wave(samples_S), format="wav", autoplay=autoplay, loop=False)
