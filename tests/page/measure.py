"""Measure the bytes of the pages and the time until the first map is drawn, with a running service.

python -m tests.page.measure --url http://localhost:8080
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from convscope import Client
from convscope_lens import PageServer, report
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.page.browser import Watched, chromium
from tests.server.harness import ROOT

ROUNDS = 5


def photograph() -> bytes:
    """Return a JPEG of 12 megapixels: smooth colours and noise."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (30, 40, 3), np.uint8))
    smooth = np.asarray(small.resize((4000, 3000), Image.Resampling.BICUBIC), np.float32)
    content = io.BytesIO()
    noisy = np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(content, "JPEG", quality=90)
    return content.getvalue()


def first_map(browser: Browser, address: str, act: Callable[[Page], None] = lambda page: None) -> tuple[str, int]:
    """Return the time until the first map, as text, and the bytes that came over HTTP."""
    times, received = [], 0
    for _ in range(ROUNDS):
        watched = Watched(browser)
        replies: list[int] = []
        watched.page.on("response", lambda reply, to=replies: to.append(int(reply.headers.get("content-length", 0))))
        started = time.perf_counter()
        act(watched.open(address))
        watched.page.wait_for_selector(".tile canvas", timeout=120_000)
        times.append(1000 * (time.perf_counter() - started))
        received = sum(replies)
        watched.context.close()
    return f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f}) ms", received


def main() -> None:
    """Print a line for each page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8080", help="a service with cifar, deep and edges")
    url = parser.parse_args().url
    cat = (ROOT / "samples/cat.png").read_bytes()
    pages = [("cat.png", cat, "cifar"), ("cat.png", cat, "deep"), ("12 megapixels", photograph(), "edges")]
    with Client(url, deadline_s=120) as client, chromium() as browser, tempfile.TemporaryDirectory() as folder:
        for name, picture, model in pages:
            file = Path(folder, "report.html")
            file.write_text(report(client, picture, model=model), encoding="utf-8")
            took, _ = first_map(browser, file.as_uri())
            print(f"report, {name}, {model}: {file.stat().st_size:,} bytes, first map after {took}")
        with PageServer(client, ["cifar"]) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            took, received = first_map(
                browser, server.url, lambda page: page.set_input_files("#file", ROOT / "samples/cat.png")
            )
            print(f"ui, cat.png, cifar: {received:,} bytes, first map after {took}")
            server.shutdown()


if __name__ == "__main__":
    main()
