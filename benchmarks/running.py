"""Starts a server, checks it against eager torch, warms it up, measures it and stops it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks import machine, models
from benchmarks.load import ROOT, Load, Outcome, Wire, measure
from benchmarks.models import Model
from benchmarks.servers import Place, Server, clean, environment, our_request
from benchmarks.wires import Grpc, Http, Reply
from benchmarks.workloads import Asked, Workload

_START_S = 120.0
_PAUSE_S = 0.05


class Running:
    """A running server, as a context manager.

    Args:
        server: The server's row of the table.
        model: The network that it serves.
        work: Folder for the server's own files.
        workers: Number of workers.
        settings: For the floor: the settings of our workers (`worker_settings`).
    """

    def __init__(
        self, server: Server, model: Model, work: Path, workers: int, settings: Mapping[str, str] | None = None
    ) -> None:
        self.server = server
        ports = tuple(free_port() for _ in range(5))
        name = "".join(character if character.isalnum() else "-" for character in server.name)
        self.place = Place(model, work / f"run-{name}", workers, ports[0], ports[1], ports[2:], settings or {})
        self.first_answer_s = float("nan")
        self._sizes: dict[tuple[Asked, Wire], int] = {}
        self._stopped: list[psutil.Process] = []
        self._slack = 64 if server.kind == "ours" else 0

    def __enter__(self) -> Running:
        clean(self.place)
        self.place.folder.mkdir(parents=True)
        began = time.perf_counter()
        with (self.place.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                self.server.command(self.place),
                cwd=ROOT,
                env=environment(self.server, self.place),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.server.kind == "floor" else log,
                stderr=log,
                text=True,
            )
        try:
            self._await_answer()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self.first_answer_s = time.perf_counter() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for process in psutil.wait_procs(self._stopped, timeout=15)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if error is None:
            clean(self.place)

    def stop(self) -> None:
        """Signal all its processes to stop, since some do not stop their children, and do not wait."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            self._stopped = self._stopped or [root, *root.children(recursive=True)]
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def can(self, workload: Workload) -> bool:
        """Return whether it takes part in a workload."""
        if not fnmatch(workload.name, self.server.only):
            return False
        if self.server.kind == "floor":
            return workload.share is None
        return self.server.ask(self.place, workload.asked, workload.wire) is not None

    def worker_settings(self) -> dict[str, str]:
        """Return the variables that decide how a worker of our launcher works: threads, engine, memory allocation."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("model_service_worker" in word for word in process.cmdline()):
                    chosen = ("CONVSCOPE_", "OMP_", "MKL_", "MALLOC_")
                    files = ("CONVSCOPE_DRAIN_FILE", "CONVSCOPE_STARTING_FILE")
                    variables = process.environ().items()
                    return {key: value for key, value in variables if key.startswith(chosen) and key not in files}
        raise RuntimeError("our launcher has no worker")

    def ask(self, message: bytes, wire: Wire, timeout_s: float = 60.0) -> Reply:
        """Send one request, on a connection of its own."""
        caller: Http | Grpc
        caller = Http(("127.0.0.1", self.place.rest)) if wire == "REST" else Grpc(("127.0.0.1", self.place.grpc))
        caller.socket.settimeout(timeout_s)
        with caller.socket:
            return ask_on(caller, message)

    def warm_up(self, workloads: Iterable[Workload]) -> None:
        """Hold a reply of each kind to eager torch and remember its size; run each until the server is at its speed.

        Raises:
            AssertionError: A reply is wrong.
        """
        if self.server.kind == "floor":
            return
        kinds = dict.fromkeys((one.asked, one.wire) for one in workloads if self.can(one))
        for asked, wire in kinds:
            message = self.server.ask(self.place, asked, wire)
            assert message is not None
            reply = self.ask(message, wire)
            assert reply.status == 200, f"{self.server.name}: {reply.status} {bytes(reply.body[:300])!r}"
            self._compare(bytes(reply.body), asked, wire)
            self._sizes[asked, wire] = len(reply.body)
        for asked, wire in kinds:  # A JVM compiles the code of each kind anew.
            needed = self.server.warm_up_s / (2 if asked.photograph else 1)  # Java sees fewer bytes a second otherwise.
            self.load(Workload("warm-up", asked, 8 if asked.pictures == 1 else 2, wire), max(0.5, needed / len(kinds)))

    def take(self, workload: Workload, seconds: float) -> dict[str, Any]:
        """Measure a workload once."""
        rate = None
        if workload.share is not None:
            pilot = self.load(replace(workload, callers=32, share=None), max(1.0, seconds / 2))
            rate = workload.share * len(pilot.latencies) / pilot.wall_s
        others = machine.Interval()
        before = machine.cpu_s(self.process.pid)
        if self.server.kind == "floor":
            outcome = self._run_floor(workload.asked, seconds)
        else:
            outcome = self.load(workload, seconds, rate)
        used = {name: spent - before.get(name, 0.0) for name, spent in machine.cpu_s(self.process.pid).items()}
        steal, foreign = others.end(sum(used.values()) + outcome.cpu_s)
        return {
            "server": self.server.name,
            "workload": workload.name,
            "latencies": outcome.latencies,
            "pictures": workload.asked.pictures,
            "wall_s": outcome.wall_s,
            "rate": rate,
            "cpu_s": used,
            "load_cpu_s": outcome.cpu_s,
            "body_bytes": outcome.body_bytes,
            "errors": dict(outcome.errors),
            "steal": steal,
            "foreign": foreign,
        }

    def load(self, workload: Workload, seconds: float, rate: float | None = None) -> Outcome:
        """Run a workload's load against this server, and check the replies that were kept."""
        message = self.server.ask(self.place, workload.asked, workload.wire)
        assert message is not None
        address = "127.0.0.1", self.place.grpc if workload.wire == "gRPC" else self.place.rest
        size = self._sizes.get((workload.asked, workload.wire))
        outcome = measure(Load(address, workload.wire, message, workload.callers, seconds, size, self._slack, rate))
        for body in outcome.kept:
            try:
                self._compare(body, workload.asked, workload.wire)
            except AssertionError as error:
                outcome.errors[f"wrong content: {error}"] += 1
        outcome.kept.clear()
        return outcome

    def _compare(self, body: bytes, asked: Asked, wire: Wire) -> None:
        found = self.server.read(self.place.model, body, asked, wire)
        models.check(found, self.place.model, asked, scaled=self.server.scaled)

    def _run_floor(self, asked: Asked, seconds: float) -> Outcome:
        body = self.place.folder / "body"
        body.write_bytes(our_request(self.place.model, asked))
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"body": str(body), "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        return Outcome(array("d", said["latencies"]), said["wall_s"])

    def _await_answer(self) -> None:
        deadline = time.perf_counter() + _START_S
        if self.server.kind == "floor":
            assert self.process.stdout
            select.select([self.process.stdout], (), (), _START_S)
            if self.process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{self.server.name} did not start:\n{self._log()}")
            return
        message = self.server.ask(self.place, Asked("scores", 1, next(iter(self.place.model.pictures))), "REST") or b""
        steps = [self.server.probe(self.place)] if self.server.probe else []
        steps += [message] if message else []
        while steps:
            if self.process.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"{self.server.name} did not start:\n{self._log()}")
            try:
                if self.ask(steps[0], "REST", timeout_s=5.0).status == 200:
                    steps.pop(0)
                    continue
            except OSError:
                pass
            time.sleep(_PAUSE_S)

    def _log(self) -> str:
        return (self.place.folder / "log").read_text(errors="replace")[-3000:]


def ask_on(wire: Http | Grpc, message: bytes) -> Reply:
    """Send a request on a connection and wait for the whole reply."""
    wire.send(message)
    while (reply := wire.receive()) is None:
        pass
    return reply


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
