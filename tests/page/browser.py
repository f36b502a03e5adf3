"""A headless Chromium, and pages of it that remember what went wrong and what was fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.server.harness import ROOT

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
FETCHED = ROOT / ".tools/chromium/headless-shell"
MISSING = "no Chromium: neither on PATH nor in .tools (`make chromium` fetches Debian's)"


def find() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None) or shutil.which(FETCHED)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run it. As root it cannot have its sandbox."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=arguments, timeout=120_000)
        yield browser
        browser.close()


class Watched:
    """A page of a browser.

    Args:
        browser: Where to open it.
        **options: As for `Browser.new_context`.
    """

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 960}, **options})
        self.context.set_default_timeout(60_000)
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.fetched: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda asked: self.fetched.append(asked.url))

    def open(self, url: str) -> Page:
        """Go there."""
        self.page.goto(url)
        return self.page
