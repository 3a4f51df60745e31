"""Panels for JupyterLab: what one would like to turn a knob of, and see or hear what it does."""

import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from IPython.display import Audio, display
from markupsafe import Markup

from asrlib.attention.formats import FORMATS
from asrlib.data.corpus import SAMPLE_RATE, Corpus
from asrlib.figures import size
from asrlib.html import diff_transcripts
from asrlib.models.families import PRETRAINED, load
from asrlib.runs import project_root
from asrlib.streaming import Recognition, chunks_of

WIDE = widgets.Layout(width="95%")
NAMED = {"description_width": "9em"}
LARGE = Markup("<p style='font-size: 1.2em'>{}</p>")


def found_models(root: Path | None = None) -> dict[str, Path]:
    """{name: folder} of the shipped models and of those that runs under reports/ keep, the newest first."""
    shipped = {path.parent.name: path.parent for path in sorted(PRETRAINED.glob("*/config.json"))}
    reports = (root or project_root(Path.cwd())) / "reports"
    kept = sorted(reports.glob("**/models/*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return {str(path.parent.relative_to(reports)): path.parent for path in kept} | shipped


def streaming_panel(
    models: dict[str, Path], corpus: Corpus, pace: Callable[[float], None] = time.sleep
) -> widgets.VBox:
    """An utterance of `corpus`, recognised while it is spoken: text, cache and time after every chunk.

    `pace` waits so many seconds for speech to come; recognition that is slower than speech waits for nothing.
    """
    controls = {
        "model": widgets.Dropdown(options=models, description="model", style=NAMED, layout=WIDE),
        "utterance": widgets.Dropdown(
            options=[(f"{u.id}: {u.text}", i) for i, u in enumerate(corpus)],
            description="utterance",
            style=NAMED,
            layout=WIDE,
        ),
        "chunk_ms": widgets.SelectionSlider(
            options=[80, 160, 320, 640, 1280, 2560], value=640, description="chunk, ms", style=NAMED
        ),
        "lookahead_ms": widgets.SelectionSlider(
            options=[0, 160, 320, 640], value=640, description="lookahead, ms", style=NAMED
        ),
        "left_seconds": widgets.SelectionSlider(
            options=[0.5, 1, 2, 5, 10, 30], value=10, description="left context, s", style=NAMED
        ),
        "cache": widgets.Dropdown(options=list(FORMATS), description="cache in", style=NAMED),
    }
    start = widgets.Button(description="Stream", button_style="primary", icon="play")
    heard = widgets.FloatProgress(min=0, max=1, description="heard", style=NAMED, layout=WIDE)
    text, account, player = widgets.HTML(), widgets.HTML(), widgets.Output()

    def recognise(_):
        start.disabled = True
        text.value = account.value = ""
        try:
            chosen = {name: control.value for name, control in controls.items()}
            utterance = corpus[chosen.pop("utterance")]
            samples_S = utterance.audio()
            player.clear_output(wait=True)
            with player:
                display(Audio(samples_S, rate=SAMPLE_RATE, autoplay=True))
            model, processor = load(chosen.pop("model"))
            cache = chosen.pop("cache")
            recognition = Recognition(model, processor, chunks_of(model.config, **chosen), cache)
            for share, words in _as_spoken(recognition, samples_S, pace):
                heard.value, text.value = share, LARGE.format(words)
                account.value = _account(recognition)
            text.value = LARGE.format(diff_transcripts(utterance.text.upper(), recognition.text.upper()))
        except (OSError, ValueError) as error:
            account.value = Markup("<p><b>This does not work:</b> {}</p>").format(error)
        finally:
            start.disabled = False

    start.on_click(recognise)
    return widgets.VBox([*controls.values(), start, heard, text, account, player])


def _as_spoken(recognition: Recognition, samples_S: np.ndarray, pace: Callable[[float], None]):
    """(share of the audio that was heard, text so far) after every chunk that was recognised."""
    piece = SAMPLE_RATE // 25
    for start in range(0, len(samples_S), piece):
        began = time.perf_counter()
        for words in recognition.hear(samples_S[start : start + piece]):
            yield min(1.0, (start + piece) / len(samples_S)), words
        pace(max(0.0, piece / SAMPLE_RATE - (time.perf_counter() - began)))
    for words in recognition.finish():
        yield 1.0, words


def _account(recognition: Recognition) -> str:
    streams = recognition.streams
    kept, convolutions = sum(streams.attention_bytes), sum(streams.convolution_bytes)
    return f"<p>{streams.held_frames} frames kept: attention {size(kept)}, convolutions {size(convolutions)}</p>"
