"""Request bodies in pieces, so that the deadline and an early response are noticed while they are sent.

httpx sends the whole body before it reads the response. But a server that rejects a request for its size responds at
once, and may take no more of it. So a request above `LARGE_BYTES` gets a connection of its own, whose socket is known
from httpx's `trace` extension, and each piece waits until that socket is ready for it.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpcore

from convscope._exceptions import DeadlineExceeded

SMALL_BYTES = 256 * 1024  # Bodies up to here are sent at once, and others in such pieces unless they are watched.
LARGE_BYTES = 8 * 1024 * 1024  # For larger bodies, a connection of their own costs little beside the upload.
PIECE_BYTES = 16 * 1024  # Of a watched body: no more than a socket takes at once when it is ready.
_POLL_S = 0.01  # Seconds between two looks at the socket, in asyncio.


class _Watch:
    """Tells whether the socket of an upload takes more, or the server has responded or closed the connection."""

    def __init__(self) -> None:
        self._poll: Any = None

    def start(self, stream: Any) -> None:
        """Watch a stream of httpcore's: first the connection, then the one with TLS over it."""
        if not hasattr(select, "poll"):
            return  # On Windows, pieces are sent without a look.
        # Bytes that come over TLS may be TLS's own. That the server has closed its side is certain.
        tls = stream.get_extra_info("ssl_object") is not None
        events = getattr(select, "POLLRDHUP", 0) if tls else select.POLLIN
        self._poll = select.poll()
        self._poll.register(stream.get_extra_info("socket"), select.POLLOUT | events)

    def piece_bytes(self) -> int:
        """Return how large the pieces should be."""
        return SMALL_BYTES if self._poll is None else PIECE_BYTES

    def takes_more(self, seconds: float) -> bool:
        """Wait so long until the socket is ready; return whether it takes more.

        Raises:
            httpcore.WriteError: The server has responded or closed the connection: httpx goes on to read the response.
        """
        if self._poll is None:
            return True
        events = self._poll.poll(1000 * seconds)
        if any(found & ~select.POLLOUT for _, found in events):
            raise httpcore.WriteError("the server responded before the request was complete")
        return bool(events)


class Upload:
    """The body of a request for `httpx.Client`; only a large one is watched.

    Args:
        body: The body.
        ends: When the call must end, by `time.monotonic`.
    """

    def __init__(self, body: bytes, ends: float) -> None:
        self._body = body
        self._ends = ends
        self._watch = _Watch()

    def watch(self, stream: Any) -> None:
        """Watch the connection that the request gets."""
        self._watch.start(stream)

    def __iter__(self) -> Iterator[bytes]:
        size = self._watch.piece_bytes()
        for start in range(0, len(self._body), size):
            left_s = self._ends - time.monotonic()
            if left_s <= 0 or not self._watch.takes_more(left_s):
                raise DeadlineExceeded("the deadline passed")
            yield self._body[start : start + size]


class AsyncUpload:
    """The body of a large request for `httpx.AsyncClient`, whose caller sees to the deadline.

    Args:
        body: The body.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._watch = _Watch()

    def watch(self, stream: Any) -> None:
        """Watch the connection that the request gets."""
        self._watch.start(stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = self._watch.piece_bytes()
        for start in range(0, len(self._body), size):
            while not self._watch.takes_more(0):
                await asyncio.sleep(_POLL_S)
            yield self._body[start : start + size]
