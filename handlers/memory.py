"""Memory: a worker's allocator and garbage collector, set for doing the same thing again and again."""

from __future__ import annotations

import atexit
import ctypes
import gc

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # Of glibc's malloc.h.
_KEPT_BYTES = 256 * 2**20
_STEP_BYTES = 64 * 2**20
_LARGE_BYTES = 32 * 2**20


def keep() -> None:
    """Make glibc keep what a request frees, for the next.

    Otherwise the maps of a batch are mapped anew for every request, and each of their pages is faulted in: 32 pictures
    of `cifar` with float16 maps took 5.1 ms in ONNX Runtime, and 4.0 ms so (medians of 5 rounds, two cores of an AMD
    EPYC). Untouched memory is not resident. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, _KEPT_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _STEP_BYTES)):
            mallopt(option, value)


def release(reply_bytes: int) -> None:
    """Give back what glibc keeps after a large reply, which the usual ones will not need.

    Args:
        reply_bytes: Of one call's replies; below 32 MiB nothing happens, since giving back costs milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if reply_bytes > _LARGE_BYTES else None
    if trim is not None:
        trim(0)


def settle() -> None:
    """Take what is loaded out of the garbage collector's sight: looking through torch's modules takes 0.16 s."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # Else triton's bindings report as leaked, at exit, what was kept from collection.
