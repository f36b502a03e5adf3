"""The page to play with, in headless Chromium against the stand-in service."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from convscope import Client
from convscope._wire import convscope_pb2 as wire
from convscope.pixels import encode_png
from convscope_lens import PageServer
from PIL import Image
from playwright.sync_api import expect

from tests.client.stand_in import RELOADED, StandIn, fetch_maps, run_network, serve
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
        stand_in.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.png"
    path.write_bytes(make_picture())
    return path


def other_picture(tmp_path: Path, name: str, level: int) -> Path:
    path = tmp_path / name
    path.write_bytes(encode_png(np.full((8, 8), level, np.uint8)))
    return path


def draw(page: Any, *, left: int = 60, top: int = 50, right: int = 150, bottom: int = 160) -> None:
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    scale = box["width"] / 280
    page.mouse.move(box["x"] + left * scale, box["y"] + top * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + right * scale, box["y"] + bottom * scale, steps=5)
    page.mouse.up()


def await_title(page: Any, title: str) -> None:
    expect(page.locator("h1")).to_have_text(title, timeout=60_000)
    page.wait_for_selector("main:not([hidden])")
    expect(page.locator("main .stale")).to_have_count(0)


def drop(page: Any, *files: tuple[str, bytes]) -> None:
    page.evaluate(
        """files => {
          const data = new DataTransfer();
          for (const [name, bytes] of files)
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }""",
        [[name, list(content)] for name, content in files],
    )


def await_edits(page: Any, count: int) -> None:
    """Wait for the answer after so many edits."""
    info = page.locator("#model-info")
    if count:
        expect(info).to_contain_text(f"After {count} edit{'s' * (count > 1)}.", timeout=60_000)
    else:
        expect(info).not_to_contain_text("After", timeout=60_000)
    expect(page.locator("main .stale")).to_have_count(0)


def last_edits(stand_in: StandIn) -> list[wire.Edit]:
    """Return the edits of the last request with a picture."""
    return [list(request.edits) for _, _, request in stand_in.requests if request.pictures][-1]


def brush(page: Any, first: tuple[int, int], last: tuple[int, int], rows: int = 6, columns: int = 5) -> None:
    """Drag over the map of the drawer, from one cell to another."""
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    spots = [
        (box["x"] + (column + 0.5) * box["width"] / columns, box["y"] + (row + 0.5) * box["height"] / rows)
        for row, column in (first, last)
    ]
    page.mouse.move(*spots[0])
    page.mouse.down()
    page.mouse.move(*spots[1], steps=4)
    page.mouse.up()


def last_picture(stand_in: StandIn) -> Any:
    """Return the pixels of the last picture that the service was sent."""
    pictures = [request.pictures[0] for _, _, request in stand_in.requests if request.pictures]
    return np.asarray(Image.open(io.BytesIO(pictures[-1])).convert("L"))


def test_a_chosen_picture_is_answered_by_another_network_too_and_a_pressed_score_explained(
    watch: Open, server: PageServer, picture: Path
):
    watched = watch()
    page = watched.open(server.url)
    assert page.locator("main").is_hidden()
    assert page.get_by_role("region", name="The network").get_by_role("heading").all_inner_texts()[1:] == [
        "Input", "conv1", "conv2", "Scores"
    ]  # fmt: skip
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_label("Network", exact=True).select_option("cifar")
    await_title(page, "dog.png – cifar")
    assert {url.split("/")[2] for url in watched.fetched if url.startswith("http")} == {server.url.split("/")[2]}
    tiles = page.get_by_role("region", name="conv1", exact=True).get_by_role("button", name="enlarge")
    assert tiles.count() == 4
    scores = page.get_by_role("region", name="Scores").get_by_role("button")
    label = scores.nth(3).locator(".label").inner_text()
    scores.nth(3).click()
    heat = page.get_by_role("region", name="Heat map")
    expect(heat.get_by_role("heading")).to_have_text(f"Why “{label}”?")
    assert scores.nth(3).get_attribute("aria-pressed") == "true"
    scores.nth(3).click()
    expect(heat.get_by_role("heading")).not_to_have_text(f"Why “{label}”?")


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
        draw(page, right=200)
    expect(page.locator("#state")).to_contain_text("%", timeout=60_000)
    assert len(stand_in.requests) > before
    page.mouse.move(2, 2)
    expect(page.locator("#cell-description")).to_contain_text("conv2, channel 1, row 1, column 1:")
    assert page.get_by_role("button", name="drawing").count() == 1


def test_every_picture_that_is_dropped_pasted_or_a_sample_is_used(watch: Open, server: PageServer):
    page = watch().open(server.url)
    files = [
        (f"{name}.png", encode_png(np.full((8, 8), level, np.uint8)))
        for name, level in (("a", 10), ("b", 90), ("c", 200))
    ]
    drop(page, *files)
    await_title(page, "a.png – digits")
    film = page.get_by_role("group", name="Your pictures").get_by_role("button")
    expect(film).to_have_count(3)
    film.nth(2).click()
    await_title(page, "c.png – digits")
    assert film.nth(2).get_attribute("aria-pressed") == "true"
    frames, file = [Image.new("RGB", (4, 5), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    drop(page, ("cat.gif", file.getvalue()))
    await_title(page, "cat.gif – digits")
    section = page.get_by_role("region", name="Input", exact=True)
    expect(section).to_contain_text("Converted: first frame only")
    page.evaluate(
        """bytes => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        list(make_picture()),
    )
    await_title(page, "pasted.png – digits")
    expect(section).not_to_contain_text("Converted")
    page.get_by_role("group", name="Samples").get_by_role("button", name="cat.png").click()
    await_title(page, "cat.png – digits")


