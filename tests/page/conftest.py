"""Tests that need a browser are skipped where there is none, with one reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from convscope_lens import report

from tests.page.service import Service, make_picture

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.page.browser import Watched

Open = Callable[..., "Watched"]


@pytest.fixture(scope="package")  # Not for longer: while it is open, asyncio.run() does not work.
def browser() -> Iterator[Browser]:
    from tests.page.browser import MISSING, chromium, find

    if not find():
        pytest.skip(MISSING)
    with chromium() as browser:
        yield browser


@pytest.fixture
def watch(browser: Browser) -> Iterator[Open]:
    """Open a page; whatever went wrong in it fails the test."""
    from tests.page.browser import Watched

    opened = []

    def watch(**options: Any) -> Watched:
        opened.append(Watched(browser, **options))
        return opened[-1]

    yield watch
    for watched in opened:
        watched.context.close()
        assert not watched.wrong


@pytest.fixture
def open_report(watch: Open, tmp_path: Path) -> Open:
    """Write a report of a made-up service, and open it."""

    def open_report(
        service: Any = None, *, title: str = "cat.png", picture: bytes | None = None, **options: Any
    ) -> Watched:
        file = tmp_path / "report.html"
        page = report(service or Service(), make_picture() if picture is None else picture, model="net", title=title)
        file.write_text(page, encoding="utf-8")
        watched = watch(**options)
        watched.open(file.as_uri())
        watched.page.wait_for_selector("#network .card")
        return watched

    return open_report
