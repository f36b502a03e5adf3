"""Connections of HTTP/1.1 for asyncio; see `_network`. The caller is woken once, when all of an answer is there."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpcore

from convscope._http import Incoming
from convscope._network import SMALL, BaseConnection, check_tunnel, is_address
from convscope._socket_stream import AT_ONCE

_SECOND_ADDRESS_S = 0.25  # Seconds after which a host's next address is tried beside the first: RFC 8305's.


class AsyncConnection(BaseConnection):
    """A connection of the event loop's. It knows no timeouts: whoever asks puts one around the whole."""

    async def ask(self, head: bytes, body: bytes) -> Incoming:
        """Send a request and return its answer; see `Connection.ask`."""
        self._answer = answer = Incoming()
        if self._stream is None:
            self._stream = await self._open()
        await self._stream.exchange((head, body) if len(body) > SMALL else (head + body,), answer)
        return answer

    async def close(self) -> None:
        """Close it; whoever waits for an answer is woken."""
        self.closed = True
        if self._opening is not None:
            await self._opening.aclose()

    async def _open(self) -> _Stream:
        route = self._route
        self._opening = stream = await _connect(route.host, route.port)
        if self.closed:  # Meanwhile.
            await stream.aclose()
            raise httpcore.ConnectError("it was closed")
        if route.proxy_tls is not None:
            await stream.start_tls(route.proxy_tls, route.host)
        if route.tunnel:
            answer = Incoming(bodiless=True)
            await stream.exchange((route.tunnel,), answer)
            check_tunnel(answer)
        if route.tls is not None:
            await stream.start_tls(route.tls, route.service)
        return stream


async def _connect(host: str, port: int) -> _Stream:
    loop = asyncio.get_running_loop()
    race: dict[str, Any] = {}
    # asyncio's race loses a connection whose caller is cancelled just when it is won; an address needs no race. Other
    # loops, such as uvloop's, have none: they try one address after the other.
    if isinstance(loop, asyncio.BaseEventLoop) and not is_address(host):
        race["happy_eyeballs_delay"] = _SECOND_ADDRESS_S
    try:
        _, stream = await loop.create_connection(_Stream, host, port, **race)
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    return stream


class _Stream(asyncio.Protocol):
    """What asyncio tells of a connection."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._layers: list[asyncio.Transport] = []  # The socket's, and one for each layer of TLS over it.
        self._readable = False  # There was more to read than answers, or its end.
        self._error: Exception | None = None
        self._answer: Incoming | None = None
        self._paused = False  # There is enough to be sent for now.
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._layers.append(self._transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self._readable = True
            return
        try:
            self._answer.take(data)
        except Exception as error:
            self._error = error
        if self._answer.complete or self._error is not None:
            self._wake()

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._readable = True
        if self._error is None and exc is not None:
            self._error = httpcore.ReadError(str(exc))
            self._error.__cause__ = exc
        self._wake()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    async def exchange(self, pieces: tuple[bytes, ...], answer: Incoming) -> None:
        """Send a request, and wait until its answer is complete, which may be before all of the request is sent."""
        self._answer = answer
        try:
            sent = await self._send(pieces, answer)
            while not self._over(answer):
                await self._wait()
        finally:
            self._answer = None
        if answer.complete:
            answer.reusable &= sent and not any(transport.get_write_buffer_size() for transport in self._layers)
            return
        if self._error is not None:
            raise self._error
        answer.end()

    async def _send(self, pieces: tuple[bytes, ...], answer: Incoming) -> bool:
        """Send a request as far as the peer takes it before it answers; say whether that was all of it."""
        for piece in pieces:
            for start in range(0, len(piece), AT_ONCE):
                if start:
                    await asyncio.sleep(0)  # Others want the loop, too, and the deadline may have come.
                while self._paused and not self._over(answer):
                    await self._wait()
                if self._over(answer):
                    return False
                self._transport.write(memoryview(piece)[start : start + AT_ONCE])
        return True

    def _over(self, answer: Incoming) -> bool:
        """Say whether nothing more is to come for an answer."""
        return answer.complete or self._error is not None or self._readable

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def aclose(self) -> None:
        self._transport.close()
        try:
            await asyncio.sleep(0)
        finally:
            self._transport.abort()  # What could not be sent by now is of no use to anybody.

    async def start_tls(self, trust: Any, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(self._transport, self, trust, server_hostname=host)
        except BaseException as error:
            self._transport.abort()
            if isinstance(error, OSError):
                raise httpcore.ConnectError(str(error)) from error
            raise
        if secure is None:
            raise httpcore.ConnectError("the connection was closed")
        self._transport = secure
        self._layers.append(secure)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._readable or any(transport.is_closing() for transport in self._layers)
        return self._transport.get_extra_info(info)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