def test_a_drawing_is_centred_and_scaled_as_mnists_digits_or_sent_as_it_is(
    watch: Open, server: PageServer, stand_in: StandIn
):
    page = watch().open(server.url)
    for ink in ("white on black", "black on white"):
        page.get_by_label("ink").select_option(ink)
        with page.expect_response("**/predict?*"):
            draw(page, left=20, top=15, right=60, bottom=75)
        await_title(page, "drawing – digits")
        pixels = last_picture(stand_in).astype(float)
        assert pixels.shape == (280, 280)  # The stand-in's networks are not of 28×28: ten pixels for one of MNIST's.
        assert pixels[0, 0] == (0 if ink == "white on black" else 255)
        strength = pixels if ink == "white on black" else 255 - pixels
        rows, columns = np.nonzero(strength > 60)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(200, abs=8)
        along, down = np.arange(280) + 0.5, (np.arange(280) + 0.5)[:, np.newaxis]
        centre = [(strength * places).sum() / strength.sum() for places in (down, along)]
        assert centre == pytest.approx([140, 140], abs=2)
        page.get_by_role("button", name="Clear the pad").click()
    page.get_by_label("ink").select_option("white on black")
    page.get_by_label("centre and scale").uncheck()
    with page.expect_response("**/predict?*"):
        draw(page, left=30, top=30, right=60, bottom=60)
    await_title(page, "drawing – digits")
    rows, columns = np.nonzero(last_picture(stand_in))
    assert max(rows.max(), columns.max()) < 80


def test_a_drawing_can_be_made_by_keys(watch: Open, server: PageServer):
    page = watch().open(server.url)
    page.locator("#pad").focus()
    page.keyboard.press("Space")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    assert page.inner_text("#pen") == "Pen down at row 190, column 140 of 280."
    await_title(page, "drawing – digits")


def test_a_result_that_is_not_of_the_last_request_is_dimmed_and_labelled(
    watch: Open, server: PageServer, picture: Path, tmp_path: Path
):
    watched = watch()
    page = watched.open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    before = page.locator("main").bounding_box()
    (tmp_path / "bad.png").write_bytes(b"bad picture")
    page.set_input_files("#file", tmp_path / "bad.png")
    expect(page.locator("#error")).to_contain_text("bad_image: ", timeout=60_000)
    assert page.get_by_role("alert").count() == 1
    expect(page.locator("main .stale-note")).to_have_text("Old: the result of dog.png, digits.")
    network = page.locator("main .network")
    expect(network).to_have_css("opacity", "0.45")
    page.get_by_role("button", name="dog.png").click()
    await_title(page, "dog.png – digits")
    expect(network).to_have_css("opacity", "1")
    assert page.locator("main .stale-note").inner_text() == ""
    assert page.locator("main").bounding_box()["x"] == before["x"]
    assert [text for text in watched.wrong if "400" not in text] == []  # Chromium itself tells of the status.
    watched.wrong.clear()


