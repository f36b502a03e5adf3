"""The models: each has a queue, and workers that take batches out of it.

A pipeline does one thing at a time, so each worker is a process of its own, as in TorchServe: archives cannot touch
each other, and one that crashes or hangs costs its batch. Requests that arrive while all workers are busy wait, and the
next free worker takes as many as the archive's `batchSize` allows. A free worker never waits for more, so
`maxBatchDelay` has no effect, as in a TorchServe that is patched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from handlers.wire import convscope_pb2 as wire
from server import devices
from server.children import describe_ending
from server.configuration import PrivateDirectory, worker_environment
from server.failures import Failure
from server.kserve import tensors
from server.kserve.arguments import Asked
from server.kserve.errors import Rejected
from server.kserve.worker import LENGTH, Head, pack
from server.models import Archive, describe_models
from server.reporting import Reporter

WORKER = Path(__file__).with_name("worker.py")
MOST_WAITING = 100  # Requests in a model's queue, as in TorchServe's.
READY_S = 10.0  # A model that takes longer for its card is not ready.
ENDING_S = 0.5  # From a worker's closed connection to its end.
CAUSES = ("late", "killed", "crash", "error")  # Of a worker's death, as on the TorchServe host.
FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
LONGEST_PAUSE_S = 60.0  # Between two starts of a worker that does not come up again.

T = TypeVar("T")
Parameters = Mapping[str, bytes | list[bytes]]


async def in_time(timeout_s: float, work: Awaitable[T]) -> T:
    """Return what the work returns.

    Raises:
        Rejected: It takes longer.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise Rejected("deadline_exceeded", f"there was no response within {timeout_s:g} s") from error


@dataclass(frozen=True)
class Reply:
    """What a handler responded: HTTP status, media type, body."""

    status: int
    media_type: str
    body: bytes


