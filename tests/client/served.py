"""Real networks behind the stand-in's two transports: the client's requests, the handlers' answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from convscope._wire import convscope_pb2 as wire

from handlers.pipeline import Pipeline
from tests.client.stand_in import StandIn, serve


@contextmanager
def serving(services: Mapping[str, Pipeline]) -> Iterator[StandIn]:
    """Serve networks by name; `requests` of what is returned lists what they were asked."""

    def take(model: str, version: str, data: bytes, key: str | None) -> wire.PredictReply:
        stand_in.requests.append((model, version, wire.PredictRequest.FromString(data)))
        [response] = services[model].respond([{"request": bytearray(data)}], [{}], ["an-id"])
        return wire.PredictReply.FromString(response.body)

    with serve() as stand_in:
        stand_in.take = take  # type: ignore[method-assign]
        yield stand_in
