"""What the tests of the server share: archives of a few lines, and the launcher as a process."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from server.trust import DIGESTS

ROOT = Path(__file__).parents[2]

OBEDIENT = """
import json, os, pathlib, time

class Handler:
    def initialize(self, context):
        self.name = context.manifest["model"]["modelName"]
        self.version = context.manifest["model"]["modelVersion"]

    def handle(self, rows, context):
        return [self.answer(bytes(row.get("body") or row.get("data") or b"").decode(errors="replace")) for row in rows]

    def answer(self, order):
        verb, _, argument = order.partition(":")
        if verb == "sleep":
            started, seconds = argument.split(",")
            pathlib.Path(started).touch()
            time.sleep(float(seconds))
            return b"slept"
        if verb == "wait":
            pathlib.Path(argument + ".begun").touch()
            while not pathlib.Path(argument).exists():
                time.sleep(0.01)
            return b"waited"
        if verb == "compute":
            end = time.monotonic() + float(argument)
            while time.monotonic() < end:  # A tenth of the time, ten times what counts as idle.
                sum(range(100_000))
                time.sleep(0.02)
            return b"computed"
        if verb == "complain":
            code, count = argument.split(",")
            entry = {"time": "now", "level": "warning", "model": self.name, "version": self.version, "code": code}
            for number in range(int(count)):
                print(json.dumps({**entry, "transport": "rest", "request_id": str(number), "message": "no"}))
            return b"complained"
        if verb == "bytes":
            return b"x" * int(argument)
        if verb == "environment":
            return repr(os.environ.get(argument)).encode()
        if verb == "path":
            import sys
            return "\\n".join(sys.path).encode()
        if verb == "pid":
            return str(os.getpid()).encode()
        if verb == "die":
            raise SystemExit
        return f"{self.name} {self.version}".encode()
"""

CAREFUL = """
import json, os, pathlib

class Handler:
    def initialize(self, context):
        self.starting = pathlib.Path(os.environ["CONVSCOPE_STARTING_FILE"])
        self.seen = []

    def handle(self, rows, context):
        answers = []
        for index, row in enumerate(rows):
            starting = self.starting.exists()
            order = bytes(row.get("body") or b"")
            if order == b"seen":
                answers.append(json.dumps(self.seen).encode())
                continue
            if not order and "data" not in row and starting:
                context.set_response_status(503, "Service Unavailable", index)
                answers.append(json.dumps({"error": {"code": "draining", "message": "warming up"}}).encode())
                continue
            headers = context.get_all_request_header(index)
            transport = "REST" if "host" in map(str.lower, headers) else "gRPC"
            kind = "card" if not order and "data" not in row else transport
            self.seen.append([kind, starting])
            answers.append(b"ok")
        return answers
"""


def write_archive(
    store: Path,
    name: str,
    handler: str = OBEDIENT,
    *,
    version: str = "1.0",
    file: str | None = None,
    config: str | None = None,
    handler_file: str = "entry.py",
) -> Path:
    """Write a `.mar` with one handler file and the list of digests, and return its path."""
    model = {"modelName": name, "modelVersion": version, "handler": handler_file}
    members = {"entry.py": handler}
    if config is not None:
        model["configFile"] = "model-config.yaml"
        members["model-config.yaml"] = config
    members["MAR-INF/MANIFEST.json"] = json.dumps({"runtime": "python", "model": model})
    return write_members(store / f"{file or name}.mar", [*members.items(), (DIGESTS, list_digests(members))])


def list_digests(members: Mapping[str, str]) -> str:
    """Return what `sha256sum` would print of files by name."""
    return "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in members.items())


def write_members(path: Path, members: Iterable[tuple[str | zipfile.ZipInfo, str]]) -> Path:
    """Write a zip file with these members, of which none is checked, and return its path."""
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a name that is there twice.
        for member, text in members:
            archive.writestr(member, text)
    return path


def poll(condition: Callable[[], object], timeout_s: float = 30.0, pause_s: float = 0.02) -> object:
    """Wait until a condition holds and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (held := condition()):
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(pause_s)
    return held


@contextlib.contextmanager
def seen(observe: Callable[[], object], pause_s: float = 0.01) -> Iterator[list[object]]:
    """Observe again and again in another thread, so that no passing state is missed, and collect what was seen."""
    done, found = threading.Event(), []

    def observe_until_done() -> None:
        found.append(observe())
        while not done.wait(pause_s):  # States last for longer, and what is tested needs a processor too.
            found.append(observe())

    with ThreadPoolExecutor(1) as pool:
        observing = pool.submit(observe_until_done)
        try:
            yield found
        finally:
            done.set()
        observing.result()


