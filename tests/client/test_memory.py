"""That memory freed by one reply serves the next."""

from __future__ import annotations

import asyncio
import gc
import platform
import resource
import subprocess
import sys
from typing import Any

import pytest
from convscope import AsyncClient, Client
from convscope._memory import keep_freed_memory

REPLIES = 60
PROGRAM = f"""
import resource, sys
from convscope._memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def use():
    blocks = [bytearray(1 << 20) for _ in range(3)]  # Its pages are all written to.
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({REPLIES}):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """How many fresh pages a program of its own took for replies of 3 MiB."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator, another rule")
def test_the_memory_of_one_reply_serves_the_next(monkeypatch: pytest.MonkeyPatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "PYTHONMALLOC"):
        monkeypatch.delenv(name, raising=False)
    kept, handed_back = faults("kept"), faults("handed back")
    assert kept < REPLIES * 64  # Of 768 pages that each takes.
    assert handed_back > 5 * max(kept, REPLIES)


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
def test_keeping_memory_takes_none():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        keep_freed_memory()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("coalesce", ["off", "on"])
def test_a_reply_goes_with_its_prediction(kind: type, coalesce: Any, url: str):
    """Nothing in a circle, that would keep megabytes until Python looks for such."""
    asked = {"model": "cifar", "layers": ["conv1"]}

    def in_a_thread() -> None:
        with Client(url, coalesce=coalesce) as client:
            client.predict(b"cat", **asked)
            gc.collect()
            for _ in range(5):
                client.predict(b"cat", **asked)
                list(client.predict_many([b"cat"] * 5, **asked))
            found.append(circles())

    async def in_a_loop() -> None:
        async with AsyncClient(url, coalesce=coalesce) as client:
            await client.predict(b"cat", **asked)
            gc.collect()
            for _ in range(5):
                await client.predict(b"cat", **asked)
                await asyncio.gather(*(client.predict(b"cat", **asked) for _ in range(5)))
            found.append(circles())

    found: list[list[str]] = []
    gc.disable()
    try:
        in_a_thread() if kind is Client else asyncio.run(in_a_loop())
    finally:
        gc.enable()
    assert found == [[]]


def circles() -> list[str]:
    """Name the client's objects, and those of its libraries, that only Python's search for circles finds."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        kinds = {f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    return sorted(kind for kind in kinds if kind.startswith(("convscope._", "httptools.", "numpy.")))
