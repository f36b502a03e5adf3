"""Mending three things in TorchServe 0.12 that cost requests time, by bytes of its classes; nobody develops it further.

* The first request of a batch waits all of maxBatchDelay for others, a millisecond at least, also where nobody else
  asks: twice what a small network takes. Mended, a worker takes what waits, up to batchSize, and waits for nothing.
* A batch's reply is read from the worker in pieces of 64 KB at most and parsed from its beginning again at each.
  Mended, a piece holds what is there: as much as the worker's socket buffer takes (`handlers.connection`).
* A batch is handed to the worker's connection by a task of the JVM's common pool, which waits until it is written; with
  one or two cores the JVM has no such pool and starts a thread for each batch. Mended, the thread that has the batch
  hands it over and goes on.

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
    """Changes to a class.

    Attributes:
        member: The class file in the jar.
        sha256: Of the class that is known.
        edits: Bytes that occur in it once, each with as many to stand there instead.
    """

    member: str
    sha256: str
    edits: tuple[tuple[bytes, bytes], ...]

    def make(self, original: bytes) -> bytes:
        """Return the class with the changes."""
        for before, after in self.edits:
            original = original.replace(before, after)
        return original


CHANGES = (
    # In Model.pollBatch, where a batch's second and later requests are taken, jobsQueue.poll(maxDelay, MILLISECONDS)
    # becomes poll(0, MILLISECONDS): aload 5, lload 6, getstatic; aload 5, lconst_0, nop, getstatic.
    Change(
        "org/pytorch/serve/wlm/Model.class",
        "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff",
        ((bytes.fromhex("1905 1606 b2"), bytes.fromhex("1905 0900 b2")),),
    ),
    # The constant 65,536 becomes 4 MiB: the most that netty, used with its defaults, reads at once.
    Change(
        "io/netty/channel/AdaptiveRecvByteBufAllocator.class",
        "0b9f688fa3f189aa5729e811c589f25f9682a1178c0e3974965f0e04b4c58c97",
        ((bytes.fromhex("03 00010000"), bytes.fromhex("03 00400000")),),
    ),
    # In WorkerThread.run, where a batch goes out, futures.add(CompletableFuture.runAsync(() -> lambda$run$0(i))) is now
    # lambda$run$0(i), and in that method channel.writeAndFlush(request).sync() loses its sync(). Nobody looks at those
    # futures: a connection that breaks interrupts this thread, which is then waiting for the reply, as before.
    Change(
        "org/pytorch/serve/wlm/WorkerThread.class",
        "5292f5b79ac1ec509876cd997e2605848fd79f0b15b24ebd1a96c9c6b035ffd6",
        (
            # aload 8, aload_0, iload 10, invokedynamic, invokestatic runAsync, invokeinterface add, pop.
            (
                bytes.fromhex("1908 2a 150a ba01670000 b8016b b901710200 57"),
                bytes.fromhex("2a 150a b703ed" + 13 * "00"),
            ),
            # invokeinterface writeAndFlush, invokeinterface sync, pop.
            (bytes.fromhex("b903550200 b9027b0100 57"), bytes.fromhex("b903550200 0000000000 57")),
        ),
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
        path.write_bytes(change.make(original))
    return True