def test_while_a_request_is_answered_the_old_result_is_dimmed_and_another_network_has_no_edits(
    watch: Open, stand_in: StandIn, picture: Path
):
    with Client(stand_in.rest_url) as client:
        stand_in.release.set()
        server = PageServer(client, ["cifar", "slow"])
        stand_in.release.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with server:
            page = watch().open(server.url)
            page.set_input_files("#file", picture)
            await_title(page, "dog.png – cifar")
            page.get_by_label("Network", exact=True).select_option("slow")
            expect(page.locator("#state")).to_have_text("Predicting…")
            note = page.locator("main .stale-note")
            expect(note).to_have_text("Old: the result of dog.png, cifar, until the new one is here.")
            assert page.locator("main .result").get_attribute("aria-busy") == "true"
            stand_in.release.set()
            await_title(page, "dog.png – slow")
            stand_in.release.clear()
            page.get_by_label("Switch it off").check()
            expect(page.locator("#state")).to_have_text("Predicting…")
            expect(note).to_have_text("Old: the result of dog.png, slow, until the new one is here.")
            stand_in.release.set()
            await_edits(page, 1)
            page.get_by_label("Network", exact=True).select_option("cifar")
            await_title(page, "dog.png – cifar")
            assert page.get_by_role("region", name="Edits").count() == 0
            assert not last_edits(stand_in)
            server.shutdown()


def test_a_url_without_its_token_is_explained_and_rejected(watch: Open, server: PageServer, picture: Path):
    watched = watch()
    page = watched.open(server.url.partition("#")[0])
    assert "Missing token" in page.inner_text("#error")
    page.set_input_files("#file", picture)
    expect(page.locator("#error")).to_contain_text("forbidden: ", timeout=60_000)
    watched.wrong.clear()


def test_everything_that_was_asked_is_in_the_address_and_a_link_shows_the_same(
    watch: Open, server: PageServer, picture: Path, stand_in: StandIn
):
    page = watch().open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_label("Network", exact=True).select_option("cifar")
    await_title(page, "dog.png – cifar")
    page.get_by_label("Explain by").select_option("occlusion")
    page.locator("#top_k").fill("3")
    page.locator("#opacity").evaluate(  # The page is drawn again while the number is typed, as by a response.
        "(slider) => { slider.value = 40; slider.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    page.wait_for_function("location.href.includes('opacity=40')")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="conv2, channel 2: enlarge").click()
    page.locator("#map").focus()
    page.keyboard.press("Control+Home")
    expect(page.get_by_role("region", name="Scores").get_by_role("listitem")).to_have_count(3)
    link = page.evaluate("location.href")
    other = watch().open(link)
    await_title(other, "dog.png – cifar")
    for name, value in (("method", "occlusion"), ("top_k", "3"), ("opacity", "40"), ("model", "cifar")):
        assert other.locator(f"#{name}").input_value() == value
    assert "conv2, channel 2, row 0, column 0:" in other.inner_text("#cell-description")
    assert other.get_by_role("region", name="Scores").get_by_role("listitem").count() == 3
    assert other.get_by_role("group", name="Your pictures").get_by_role("button").count() == 1
    asked = [request for request in stand_in.requests if request[2].pictures][-2:]
    assert {request.explain.method for _, _, request in asked} == {"occlusion", ""}
    assert "token" not in link.partition("#")[0]


def test_two_networks_and_two_pictures_stand_side_by_side(
    watch: Open, server: PageServer, picture: Path, tmp_path: Path
):
    page = watch(viewport={"width": 1600, "height": 1000}).open(server.url)
    page.set_input_files("#file", [picture, other_picture(tmp_path, "dark.png", 10)])
    await_title(page, "dog.png – digits")
    page.get_by_label("Compare with").select_option("cifar")
    other = page.get_by_role("region", name="Compared with")
    expect(other.get_by_role("heading").first).to_have_text("dog.png – cifar")
    expect(other.get_by_role("region", name="conv2, compared", exact=True)).to_have_count(1)
    page.get_by_label("Compare with").select_option("dark.png")
    expect(other.get_by_role("heading").first).to_have_text("dark.png – digits")
    left, right = page.locator("main").bounding_box(), other.bounding_box()
    assert right["x"] >= left["x"] + left["width"]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)")
    assert len(ids) == len(set(ids))


