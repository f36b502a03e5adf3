"""Measure what the client costs: microseconds of its process's CPU a call, against a server that only replies.

Type: python -m benchmarks.client_cost [--rounds 7] [--calls 300]

A server in a process of its own answers every request with the same bytes, so that the CPU time of the process that
calls, all threads, is the client's. The floor beside it is what no client can save: a bare socket, or gRPC's own bytes
in and bytes out, and parsing the reply. Each round runs every way once.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from convscope import AsyncClient, Client
from convscope._wire import convscope_pb2 as wire
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

from benchmarks.summaries import spread

ROOT = Path(__file__).resolve().parents[1]
METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MAPS = {"conv1": (16, 32, 32), "conv2": (32, 16, 16)}  # Those of `cifar`: 98,304 bytes in float32.
WORKLOADS: dict[str, dict[str, Any]] = {"scores": {}, "scores, maps float32": {"layers": ["conv1", "conv2"]}}
PICTURE = (ROOT / "samples/cat.png").read_bytes()
Ways = dict[str, Callable[[int, dict[str, Any]], float]]
PACKAGES = ("httpx", "httpcore", "httpx-aiohttp", "aiohttp", "grpcio", "numpy", "protobuf")


def main() -> int:
    """Measure, print the table, and write it with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=300, help="of each way in a round")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "client_cost.json")
    options = parser.parse_args()
    with replying() as ports:
        costs = measure(make_ways(*ports), options.rounds, options.calls)
    print(table(costs))
    circumstances = {
        "rounds": options.rounds,
        "calls": options.calls,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"circumstances": circumstances, "cpu_us_a_call": costs}, indent=2))
    print(f"\n{json.dumps(circumstances)}")
    return 0


def measure(ways: Ways, rounds: int, calls: int) -> dict[str, dict[str, list[float]]]:
    """Return microseconds a call by workload and way, a value for each round."""
    costs: dict[str, dict[str, list[float]]] = {workload: {way: [] for way in ways} for workload in WORKLOADS}
    for call in ways.values():
        call(50, {})
    for number in range(rounds):
        for workload, found in costs.items():
            for way, call in ways.items():
                found[way].append(1e6 * call(calls, WORKLOADS[workload]) / calls)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return costs


def installed(package: str) -> str | None:
    """Return the version of a package, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def make_ways(rest_port: int, grpc_port: int) -> Ways:
    """Return the ways of calling by name: each calls so often and returns the seconds of CPU that it took."""
    rest, rpc = f"http://127.0.0.1:{rest_port}", f"grpc://127.0.0.1:{grpc_port}"
    ways: Ways = {
        "floor REST": partial(bare_socket, rest_port),
        "REST": partial(blocking, rest),
        "REST, asyncio": lambda calls, asked: asyncio.run(awaited(rest, calls, asked)),
        "floor gRPC": partial(bare_grpc, grpc_port),
        "gRPC": partial(blocking, rpc),
        "gRPC, asyncio": lambda calls, asked: asyncio.run(awaited(rpc, calls, asked)),
    }
    if importlib.util.find_spec("httpx_aiohttp"):
        ways["REST, asyncio, aiohttp"] = lambda calls, asked: asyncio.run(
            awaited(rest, calls, asked, backend="aiohttp")
        )
    return ways


def blocking(url: str, calls: int, asked: dict[str, Any]) -> float:
    """Call with `Client`."""
    with Client(url) as client:
        client.predict(PICTURE, model="cifar", **asked)  # Connects.
        began = time.process_time()
        for _ in range(calls):
            client.predict(PICTURE, model="cifar", **asked)
        return time.process_time() - began


async def awaited(url: str, calls: int, asked: dict[str, Any], **settings: Any) -> float:
    """Call with `AsyncClient`."""
    async with AsyncClient(url, **settings) as client:
        await client.predict(PICTURE, model="cifar", **asked)
        began = time.process_time()
        for _ in range(calls):
            await client.predict(PICTURE, model="cifar", **asked)
        return time.process_time() - began


def bare_socket(port: int, calls: int, asked: dict[str, Any]) -> float:
    """Ask over a socket, parse the reply, and make no object of it."""
    body = wire.PredictRequest(pictures=[PICTURE], **asked).SerializeToString()
    head = f"POST /predictions/cifar HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(body)}\r\n\r\n"
    question = head.encode() + body
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer = connection.makefile("rb", buffering=0)
        buffer = bytearray(1 << 18)
        began = time.process_time()
        for _ in range(calls):
            connection.sendall(question)
            have = answer.readinto(buffer) or 0
            start = buffer.index(b"\r\n\r\n") + 4
            mark = buffer.index(b"content-length: ") + 16
            ends = start + int(buffer[mark : buffer.index(b"\r", mark)])
            while have < ends:
                have += answer.readinto(memoryview(buffer)[have:]) or 0
            wire.PredictReply.FromString(bytes(memoryview(buffer)[start:ends]))
        return time.process_time() - began


def bare_grpc(port: int, calls: int, asked: dict[str, Any]) -> float:
    """Ask over gRPC with bytes, parse the reply, and make no object of it."""
    inner = wire.PredictRequest(pictures=[PICTURE], **asked).SerializeToString()
    question = PredictionsRequest(model_name="cifar", input={"request": inner}).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(METHOD)
        ask(question)
        began = time.process_time()
        for _ in range(calls):
            wire.PredictReply.FromString(PredictionResponse.FromString(ask(question)).prediction)
        return time.process_time() - began


@contextmanager
def replying() -> Iterator[tuple[int, int]]:
    """Run the servers in a process of their own; yield their ports, REST and gRPC."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        yield ours.recv()
    finally:
        server.terminate()
        server.join()


