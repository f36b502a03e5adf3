"""TorchServe's management API, over its unix socket: describe, scale, register and unregister models."""

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
        pid: Its process, or the last one it had; -1 before the first.
        ready: TorchServe believes that it has loaded the model and runs.
        slot: TorchServe's number for it, which is in the names of its metrics files (`handlers.ops.metrics`).
    """

    pid: int
    ready: bool
    slot: str = ""


@dataclass(frozen=True)
class ModelState:
    """One version of a model, as TorchServe describes it now.

    Attributes:
        workers: Workers it is meant to have.
        most: Workers it may have.
        found: The workers it has.
        pending: Requests that wait for a worker; those a worker has taken are not among them.
        batch_delay_s: Longest time a request waits for others to join its batch, in seconds.
    """

    workers: int
    most: int
    found: tuple[Worker, ...]
    pending: int
    batch_delay_s: float

    @property
    def loaded(self) -> int:
        """Workers that TorchServe believes to have loaded the model."""
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
        timeout_s: Longest time that one answer takes, in seconds.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def describe(self, name: str, version: str) -> ModelState | None:
        """Describe one version of a model; None while TorchServe does not answer."""
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
        """Ask for a number of workers; `describe` tells when they are there.

        Args:
            archive: The model.
            workers: How many.
            most: How many there may be; None for no more than that.

        Returns:
            Whether TorchServe has taken it.
        """
        scale = f"min_worker={workers}&max_worker={workers if most is None else most}"
        return self._ask("PUT", f"/models/{archive.full_name}?{scale}") is not None

    def register(self, folder: Path, workers: int) -> str | None:
        """Register an unpacked archive; `describe` tells when its workers are there.

        TorchServe gets a folder and not the file: it would unpack that in a thread that requests need, and delete
        a file that is named by a URL when the model is unregistered.

        Args:
            folder: Where it is unpacked.
            workers: How many, unless the archive says.

        Returns:
            Why TorchServe does not take it; None if it does.
        """
        asked = urllib.parse.urlencode({"url": folder, "initial_workers": workers, "synchronous": "false"})
        return self._tell("POST", f"/models?{asked}")

    def unregister(self, archive: Archive) -> str | None:
        """Have TorchServe answer no more requests for a version than it has; return why it does not, or None.

        Patched (`server.patches`, reload), TorchServe leaves the workers to what they have; without, it kills them.
        """
        return self._tell("DELETE", f"/models/{archive.full_name}")

    def set_default(self, archive: Archive) -> str | None:
        """Give a version to callers who name none; return why TorchServe does not, or None."""
        return self._tell("PUT", f"/models/{archive.full_name}/set-default")

    def describe_all(self, archives: Sequence[Archive]) -> list[ModelState] | None:
        """Describe several models; None if any of them is not described."""
        states = []
        for archive in archives:
            if (state := self.describe(archive.name, archive.version)) is None:
                return None  # The others are not asked: where nobody answers, each takes all of its time.
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
