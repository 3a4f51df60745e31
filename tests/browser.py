"""Chromium, driven by Playwright: what a reader of a page, or a user of a notebook, would see.

No page reaches anything but files and this machine: what else it asks for is refused and remembered. Debian's package
`chromium` will do, or any other that is on PATH or named in $CHROMIUM; where there is none, the tests skip.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Route, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LOCAL_SCHEMES = ("file", "data", "blob", "about")
LOCAL_HOSTS = ("127.0.0.1", "localhost")
ARGUMENTS = (
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # what no route would see, too
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",
)


@dataclass
class LocalPage:
    """A page without a network: what it asked for elsewhere, and the errors of its scripts and console."""

    page: Page
    refused: list[str] = field(default_factory=list)  # addresses
    errors: list[str] = field(default_factory=list)


def chromium() -> str | None:
    """The program to start; None where there is none."""
    if named := os.environ.get("CHROMIUM"):
        if found := shutil.which(named):
            return found
        raise FileNotFoundError(f"$CHROMIUM is {named}, which is no program: name one, or unset it")
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def launch(playwright: Playwright, *arguments: str) -> Browser:
    """A headless Chromium started with `arguments` too; skips the test where there is none."""
    program = chromium()
    if program is None:
        pytest.skip(f"no {', '.join(PROGRAMS)} on PATH: install one (apt-get install chromium) or set CHROMIUM")
    as_root = ["--no-sandbox"] * (getattr(os, "geteuid", lambda: 1)() == 0)
    return playwright.chromium.launch(executable_path=program, args=[*ARGUMENTS, *as_root, *arguments])


def new_page(browser: Browser, **options) -> LocalPage:
    """A page of its own context, made with `options` (viewport, color_scheme, java_script_enabled, …)."""
    context = browser.new_context(**{"service_workers": "block"} | options)
    local = LocalPage(context.new_page())

    def answer(route: Route) -> None:
        if is_local(route.request.url):
            route.continue_()
        else:
            local.refused.append(route.request.url)
            route.abort()

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            local.errors.append(f"{message.text} ({message.location.get('url', '')})")

    context.route("**/*", answer)
    local.page.on("websocket", lambda socket: is_local(socket.url) or local.refused.append(socket.url))
    local.page.on("console", note)
    local.page.on("pageerror", lambda error: local.errors.append(str(error)))
    return local


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in LOCAL_SCHEMES or parts.hostname in LOCAL_HOSTS


# Both last as long as a file of tests, not the session: while Playwright runs, no other test of the process could use
# asyncio, as those do that execute notebooks.
@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright) -> Iterator[Browser]:
    """A headless Chromium."""
    browser = launch(playwright)
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., LocalPage]]:
    """open_page(url, **options of the context) → a `LocalPage` that has loaded `url`, which may be a path."""
    opened = []

    def open_(url, **options) -> LocalPage:
        local = new_page(browser, **options)
        opened.append(local)
        local.page.goto(url.as_uri() if hasattr(url, "as_uri") else url)
        return local

    yield open_
    for local in opened:
        local.page.context.close()