def serve(pipe: Connection) -> None:
    """Answer everything with the same bytes, until ended: with maps where the request is about layers."""
    replies = [make_reply({}), make_reply(MAPS)]

    class Rest(asyncio.Protocol):
        have = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.have += data
            head, found, body = self.have.partition(b"\r\n\r\n")
            if not found or len(body) < int(head.lower().partition(b"content-length:")[2].split()[0]):
                return
            reply = replies[b"conv1" in body]
            self.have = b""
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n"  # As TorchServe spells the others.
                b"x-request-id: 7b4b0d4e-3d3b-4b6e-a6f5-1a6f1c6d1e53\r\nPragma: no-cache\r\n"
                b"Cache-Control: no-cache; no-store, must-revalidate, private\r\nExpires: Thu, 01 Jan 1970 00:00:00 UTC"
                b"\r\ncontent-length: %d\r\nconnection: keep-alive\r\n\r\n" % len(reply) + reply
            )

    class Rpc(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda request, _context: PredictionResponse(prediction=replies[b"conv1" in request]),
                response_serializer=PredictionResponse.SerializeToString,
            )

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Rest, "127.0.0.1", 0)
        rpc = grpc.server(ThreadPoolExecutor(2))
        rpc.add_generic_rpc_handlers((Rpc(),))
        grpc_port = rpc.add_insecure_port("127.0.0.1:0")
        rpc.start()
        pipe.send((server.sockets[0].getsockname()[1], grpc_port))
        await server.serve_forever()

    asyncio.run(run())


def make_reply(maps: dict[str, tuple[int, ...]]) -> bytes:
    """Return a reply about one picture, serialized."""
    result = wire.Result()
    for index in range(5):
        result.top.add(index=index, label=f"class {index}", probability=0.2, logit=1.5)
    for layer, shape in maps.items():
        cells = np.random.default_rng(0).normal(size=shape).astype("<f4")
        result.maps.add(layer=layer, tensor=wire.Tensor(dtype=wire.FLOAT32, shape=shape, data=cells.tobytes()))
    reply = wire.PredictReply(model="cifar", version="1.0", engine="torch-2.15.0", device="cpu", results=[result])
    return reply.SerializeToString()


def table(costs: dict[str, dict[str, list[float]]]) -> str:
    """Lay out medians with the least and the largest of the rounds."""
    ways = list(next(iter(costs.values())))
    lines = ["| µs of CPU a call | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name, found in costs.items():
        cells = [spread(us, "{:.0f}") for us in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
