"""Take the pictures of docs/pictures/ that show the pages, of a running service.

python -m tests.page.pictures --url http://localhost:8080
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from convscope import Client
from convscope_lens import PageServer, report
from playwright.sync_api import expect

from tests.page.browser import Watched, chromium
from tests.server.harness import ROOT

PICTURES = ROOT / "docs/pictures"
SEVEN = ((0.28, 0.22), (0.7, 0.22), (0.42, 0.82))  # x, y of the pad.


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8080", help="a service with cifar and digits")
    url = parser.parse_args().url
    with Client(url) as client, tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = Path(folder, "report.html")
        page.write_text(report(client, ROOT / "samples/cat.png", model="cifar"), encoding="utf-8")
        for scheme in ("light", "dark"):
            shown = Watched(browser, color_scheme=scheme, viewport={"width": 1400, "height": 900}).open(page.as_uri())
            shown.get_by_role("region", name="conv2", exact=True).get_by_role("button").first.click()
            shown.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
            shown.screenshot(path=PICTURES / f"report-{scheme}.png", full_page=True)
        with PageServer(client, ["digits", "cifar"]) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            shown = Watched(browser, viewport={"width": 1400, "height": 1100}).open(server.url)
            pad = shown.locator("#pad").bounding_box()
            assert pad
            spots = [(pad["x"] + x * pad["width"], pad["y"] + y * pad["height"]) for x, y in SEVEN]
            shown.mouse.move(*spots[0])
            shown.mouse.down()
            for x, y in spots[1:]:
                shown.mouse.move(x, y, steps=8)
            shown.mouse.up()
            expect(shown.locator("#state")).to_contain_text("%", timeout=60_000)
            shown.screenshot(path=PICTURES / "ui.png")
            server.shutdown()


if __name__ == "__main__":
    main()
