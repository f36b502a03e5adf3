"""Connections that send prepared requests and find the ends of replies, with as little Python as possible.

A load that shares two cores with the server must cost less than it; HTTP and gRPC libraries for Python take 200 µs and
more a call. Neither wire knows what a body means.

With grpcio in place of `Grpc`, a thread a connection, the load took 320 to 420 µs a request instead of 77 to 149,
and 32 callers got 1,540 scores a second of `cifar` instead of 2,663: `python -m benchmarks --full --parts cifar --only
'gRPC, c=8|gRPC, c=32' --servers convscope --rounds 1`, two cores of an AMD EPYC, 2026-12-01.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

Address = tuple[str, int]

_BUFFER = 2**20
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8  # RFC 9113, section 6
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_LARGEST_WINDOW = 2**31 - 1
_FRAME = 16_384  # The largest every peer takes.
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4
# The trailer `grpc-status: 0`, never indexed since there is no table: as it is, and in the Huffman code of RFC 7541.
_GOOD = (
    b"\x0bgrpc-status\x010",
    b"\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f\x010",
    b"\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f\x81\x07",
)


@dataclass(frozen=True)
class Reply:
    """A reply: status 200 is good on both wires; `body` is a view that the next request overwrites."""

    status: int
    body: memoryview


class Http:
    """A kept-open HTTP/1.1 connection; replies carry a content length.

    Args:
        address: The server's address.
    """

    def __init__(self, address: Address) -> None:
        self.socket = _connect(address)
        self.socket.setblocking(False)
        self.unsent = memoryview(b"")
        self._view = memoryview(bytearray(_BUFFER))

    def send(self, message: bytes) -> None:
        """Send a whole request, head and body, as far as the server takes it now; `push` sends the rest."""
        self._received, self._end = 0, 0
        self.unsent = memoryview(message)
        self.push()

    def push(self) -> None:
        """Send more of the request, without waiting for a server that does not read."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def receive(self) -> Reply | None:
        """Take what has arrived; return the reply once it is whole.

        Raises:
            ConnectionError: The server closed the connection, or does not say how long its reply is.
        """
        if self._received == len(self._view):
            self._grow(2 * self._received)
        self._received += _take(self.socket, self._view[self._received :])
        if not self._end and not self._read_head():
            return None
        if self._received < self._end:
            return None
        return Reply(self._status, self._view[self._start : self._end])

    def _read_head(self) -> bool:
        head, found, _ = bytes(self._view[: min(self._received, 4096)]).partition(b"\r\n\r\n")
        if not found:
            return False
        self._status = int(head[9:12])
        self._start = len(head) + 4
        length = (head.lower() + b"\r\n").partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not length:  # The good replies of all servers have it.
            raise ConnectionError("a reply without a content length")
        self._end = self._start + int(length)
        if self._end > len(self._view):
            self._grow(self._end)
        return True

    def _grow(self, size: int) -> None:
        larger = memoryview(bytearray(size))
        larger[: self._received] = self._view[: self._received]
        self._view = larger


class Grpc:
    """An HTTP/2 connection that makes one unary gRPC call at a time.

    Args:
        address: The server's address.
    """

    unsent = b""  # `receive` sends what flow control held back.
    path = b"/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"

    def __init__(self, address: Address) -> None:
        self.socket = _connect(address)
        self._view = memoryview(bytearray(_BUFFER))
        self._read, self._written, self._stream, self._taken = 0, 0, -1, 0
        self._window = self._first_window = self._stream_window = 65_535
        self._rest = memoryview(b"")
        self._body, self._status = bytearray(), 0
        self._head = b"".join(
            # Literal, never indexed: the same bytes for every call.
            b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", self.path),
                (b":authority", f"{address[0]}:{address[1]}".encode()),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            )
        )
        # No header table, so that a reply's trailers are always the same bytes; and no flow control towards us.
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        self.socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        self._grant(_LARGEST_WINDOW - 65_535)
        self._settled = False
        while not self._settled:
            self.receive()

    def send(self, message: bytes) -> None:
        """Call with a serialized message, as far as the server's flow control lets it go now."""
        self._stream += 2
        self._stream_window = self._first_window
        self._body, self._status = bytearray(), 0
        self._rest = memoryview(b"\0" + struct.pack(">I", len(message)) + message)
        self._pump(_frame(_HEADERS, _END_HEADERS, self._stream, self._head))

    def receive(self) -> Reply | None:
        """Take what has arrived; return the reply once it is whole.

        Raises:
            ConnectionError: The server closed the connection, or is about to.
        """
        if self._written == len(self._view):  # Only the beginning of a frame is left: frames are far smaller.
            left = self._written - self._read
            self._view[:left] = bytes(self._view[self._read :])
            self._read, self._written = 0, left
        self._written += _take(self.socket, self._view[self._written :])
        reply = None
        while self._written - self._read >= 9:
            start = self._read + 9
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", self._view, self._read)
            end = start + (high << 16 | low)
            if end > self._written:
                break
            self._read = end
            reply = self._handle(kind, flags, stream, self._view[start:end]) or reply
        if self._read == self._written:
            self._read = self._written = 0
        return reply

    def _handle(self, kind: int, flags: int, stream: int, payload: memoryview) -> Reply | None:
        if kind == _DATA:
            self._body += payload
            self._taken += len(payload)
            if self._taken > 2**30:
                self._grant(self._taken)
                self._taken = 0
        elif kind == _HEADERS:
            if any(good in bytes(payload) for good in _GOOD):
                self._status = 200
        elif kind == _SETTINGS and not flags & _ACK:
            self._settle(payload)
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(_frame(_PING, _ACK, 0, bytes(payload)))
        elif kind == _WINDOW_UPDATE:
            more = int.from_bytes(payload)
            self._window += more if stream == 0 else 0
            self._stream_window += more if stream == self._stream else 0
            self._pump()
        elif kind == _GOAWAY:
            raise ConnectionError("the server says goodbye")
        ended = kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)
        return Reply(self._status, memoryview(self._body)[5:]) if ended else None

    def _settle(self, payload: memoryview) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == _INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._first_window
                self._first_window = value
        self.socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        self._settled = True

    def _pump(self, before: bytes = b"") -> None:
        """Send as much of the message as the windows allow, in one system call."""
        frames = [before]
        while self._rest and (size := min(_FRAME, len(self._rest), self._window, self._stream_window)) > 0:
            flags = _END_STREAM if size == len(self._rest) else 0
            frames.append(_frame(_DATA, flags, self._stream, self._rest[:size]))
            self._rest = self._rest[size:]
            self._window -= size
            self._stream_window -= size
        if any(frames):
            self.socket.sendall(b"".join(frames))

    def _grant(self, size: int) -> None:
        self.socket.sendall(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", size)))


def _connect(address: Address) -> socket.socket:
    connection = socket.create_connection(address, timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _take(connection: socket.socket, room: memoryview) -> int:
    count = connection.recv_into(room)
    if not count:
        raise ConnectionError("the server closed the connection")
    return count


def _frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    size = len(payload)
    return struct.pack(">BHBBI", size >> 16, size & 0xFFFF, kind, flags, stream) + bytes(payload)
