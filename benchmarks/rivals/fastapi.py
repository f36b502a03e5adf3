"""FastAPI on uvicorn: the body read from the request, the network called in the handler, raw bytes in a Response.

uvicorn benchmarks.rivals.fastapi:app --workers N
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from benchmarks.rivals.network import Plain, encode, unpack

app = FastAPI()
network = Plain()


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Answer raw bytes."""
    want, files = unpack(await request.body())
    return Response(encode(network.answer(files, want)), media_type="application/octet-stream")
