"""A socket as one of httpcore's streams, whose calls end in time and whose uploads hear an early answer.

httpcore's own streams give every `send` and `recv` of a call the whole timeout, so that a slow peer can stretch a call
without end. They do not read while they write, so that an answer to half a request is not seen.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpcore

AT_ONCE = 256 * 1024  # Bytes read, or encrypted, in one call.
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_SELECTOR = getattr(selectors, "PollSelector", selectors.SelectSelector)


class SocketStream(httpcore.NetworkStream):
    """A connected socket, with any number of layers of TLS. A timeout is for a whole call.

    Args:
        sock: The socket; the stream closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._layers: list[_Tls] = []  # The outermost last.
        self._heard = b""  # What has come, decrypted, and was not read yet.
        self._ended = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what comes next; nothing once the peer has closed the connection."""
        ends = _end(timeout)
        with _raised_as(httpcore.ReadTimeout, httpcore.ReadError):
            while not self._heard and not self._ended:
                self._socket.settimeout(_left(ends))
                self._hear()
        data, self._heard = self._heard[:max_bytes], self._heard[max_bytes:]
        return data

    def write(self, buffer: Any, timeout: float | None = None) -> None:
        """Send everything.

        Args:
            buffer: Bytes, or a view of them.
            timeout: Seconds it may take.

        Raises:
            httpcore.WriteError: The connection broke, or the peer answered or closed while it took no more. What it
                said is there to be read; the rest was not sent.
            httpcore.WriteTimeout: It took too long.
        """
        ends = _end(timeout)
        left = memoryview(buffer)
        with _raised_as(httpcore.WriteTimeout, httpcore.WriteError):
            while left:
                _left(ends)  # A peer that is quick enough never makes it wait.
                piece: Any = left[:AT_ONCE]
                for layer in reversed(self._layers):
                    piece = layer.encrypt(piece)
                self._send(memoryview(piece), ends)
                left = left[AT_ONCE:]

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> SocketStream:
        """Speak TLS from here on, within the TLS that is spoken already. Closes the connection if that fails."""
        ends = _end(timeout)
        layer = _Tls(ssl_context, server_hostname)
        try:
            with _raised_as(httpcore.ConnectTimeout, httpcore.ConnectError):
                while not layer.shake_hands():
                    self.write(layer.encrypted(), _left(ends))
                    data = self.read(AT_ONCE, _left(ends))
                    layer.feed(data, ended=not data)
                self.write(layer.encrypted(), _left(ends))
                self._layers.append(layer)
                self._heard = layer.decrypted()
                self._ended |= layer.ended
        except BaseException:
            with contextlib.suppress(Exception):
                self.write(layer.encrypted(), 0.1)  # The alert, which tells the peer what was wrong with it.
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """Return the `socket`, or whether the stream `is_readable`."""
        if info == "socket":
            return self._socket
        if info == "is_readable":
            try:
                return bool(self._heard) or self._ended or bool(self._wait(_READ, 0.0))
            except OSError:
                return True
        return None

    def _hear(self) -> None:
        """Take what has come to the socket."""
        data = self._socket.recv(AT_ONCE)
        ended = not data
        for layer in self._layers:
            layer.feed(data, ended=ended)
            data, ended = layer.decrypted(), layer.ended
        self._heard += data
        self._ended = ended

    def _send(self, data: memoryview, ends: float | None) -> None:
        """Send bytes as they are, and listen while they cannot be sent."""
        self._socket.setblocking(False)
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                if self._wait(_READ | _WRITE, _left(ends)) & _READ:
                    self._hear()
                    if self._heard or self._ended:
                        raise httpcore.WriteError("an answer came before all of the request was sent") from None

    def _wait(self, events: int, timeout: float | None) -> int:
        """Wait for the socket; return which of the events came, 0 when the time has passed."""
        with _SELECTOR() as selector:
            try:
                selector.register(self._socket, events)
            except ValueError as error:  # Another thread has closed it.
                raise OSError(errno.EBADF, "the connection was closed") from error
            return sum(found for _, found in selector.select(timeout))


class _Tls:
    """A layer of TLS, in memory.

    Args:
        context: Whom to trust.
        host: Whom the peer's certificate must name.

    Attributes:
        ended: Whether the peer has ended this layer.
    """

    def __init__(self, context: ssl.SSLContext, host: str | None) -> None:
        self.ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def shake_hands(self) -> bool:
        """Go on with the handshake; say whether it is done. If not, send what is encrypted and feed what comes."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def feed(self, data: bytes, *, ended: bool) -> None:
        """Take what the peer sent, and whether that was the last of it."""
        self._incoming.write(data)
        if ended:
            self._incoming.write_eof()

    def decrypted(self) -> bytes:
        """Return what there is to be read."""
        pieces = []
        try:
            while piece := self._tls.read(AT_ONCE):
                pieces.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLEOFError:  # It closed the connection without a word; so do many.
            self.ended = True
        return b"".join(pieces)

    def encrypt(self, data: Any) -> bytes:
        """Return the bytes to be sent for these."""
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]
        return self.encrypted()

    def encrypted(self) -> bytes:
        """Return what is to be sent."""
        return self._outgoing.read()


def _end(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(ends: float | None) -> float | None:
    """Return the seconds left."""
    if ends is None:
        return None
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("too late")
    return left_s


@contextlib.contextmanager
def _raised_as(timeout: type[Exception], failure: type[Exception]) -> Iterator[None]:
    """Raise what a socket or TLS raises as one of httpcore's exceptions; leave those that are already."""
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error)) from error
    except OSError as error:
        raise failure(str(error)) from error