def processes(text: str) -> list[int]:
    """Return the processes, zombies apart, whose command line holds a text."""
    found = []
    for folder in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and text.encode() in Path(folder, "cmdline").read_bytes().replace(b"\0", b" "):
                found.append(int(folder.name))
    return found


class Launched:
    """`python -m server` as a process of its own, on free ports, with its private directory in `work`.

    With `deaf` whatever it says is lost, on a disk that is full.
    """

    python = sys.executable
    # Java's first compiler alone, and a heap that is touched when it is needed: a start takes a third less of the
    # processor. Nothing here asks how fast Java becomes. Java reads them after its command line.
    java_options = "-XX:TieredStopAtLevel=1 -XX:-AlwaysPreTouch"

    def __init__(
        self,
        store: Path,
        work: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        deaf: bool = False,
        workers: int | None = 1,
    ) -> None:
        self.work = work
        # Seldom watched and not warmed up: what a test counts is its own requests, and two seconds a start add up.
        # Tests of watching, warming up and several workers pass their own options, which come later in the command.
        ports = ("--rest-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--device", "cpu")
        ports += ("--watch-s", "3600", "--warm-up-s", "0")
        ports += () if workers is None else ("--workers", str(workers))
        command = [
            self.python,
            "-m",
            "server",
            "--model-store",
            str(store),
            "--work-dir",
            str(work),
            *ports,
            *options,
        ]
        if deaf:
            command = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", *command]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "",  # As a user has it.
                "_JAVA_OPTIONS": self.java_options,
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: dict[str, list[str]] = {"out": [], "err": []}
        self._readers = [
            threading.Thread(
                target=lambda pipe, said: said.extend(iter(pipe.readline, "")), args=(pipe, said), daemon=True
            )
            for pipe, said in ((self.process.stdout, self._said["out"]), (self.process.stderr, self._said["err"]))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def out(self) -> str:
        return "".join(self._said["out"])

    @property
    def err(self) -> str:
        return "".join(self._said["err"])

    def await_ready(self) -> Launched:
        poll(lambda: "Ctrl-C stops it." in self.out or self._ready_entry() or self.process.poll() is not None, 240)
        assert self.process.poll() is None, self.err
        return self

    def end(self, timeout_s: float = 60) -> int:
        """Wait for the exit status."""
        status = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return status

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def descendants(self) -> list[int]:
        """Return Java, the workers and the exporter: their command lines name the private directory."""
        return [pid for pid in processes(str(self.work)) if pid != self.process.pid]

    def workers(self) -> list[int]:
        return sorted(processes(f"--sock-name {self.work}"))

    def java(self) -> int:
        (pid,) = processes(f"-Djava.io.tmpdir={self.work}")
        return pid

    def port(self, what: str) -> int:
        if entry := self._ready_entry():
            return int(re.findall(r":(\d+)", entry[what.lower()])[0])
        match = re.search(rf"{what} +(?:http://)?[\d.]+:(\d+)", self.out)
        assert match, self.out
        return int(match[1])

    def _ready_entry(self) -> dict[str, str] | None:
        """Return what it says with --log-format json once it is ready."""
        lines = [line for line in list(self._said["err"]) if '"message": "ready"' in line]
        return json.loads(lines[0]) if lines else None

    def rest(self, model: str, order: str = "") -> bytes:
        """Ask over REST; raises AssertionError unless the answer is 200."""
        status, body = self.ask("POST" if order else "GET", f"/predictions/{model}", order)
        assert status == 200, body
        return body

    def ask(
        self, method: str, path: str, body: str = "", what: str = "REST", *, timeout_s: float = 60.0
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port(what), timeout=timeout_s)
        try:
            connection.request(method, path, body.encode() or None, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def grpc(self, model: str, order: str = "", *, version: str = "") -> bytes:
        """Ask over gRPC, with the message written by hand: PredictionsRequest{1: name, 2: version, 3: data}."""
        entry = _field(1, b"data") + _field(2, order.encode())
        request = _field(1, model.encode()) + _field(2, version.encode()) + _field(3, entry)
        with grpc.insecure_channel(f"127.0.0.1:{self.port('gRPC')}") as channel:
            call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
            reply: bytes = call(request, timeout=60)
        assert reply[0] == 0x0A, "field 1, length-delimited"
        return reply[2:] if len(reply) < 130 else reply

    def close(self) -> None:
        """Stop by force whatever is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.end()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


def _field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


@contextlib.contextmanager
def launched(
    store: Path,
    work: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    deaf: bool = False,
    workers: int | None = 1,
) -> Iterator[Launched]:
    server = Launched(store, work, *options, environment=environment, deaf=deaf, workers=workers)
    try:
        yield server
    finally:
        server.close()
