"""Mending how TorchServe fills a batch: a worker takes what waits, up to batchSize, and does not wait for more.

TorchServe 0.12 lets the first request of a batch wait all of maxBatchDelay, a millisecond at least, also where nobody
else asks: twice what such a request takes by itself. Two bytes of one of its classes say so; TorchServe is not
developed further, so they are changed here. The changed class lies in the private directory and goes before the jar; a
class that is not exactly the known one is left alone.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

JAR = Path("ts/frontend/model-server.jar")
MODEL = "org/pytorch/serve/wlm/Model.class"
KNOWN = "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff"  # SHA-256 of it in 0.12.0.
# In Model.pollBatch, where the second request and later ones are taken: jobsQueue.poll(maxDelay, MILLISECONDS) becomes
# jobsQueue.poll(0, MILLISECONDS). That is aload 5, lload 6, getstatic; and aload 5, lconst_0, nop, getstatic.
WAITS, TAKES = bytes.fromhex("1905 1606 b2"), bytes.fromhex("1905 0900 b2")


def mend(home: Path, folder: Path) -> bool:
    """Write the mended class into a folder for the front of the class path; False if TorchServe is another one.

    Args:
        home: Where TorchServe is installed.
        folder: Where to write, made if need be.
    """
    with zipfile.ZipFile(home / JAR) as jar:
        original = jar.read(MODEL)
    if hashlib.sha256(original).hexdigest() != KNOWN or original.count(WAITS) != 1:
        return False
    path = folder / MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(original.replace(WAITS, TAKES))
    return True
