"""What stands above and below the figures of a sweep: a heading that says what is shown, and how to read it.

Figures go by the names that `member_figures.figures_of` gives them.
"""

from asrlib.measuring.names import AUDIO_SECONDS
from asrlib.reporting.benchmark_tables import lengths_caption, listed
from asrlib.reporting.member_figures import by_cache
from asrlib.reporting.members import Comparison, varied_parameters

HEADINGS = {
    "wer_vs_cache": f"Word errors against the state kept of {AUDIO_SECONDS:g} s of audio",
    "wer_vs_time": "Word errors against the time of an utterance",
    "training_together": "Word errors on the validation split as training goes on",
    "lengths": "Time and memory against the length of the audio",
}


def heading_of(name: str) -> str:
    return HEADINGS.get(name, f"Word errors against {name.removeprefix('wer_vs_')}")


def caption_of(name: str, sweep: Comparison) -> str:
    """How to read the figure of that name: what a point, a bar and a colour is."""
    if name == "wer_vs_cache":
        state = "The state is what a stream keeps, by the formula."
        return " ".join(filter(None, ["Bars: 95 % intervals.", state, _side_by_side(sweep), _looks(sweep)]))
    if name == "wer_vs_time":
        return f"Bars: 95 % intervals. The time is the mean of a full pass over an utterance. {_looks(sweep)}"
    if name == "training_together":
        return f"A training's time is shared out equally among its steps. {_looks(sweep)}"
    if name == "lengths":
        return f"{lengths_caption(sweep.benchmark['lengths'])} {_looks(sweep)}"
    parameter = name.removeprefix("wer_vs_")
    joined = {member for group in varied_parameters(sweep.entries).get(parameter, []) for member in group}
    others = [sweep.short[other] for other in sweep.table["reference"].dropna().unique() if other not in joined]
    dotted = f" Dotted: {listed(others)}, which they are compared with." if others else ""
    return f"Members that differ in {parameter} alone; bars: 95 % intervals.{dotted}"


def _side_by_side(sweep: Comparison) -> str:
    """Which points were moved so that none hides another; nothing where none was."""
    sizes = sweep.table["cache_bytes"].dropna()
    groups = [names for _, names in sizes.groupby(sizes).groups.items() if len(names) > 1]
    if not groups:
        return ""
    equal = "; ".join(listed([sweep.short[name] for name in names]) for names in groups)
    return f"Members whose states are of one size are drawn side by side, to be seen all: {equal}."


def _looks(sweep: Comparison) -> str:
    """What colours and lines mean, as `member_figures.looks` gives them."""
    if by_cache(sweep.table):
        return "Colours go from the smallest state to the largest."
    encoders = len(set(sweep.table["encoder"].dropna())) > 1
    return f"Colour: the kind of attention{'; shape and line: the encoder' if encoders else ''}."
