"""A worker's connection to TorchServe, set for messages of many small fields and for large replies."""

from __future__ import annotations

import io
import socket
from contextlib import suppress
from typing import Any

_REPLY_BUFFER_BYTES = 4 * 2**20  # The kernel grants net.core.wmem_max of it.
_READ_AHEAD_BYTES = 64 * 1024
_SMALL_BYTES = 16 * 1024  # Sooner copied than told to the kernel piece by piece.
_PIECES_AT_ONCE = 512  # Half of what Linux takes in one call.


def improve(connection: socket.socket) -> None:
    """Let a message come in at once, and a large reply go out at once and as the pieces that it is made of.

    Java parses a batch's reply again at each piece that it gets, so the socket's buffer is widened. A message has 40
    fields for a request over REST, each of which would be a system call; they are answered from what one has read.
    `sendall` takes a list of pieces too, which are not copied into one first. A connection that is improved already, or
    of another kind than TorchServe's, stays as it is.

    Args:
        connection: As TorchServe's worker uses it: blocking, one message and one reply in turns. Its `recv` must ask
            for what has to come, and no more.
    """
    if type(connection) is not socket.socket:
        return
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REPLY_BUFFER_BYTES)
    # Whoever calls it holds the socket itself, which takes no attribute of its own, but another class.
    reader = io.BufferedReader(io.FileIO(connection.fileno(), closefd=False), _READ_AHEAD_BYTES)
    connection.__class__ = type("Improved", (Improved,), {"__slots__": (), "recv": reader.read})


class Improved(socket.socket):
    """A connection that was improved."""

    __slots__ = ()

    def sendall(self, data: Any, *flags: int) -> None:
        """Send bytes, or a list of pieces one after the other."""
        if not isinstance(data, list) or sum(map(len, data)) < _SMALL_BYTES:
            super().sendall(b"".join(data) if isinstance(data, list) else data, *flags)
            return
        pieces: list[bytes | memoryview] = data
        start = 0
        while start < len(pieces):
            sent = self.sendmsg(pieces[start : start + _PIECES_AT_ONCE])
            while start < len(pieces) and sent >= len(pieces[start]):
                sent -= len(pieces[start])
                start += 1
            if sent:  # A signal came in between.
                super().sendall(memoryview(pieces[start])[sent:])
                start += 1
