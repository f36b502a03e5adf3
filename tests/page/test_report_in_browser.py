"""The report in headless Chromium: pointed at, clicked, walked through by keys, read as a screen reader does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from convscope import ClassScore
from convscope.pixels import encode_png

from tests.page.conftest import Open
from tests.page.service import CARD, HOSTILE, SIDE, Service, make_layer


def description(page: Any) -> str:
    return str(page.inner_text("#cell-description"))


def field(page: Any, name: str = "picture-field") -> list[float]:
    """Return the marked part of the picture in pixels of the picture: top, left, height, width."""
    marked: list[float] = page.evaluate(
        """([side, name]) => {
          const box = document.getElementById(name);
          return ["top", "left", "height", "width"].map((name) => parseFloat(box.style[name]) * side / 100);
        }""",
        [SIDE, name],
    )
    return [round(length, 4) for length in marked]


def original(page: Any, name: str) -> list[float]:
    """Return a marked part of the original picture of 80×120 pixels, as `field` does."""
    marked: list[float] = page.evaluate(
        """name => {
          const { style } = document.getElementById(name);
          const sides = [["top", 80], ["left", 120], ["height", 80], ["width", 120]];
          return sides.map(([side, length]) => parseFloat(style[side]) * length / 100);
        }""",
        name,
    )
    return [round(length, 2) for length in marked]


def layer(page: Any, name: str) -> Any:
    return page.get_by_role("region", name=name, exact=True)


def test_it_needs_no_network_and_the_rest_of_the_channels_comes_on_demand(open_report: Open):
    watched = open_report()
    watched.context.set_offline(True)
    page = watched.page
    page.reload()
    tiles = layer(page, "conv1").get_by_role("button", name="enlarge")
    assert tiles.count() == 6
    page.get_by_role("button", name="Show all 12 channels of conv1").focus()
    page.keyboard.press("Enter")
    assert tiles.count() == 12
    page.locator(".tile:focus").wait_for()  # The page's policy forbids Playwright's `wait_for_function`.
    tiles.nth(11).click()
    assert tiles.nth(11).get_attribute("aria-pressed") == "true"
    assert page.locator('.tile[aria-pressed="true"]').count() == 1
    assert {url.partition(":")[0] for url in watched.fetched} <= {"file", "data"}
    assert len([url for url in watched.fetched if url.startswith("file")]) == 2
    assert not watched.wrong


def test_the_policy_holds_in_the_browser(open_report: Open):
    watched = open_report()
    ran = watched.page.evaluate(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "window.taken = true";
          document.body.append(script);
          const asked = await fetch("https://example.org/").then(() => "asked", () => "refused");
          return [window.taken === true, asked];
        }"""
    )
    assert ran == [False, "refused"]
    assert len(watched.wrong) >= 2
    assert all("Content Security Policy" in text for text in watched.wrong)
    watched.wrong.clear()


def test_no_text_of_others_becomes_markup(open_report: Open):
    card = replace(CARD, description=HOSTILE, classes=(HOSTILE,), layers=(make_layer(HOSTILE, (2, 3, 3)),))
    service = Service(card, (ClassScore(0, HOSTILE, 1.0, 1.0),), notes=(HOSTILE,))
    page = open_report(service, title=HOSTILE).page
    assert page.title() == f"{HOSTILE} – net"
    assert page.inner_text("h1") == f"{HOSTILE} – net"
    assert page.inner_text("#scores .label") == HOSTILE
    assert page.inner_text(".converted") == f"Converted: {HOSTILE}"
    assert page.locator("img").count() == 0


def test_how_the_picture_was_converted_stands_beside_it(open_report: Open):
    section = open_report(Service(notes=("grey to RGB", "cropped"))).page.get_by_role(
        "region", name="Input", exact=True
    )
    assert section.get_by_role("paragraph").all_inner_texts() == ["Converted: grey to RGB, cropped"]