def test_kernels_of_a_channel_are_fetched_and_maps_overlays_and_arrays_can_be_saved(
    watch: Open, server: PageServer, picture: Path, stand_in: StandIn
):
    page = watch().open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    expect(page.locator(".kernels li")).to_have_count(3)
    assert [request.filters for _, _, request in stand_in.requests if request.filters] == ["conv1"]

    def saved(button: str) -> bytes:
        with page.expect_download() as download:
            page.get_by_role("button", name=button, exact=True).click()
        return Path(download.value.path()).read_bytes()

    expected = fetch_maps(make_picture(), (4, 6, 5))
    shown = int(re.findall(r"conv1, channel (\d+)", page.inner_text("#cell-description"))[0])
    assert np.array_equal(np.load(io.BytesIO(saved("Whole layer, .npy"))), expected)
    near = np.load(io.BytesIO(saved("Map, .npy")))
    np.testing.assert_allclose(near, expected[shown], atol=np.ptp(expected[shown]) / 255)
    page.get_by_role("button", name="Load exact values").click()
    expect(page.locator(".save")).to_contain_text("Every cell, float32.")
    assert np.array_equal(np.load(io.BytesIO(saved("Map, .npy"))), expected[shown])
    assert Image.open(io.BytesIO(saved("Map, PNG"))).size == (215, 258)  # Five columns, six rows, enlarged.
    page.get_by_role("region", name="Heat map").get_by_role("button").click()
    assert Image.open(io.BytesIO(saved("Overlay, PNG"))).size == (220, 264)  # The stand-in's input is 12×10.
    assert np.load(io.BytesIO(saved("Heat, .npy"))).shape == (6, 5)


