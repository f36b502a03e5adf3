"""One run of the server, from the settings until the last process has ended.

KServe's own `ModelServer` (0.21) is not used: it always listens on every address, lets any caller unload a model,
rejects versions, and decodes pictures as text. Its types, codecs and gRPC service run here in servers of uvicorn and
grpcio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import uvicorn

from server import ports
from server.arguments import MEGABYTE, Settings
from server.configuration import flush_s, private_directory
from server.control import Control, Reloader
from server.failures import Failure
from server.kserve import rest, rpc
from server.kserve.models import Models
from server.models import Archive, Files, Found
from server.reporting import Reporter, write

MOST_CONNECTIONS = 1024  # Including idle ones; requests on further ones get 503.
PAUSE_S = 0.1  # Between two checks of the event loop's result.
KEEP_ALIVE_S = 65  # Longer than proxies keep an idle connection.


def run(settings: Settings, found: Found, reporter: Reporter) -> bool:
    """Serve until a signal arrives.

    Args:
        settings: The settings.
        found: The archives to serve.
        reporter: Reports what happens.

    Returns:
        Whether it stopped cleanly, and not at once with requests in flight.

    Raises:
        Failure: The server cannot start.
    """
    with private_directory(settings.work_dir, None, for_java=False) as directory:
        models = Models(found.archives, directory, settings, reporter)
        models.rejected |= found.rejected
        try:
            asyncio.run(_serve(settings, models, found.files, reporter))
        except asyncio.CancelledError:
            return not directory.drain_file.exists()
    return True


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `_serve`."""
        yield


async def _serve(settings: Settings, models: Models, files: Files, reporter: Reporter) -> None:
    started, host = time.monotonic(), ports.resolve_host(settings.host)
    http_port = ports.claim_port(host, settings.rest_port, "--http-port")
    grpc_port = ports.claim_port(host, settings.grpc_port, "--grpc-port")
    ready, stop, task = asyncio.Event(), asyncio.Event(), asyncio.current_task()
    assert task is not None  # noqa: S101  # For the types.

    def on_signal() -> None:
        if stop.is_set() or not ready.is_set():
            task.cancel()  # The second signal, or one before the server is ready, stops at once.
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    control: Control | None = None
    try:
        await models.start()
        reloader = Reloader(Versions(models, asyncio.get_running_loop()), settings, reporter)
        most_bytes, timeout_s = settings.max_request_mb * MEGABYTE, settings.timeout_s
        app = rest.build_app(models, max_request_bytes=most_bytes, timeout_s=timeout_s)
        config = uvicorn.Config(
            app,
            host,
            http_port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        )
        http = _HttpServer(config)
        grpc = rpc.Server(
            models,
            f"{host}:{grpc_port}",
            max_request_bytes=most_bytes,
            max_reply_bytes=settings.max_reply_mb * MEGABYTE,
            timeout_s=timeout_s,
        )
        await grpc.start()
        serving = asyncio.create_task(http.serve())
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        control = Control(reloader, models.directory, settings, files)
        _announce(models, ports.reachable(host), http_port, grpc_port, time.monotonic() - started)
        ready.set()
        await asyncio.wait({serving, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        models.directory.drain_file.touch()
        await asyncio.to_thread(control.close)
        control = None
        reporter.say(f"stopping: requests in flight get {settings.drain_s:g} s; send the signal again to stop at once")
        await asyncio.sleep(settings.unready_s)
        http.should_exit = True
        await asyncio.gather(serving, grpc.stop(settings.drain_s))
        await asyncio.sleep(flush_s(os.environ))
    finally:
        if control is not None:
            await asyncio.to_thread(control.close)
        await models.stop()


class Versions:
    """Changes the models from another thread; implements `control.Host`.

    Args:
        models: The models served.
        loop: Their event loop.
    """

    why_not: str | None = None

    def __init__(self, models: Models, loop: asyncio.AbstractEventLoop) -> None:
        self.rejected, self.stopping = models.rejected, threading.Event()
        self._models, self._loop = models, loop

    def served(self) -> list[Archive]:
        """Return the archives served, of several versions of a model the newest first."""
        return [model.archive for model in self._models.all()]

    def take_in(self, archive: Archive) -> None:
        """Load an archive and wait until it has responded with its card.

        Raises:
            Failure: The archive does not respond with its card; it is removed completely.
        """
        self._run(self._models.take_in(archive))

    def serve(self, archives: Sequence[Archive]) -> None:
        """Serve these archives; of several versions of a model, the first is the default."""

        async def serve() -> None:
            self._models.serve(archives)

        self._run(serve())

    def retire(self, archive: Archive) -> None:
        """End the workers of an archive once they have responded to all their requests."""
        self._run(self._models.retire(archive))

    def forget(self, found: Found) -> None:
        """Do nothing: this host does not retry rejected archives."""

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return running.result(PAUSE_S)
            except TimeoutError:
                if self.stopping.is_set() and running.cancel():
                    raise Failure("the server is stopping") from None


def _announce(models: Models, host: str, http_port: int, grpc_port: int, seconds: float) -> None:
    url, names = f"http://{host}:{http_port}", [model.archive.full_name for model in models.all()]
    lines = (
        f"Ready after {seconds:.1f} s, in KServe's model server.",
        f"  REST     {url}/v2, {url}/predictions",
        f"  gRPC     {host}:{grpc_port}",
        f"  metrics  {url}/metrics",
        f"  models   {', '.join(names)}",
        "Ctrl-C stops it.",
    )
    write("\n".join(lines), sys.stdout)