def test_pointing_at_a_cell_marks_its_receptive_field(open_report: Open):
    page = open_report().page
    canvas = layer(page, "conv2").locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 2.5 / 6, box["y"] + box["height"] * 1.5 / 6)  # Row 1, column 2.
    assert "conv2, channel" in description(page)
    assert "row 1, column 2:" in description(page)
    # From -3, 4 pixels a cell, 8 pixels each way: rows 1..8, columns 5..12.
    assert "rows 1 to 8, columns 5 to 12, 8×8 pixels." in description(page)
    assert field(page) == [1, 5, 8, 8]
    page.mouse.move(box["x"] + box["width"] * 0.5 / 6, box["y"] + box["height"] * 5.5 / 6)
    assert "rows 17 to 24, columns −3 to 4, 8×8 pixels (partly padding)." in description(page)
    assert field(page) == [17, 0, 8, 5]
    page.mouse.move(2, 2)
    assert "conv1, channel" in description(page)  # Back to the map in large.
    layer(page, "head").get_by_role("button", name="head: all numbers").click()
    assert "Receptive field unknown." in description(page)
    assert page.locator("#picture-field").count() == 0


def test_pointing_at_a_cell_marks_it_in_the_original_too(open_report: Open):
    """The network saw the middle 64×64 of 80×120 pixels, two of them a pixel of its own."""
    card = replace(CARD, input=replace(CARD.input, resize=(40,)))
    service = Service(card, place=((80, 120), (8.0, 28.0, 72.0, 92.0)))
    wide = encode_png(np.full((80, 120), 200, np.uint8))
    for asked in (service, replace(service, explains=("picture",))):
        page = open_report(asked, picture=wide).page
        canvas = layer(page, "conv2").locator("canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 2.5 / 6, box["y"] + box["height"] * 1.5 / 6)  # Row 1, column 2.
        # Rows 1..8 and columns 5..12 of the input.
        assert "In the original: rows 10 to 25, columns 38 to 53." in description(page)
        assert original(page, "original-field") == [10, 38, 16, 16]
        assert original(page, "original-seen") == [8, 28, 64, 64]
        assert "80×120 pixels" in page.inner_text("#original-caption")
        middle = "document.getElementById('original').getContext('2d').getImageData(60, 40, 1, 1).data[0]"
        assert page.evaluate(middle) == 200


def test_without_a_recipe_there_is_no_second_picture(open_report: Open):
    page = open_report(Service(place=((80, 120), (0.0, 0.0, 80.0, 120.0)))).page
    assert not page.is_visible("#original")
    assert "In the original" not in description(page)


def test_it_can_be_read_by_keys_alone(open_report: Open):
    page = open_report().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the network"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "network"
    page.get_by_role("button", name=re.compile("^conv1, channel .*: enlarge$")).first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "map"
    page.keyboard.press("Control+Home")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Control+Home")
    assert "row 0, column 0:" in description(page)
    assert "rows −1 to 1, columns −1 to 1" in description(page)
    assert field(page) == [0, 0, 2, 2]
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert "row 1, column 9:" in description(page)
    assert field(page) == [0, 8, 3, 3]
    page.keyboard.press("End")
    assert f"row 1, column {SIDE - 1}:" in description(page)
    before = page.get_attribute("#map", "aria-label")
    page.keyboard.press("PageDown")
    assert page.get_attribute("#map", "aria-label") != before
    assert f"row 1, column {SIDE - 1}:" in description(page)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # The next channel, and on to its cells.
    assert page.evaluate("document.activeElement.id") == "map"


def test_the_heat_map_describes_its_cells(open_report: Open):
    page = open_report().page
    page.get_by_role("region", name="Heat map").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert "row 5, column 5: raises the score of “cat”, 100 % of the strongest contribution" in description(page)
    # What it is drawn over, a sixth of 32 pixels, is not what it sees: from -3 + 5 · 4 pixels on, 8 each way.
    assert "Drawn over rows 26 to 31, columns 26 to 31, 6×6 pixels." in description(page)
    assert "The cell sees its receptive field: rows 17 to 24, columns 17 to 24, 8×8 pixels." in description(page)
    assert field(page) == [17, 17, 8, 8]
    assert field(page, "picture-covered") == [26, 26, 6, 6]
    page.keyboard.press("Control+Home")
    assert "row 0, column 0: lowers the score of “cat”, 100 % of the strongest contribution" in description(page)
    red, _, blue = page.evaluate(
        "[...document.querySelector('#heat canvas').getContext('2d').getImageData(31, 31, 1, 1).data].slice(0, 3)"
    )
    assert red > blue + 50


def test_what_is_not_there_is_left_out(open_report: Open):
    page = open_report(Service(replace(CARD, classes=()), top=(), explains=("picture",))).page
    assert page.get_by_role("region", name="Heat map").count() == 0
    assert "no classes" in page.inner_text("#scores")
    page = open_report(Service(explains=())).page  # The page shows the file itself.
    assert "the file, resized by this page, 32×32" in page.inner_text("#picture-caption")
    assert page.evaluate("document.getElementById('picture').getContext('2d').getImageData(7, 2, 1, 1).data[0]") == 71


def brightness(page: Any) -> float:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765


def test_it_suits_the_readers_window_and_wishes(open_report: Open):
    page = open_report(viewport={"width": 320, "height": 700}, color_scheme="light").page
    for width in (320, 800, 1600):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert brightness(page) > 0.9
    page.emulate_media(color_scheme="dark")
    assert brightness(page) < 0.2
    for motion, behavior in (("no-preference", "smooth"), ("reduce", "auto")):
        page.emulate_media(reduced_motion=motion)
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behavior


def test_it_prints_bars_and_every_column_and_nothing_to_press(open_report: Open):
    page = open_report(viewport={"width": 794, "height": 1123}).page  # A4.
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    widths = page.evaluate("[...document.querySelectorAll('.scroll')].map((one) => [one.scrollWidth, one.clientWidth])")
    assert all(needed <= given for needed, given in widths)
    bar = page.locator("#scores .fill").first
    assert bar.evaluate("(one) => getComputedStyle(one).printColorAdjust") == "exact"
    assert bar.bounding_box()["width"] > 50
    assert not page.get_by_role("button", name="Show all 12 channels of conv1").is_visible()
    assert len(re.findall(rb"/Type /Page\b", page.pdf(format="A4"))) <= 4


def test_axe_finds_no_fault(open_report: Open):
    options = {"color_scheme": "light", "bypass_csp": True}  # axe is a script that the page does not know.
    page = open_report(Service(notes=("cropped",)), **options).page
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        assert len(result.response["passes"]) > 20


def test_a_screen_reader_finds_landmarks_headings_names_and_values(open_report: Open):
    page = open_report().page
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings[0] == "cat.png – net"
    assert "Feature maps by layer" in headings
    assert {"Input", "conv1", "conv2", "head", "Scores"} <= set(headings)
    assert page.get_by_role("img", name="cat.png, the network’s input, 32×32 pixels").count() == 1
    assert page.get_by_role("application", name=re.compile(r"^conv1, channel \d+, 32 rows of 32 cells$")).count() == 1
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    table = page.get_by_role("table", name="Layers of the network")
    assert table.get_by_role("columnheader", name="receptive field").count() == 1
    assert table.get_by_role("rowheader", name="conv2").count() == 1
    items = page.get_by_role("region", name="Scores").get_by_role("listitem")
    assert [re.sub(r"\s+", " ", text) for text in items.all_inner_texts()] == ["cat 75.00 %", "dog 25.00 %"]
    assert "Converted" not in page.inner_text("body")
    cells = np.random.default_rng(5).normal(size=(12, SIDE, SIDE)).astype(np.float32)  # As the service made it.
    channel, row, column, value = re.match(
        r"conv1, channel (\d+), row (\d+), column (\d+): about (\S+) \(min", description(page)
    ).groups()  # type: ignore[union-attr]
    assert int(channel) == cells.mean(axis=(1, 2)).argmax()
    assert (int(row), int(column)) == np.unravel_index(cells[int(channel)].argmax(), (SIDE, SIDE))
    assert float(value) == pytest.approx(cells[int(channel)].max(), rel=1e-3)
