"""Readiness at the start: every model responds with its card over REST, and the gRPC port is open.

TorchServe's own /ping is not used: it reports "healthy" before a model is loaded, and while loading fails in a loop.
Until the server has warmed up, handlers answer a request for the card with the error `draining`.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.configuration import Listeners
from server.failures import Failure
from server.fetching import fetch
from server.models import Archive
from server.ports import reachable

PAUSE_S = 0.1  # Between two requests to a server that is not ready yet.


@dataclass
class _Probe:
    """The responses of one model so far, written by its thread and read by the launcher."""

    archive: Archive
    ready: bool = False
    draining: bool = False
    refused: str | None = None
    answer: str = "no answer yet"
    card: Any = None


class Readiness:
    """Requests the card of every model until all have responded.

    Each model has a thread, which sends one request at a time: requests that time out stay in TorchServe's queue.

    Args:
        listeners: Where the server listens.
        archives: The models.
        timeout_s: Seconds after which a model is late.
    """

    def __init__(self, listeners: Listeners, archives: Sequence[Archive], timeout_s: float) -> None:
        self._listeners = listeners
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._given_up = threading.Event()
        self._probes = [_Probe(archive) for archive in archives]
        for probe in self._probes:
            threading.Thread(target=self._ask, args=(probe,), daemon=True).start()

    def answered(self) -> bool:
        """Return whether every model's handler has responded, if only that the server is starting."""
        return self._all(lambda probe: probe.ready or probe.draining)

    def ready(self) -> bool:
        """Return whether every model has responded with its card and the gRPC port is open."""
        return self._all(lambda probe: probe.ready)

    def refused(self) -> dict[Archive, str]:
        """Return the models that respond with an error, and the error."""
        return {
            probe.archive: f"archive {probe.archive.path.name}: {probe.refused}"
            for probe in self._probes
            if probe.refused
        }

    def late(self) -> dict[Archive, str]:
        """Return the models that have not responded in time, and their last response; empty before the deadline.

        Raises:
            Failure: All have responded, but the gRPC port is still closed.
        """
        if time.monotonic() <= self._deadline:
            return {}
        late = f"not ready after {self._timeout_s:g} s (--startup-timeout-s):"
        waiting = [probe for probe in self._probes if not probe.ready]
        if not waiting and not self._grpc_open():
            raise Failure(f"{late}\nthe gRPC port is closed")
        return {probe.archive: f"{late}\narchive {probe.archive.path.name}: {probe.answer}" for probe in waiting}

    def drop(self, archive: Archive) -> None:
        """Stop waiting for a model."""
        self._probes = [probe for probe in self._probes if probe.archive is not archive]

    def _all(self, good: Callable[[_Probe], bool]) -> bool:
        return all(map(good, self._probes)) and self._grpc_open()

    def devices(self) -> dict[str, str]:
        """Return the devices that the cards state, by the archive's file name."""
        cards = {probe.archive.path.name: probe.card for probe in self._probes if isinstance(probe.card, dict)}
        return {name: card["device"] for name, card in cards.items() if isinstance(card.get("device"), str)}

    def give_up(self) -> None:
        """Stop the threads."""
        self._given_up.set()

    def _ask(self, probe: _Probe) -> None:
        while not self._given_up.is_set() and probe in self._probes:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                return
            connection = http.client.HTTPConnection(reachable(self._listeners.host), self._listeners.rest)
            try:
                status, body = fetch(connection, probe.archive.predictions_path, left_s)
            except OSError:
                self._given_up.wait(PAUSE_S)
                continue
            said = _parse(body)
            if status == 200:
                probe.card, probe.ready = said, True
                return
            probe.answer = f"its last answer was {status} {_message(said, body)}"
            # TorchServe's own errors ({"code": 503, ...}) are temporary; the handler's are not, except `draining`.
            error = said.get("error") if isinstance(said, dict) else None
            probe.draining = isinstance(error, dict) and error.get("code") == "draining"
            if isinstance(error, dict) and not probe.draining:
                probe.refused = f"its model card fails with {error.get('code')}: {error.get('message')}"
                return
            self._given_up.wait(PAUSE_S)

    def _grpc_open(self) -> bool:
        try:
            with socket.create_connection((reachable(self._listeners.host), self._listeners.grpc), timeout=1):
                return True
        except OSError:
            return False


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _message(said: Any, body: bytes) -> str:
    if isinstance(said, dict) and "message" in said:
        return str(said["message"])
    return body[:200].decode("utf-8", "replace").strip()
