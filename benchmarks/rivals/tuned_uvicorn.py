"""A bare ASGI application on uvicorn with OpenCV and ONNX Runtime: what a day of tuning gives.

uvicorn benchmarks.rivals.tuned_uvicorn:app --interface asgi3 --lifespan off
"""

from __future__ import annotations

from typing import Any

from benchmarks.rivals.network import Tuned, encode, unpack

network = Tuned()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer any POST with raw bytes."""
    pieces, more = [], True
    while more:
        event = await receive()
        pieces.append(event.get("body", b""))
        more = event.get("more_body", False)
    want, files = unpack(b"".join(pieces))
    body = encode(network.answer(files, want))
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
