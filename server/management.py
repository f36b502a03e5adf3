"""Client of TorchServe's management API over its unix socket: describe, scale, register and unregister models."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from server.fetching import fetch
from server.models import Archive


class Worker(NamedTuple):
    """A worker, as TorchServe describes it now.

    Attributes:
        pid: Id of its process, or of its last one; -1 before the first.
        ready: Whether it has loaded the model and runs, as far as TorchServe knows.
        slot: TorchServe's number of the worker, which is part of the names of its metrics files
            (`handlers.ops.metrics`).
    """

    pid: int
    ready: bool
    slot: str = ""


@dataclass(frozen=True)
class ModelState:
    """One version of a model, as TorchServe describes it now.

    Attributes:
        workers: Number of workers that it should have.
        most: Number of workers that it may have.
        found: The workers that it has.
        pending: Number of requests that wait for a worker, without those that a worker has taken.
        batch_delay_s: Longest time a request waits for others to join its batch, in seconds.
    """

    workers: int
    most: int
    found: tuple[Worker, ...]
    pending: int
    batch_delay_s: float

    @property
    def loaded(self) -> int:
        """Number of workers that have loaded the model, as far as TorchServe knows."""
        return sum(worker.ready for worker in self.found)


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Management:
    """TorchServe's management API.

    Args:
        path: Its unix socket.
        timeout_s: Time limit of each request, in seconds.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def describe(self, name: str, version: str) -> ModelState | None:
        """Describe one version of a model; None if TorchServe does not answer."""
        answer = self._ask("GET", f"/models/{name}/{version}")
        if not isinstance(answer, list) or not answer:
            return None
        model = answer[0]
        return ModelState(
            workers=model["minWorkers"],
            most=model["maxWorkers"],
            found=tuple(
                Worker(worker["pid"], worker["status"] == "READY", worker.get("id", "")) for worker in model["workers"]
            ),
            pending=model["jobQueueStatus"]["pendingRequests"],
            batch_delay_s=model["maxBatchDelay"] / 1000,
        )

    def scale(self, archive: Archive, workers: int, most: int | None = None) -> bool:
        """Set the number of workers; `describe` shows when they are running.

        Args:
            archive: The model.
            workers: Number of workers.
            most: Largest number of workers; None for `workers`.

        Returns:
            Whether TorchServe accepted the request.
        """
        scale = f"min_worker={workers}&max_worker={workers if most is None else most}"
        return self._ask("PUT", f"/models/{archive.full_name}?{scale}") is not None

    def register(self, folder: Path, workers: int) -> str | None:
        """Register an unpacked archive; `describe` shows when its workers are running.

        TorchServe gets a folder instead of the file, which it would unpack in a thread that requests need, and delete
        when the model is unregistered.

        Args:
            folder: Folder of the unpacked archive.
            workers: Number of workers, unless the archive sets it.

        Returns:
            Why TorchServe rejected the archive; None if it did not.
        """
        asked = urllib.parse.urlencode({"url": folder, "initial_workers": workers, "synchronous": "false"})
        return self._tell("POST", f"/models?{asked}")

    def unregister(self, archive: Archive) -> str | None:
        """Unregister a version, which gets no more requests; return why TorchServe rejected that, or None.

        A patched TorchServe (`server.patches`, reload) lets the workers finish; without the patch it kills them.
        """
        return self._tell("DELETE", f"/models/{archive.full_name}")

    def set_default(self, archive: Archive) -> str | None:
        """Make a version the default, for requests that name none; return why TorchServe rejected that, or None."""
        return self._tell("PUT", f"/models/{archive.full_name}/set-default")

    def describe_all(self, archives: Sequence[Archive]) -> list[ModelState] | None:
        """Describe several models; None if any of them is not described."""
        states = []
        for archive in archives:
            if (state := self.describe(archive.name, archive.version)) is None:
                return None  # The others would probably time out too.
            states.append(state)
        return states

    def _ask(self, method: str, path: str) -> Any:
        try:
            status, body = self._fetch(method, path)
            return json.loads(body) if status < 300 else None
        except (OSError, ValueError):
            return None

    def _tell(self, method: str, path: str) -> str | None:
        try:
            status, body = self._fetch(method, path)
        except OSError as error:
            return f"its management API does not answer ({error})"
        if status < 300:
            return None
        try:
            return str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            return f"its management API answers {status}"

    def _fetch(self, method: str, path: str) -> tuple[int, bytes]:
        return fetch(UnixConnection(self._path, self._timeout_s), path, self._timeout_s, method=method)
