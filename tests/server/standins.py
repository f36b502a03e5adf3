"""Stand-ins for TorchServe's metrics and management API: scripted bytes, at once, late, drop by drop, or never."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Answer = Callable[[socket.socket, str], None]  # Gets the connection and the path asked for.

COUNTERS = """\
# HELP Requests2XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests2XX counter
Requests2XX{Level="Host",Hostname="vm",} 10.0
# TYPE Requests5XX counter
Requests5XX{Level="Host",Hostname="vm",} 2.0
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="cifar",model_version="default",hostname="vm",} 7.0
ts_inference_requests_total{model_name="cifar",model_version="2.0",hostname="vm",} 3.0
ts_inference_requests_total{model_name="cifar",model_version="1.0",hostname="vm",} 1.0
ts_inference_requests_total{model_name="invented",model_version="1.0",hostname="vm",} 1.0
# TYPE ts_queue_latency_microseconds counter
ts_queue_latency_microseconds{model_name="cifar",model_version="default",hostname="vm",} 1.5E6
# TYPE QueueTime gauge
QueueTime{Level="Host",Hostname="vm",} 14283.0
"""


def describe(workers: int, ready: int, wanted: int = 2, pending: int = 0, pid: int | None = None) -> str:
    """Describe a model as TorchServe does, as far as anybody reads it; its workers are this process, or another."""
    states = [
        {"status": "READY" if number < ready else "UNLOADING", "pid": pid or os.getpid()} for number in range(workers)
    ]
    model = {"minWorkers": wanted, "maxWorkers": wanted, "maxBatchDelay": 100, "workers": states}
    return json.dumps([{**model, "jobQueueStatus": {"pendingRequests": pending}}])


def saying(body: str, status: str = "200 OK") -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
    return lambda connection, path: connection.sendall((head + body).encode())


def dripping(stop: threading.Event) -> Answer:
    """A byte at a time, each well within any timeout of a socket, and no end."""

    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not stop.wait(0.1):
            connection.sendall(b"#")

    return answer


def silent(stop: threading.Event) -> Answer:
    def answer(connection: socket.socket, path: str) -> None:
        stop.wait()

    return answer


@contextlib.contextmanager
def serving(address: tuple[str, int] | Path, answer: Answer) -> Iterator[int]:
    """Serve on a port or a unix socket, a thread for each connection; yields the port."""
    listener = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
    listener.bind(str(address) if isinstance(address, Path) else address)
    listener.listen()
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection, connection.recv(65536).decode().split(" ")[1])

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield 0 if isinstance(address, Path) else listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(10)
        listener.close()
        for thread in threads:
            thread.join(10)
