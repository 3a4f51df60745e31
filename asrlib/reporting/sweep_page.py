"""The index page of a sweep: who is best, what that cost, and the way to every member's own pages."""

from pathlib import Path

import pandas as pd

from asrlib.measuring.entries import entries_of
from asrlib.reporting import notebook_pages, tables
from asrlib.reporting.comparison import step_times
from asrlib.reporting.estimated import beside, compared, estimated_steps
from asrlib.reporting.figure_captions import caption_of, heading_of
from asrlib.reporting.member_tables import headline, how_to_read, ranking_html
from asrlib.reporting.members import Comparison, compare_members
from asrlib.reporting.notebook_pages import PAGES
from asrlib.reporting.numbers import duration, unbroken
from asrlib.reporting.provenance import parameters_of, provenance_of
from asrlib.runs import Run, asked_for

FIRST_FIGURES = 2  # stand above the list of members, the others below


def write_sweep_index(run: Run, command: str) -> Path:
    """Write index.html of a sweep from what is completed of it; says what is missing. Returns its path."""
    times = {stem: seconds for stem, seconds in step_times(run).items() if (run.path / f"{stem}.html").is_file()}
    members = {name: _progress(Run(run.path / name)) for name in asked_for(run)}
    finished = [name for name, member in members.items() if member["finished"]]
    sweep = _compared(run) if "06_compare" in times else compare_members(run, finished, test=False)
    pairs = {"": estimated_steps(run)} | {name: estimated_steps(Run(run.path / name)) for name in members}
    index = run.path / "index.html"
    figures = _figures(run, sweep) if "06_compare" in times else []
    return notebook_pages.render_template(
        "sweep.html.j2",
        index,
        page=notebook_pages.page_facts(index, run.path.name, f"{len(members)} recognisers side by side", times),
        headline=unbroken(headline(sweep)) if finished else "No member is finished yet.",
        ranking=ranking_html(sweep) if finished else None,
        reading=unbroken(how_to_read(sweep)),
        figures=figures[:FIRST_FIGURES],
        more_figures=figures[FIRST_FIGURES:],
        steps={stem: (*PAGES[stem], duration(seconds)) for stem, seconds in times.items()},
        members=members,
        unfinished=[name for name in members if name not in finished],
        uncompared=[name for name in finished if name not in sweep.table.index],
        total=duration(sum(member["seconds"] for member in members.values()) + sum(times.values())),
        estimate=compared({(name, step): pair for name, steps in pairs.items() for step, pair in steps.items()}),
        command=command,
        parameters=parameters_of(run),
        provenance=provenance_of(run, {"benchmark": sweep.benchmark, "baseline": {}}),
        files=[file for file in ("tables/ranking.csv", "tables/tests.csv") if figures and (run.path / file).is_file()],
    )


def _progress(run: Run) -> dict:
    """How far a member is: its steps with their pages, the seconds they took, what is left, its index page."""
    begun = [stem for stem in PAGES if run.started(stem)]
    done = step_times(run)
    pages = {stem: f"{run.path.name}/{stem}.html" for stem in done if (run.path / f"{stem}.html").is_file()}
    return {
        "finished": bool(begun) and all(run.completed(stem) for stem in begun),
        "done": [(PAGES[stem][0], pages.get(stem)) for stem in done],
        "left": [_left(run, stem) for stem in begun if not run.completed(stem)] if begun else ["not begun"],
        "seconds": sum(done.values()),
        "time": duration(sum(done.values())),
        "estimated": beside(estimated_steps(run)),
        "page": (run.path / "index.html").is_file(),
    }


def _left(run: Run, stem: str) -> str:
    """Why a step that was begun is not done, and what the next call will make of it."""
    name = PAGES[stem][0]
    if (run.path / "notebooks" / f"{stem}.failed.ipynb").is_file():
        return f"{name} failed"
    if not run.resumable(stem):
        return f"not done: {name}"
    checkpoints = any((run.path / "checkpoints" / stem).glob("*"))
    return f"{name} interrupted, {'goes on where it stopped' if checkpoints else 'begins again'}"


def _compared(run: Run) -> Comparison:
    """What 06_compare found, read back instead of tested again."""
    before = run.read_metrics("compare")
    entries = entries_of(run, run.completed("06_compare")["parameters"]["members"])
    table = pd.DataFrame(before["table"]).set_index("member")
    numbers = [column for column in table if column not in ("encoder", "attention", "system", "reference")]
    table = table.astype(dict.fromkeys(numbers, float))
    return Comparison(entries, run.read_metrics("benchmark"), table, pd.DataFrame(before["tests"]))


def _figures(run: Run, sweep: Comparison) -> list[tuple]:
    """The figures that 06_compare made, in its order: heading, image, caption."""
    paths = {name: run.path / "figures" / f"{name}.png" for name in run.read_metrics("compare")["figures"]}
    return [
        (heading_of(name), tables.figure_html(path), unbroken(caption_of(name, sweep)))
        for name, path in paths.items()
        if path.is_file()
    ]