CAMERA = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 48 });
  const context = canvas.getContext("2d");
  setInterval(() => { context.fillStyle = "#c80000"; context.fillRect(0, 0, 64, 48); }, 50);
  navigator.mediaDevices.getUserMedia = async () => canvas.captureStream();
}"""


def test_the_camera_takes_a_picture_or_says_that_it_cannot_be_used(watch: Open, server: PageServer, stand_in: StandIn):
    page = watch().open(server.url)
    button = page.get_by_role("button", name="Camera")
    button.click()
    expect(page.locator(".camera")).to_contain_text("The camera cannot be used: ")
    page.evaluate(CAMERA)  # Chromium's headless shell has none, not even a false one.
    button.click()
    button.click()
    expect(page.locator("video")).to_have_js_property("readyState", 4, timeout=60_000)
    page.get_by_role("button", name="Take the picture").click()
    await_title(page, "photograph – digits")
    assert page.locator("video").count() == 0
    assert last_picture(stand_in).shape == (48, 64)
    assert last_picture(stand_in)[24, 32] == pytest.approx(60, abs=3)  # The grey of that red.


def test_a_channel_is_switched_off_and_on_again(watch: Open, server: PageServer, stand_in: StandIn, picture: Path):
    page = watch().open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_role("button", name="conv1, channel 2: enlarge").click()
    tiles = page.get_by_role("region", name="conv1", exact=True).locator(".tile canvas + .name")
    order = tiles.all_inner_texts()
    page.get_by_label("Switch it off").check()
    await_edits(page, 1)
    off = wire.Edit(layer="conv1", operation="zero", channels=[2])
    assert last_edits(stand_in) == [off]
    logits, before = run_network(make_picture(), [off])[0], run_network(make_picture())[0]
    first = int(logits.argmax())
    points = 100 * (np.exp(logits) / np.exp(logits).sum() - np.exp(before) / np.exp(before).sum())[first]
    change = f"{points:+.2f} points".replace("-", "−")
    row = page.get_by_role("region", name="Scores").get_by_role("listitem").first
    assert [row.locator(".label").inner_text(), row.locator(".delta").inner_text()] == [f"class {first}", change]
    assert page.inner_text("#state").endswith(f"{change} by the edits")
    assert tiles.all_inner_texts() == [f"{name} Δ" if name == "2" else name for name in order]
    assert page.get_by_role("button", name="conv1, channel 2, changed: enlarge").get_attribute("aria-pressed") == "true"
    assert "1 of 4 changed" in page.get_by_role("region", name="conv1", exact=True).inner_text()
    assert "all 3 changed" in page.get_by_role("region", name="conv2", exact=True).inner_text()
    assert page.get_by_label("Scale", exact=True).is_disabled()
    page.get_by_role("button", name="Load exact values").click()
    expect(page.locator(".save")).to_contain_text("Every cell, float32.")
    assert last_edits(stand_in) == [off]
    page.locator(".drawer").get_by_role("button", name="Undo").click()
    await_edits(page, 0)
    assert not page.get_by_label("Switch it off").is_checked()
    assert page.locator(".delta, .changed").count() == 0
    expect(page.get_by_role("region", name="Heat map")).to_have_count(1)


def test_a_slider_scales_a_channel_and_one_undo_takes_all_its_moves_back(
    watch: Open, server: PageServer, stand_in: StandIn, picture: Path
):
    page = watch().open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_role("button", name="conv1, channel 1: enlarge").click()
    page.get_by_label("Scale", exact=True).focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    await_edits(page, 1)
    expect(page.get_by_role("region", name="Edits").get_by_role("listitem")).to_contain_text("scaled by 0.8")
    [scale] = last_edits(stand_in)
    assert (scale.layer, scale.operation, list(scale.channels)) == ("conv1", "scale", [1])
    assert list(scale.value) == pytest.approx([0.8])
    assert page.evaluate("document.activeElement.id") == "factor"  # It keeps the focus while answers come.
    page.get_by_role("region", name="Edits").get_by_role("button", name="Undo").click()
    await_edits(page, 0)
    assert page.locator("#factor").input_value() == "1"
    page.locator("#factor").fill("0.5")
    await_edits(page, 1)
    page.locator("#factor").fill("1")
    await_edits(page, 0)


def test_regions_are_brushed_out_by_pointer_and_by_keys(
    watch: Open, server: PageServer, stand_in: StandIn, picture: Path
):
    page = watch().open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_role("button", name="conv1, channel 0: enlarge").click()
    brush(page, (1, 1), (3, 2))  # Without the brush a cell is marked, and nothing edited.
    page.get_by_role("button", name="Brush out a region").click()
    brush(page, (4, 3), (1, 2))
    await_edits(page, 1)
    first = wire.Edit(layer="conv1", operation="zero", channels=[0], region=[1, 2, 5, 4])
    assert last_edits(stand_in) == [first]
    expect(page.locator(".box.brushed")).to_have_count(1)
    page.locator("#map").focus()
    for key in ("Control+Home", "Space", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(".edit [role=status]")).to_contain_text("A region begins at row 0, column 0.")
    page.keyboard.press("Escape")
    expect(page.locator(".box.brushing")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "map"
    for key in ("Control+Home", "Space", "ArrowDown", "ArrowRight", "ArrowRight", "Space"):
        page.keyboard.press(key)
    await_edits(page, 2)
    second = wire.Edit(layer="conv1", operation="zero", channels=[0], region=[0, 0, 2, 3])
    assert last_edits(stand_in) == [first, second]
    assert page.evaluate("document.activeElement.id") == "map"
    remove = page.get_by_role("button", name="Remove: conv1, channel 0, rows 1 to 4, columns 2 to 3: set to zero")
    remove.focus()
    page.keyboard.press("Enter")
    await_edits(page, 1)
    assert last_edits(stand_in) == [second]
    assert "rows 0 to 1" in page.evaluate("document.activeElement.getAttribute('aria-label')")


def test_edits_stand_in_the_address_and_can_be_copied(
    watch: Open, server: PageServer, stand_in: StandIn, picture: Path, monkeypatch: pytest.MonkeyPatch
):
    watched = watch(permissions=["clipboard-read", "clipboard-write"])
    page = watched.open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_role("button", name="conv1, channel 2: enlarge").click()
    page.locator("#factor").fill("0.5")
    page.locator("#map").focus()
    for key in ("Control+Home", "Space", "Space"):
        page.keyboard.press(key)
    await_edits(page, 2)
    sent = last_edits(stand_in)
    other = watch().open(page.evaluate("location.href"))
    await_title(other, "dog.png – digits")
    await_edits(other, 2)
    assert last_edits(stand_in) == sent
    assert other.locator("#factor").input_value() == "0.5"
    texts = [one.get_by_role("region", name="Scores").inner_text() for one in (page, other)]
    assert texts[0] == texts[1]
    other.get_by_role("button", name="Reset").click()
    await_edits(other, 0)
    assert "edits" not in other.evaluate("location.href")
    other.get_by_role("region", name="Edits").get_by_role("button", name="Undo").click()
    await_edits(other, 2)

    def copied(what: str) -> str:
        page.get_by_role("button", name=f"Copy as {what}").click()
        expect(page.get_by_role("region", name="Edits").get_by_role("status")).to_have_text(f"{what} is copied.")
        return str(page.evaluate("navigator.clipboard.readText()"))

    region = {"layer": "conv1", "channels": [2], "region": [0, 0, 1, 1], "operation": "zero"}
    scale = {"layer": "conv1", "channels": [2], "operation": "scale", "value": 0.5}
    assert json.loads(copied("JSON")) == [scale, region]
    monkeypatch.chdir(picture.parent)
    exec(compile(copied("Python"), "copied", "exec"), {})
    model, _, request = stand_in.requests[-1]
    assert (model, list(request.edits), request.compare) == ("digits", sent, True)
    assert list(request.pictures) == [make_picture()]


def test_edits_of_the_address_that_do_not_fit_are_rejected_in_the_services_words(
    watch: Open, server: PageServer, picture: Path
):
    watched = watch()
    page = watched.open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.evaluate("""location.hash += "&edits=" + encodeURIComponent('[{"layer": "nose", "operation": "zero"}]')""")
    expect(page.locator("#error")).to_contain_text("unknown_layer: edits[0]: no layer 'nose'; there are: conv1, conv2")
    expect(page.locator("main .stale-note")).to_have_text("Old: the result of dog.png, digits.")
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("main .stale")).to_have_count(0)
    assert page.inner_text("#error") == ""
    page.evaluate("location.hash += '&edits=nonsense'")
    expect(page.locator("#error")).to_have_text("bad_request: edits is not JSON")
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("main .stale")).to_have_count(0)
    # JSON can hold objects that no script can turn into text, and lists that are no numbers.
    wordless = {"toString": 1, "valueOf": 1}
    good = {"layer": "conv1", "operation": "scale", "value": 0.5}
    fields = [{name: wordless} for name in ("layer", "operation", "value", "channels", "box")]
    fields += [{"channels": {"except": wordless}}, {"region": [0, 0, 1, wordless]}, {"value": [[wordless]]}]
    edits = json.dumps([good, *({**good, **field} for field in fields)])
    page.evaluate("(edits) => { location.hash += '&edits=' + encodeURIComponent(edits); }", edits)
    expect(page.locator("#error")).to_contain_text("bad_request: edits[1]")
    expect(page.get_by_role("region", name="Edits").get_by_role("listitem")).to_have_count(1)
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("main .stale")).to_have_count(0)
    assert page.inner_text("#error") == ""
    watched.wrong.clear()


def test_after_a_reload_the_page_asks_for_the_new_card(
    watch: Open, server: PageServer, stand_in: StandIn, picture: Path
):
    watched = watch()
    page = watched.page
    with page.expect_response("**/models?*"):
        watched.open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    stand_in.newest = RELOADED
    with page.expect_response("**/models?*") as response:
        page.locator("#top_k").fill("3")
        page.keyboard.press("Enter")
    expect(page.locator("#model-info")).to_contain_text(f"stands in, reloaded. Version {RELOADED}")
    assert {one["name"]: one["version"] for one in response.value.json()}["digits"] == RELOADED


def test_it_fits_every_window(watch: Open, server: PageServer, picture: Path):
    page = watch(viewport={"width": 320, "height": 800}).open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.get_by_label("Compare with").select_option("cifar")
    expect(page.get_by_role("region", name="conv2, compared", exact=True)).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.locator("#off").check()
    await_edits(page, 1)
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator(".edits pre")).to_be_visible()
    for width in (320, 768, 2560):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axe_finds_no_fault(watch: Open, server: PageServer, picture: Path):
    page = watch(color_scheme="light", bypass_csp=True).open(server.url)
    page.set_input_files("#file", picture)
    await_title(page, "dog.png – digits")
    page.locator("#compare").select_option("network:cifar")
    expect(page.get_by_role("region", name="conv2")).to_have_count(2)
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    page.get_by_role("button", name="Brush out a region").click()
    brush(page, (0, 0), (1, 1))
    await_edits(page, 1)
    page.get_by_role("button", name="Copy as JSON").click()
    expect(page.locator(".edits pre")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
