"""Connections that send prepared requests and find the ends of replies; neither wire knows what a body means.

A load that shares two cores with the server must cost less than it. An HTTP library for Python takes 200 µs and more a
call, so `Http` is a socket and as little Python as possible. Over gRPC only our own service is asked: grpcio will do.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import grpc

Address = tuple[str, int]

_BUFFER = 2**20
_CHUNKED = -1  # Instead of where a reply ends.
_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"


@dataclass(frozen=True)
class Reply:
    """What came back: 200 is good on both wires, else HTTP's or gRPC's code; the next request overwrites `body`."""

    status: int
    body: memoryview


class Http:
    """A kept-open HTTP/1.1 connection; replies carry a content length, or come in chunks.

    Args:
        address: The server's.
    """

    def __init__(self, address: Address) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
            ConnectionError: The server closed the connection.
        """
        if self._received == len(self._view):
            self._grow(2 * self._received)
        count = self.socket.recv_into(self._view[self._received :])
        if not count:
            raise ConnectionError("the server closed the connection")
        self._received += count
        if not self._end and not self._read_head():
            return None
        if self._end == _CHUNKED:
            body = self._view[self._start : self._received]
            return Reply(self._status, _join(body)) if body[-7:] == b"\r\n0\r\n\r\n" else None
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
        self._end = self._start + int(length) if length else _CHUNKED
        if self._end > len(self._view):
            self._grow(self._end)
        return True

    def _grow(self, size: int) -> None:
        larger = memoryview(bytearray(size))
        larger[: self._received] = self._view[: self._received]
        self._view = larger

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class Grpc:
    """A gRPC channel of its own, by grpcio, that makes one unary call at a time.

    Args:
        address: The server's.
    """

    unsent = b""  # grpcio sends it.

    def __init__(self, address: Address) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel("{}:{}".format(*address), options)
        self._call = self._channel.unary_unary(_METHOD)
        self.socket, self._done = socket.socketpair()  # Readable when the reply is there, so that `select` sees it.

    def send(self, message: bytes) -> None:
        """Call with a serialized message."""
        self._reply = self._call.future(message)
        self._reply.add_done_callback(self._tell)

    def _tell(self, _: object) -> None:
        with contextlib.suppress(OSError):  # Closed meanwhile.
            self._done.send(b".")

    def receive(self) -> Reply | None:
        """Return the reply."""
        self.socket.recv(1)
        code = self._reply.code()
        if code is not grpc.StatusCode.OK:
            return Reply(code.value[0], memoryview(b""))
        return Reply(200, memoryview(self._reply.result()))

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()
        self.socket.close()
        self._done.close()


def _join(chunked: memoryview) -> memoryview:
    """Return a body without the sizes of its chunks."""
    rest, chunks = bytes(chunked), []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return memoryview(b"".join(chunks))
