"""Mending two things in TorchServe 0.12 that cost requests time, by bytes of its classes; it is not developed further.

* The first request of a batch waits all of maxBatchDelay for others, a millisecond at least, also where nobody else
  asks: twice what a small network takes. Mended, a worker takes what waits, up to batchSize, and waits for nothing.
* A batch's reply is read from the worker in pieces of 64 KB at most and parsed from its beginning again at each.
  Mended, a piece holds what is there: as much as the worker's socket buffer takes (`handlers.connection`).

Changed classes lie in the private directory and go before the jar. If any is not exactly the one that is known, none
is changed. `benchmarks/batching.md` has what it brings.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

JAR = Path("ts/frontend/model-server.jar")


@dataclass(frozen=True)
class Change:
    """A change to a class.

    Attributes:
        member: The class file in the jar.
        sha256: Of the class that is known.
        before: Bytes that occur in it once.
        after: As many bytes to stand there instead.
    """

    member: str
    sha256: str
    before: bytes
    after: bytes


CHANGES = (
    # In Model.pollBatch, where a batch's second and later requests are taken, jobsQueue.poll(maxDelay, MILLISECONDS)
    # becomes poll(0, MILLISECONDS): aload 5, lload 6, getstatic; aload 5, lconst_0, nop, getstatic.
    Change(
        "org/pytorch/serve/wlm/Model.class",
        "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff",
        bytes.fromhex("1905 1606 b2"),
        bytes.fromhex("1905 0900 b2"),
    ),
    # The constant 65,536 becomes 4 MiB: the most that netty, used with its defaults, reads at once.
    Change(
        "io/netty/channel/AdaptiveRecvByteBufAllocator.class",
        "0b9f688fa3f189aa5729e811c589f25f9682a1178c0e3974965f0e04b4c58c97",
        bytes.fromhex("03 00010000"),
        bytes.fromhex("03 00400000"),
    ),
)


def mend(home: Path, folder: Path) -> bool:
    """Write the mended classes into a folder for the front of the class path; False if TorchServe is another one.

    Args:
        home: Where TorchServe is installed.
        folder: Where to write, made if need be.
    """
    with zipfile.ZipFile(home / JAR) as jar:
        members = set(jar.namelist())
        found = {change: jar.read(change.member) for change in CHANGES if change.member in members}
    known = [hashlib.sha256(found.get(change, b"")).hexdigest() == change.sha256 for change in CHANGES]
    if not all(known):
        return False
    for change, original in found.items():
        path = folder / change.member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(original.replace(change.before, change.after))
    return True
