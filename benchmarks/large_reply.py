"""Measure what a large reply costs: whole maps of many pictures, beside the same pictures with maps averaged to a cell.

Type: python -m benchmarks.large_reply [--pictures 64] [--rounds 9]

MobileNetV3-Small's first map has 16 x 112 x 112 values, 0.8 MB a picture in float32. Both requests decode and classify
the same pictures, so their difference is what moving the maps costs: wall time, and processor time of TorchServe's
Java, of our Python processes (the worker), and of the process that calls; the first two are counted in steps of 10 ms.
Beside it stand two floors: copying as many bytes in memory, and sending them from one process to another over the
loopback device. Each round measures everything once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from convscope import Client

from benchmarks import machine, models
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.workloads import Asked, closed

MIB = 2**20
COLUMNS = ("wall", "Java", "Python", "caller")


def main() -> None:
    """Measure, and print the table: milliseconds, the median with the least and the largest of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = models.prepare("first_map", ROOT / "out/bench")
    files = model.files(Asked("scores", options.pictures, "0.3 MP"))
    ours = next(one for one in SERVERS if one.name == "convscope")
    found: dict[str, list[dict[str, float]]] = {}
    with Running(ours, model, ROOT / "out/bench", 1) as running, Echo() as echo:
        running.warm_up([closed("pool", 1, options.pictures, "0.3 MP")])
        urls = {"REST": f"http://127.0.0.1:{running.place.rest}", "gRPC": f"grpc://127.0.0.1:{running.place.grpc}"}
        clients = {name: Client(url) for name, url in urls.items()}
        whole = clients["REST"].predict(files, model=model.name, layers="all")
        size = sum(cells.nbytes for one in whole for cells in one.maps.values())
        source = bytes(size)
        for number in range(options.rounds + 2):
            takes: dict[str, dict[str, float]] = {}
            for name, client in clients.items():
                moved = spent(running, client.predict, files, model=model.name, layers="all")
                takes[f"{name}, averaged to a cell"] = least = spent(
                    running, client.predict, files, model=model.name, layers="all", pool=1
                )
                takes[f"{name}, what whole maps add"] = {column: moved[column] - least[column] for column in COLUMNS}
            takes["floor: copied in memory"] = spent(None, bytearray, source)
            takes["floor: over the loopback device"] = spent(None, echo.receive, size)
            if number >= 2:  # A JVM compiles the first ones.
                for name, took in takes.items():
                    found.setdefault(name, []).append(took)
        for client in clients.values():
            client.close()
    print(f"{options.pictures} pictures, maps of {size / MIB:.0f} MiB, one worker; {options.rounds} rounds; ms")
    print(f"{machine.circumstances()}\n")
    print(f"| what | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, takes in found.items():
        print(f"| {name} | {' | '.join(cell([take.get(column) for take in takes]) for column in COLUMNS)} |")


def spent(running: Running | None, call: Callable[..., object], *given: Any, **options: Any) -> dict[str, float]:
    """Call, and return the milliseconds of the wall and of processors that it took."""
    used = machine.cpu_s(running.process.pid) if running else {}
    own, began = time.process_time(), time.perf_counter()
    call(*given, **options)
    took = {"wall": time.perf_counter() - began, "caller": time.process_time() - own}
    after = machine.cpu_s(running.process.pid) if running else {}
    names = {"java": "Java", "python": "Python"}
    took |= {names[kind]: after[kind] - used[kind] for kind in after}
    return {name: 1000 * value for name, value in took.items()}


def cell(values: list[float | None]) -> str:
    """Write a median with its range."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f} ({min(known):.0f} to {max(known):.0f})" if known else "–"


class Echo:
    """A process that sends as many bytes as it is asked for, over the loopback device."""

    def __enter__(self) -> Echo:
        listener = socket.create_server(("127.0.0.1", 0))
        self._process = multiprocessing.Process(target=_send, args=(listener,), daemon=True)
        self._process.start()
        self._socket = socket.create_connection(listener.getsockname())
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()

    def receive(self, size: int) -> bytearray:
        """Ask for and receive bytes."""
        self._socket.sendall(size.to_bytes(8))
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            view = view[self._socket.recv_into(view) :]
        return buffer


def _send(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    while count := connection.recv(8):
        connection.sendall(bytes(int.from_bytes(count)))


if __name__ == "__main__":
    main()
