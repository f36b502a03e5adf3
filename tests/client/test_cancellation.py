"""A caller of AsyncClient that gives up, wherever its request is by then, leaves no connection open."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from typing import Any

import pytest
from convscope import ConvscopeError, _async_network
from convscope._rest import AsyncRestTransport
from convscope._wire.convscope_pb2 import PredictRequest

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: %d\r\n\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of a connection with an empty reply, which no client takes for a prediction."""
    try:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", asked)[1]))
            writer.write(HEAD % 0)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@pytest.mark.parametrize("before", [0, 1, 2], ids=["a new connection", "a used one", "one that has expired"])
def test_no_turn_of_the_loop_is_a_bad_one_to_be_cancelled_at(before: int, monkeypatch: pytest.MonkeyPatch):
    opened: list[Any] = []
    connect = _async_network._connect

    async def watched(host: str, port: int) -> Any:
        stream = await connect(host, port)
        opened.append(stream)
        return stream

    monkeypatch.setattr(_async_network, "_connect", watched)

    async def send(transport: AsyncRestTransport) -> None:
        with contextlib.suppress(ConvscopeError):
            await transport.send(PredictRequest(request_id="x"), model="cifar", version=None, deadline_s=5)

    async def cancelled_at(turns: int, url: str) -> bool:
        """Cancel a request after so many turns of the loop; say whether it was too late."""
        opened.clear()
        transport = AsyncRestTransport(url)
        await asyncio.gather(*(send(transport) for _ in range(before)))
        if before == 2:
            for connection in transport._idle:
                connection._idle_since = -60.0
        asking = asyncio.create_task(send(transport))
        for _ in range(turns):
            await asyncio.sleep(0)
        late = not asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        still = [stream for stream in opened if not stream._transport.is_closing()]
        kept = [connection._stream for connection in transport._idle if not connection.closed]
        assert still == kept, f"cancelled after {turns} turns"
        await transport.close()
        assert all(stream._transport.is_closing() for stream in opened)
        return late

    async def sweep() -> int:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            for turns in itertools.count():
                if await cancelled_at(turns, url):
                    return turns
        finally:
            server.close()
            await server.wait_closed()
            while [task for task in asyncio.all_tasks() if task.get_coro().__name__ == "answer"]:
                await asyncio.sleep(0.01)  # They go when they find their connection closed.

    assert asyncio.run(asyncio.wait_for(sweep(), 30)) > 3  # It was cancelled on its way, and more than once.
