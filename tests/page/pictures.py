"""Take the pictures of docs/pictures/page that show the report and the live page, of a running service.

python -m tests.page.pictures --url http://localhost:8080
python -m tests.page.pictures --portrait portrait.html
"""

from __future__ import annotations

import argparse
import io
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convscope import Client
from convscope._cli import main as convscope
from convscope_lens import PageServer, report
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page.browser import Watched, chromium
from tests.server.harness import ROOT

PICTURES = ROOT / "docs/pictures/page"
WIDTHS = (320, 768, 1280, 2560)
THREE = (
    (0.3, 0.2),
    (0.62, 0.22),
    (0.66, 0.4),
    (0.46, 0.48),
    (0.68, 0.58),
    (0.66, 0.78),
    (0.3, 0.8),
)  # x, y of the pad.


def keep(page: Page, name: str, *, whole: bool = True) -> None:
    """Write what the page shows as a small WebP file."""
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
    write(page.screenshot(full_page=whole), name)


def write(screenshot: bytes, name: str) -> None:
    """Write a screenshot as a small WebP file."""
    image = Image.open(io.BytesIO(screenshot))
    image.thumbnail((1280, image.height))
    image.convert("RGB").save(PICTURES / f"{name}.webp", quality=55, method=6)


def draw(page: Page) -> None:
    """Draw a 3 on the pad, small and in a corner."""
    pad = page.locator("#pad").bounding_box()
    assert pad
    spots = [(pad["x"] + 0.6 * x * pad["width"], pad["y"] + 0.6 * y * pad["height"]) for x, y in THREE]
    page.mouse.move(*spots[0])
    page.mouse.down()
    for x, y in spots[1:]:
        page.mouse.move(x, y, steps=8)
    page.mouse.up()


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8080", help="a service with cifar, deep and digits")
    parser.add_argument("--portrait", metavar="FILE", help="take only that of a page of `convscope survey`")
    options = parser.parse_args()
    url = options.url
    PICTURES.mkdir(parents=True, exist_ok=True)
    if options.portrait is not None:
        with chromium() as browser:
            watched = Watched(browser, viewport={"width": 1280, "height": 2150})
            keep(watched.open(Path(options.portrait).resolve().as_uri()), "portrait", whole=False)
        return
    with Client(url) as client, tempfile.TemporaryDirectory() as folder, chromium() as browser:

        def opened(address: str, width: int, **options: Any) -> Page:
            return Watched(browser, viewport={"width": width, "height": 900}, **options).open(address)

        file = Path(folder, "report.html")
        file.write_text(report(client, ROOT / "samples/cat.png", model="deep", top_k=10), encoding="utf-8")
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                page = opened(f"{file.as_uri()}#at=block2,0", width, color_scheme=scheme)
                page.wait_for_selector("#network .card")
                keep(page, f"report-{width}-{scheme}")
        page = opened(file.as_uri(), 794)  # A4 at 96 pixels an inch.
        page.wait_for_selector("#network .card")
        page.emulate_media(media="print")
        keep(page, "report-print")
        names = ("airplane", "cat", "frog", "horse", "ship", "truck")
        reports = Path(folder, "reports")
        arguments = ["report", *(str(ROOT / f"samples/{name}.png") for name in names), "--model", "deep"]
        assert convscope([*arguments, "--out", str(reports), "--url", url]) == 0
        keep(opened((reports / "index.html").as_uri(), 900), "index")
        with PageServer(client, ["deep", "cifar", "digits"]) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _live(lambda width: opened(server.url, width))
            server.shutdown()


def _live(opened: Callable[[int], Page]) -> None:
    page = opened(1280)
    page.wait_for_selector("#pad")
    keep(page, "ui-empty", whole=False)
    page.get_by_label("Network", exact=True).select_option("digits")
    draw(page)
    expect(page.locator("#state")).to_contain_text("%", timeout=60_000)
    keep(page, "ui-drawing")
    page = opened(1600)
    page.get_by_role("button", name="cat.png").click()
    expect(page.locator("#state")).to_contain_text("%", timeout=60_000)
    page.get_by_label("Compare with").select_option("cifar")
    expect(page.get_by_role("region", name="Compared with").get_by_role("heading").first).to_be_visible()
    page.get_by_role("region", name="Scores").first.get_by_role("button").nth(1).click()
    expect(page.locator("main .stale")).to_have_count(0)
    keep(page, "ui-compare")
    page = opened(1280)
    page.get_by_role("button", name="cat.png").click()
    page.get_by_label("Network", exact=True).select_option("deep")
    page.get_by_role("button", name="block2, channel").nth(1).click()
    page.locator("#factor").fill("0.25")
    expect(page.locator("#model-info")).to_contain_text(
        "After 1 edit.", timeout=60_000
    )  # The list of edits moves the map.
    page.get_by_role("button", name="Brush out a region").click()
    cells = page.locator("#map").bounding_box()
    assert cells
    page.mouse.move(cells["x"] + 0.3 * cells["width"], cells["y"] + 0.2 * cells["height"])
    page.mouse.down()
    page.mouse.move(cells["x"] + 0.6 * cells["width"], cells["y"] + 0.5 * cells["height"], steps=4)
    page.mouse.up()
    expect(page.locator("#model-info")).to_contain_text("After 2 edits.", timeout=60_000)
    expect(page.locator("main .stale")).to_have_count(0)
    page.mouse.move(2, 2)
    write(page.locator(".drawer").screenshot(), "ui-edits")


if __name__ == "__main__":
    main()
