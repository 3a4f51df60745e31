"""That a page which asks for the network, or fails, is found out."""

import pytest
from browser import PROGRAMS, chromium


@pytest.fixture
def page_of(tmp_path, open_page):
    def write_and_open(html, **options):
        (tmp_path / "page.html").write_text(f"<!doctype html><title>page</title>{html}")
        return open_page(tmp_path / "page.html", **options)

    return write_and_open


def test_a_page_of_its_own_files_asks_for_nothing_and_has_no_errors(page_of, tmp_path):
    (tmp_path / "beside.js").write_text("document.title = 'run'")
    local = page_of("<script src=beside.js></script>")
    assert local.page.title() == "run" and local.refused == local.errors == []


@pytest.mark.parametrize(
    "html",
    [
        "<img src=https://example.org/pixel.png>",
        "<script>fetch('https://example.org/pixel.png').catch(() => 0)</script>",
        "<script>new WebSocket('ws://example.org/pixel.png')</script>",
    ],
    ids=["image", "fetch", "socket"],
)
def test_what_a_page_asks_for_elsewhere_is_refused_and_remembered(page_of, html):
    local = page_of(html)
    local.page.wait_for_timeout(200)
    (asked,) = local.refused
    assert asked.endswith("//example.org/pixel.png")


@pytest.mark.parametrize(
    "script", ["console.error('broken')", "throw new Error('broken')", "Promise.reject(new Error('broken'))"]
)
def test_errors_of_a_page_are_collected(page_of, script):
    local = page_of(f"<script>{script}</script>")
    local.page.wait_for_timeout(200)
    assert ["broken" in error for error in local.errors] == [True]


def test_a_page_is_opened_as_its_reader_has_it_set(page_of):
    look = "<style>p {color: black} @media (prefers-color-scheme: dark) {p {color: white}}</style><p>text</p>"
    local = page_of(look, color_scheme="dark", viewport={"width": 360, "height": 640})
    assert local.page.evaluate("getComputedStyle(document.querySelector('p')).color") == "rgb(255, 255, 255)"
    assert local.page.evaluate("innerWidth") == 360


def test_the_browser_is_the_one_that_is_named_or_the_first_on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert chromium() is None
    for name in reversed(PROGRAMS):
        (tmp_path / name).touch(mode=0o755)
        assert chromium() == str(tmp_path / name)
    monkeypatch.setenv("CHROMIUM", "google-chrome")
    assert chromium() == str(tmp_path / "google-chrome")
    monkeypatch.setenv("CHROMIUM", "mistyped")
    with pytest.raises(FileNotFoundError, match="mistyped"):
        chromium()
