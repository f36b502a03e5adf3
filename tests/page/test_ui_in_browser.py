"""The page to play with, in headless Chromium against the stand-in service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from convscope import Client
from convscope_lens import PageServer
from playwright.sync_api import expect

from tests.client.stand_in import StandIn, serve
from tests.page.conftest import Open
from tests.page.service import make_picture


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with serve() as running:
        yield running


@pytest.fixture
def server(stand_in: StandIn) -> Iterator[PageServer]:
    with Client(stand_in.rest_url) as client, PageServer(client, ["digits", "cifar"]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.png"
    path.write_bytes(make_picture())
    return path


def draw(page: Any) -> None:
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 160, steps=5)
    page.mouse.up()


def await_title(page: Any, title: str) -> None:
    expect(page.locator("h1")).to_have_text(title, timeout=60_000)
    page.wait_for_selector("main:not([hidden])")


def test_a_chosen_picture_is_answered_and_another_network_asked_about_it(
    watch: Open, server: PageServer, picture: Path
):
    watched = watch()
    page = watched.open(server.url)
    assert page.locator("main").is_hidden()
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_label("Network", exact=True).select_option("cifar")
    await_title(page, "dog.png – cifar")
    assert {url.split("/")[2] for url in watched.fetched if url.startswith("http")} == {server.url.split("/")[2]}
    assert page.get_by_role("region", name="conv1", exact=True).get_by_role("button").count() == 4


def test_a_drawing_is_answered_and_the_chosen_map_stays(watch: Open, server: PageServer, stand_in: StandIn):
    page = watch().open(server.url)
    draw(page)
    await_title(page, "drawing – digits")
    page.get_by_role("button", name="conv2, channel 1: enlarge").click()
    page.locator("#map").focus()
    page.keyboard.press("Control+End")
    assert "conv2, channel 1, row 1, column 1:" in page.inner_text("#cell-description")
    before = len(stand_in.requests)
    page.get_by_role("button", name="Clear the pad").click()
    with page.expect_response("**/predict?*"):
        draw(page)
    expect(page.locator("#state")).to_contain_text("%", timeout=60_000)
    assert len(stand_in.requests) > before
    assert "conv2, channel 1, row 1, column 1:" in page.inner_text("#cell-description")


def test_a_dropped_picture_is_answered(watch: Open, server: PageServer):
    page = watch().open(server.url)
    page.evaluate(
        """bytes => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }""",
        list(make_picture()),
    )
    await_title(page, "dropped.png – digits")


def test_a_drawing_can_be_made_by_keys(watch: Open, server: PageServer):
    page = watch().open(server.url)
    page.locator("#pad").focus()
    page.keyboard.press("Space")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    assert page.inner_text("#pen") == "Pen down at row 190, column 140 of 280."
    await_title(page, "drawing – digits")


def test_what_the_service_rejects_stands_there_with_its_code(watch: Open, server: PageServer, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"bad picture")
    watched = watch()
    page = watched.open(server.url)
    page.set_input_files("#file", tmp_path / "bad.png")
    expect(page.locator("#error")).to_contain_text("bad_image: ", timeout=60_000)
    assert page.get_by_role("alert").count() == 1
    assert [text for text in watched.wrong if "400" not in text] == []  # Chromium itself tells of the status.
    watched.wrong.clear()


def test_a_url_without_its_token_is_explained_and_rejected(watch: Open, server: PageServer, picture: Path):
    watched = watch()
    page = watched.open(server.url.partition("#")[0])
    assert "Missing token" in page.inner_text("#error")
    page.set_input_files("#file", picture)
    expect(page.locator("#error")).to_contain_text("forbidden: ", timeout=60_000)
    watched.wrong.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(scheme: str, watch: Open, server: PageServer, picture: Path):
    page = watch(color_scheme=scheme, bypass_csp=True).open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
