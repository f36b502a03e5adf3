"""The models: each has a queue, and workers that take batches out of it.

A pipeline does one thing at a time, so each worker is a process of its own, as in TorchServe: archives do not affect
each other, and a worker that crashes or hangs loses only its batch. Requests that arrive while all workers are busy are
queued, and the next free worker takes as many as the archive's `batchSize` allows. A free worker never waits for more,
so `maxBatchDelay` has no effect, as in a patched TorchServe.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from handlers.wire import convscope_pb2 as wire
from server import devices
from server.arguments import Settings
from server.children import describe_ending
from server.configuration import PrivateDirectory, count_workers, default_workers, worker_environment
from server.control import check_room, unpack
from server.failures import Failure
from server.kserve import tensors
from server.kserve.errors import Rejected
from server.kserve.worker import LENGTH, Head, pack
from server.models import Archive, describe_models
from server.reporting import Reporter

WORKER = Path(__file__).with_name("worker.py")
MOST_WAITING = 100  # Requests in a model's queue, as in TorchServe.
READY_S = 10.0  # A model that takes longer for its card is not ready.
ENDING_S = 0.5  # From a worker's closed connection to the end of its process.
CAUSES = ("late", "killed", "crash", "error")  # Of a worker's death, as on the TorchServe host.
FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
PAUSE_S = 0.05  # Between two checks of the requests that use a model.
LONGEST_PAUSE_S = 60.0  # Between two starts of a worker that fails to start.

T = TypeVar("T")
Parameters = Mapping[str, bytes | list[bytes]]


async def in_time(timeout_s: float, work: Awaitable[T]) -> T:
    """Return the result of an awaitable.

    Raises:
        Rejected: It takes longer than `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise Rejected("deadline_exceeded", f"there was no response within {timeout_s:g} s") from error


@dataclass(frozen=True)
class Reply:
    """A handler's response: HTTP status, media type, body."""

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
        """Kill the process."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Model:
    """One version of a model, its queue and its workers.

    Args:
        archive: The archive.
        folder: Where it is unpacked.
        commands: For each worker the command that starts it.
        slots: For each worker its number, which is part of the names of its metrics files.
        environment: Environment of the workers.
        settings: The settings.
        reporter: Reports what happens to workers.

    Attributes:
        archive: The archive.
        card: The model card; empty until a worker has started.
        users: Number of requests that use the model, from the moment that they found it.
        folder, slots: As given.
        deaths: Number of workers that ended unexpectedly, by cause.
    """

    def __init__(
        self,
        archive: Archive,
        folder: Path,
        commands: Sequence[Sequence[str]],
        slots: Sequence[int],
        environment: Mapping[str, str],
        settings: Settings,
        reporter: Reporter,
    ) -> None:
        self.archive, self.card, self.deaths = archive, wire.ModelCard(), dict.fromkeys(CAUSES, 0)
        self._commands, self._settings, self._say = commands, settings, reporter.say
        self._environment = {**environment, "PYTHONPATH": str(folder)}
        self.users, self.folder, self.slots = 0, folder, slots
        self._waiting: deque[Request] = deque()
        self._arrival = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[Worker] = []

    @property
    def live(self) -> int:
        """Number of workers that are running."""
        return len(self._workers)

    @property
    def waiting(self) -> int:
        """Number of requests that no worker has taken yet."""
        return len(self._waiting)

    @property
    def workers(self) -> int:
        """Number of workers that the model should have."""
        return len(self._commands)

    async def start(self) -> None:
        """Start every worker, and get the model card from one of them.

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
        self.users += 1
        self._waiting.append(request)
        try:
            async with self._arrival:
                self._arrival.notify_all()  # A worker that is about to end may be among them.
            return await request.reply
        finally:
            self.users -= 1
            request.reply.cancel()
            with contextlib.suppress(ValueError):  # A worker has taken it.
                self._waiting.remove(request)

    async def wait_until_unused(self) -> None:
        """Wait until no request uses the model; `timeout_s` ends each of them."""
        while self.users:
            await asyncio.sleep(PAUSE_S)

    def processes(self) -> list[int]:
        """Return the process ids of its running workers."""
        return [worker.process.pid for worker in self._workers]

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
        """Run a worker, and start another one whenever it ends.

        Args:
            command: Command that starts it.
            loaded: Set once the first worker has started; or to its failure, after which no other is started.
        """
        timeout_s = min(self._settings.startup_timeout_s, self.archive.startup_timeout_s)
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
            self._workers.append(worker)
            try:
                cause, why = await self._use(worker)
            finally:
                self._workers.remove(worker)
                await worker.end()
            self.deaths[cause] += 1
            self._say(f"Worker died: {self.archive.full_name}: {why}; it is started again", level="error")

    async def _use(self, worker: Worker) -> tuple[str, str]:
        """Send batches to a worker until it ends; return the cause, one of `CAUSES`, and a description."""
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
        archives: The archives to serve, the newest version of a model first.
        directory: The private directory, for unpacked archives, metrics and the drain file.
        settings: The settings.
        reporter: Reports what happens.

    Attributes:
        rejected: Archives that are not served, and why.
        started: When the server was started, unix time.
    """

    def __init__(
        self, archives: Sequence[Archive], directory: PrivateDirectory, settings: Settings, reporter: Reporter
    ) -> None:
        self._gpus = devices.count_gpus(settings.device)
        cores = devices.count_cores()
        self._default_workers = default_workers(len(archives), self._gpus, cores)
        workers = sum(count_workers(archive, settings, self._default_workers) for archive in archives)
        self._environment = worker_environment(directory, settings, workers, cores, os.environ)
        self.directory, self.rejected, self.started = directory, dict[str, str](), time.time()
        self._settings, self._reporter, self._say = settings, reporter, reporter.say
        self._slots, self._folders, self._leftovers = itertools.count(), itertools.count(1), list[Path]()
        self._archives, self._models, self._loaded = archives, list[Model](), dict[Archive, Model]()

    @property
    def is_draining(self) -> bool:
        """Whether readiness fails because the server is stopping."""
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
        results = await asyncio.gather(*map(self._load, self._archives), return_exceptions=True)
        for archive, result in zip(self._archives, results, strict=True):
            if isinstance(result, Failure):
                self.rejected[archive.path.stem] = str(result)
                self._say(f"Archive rejected: {result}", level="error")
            elif isinstance(result, BaseException):
                raise result
        self.serve([archive for archive in self._archives if archive in self._loaded])
        if not self._models:
            raise Failure("no archive can be served")

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(model.stop() for model in self._loaded.values()))

    async def take_in(self, archive: Archive) -> None:
        """Load an archive beside those that are served.

        Raises:
            Failure: It cannot be loaded, or memory or disk do not suffice; nothing is left of it.
        """
        for path in self._leftovers:  # Metrics of workers that ended at the last reload, scraped by now.
            path.unlink(missing_ok=True)
        self._leftovers = []
        check_room(
            archive,
            count_workers(archive, self._settings, self._default_workers),
            (process for model in self._models for process in model.processes()),
            (process for model in self._models if model.archive.name == archive.name for process in model.processes()),
            self.directory.path,
        )
        await self._load(archive)

    def serve(self, archives: Sequence[Archive]) -> None:
        """Serve these archives, all of which are loaded; of several versions of a model, the first is the default."""
        self._models = [self._loaded[archive] for archive in archives]

    async def retire(self, archive: Archive) -> None:
        """End the workers of an archive that is no longer served, once no request uses it."""
        model = self._loaded[archive]
        await model.wait_until_unused()
        await model.stop()
        del self._loaded[archive]
        self._remove(model)

    async def _load(self, archive: Archive) -> None:
        """Unpack an archive and start its workers.

        Raises:
            Failure: It cannot be unpacked, a worker cannot load it, or it does not respond with its card.
        """
        folder = self.directory.path / "archives" / f"{next(self._folders)}-{archive.name}-{archive.version}"
        await asyncio.to_thread(unpack, archive, folder, self._settings.require_signature)
        commands, slots = [], []
        for _ in range(count_workers(archive, self._settings, self._default_workers)):
            slots.append(slot := next(self._slots))
            gpu = ("--gpu", str(slot % self._gpus)) if self._gpus else ()
            # -P: this repository's own modules are not on the path, the archive's folder is.
            commands.append((sys.executable, "-P", str(WORKER), "--port", str(slot), "--archive", str(folder), *gpu))
        model = Model(archive, folder, commands, slots, self._environment, self._settings, self._reporter)
        try:
            await model.start()
        except BaseException as failure:
            self._remove(model)
            if isinstance(failure, Failure):
                raise Failure(f"archive {archive.path.name}: {failure}") from failure
            raise
        self._loaded[archive] = model

    def _remove(self, model: Model) -> None:
        """Remove the files of a model whose workers have ended."""
        for slot in model.slots:
            self._leftovers += self.directory.metrics.glob(f"*_slot{slot}.db")
        shutil.rmtree(model.folder, ignore_errors=True)

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

    @contextlib.contextmanager
    def use(self, name: str, version: str = "") -> Iterator[Model]:
        """Yield one version of a model, the newest unless it is named; it is not unloaded during the block.

        Raises:
            Rejected: There is no such model or version.
        """
        model = self.get(name, version)
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    def describe(self, name: str, version: str = "") -> dict[str, Any]:
        """Return the metadata of a model, with the fields of v2.

        Raises:
            Rejected: There is no such model or version.
        """
        versions = [model.archive.version for model in self.versions(name)]
        return tensors.describe(self.get(name, version).card, versions)

    async def check(self, models: Sequence[Model] | None = None) -> None:
        """Request the cards of models, by default of all: readiness.

        Raises:
            Rejected: One is not ready.
        """
        if self.is_draining:
            raise Rejected("draining", "the server is stopping: send new requests to another replica")
        await asyncio.gather(*(model.describe() for model in models or self._models))
