"""The index of many reports, in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from convscope import ClassScore
from convscope_lens._page.report import Options, write_reports
from playwright.sync_api import expect

from tests.page.conftest import Open
from tests.page.service import HOSTILE, Service, make_picture


class Varying(Service):
    """Is the surer the longer a picture's file is."""

    def predict(self, file: bytes, **options: Any) -> Any:
        share = 0.5 + (len(file) - len(make_picture())) / 100
        self.notes = ("cropped",) if share > 0.65 else ()
        self.top = (ClassScore(0, HOSTILE, share, 2.0), ClassScore(1, "dog", 1 - share, 1.0))
        return super().predict(file, **options)


@pytest.fixture
def index(tmp_path: Path) -> str:
    names = {"pic10.png": 10, "pic9.png": 40, "pic8.png": 20}
    for name, extra in names.items():
        (tmp_path / name).write_bytes(make_picture() + bytes(extra))
    paths = [*(tmp_path / name for name in names), tmp_path / "missing.png"]
    written = list(write_reports(Varying(), paths, tmp_path / "out", model="net", options=Options()))  # type: ignore[arg-type]
    assert [one.page is None for one in written] == [False, False, False, True]
    return (tmp_path / "out/index.html").as_uri()


def titles(page: Any) -> list[str]:
    return page.get_by_role("rowheader").all_inner_texts()  # type: ignore[no-any-return]


def test_a_press_on_a_heading_sorts_by_it(watch: Open, index: str):
    page = watch().open(index)
    assert titles(page) == ["pic10.png", "pic9.png", "pic8.png", "missing.png"]
    page.get_by_role("button", name="picture").click()
    assert titles(page) == ["missing.png", "pic8.png", "pic9.png", "pic10.png"]
    assert page.get_by_role("columnheader", name="picture").get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="score").focus()
    page.keyboard.press("Enter")
    assert titles(page) == ["pic9.png", "pic8.png", "pic10.png", "missing.png"]
    page.keyboard.press("Enter")
    assert titles(page) == ["missing.png", "pic10.png", "pic8.png", "pic9.png"]
    assert page.get_by_role("columnheader", name="score").get_attribute("aria-sort") == "ascending"


def test_a_picture_leads_to_its_page_and_those_that_failed_or_were_converted_are_counted(watch: Open, index: str):
    page = watch().open(index)
    header = page.get_by_role("banner").inner_text()
    assert "1 of the pictures failed. Pictures that were converted, as their pages say: 2." in header
    assert "unreadable: No such file or directory" in page.get_by_role("row", name="missing.png").inner_text()
    assert page.get_by_role("row", name="pic9.png").locator("td").nth(1).inner_text() == HOSTILE
    assert "80.0 points over dog" in page.get_by_role("row", name="pic9.png").inner_text()
    page.get_by_role("link", name="pic9.png").click()
    page.wait_for_selector("#network .card")
    assert page.inner_text("h1") == "pic9.png – net"
    expect(page.get_by_role("region", name="Input")).to_contain_text("Converted: cropped")


def test_axe_finds_no_fault_and_it_fits(watch: Open, index: str):
    page = watch(viewport={"width": 320, "height": 700}, bypass_csp=True).open(index)
    for width in (320, 2560):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