@dataclass(eq=False)
class Request:
    """A request that waits for its reply: its parameters and headers as TorchServe would pass them."""

    parameters: Parameters
    headers: Mapping[str, str]
    reply: asyncio.Future[Reply]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Worker:
    """A worker process that has loaded its archive.

    Args:
        process: The process.
        reader: Frames from the worker.
        writer: Frames to the worker.
        batch_size: Most requests in one batch.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        batch_size: int,
    ) -> None:
        self.process, self._reader, self._writer, self.batch_size = process, reader, writer, batch_size

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Worker:
        """Start a worker and wait until it has loaded its archive.

        Raises:
            Failure: It cannot, or takes too long.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                *("--socket", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,  # The handlers log there: a JSON object a line.
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer, 1)
        try:
            async with asyncio.timeout(timeout_s):
                head, _ = await worker._receive()
            if "failure" in head:
                raise Failure(str(head["failure"]))
        except BaseException as error:
            await worker.end()
            if isinstance(error, TimeoutError):
                raise Failure(f"its worker did not load it within {timeout_s:g} s") from error
            if isinstance(error, (OSError, EOFError)):
                raise Failure(f"its worker ended while loading (status {process.returncode})") from error
            raise
        worker.batch_size = head["batch_size"]
        return worker

    async def respond(self, batch: Sequence[Request]) -> list[Reply]:
        """Send a batch to the worker and return its replies.

        Raises:
            OSError, EOFError: The worker has ended.
        """
        described, blobs = list[Head](), list[bytes]()
        for request in batch:
            names: dict[str, int | None] = {}
            for name, value in request.parameters.items():
                names[name] = len(value) if isinstance(value, list) else None
                blobs += value if isinstance(value, list) else [value]
            described.append({"headers": dict(request.headers), "id": request.id, "names": names})
        self._writer.writelines(pack({"requests": described}, blobs))
        await self._writer.drain()
        head, bodies = await self._receive()
        return [Reply(**said, body=body) for said, body in zip(head["replies"], bodies, strict=True)]

    async def _receive(self) -> tuple[Head, list[bytes]]:
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        head, sizes = json.loads(await self._reader.readexactly(length))
        return head, [await self._reader.readexactly(size) for size in sizes]

    async def end(self) -> None:
        """End the process, whatever it is at."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Model:
    """One version of a model, its queue and its workers.

    Args:
        archive: The archive.
        commands: For each worker the command that starts it.
        environment: Of the workers.
        asked: What the server was asked to do.
        reporter: Is told what happens to workers.

    Attributes:
        archive: The archive.
        card: The model card; there once a worker has started.
        live: Workers that are up.
        deaths: Workers that have ended unasked, by cause.
    """

    def __init__(
        self,
        archive: Archive,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        asked: Asked,
        reporter: Reporter,
    ) -> None:
        self.archive, self.card, self.live, self.deaths = archive, wire.ModelCard(), 0, dict.fromkeys(CAUSES, 0)
        self._commands, self._environment, self._asked, self._say = commands, environment, asked, reporter.say
        self._waiting: deque[Request] = deque()
        self._arrival = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Requests that no worker has taken yet."""
        return len(self._waiting)

    @property
    def workers(self) -> int:
        """Workers that the model is meant to have."""
        return len(self._commands)

    async def start(self) -> None:
        """Start every worker, and have one respond with the model card.

        Raises:
            Failure: A worker cannot load the archive, or the model does not return its card.
        """
        loaded = [asyncio.get_running_loop().create_future() for _ in self._commands]
        self._tasks = [
            asyncio.create_task(self._keep(command, future))
            for command, future in zip(self._commands, loaded, strict=True)
        ]
        try:
            failures = [found for found in await asyncio.gather(*loaded, return_exceptions=True) if found]
            if failures:
                raise failures[0]
            self.card = await self.describe()
        except BaseException as error:
            await self.stop()
            if isinstance(error, Rejected):
                raise Failure(f"it does not respond with its model card ({error})") from error
            raise

    async def stop(self) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, parameters: Parameters, headers: Mapping[str, str]) -> Reply:
        """Queue a request and return the reply. Cancelling this removes the request from the queue.

        Args:
            parameters: As TorchServe passes them; a list for a repeated form field.
            headers: HTTP headers, names in lower case; empty for gRPC.

        Raises:
            Rejected: The queue is full, or the worker ended.
        """
        if len(self._waiting) >= MOST_WAITING:
            raise Rejected("overloaded", f"{MOST_WAITING} requests wait for {self.archive.name} already; try later")
        request = Request(parameters, headers, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        try:
            async with self._arrival:
                self._arrival.notify_all()  # A worker that is about to end may be among them.
            return await request.reply
        finally:
            request.reply.cancel()
            with contextlib.suppress(ValueError):  # A worker has taken it.
                self._waiting.remove(request)

    async def describe(self) -> wire.ModelCard:
        """Return the model card after one real forward pass: readiness.

        Raises:
            Rejected: The model is not ready.
        """
        answered = await in_time(READY_S, self.ask({"describe": b"true"}, {}))
        reply = wire.PredictReply.FromString(answered.body)
        if not reply.HasField("card"):
            raise Rejected(reply.error.code, reply.error.message)
        return reply.card

    async def _keep(self, command: Sequence[str], loaded: asyncio.Future[None]) -> None:
        """Have a worker respond to what is asked, and start another whenever it ends.

        Args:
            command: Starts it.
            loaded: Is told once it is up, or why it cannot start; then there is no other.
        """
        timeout_s = min(self._asked.settings.startup_timeout_s, self.archive.startup_timeout_s)
        pause_s = 1.0
        while True:
            try:
                worker = await Worker.start(command, self._environment, timeout_s)
            except Failure as failure:
                if not loaded.done():
                    loaded.set_exception(failure)
                    return
                self._say(f"Worker of {self.archive.full_name} does not start: {failure}", level="error")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if not loaded.done():
                loaded.set_result(None)
            pause_s = 1.0
            self.live += 1
            try:
                cause, why = await self._use(worker)
            finally:
                self.live -= 1
                await worker.end()
            self.deaths[cause] += 1
            self._say(f"Worker died: {self.archive.full_name}: {why}; it is started again", level="error")

    async def _use(self, worker: Worker) -> tuple[str, str]:
        """Give a worker batches until it ends; return the cause, one of `CAUSES`, and the same for people."""
        feeding, ended = asyncio.create_task(self._feed(worker)), asyncio.create_task(worker.process.wait())
        try:
            await asyncio.wait({feeding, ended}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({ended}, timeout=ENDING_S)
        finally:
            feeding.cancel()
            ended.cancel()
            results = await asyncio.gather(feeding, ended, return_exceptions=True)
        if isinstance(results[0], TimeoutError):
            return "late", f"it had not responded after {self.archive.response_timeout_s} s"
        status = worker.process.returncode or 0
        return "error" if status >= 0 else "crash" if -status in FATAL else "killed", describe_ending(status)

    async def _feed(self, worker: Worker) -> None:
        while True:
            batch = await self._next_batch(worker.batch_size)
            try:
                async with asyncio.timeout(self.archive.response_timeout_s):
                    replies = await worker.respond(batch)
            except BaseException:
                for request in batch:
                    if not request.reply.done():
                        died = Rejected("internal", "the worker ended before it had responded")
                        request.reply.set_exception(died)
                raise
            for request, reply in zip(batch, replies, strict=True):
                if not request.reply.done():
                    request.reply.set_result(reply)

    async def _next_batch(self, most: int) -> list[Request]:
        """Wait for a request, and return it and those that wait with it."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: self._waiting)
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]


class Models:
    """The models served, by name and version.

    Args:
        archives: Those to serve, the newest version of a model first.
        directory: Where archives are unpacked, metrics are written, and the drain file is.
        asked: What the server was asked to do.
        reporter: Is told what happens.

    Attributes:
        rejected: Archives that are not served, and why.
        started: When the server was started, unix time.
    """

    def __init__(
        self, archives: Sequence[Archive], directory: PrivateDirectory, asked: Asked, reporter: Reporter
    ) -> None:
        settings, gpus = asked.settings, devices.count_gpus(asked.settings.device)
        counts = [settings.workers or archive.workers or max(1, gpus) for archive in archives]
        environment = worker_environment(directory, settings, sum(counts), devices.count_cores(), os.environ)
        self.directory, self.rejected, self.started = directory, dict[str, str](), time.time()
        self._say, self._models, slot = reporter.say, list[Model](), 0
        for archive, count in zip(archives, counts, strict=True):
            folder = directory.path / "archives" / archive.full_name
            with zipfile.ZipFile(archive.path) as file:
                file.extractall(folder)
            commands = []
            for _ in range(count):
                gpu = ("--gpu", str(slot % gpus)) if gpus else ()
                # -P: this repository's own modules are not on the path, the archive's folder is.
                command = (sys.executable, "-P", str(WORKER), "--port", str(slot), "--archive", str(folder), *gpu)
                commands.append(command)
                slot += 1
            own = {**environment, "PYTHONPATH": str(folder)}
            self._models.append(Model(archive, commands, own, asked, reporter))

    @property
    def is_draining(self) -> bool:
        """Whether readiness fails since the server stops."""
        return self.directory.drain_file.exists()

    @property
    def is_up(self) -> bool:
        """Whether every model has a worker."""
        return all(model.live for model in self._models)

    async def start(self) -> None:
        """Start all models; one that does not start is left out.

        Raises:
            Failure: None starts.
        """
        results = await asyncio.gather(*(model.start() for model in self._models), return_exceptions=True)
        for model, result in zip(self._models, results, strict=True):
            if isinstance(result, Failure):
                self.rejected[model.archive.path.stem] = why = f"archive {model.archive.path.name}: {result}"
                self._say(f"Archive rejected: {why}", level="error")
            elif isinstance(result, BaseException):
                raise result
        self._models = [model for model in self._models if model.archive.path.stem not in self.rejected]
        if not self._models:
            raise Failure("no archive can be served")

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(model.stop() for model in self._models))

    def all(self) -> list[Model]:
        """Return every version of every model, the newest of each first."""
        return self._models

    def versions(self, name: str) -> list[Model]:
        """Return the versions of a model, the newest first.

        Raises:
            Rejected: There is no such model.
        """
        found = [model for model in self._models if model.archive.name == name]
        if not found:
            raise Rejected("model_not_found", f"Model not found{self._describe()}: {name[:100]}")
        return found

    def get(self, name: str, version: str = "") -> Model:
        """Return one version of a model, the newest unless it is named.

        Raises:
            Rejected: There is no such model or version.
        """
        for model in self.versions(name):
            if version in ("", model.archive.version):
                return model
        message = f"Model version: {version[:100]}{self._describe()} does not exist for model: {name[:100]}"
        raise Rejected("model_not_found", message)

    def _describe(self) -> str:
        return describe_models([model.archive for model in self._models])

    def describe(self, name: str, version: str = "") -> dict[str, Any]:
        """Return the metadata of a model, with the fields of v2.

        Raises:
            Rejected: There is no such model or version.
        """
        versions = [model.archive.version for model in self.versions(name)]
        return tensors.describe(self.get(name, version).card, versions)

    async def check(self, models: Sequence[Model] | None = None) -> None:
        """Ask models for their cards, all of them unless some are named: readiness.

        Raises:
            Rejected: One is not ready.
        """
        if self.is_draining:
            raise Rejected("draining", "the server is stopping; requests in flight finish, new ones go elsewhere")
        await asyncio.gather(*(model.describe() for model in models or self._models))
