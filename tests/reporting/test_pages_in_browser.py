"""The pages in a browser without a network, as a reader has them: on a screen, on a phone, in the dark, by keyboard."""

from pathlib import Path

import pytest
import tiny
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_markdown_cell
from test_report import SCORES, TIMINGS, complete, display_data, fill, render

from asrlib.measuring.word_errors import score
from asrlib.reporting.changes import listening_table
from asrlib.reporting.comparison import write_comparison
from asrlib.reporting.notebook_pages import PAGES
from asrlib.reporting.pages import write_index
from asrlib.reporting.runs_page import write_runs_index
from asrlib.reporting.tables import table_html
from asrlib.runs import Run

KEPT = Path(__file__).parents[2] / "reports" / "examples"
DEMO = sorted((KEPT / "demo").glob("*.html"))
INDEXES = [path for path in sorted(KEPT.glob("*/index.html")) if path.parent.name != "demo"]
SCREEN, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

BROKEN_IMAGES = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt.trim()).map(i => i.alt)"
OUTSIDE = """() => [...document.querySelectorAll('main *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !e.closest('.table, .html, pre, figure, nav, summary');
}).map(e => e.outerHTML.slice(0, 80))"""
VALUES = "place => [...document.querySelectorAll('tbody tr')].map(row => row.cells[place].dataset.value)"
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"


def named(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("size", [SCREEN, PHONE], ids=["screen", "phone"])
@pytest.mark.parametrize("path", DEMO + INDEXES, ids=named)
def test_a_kept_page_asks_for_nothing_fails_nowhere_and_fits_the_window(open_page, path, size):
    local = open_page(path, viewport=size)
    assert local.refused == [] and local.errors == []
    assert local.page.evaluate(BROKEN_IMAGES) == [], "images that do not appear, or say nothing to who cannot see"
    assert local.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert local.page.evaluate(OUTSIDE) == []
    for link in local.page.evaluate(LINKS):
        target, _, fragment = link.partition("#")
        assert link.startswith(("http", "mailto")) or (path.parent / target).exists(), link
        if fragment and not target:
            assert local.page.evaluate("id => document.getElementById(decodeURIComponent(id)) !== null", fragment), link


@pytest.fixture
def finished(tmp_path):
    """The index page of a run with all steps done, as the code of now writes it."""
    run = Run(tmp_path / "trial")
    fill(run)
    for step in PAGES:
        complete(run, step, seconds=61.0)
        (run.path / f"{step}.html").write_text("<p>")
    write_comparison(run)
    return write_index(run.path)


@pytest.fixture
def listening(tmp_path):
    """A page with an utterance to hear, rendered from a notebook."""
    speech = tiny.corpus(2)
    rows = [
        {"id": u.id, "speaker": u.speaker, "seconds": u.seconds, "reference": u.text, "hypothesis": ""} for u in speech
    ]
    table = listening_table({"baseline": score(rows)}, speech, [0, 1])
    html = str(table_html(table, "What was heard", dict.fromkeys(table, lambda cell: cell), index=False))
    cells = [new_markdown_cell("# Word errors"), new_code_cell(outputs=[display_data({"text/html": html})])]
    render(tmp_path, *cells, name="04_evaluate")
    return tmp_path / "04_evaluate.html", [utterance.seconds for utterance in speech]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_is_found_to_readers_who_see_little_or_nothing(open_page, finished, listening, scheme):
    """By axe-core: contrasts, names, landmarks, headings, tables."""
    for path in (finished, listening[0]):
        found = Axe().run(open_page(path, color_scheme=scheme).page)
        assert found.violations_count == 0, f"{path}\n{found.generate_report()}"


def test_the_audio_of_an_utterance_plays_from_inside_the_page(open_page, listening):
    path, seconds = listening
    local = open_page(path)
    local.page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState > 0)", timeout=20_000)
    durations = local.page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert durations == pytest.approx(seconds, abs=0.2) and local.refused == local.errors == []


def test_by_keyboard_one_gets_past_the_navigation_and_opens_the_code(open_page):
    page = open_page(KEPT / "demo" / "00_baseline.html").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.wait_for_url("**#content")  # fails after its time
    code = page.locator("details.code").first
    assert not code.locator(".highlight").is_visible()
    code.locator("summary").focus()
    page.keyboard.press("Enter")
    assert code.locator(".highlight").is_visible()


def test_on_paper_there_is_no_navigation_and_nothing_is_cut_off(open_page):
    page = open_page(KEPT / "demo" / "index.html").page
    page.emulate_media(media="print")
    assert not page.locator("nav.pages").is_visible() and page.locator("main h1").is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_the_table_of_all_runs_sorts_by_the_column_that_is_chosen(open_page, tmp_path):
    for name, system, timings in (("b", "converted", TIMINGS), ("a", "baseline", None), ("c", "finetuned", TIMINGS)):
        last = {one: SCORES[one] for one in ("baseline", system)}
        write_index(fill(Run(tmp_path / name), last, timings and {one: timings[one] for one in last}).path)
    page = open_page(write_runs_index(tmp_path)).page
    heads = page.locator("thead th")
    for column, known in (("WER", 6), ("RTFx", 4)):
        place = heads.all_inner_texts().index(column)
        for rising in (True, False):
            heads.nth(place).locator("button").click()
            assert heads.nth(place).get_attribute("aria-sort") == ("ascending" if rising else "descending")
            values = page.evaluate(
                f"[...document.querySelectorAll('tbody tr')].map(r => r.cells[{place}].dataset.value)"
            )
            numbers = [float(value) for value in values[:known]]
            assert numbers == sorted(numbers, reverse=not rising)
            assert values[known:] == [""] * (6 - known), "what is unknown comes last"
