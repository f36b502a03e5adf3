"""The portrait of a data set in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from convscope.pixels import encode_png
from convscope_lens import portrait, survey

from tests.lens.surveyed import FOLLOWER, animate, make_client, make_pixels, write_folder
from tests.page.conftest import Open
from tests.page.service import HOSTILE

STRANGE = HOSTILE.replace("/", "∕")  # As the name of a folder.


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """Write the portrait of 27 pictures of four classes, of which one has a hostile name, and of a broken file."""
    folder = tmp_path / "pictures"
    write_folder(folder)
    (folder / STRANGE).mkdir()
    for number in range(2):
        (folder / STRANGE / f"{number}.png").write_bytes(encode_png(make_pixels(number, zebra=False)))
    (folder / "bee/broken.png").write_bytes(b"text")
    animate(folder / "ant", 1)
    client, _ = make_client()
    file = tmp_path / "portrait.html"
    file.write_text(portrait(client, survey(client, str(folder), model="net")), "utf-8")
    return file


def test_it_says_what_was_planted(watch: Open, page_file: Path):
    watched = watch()
    page = watched.open(page_file.as_uri())
    assert page.inner_text("h1") == "pictures – fake"
    [first, *_] = page.get_by_role("region", name="conv", exact=True).get_by_role("heading", level=4).all_inner_texts()
    assert first == f"Channel {FOLLOWER}"
    card = page.locator("#layer-0 .card").first
    assert "zebra, selectivity 1.000, shuffled 0." in card.inner_text()
    assert "8 of 9 zebra" in card.inner_text()
    assert card.locator("img").count() == 9
    assert card.locator("img").first.get_attribute("alt") == "zebra, value 1"
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("#overview tbody tr").count() == 2
    assert "bee/broken.png" in page.locator("#failed").inner_text()
    converted = page.get_by_role("region", name="Converted pictures").get_by_role("row", name="first frame only")
    assert converted.get_by_role("cell").inner_text() == "1"
    row = page.get_by_role("region", name="Classes").nth(1).get_by_role("row", name="bee")
    assert row.locator("td").nth(1).inner_text() == "0 (0.0 %)"
    page.locator("#layer-0 summary").focus()
    page.keyboard.press("Enter")
    table = page.locator("#layer-0 tbody")
    assert table.inner_text().startswith(f"{FOLLOWER}\t")
    assert "(dead)" in table.inner_text()
    assert {url.partition(":")[0] for url in watched.fetched} <= {"file", "data"}
    # No text of others becomes markup, and no script runs.
    assert page.title() == "pictures – fake"
    assert page.get_by_role("rowheader", name=STRANGE).count() == 1
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.taken = true";
          document.body.append(script);
        }"""
    )
    assert page.evaluate("window.taken === undefined")
    assert watched.wrong
    assert all("Content Security Policy" in text for text in watched.wrong)
    watched.wrong.clear()


def test_axe_finds_no_fault_and_it_fits(watch: Open, page_file: Path):
    page = watch(viewport={"width": 320, "height": 700}, bypass_csp=True).open(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width, scheme in ((320, "dark"), (2560, "light")):
        page.set_viewport_size({"width": width, "height": 700})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
