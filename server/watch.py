"""Watches every model while the server serves: each is asked for its card, and restarted if TorchServe does not help.

TorchServe starts a worker again that has ended, and ends one that takes longer than responseTimeout for a batch. It
does not notice when its own thread for a worker ends by an exception, and stops trying to start a worker that has
failed for maxRetryTimeoutInSec. Its management API calls both workers what they last were.

| reason | a model is restarted when |
|---|---|
| `worker_gone` | for 10 s TorchServe has called a worker ready whose process has ended or is stopped |
| `given_up` | the model has no process, and TorchServe has started none for longer than it pauses between attempts |
| `card_fails` | for a minute the same workers have answered the card with an error |
| `no_answer` | the card has waited longer than responseTimeout allows for all that waited before it |

A card waits in the model's queue, so a busy model answers it late. None of these takes a busy model for a dead one:
the first three look at processes and answers, and the last bound is what TorchServe itself enforces, batch by batch.

A restart takes all workers of that model away and starts as many: TorchServe then has new threads for them. Requests
that wait go on waiting, and other models are not touched. Where three restarts in a row have brought no answer though
the workers load, or TorchServe's management API is silent too, the launcher ends with a failure: whatever started it
(Docker's restart policy) starts everything anew, with a new Java and no queue, which the launcher could not do better.

What is known is published in a file of the private directory, for the exporter and for `deploy/readiness.py`:
`{"models": {"cifar/1.0": {"answered": true, "restarting": null, "restarts": {"worker_gone": 0, ...}}}}`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.children import is_alive
from server.configuration import Listeners, PrivateDirectory
from server.management import Management, ModelState
from server.models import Archive
from server.ports import reachable

REASONS = {
    "worker_gone": "TorchServe calls a worker ready whose process has ended or is stopped",
    "given_up": "it has no worker, and TorchServe no longer starts one",
    "card_fails": "its workers answer its card with an error",
    "no_answer": "its card has waited longer than responseTimeout allows",
}
GONE_S = 10.0
FAILING_S = 60.0
LATE_CARDS = 3  # Intervals after which a card counts as unanswered.
TICK_S = 1.0
LOOK_S = 3.0  # From one look at the management API to the next, while something is wrong: on a GPU it is slow.
# From one restart of a model to the next. Each leaves the metrics files of a worker behind, 160 KB of `cifar`.
BACK_OFF_S, LONGEST_BACK_OFF_S, HEALTHY_S = 10.0, 300.0, 600.0
MOST_RESTARTS = 3  # In a row, without an answer between them.
MANAGEMENT_S = 60.0  # Silence of the management API.
READ_S = 10.0  # For an answer that has begun.
# TorchServe's longest pause within a limit is 0.63 of it: 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, ... s.
PAUSE_SHARE, LEAST_GIVEN_UP_S = 0.7, 30.0


class Watch:
    """Watches all models, each from a thread of its own.

    Args:
        listeners: Where the server listens.
        archives: The models served, all of which have answered their card.
        directory: The private directory.
        interval_s: From one answered card to the next question, in seconds.
    """

    def __init__(
        self, listeners: Listeners, archives: Sequence[Archive], directory: PrivateDirectory, interval_s: float
    ) -> None:
        self._file = directory.watch_file
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._models = [
            _Model(listeners, archive, Management(directory.management_socket), interval_s, self._stopped, self)
            for archive in archives
        ]
        self.publish()
        self._threads = [threading.Thread(target=model.run, daemon=True) for model in self._models]
        for thread in self._threads:
            thread.start()

    def news(self) -> list[tuple[str, str]]:
        """Return what has happened since the last call: a level (`info`, `error`) and a sentence each."""
        news = []
        with contextlib.suppress(queue.Empty):
            while True:
                news.append(self._news.get_nowait())
        return news

    @property
    def failure(self) -> str | None:
        """Why TorchServe as a whole has to be started anew; None as long as it need not."""
        return next((model.failure for model in self._models if model.failure), None)

    def stop(self) -> None:
        """Ask no more, and restart nothing; a restart that has begun is finished."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * TICK_S)

    def say(self, sentence: str, level: str = "error") -> None:
        """Add to the news."""
        self._news.put((level, sentence))

    def publish(self) -> None:
        """Write what is known to the file, at once or not at all."""
        with self._lock:
            text = json.dumps({"models": {model.name: model.describe() for model in self._models}})
            draft = self._file.with_suffix(".draft")
            with contextlib.suppress(OSError):  # A full disk: serving goes on.
                draft.write_text(text)
                draft.replace(self._file)


def read_published(file: Path) -> dict[str, dict[str, Any]]:
    """Return what a watch has published, by `name/version`; empty before there is anything."""
    try:
        models: dict[str, dict[str, Any]] = json.loads(file.read_text())["models"]
    except (OSError, ValueError):
        return {}
    return models


class _Model:
    """One model: its card, its workers, its restarts. Used by its own thread; others read `describe` and `failure`."""

    def __init__(
        self,
        listeners: Listeners,
        archive: Archive,
        management: Management,
        interval_s: float,
        stopped: threading.Event,
        watch: Watch,
    ) -> None:
        now = time.monotonic()
        self.name = f"{archive.name}/{archive.version}"
        self.failure: str | None = None
        self._listeners = listeners
        self._archive = archive
        self._management = management
        self._interval_s = interval_s
        self._stopped = stopped
        self._watch = watch
        self._restarts = dict.fromkeys(REASONS, 0)
        self._restarting: str | None = None
        self._wanted: tuple[int, int] | None = None  # Workers, and at most.
        # The card.
        self._answered = True
        self._answered_at = now
        self._failing_since: float | None = None
        self._backlog = 0  # Requests that waited at most, since the last answer.
        # The workers, as last described.
        self._processes: tuple[int, ...] = ()
        self._found: object = None
        self._changed_at = now
        self._mute_since: float | None = None
        # When to look again, and to restart again.
        self._look_at = self._restart_at = self._restarted_at = float("-inf")
        self._back_off_s = BACK_OFF_S
        self._in_a_row = 0

    def describe(self) -> dict[str, Any]:
        """Return what is published of it."""
        return {"answered": self._answered, "restarting": self._restarting, "restarts": dict(self._restarts)}

    def run(self) -> None:
        """Wait, look and ask until stopped; when it begins, the card has just been answered."""
        while not self._stopped.is_set():
            try:
                self._pause()
                if not self._stopped.is_set():
                    self._ask()
            except Exception as failure:  # A fault of ours here must not end the watching.
                self._watch.say(f"watching {self.name} failed and goes on: {failure!r}")
                self._stopped.wait(self._interval_s)

    def _ask(self) -> None:
        """Ask for the card, and note what comes."""
        try:
            verdict = self._await_card()
        except (OSError, http.client.HTTPException):
            verdict = "unreachable"
        if verdict is not None:
            self._note(verdict)

    def _pause(self) -> None:
        """Wait until the next question is due, with an eye on the workers."""
        due = time.monotonic() + self._interval_s
        while time.monotonic() < due and not self._stopped.wait(min(TICK_S, self._interval_s)):
            self._look()

    def _await_card(self) -> str | None:
        """Ask for the card, wait for it as long as it takes, and return the verdict; None if it was restarted."""
        with _Card(self._listeners, self._archive) as card:
            restarts = sum(self._restarts.values())
            while not self._stopped.is_set() and restarts == sum(self._restarts.values()):
                verdict = card.verdict(TICK_S)
                if verdict is not None:
                    return verdict
                if time.monotonic() - card.asked_at > LATE_CARDS * self._interval_s:
                    self._set_answered(answered=False)
                self._look()
        return None

    def _note(self, verdict: str) -> None:
        now = time.monotonic()
        if verdict == "good":
            self._answered_at, self._failing_since, self._backlog, self._in_a_row = now, None, 0, 0
            if now - self._restarted_at > HEALTHY_S:
                self._back_off_s = BACK_OFF_S
            if self._restarting:
                self._watch.say(f"{self.name} answers its card again", "info")
        elif verdict == "failed" and self._failing_since is None:
            self._failing_since = now
        self._set_answered(answered=verdict == "good")

    def _set_answered(self, *, answered: bool) -> None:
        changed = (answered, None if answered else self._restarting) != (self._answered, self._restarting)
        self._answered = answered
        self._restarting = None if answered else self._restarting
        if changed:
            self._watch.publish()

    def _look(self) -> None:
        """Look at the workers if something is wrong, and restart them if TorchServe does not help."""
        now = time.monotonic()
        whole = self._processes and all(map(is_alive, self._processes))
        if now < self._look_at or (self._answered and whole):
            return
        state = self._management.describe(self._archive.name, self._archive.version)
        took_s = time.monotonic() - now
        self._look_at = now + took_s + max(LOOK_S, 5 * took_s)
        if state is None:
            self._mute_since = self._mute_since or now
            if not self._answered and now - self._mute_since > MANAGEMENT_S:
                self.failure = (
                    f"{self.name} does not answer its card, and TorchServe's management API has been silent for "
                    f"{MANAGEMENT_S:g} s"
                )
            return
        self._mute_since = None
        self._wanted = self._wanted or (state.workers, state.most)
        self._processes = tuple(worker.pid for worker in state.found if worker.ready)
        if state.found != self._found:
            self._found, self._changed_at = state.found, now
        self._backlog = max(self._backlog, state.pending)
        if state.workers < self._wanted[0]:  # A restart that broke off half-way.
            self._management.scale(self._archive, *self._wanted)
        elif now >= self._restart_at and (reason := self._find_reason(state, now)):
            self._restart(reason, self._wanted, now)

    def _find_reason(self, state: ModelState, now: float) -> str | None:
        quiet_s = now - self._changed_at
        archive = self._archive
        if quiet_s >= GONE_S and any(worker.ready and not is_alive(worker.pid) for worker in state.found):
            return "worker_gone"
        given_up_s = max(LEAST_GIVEN_UP_S, PAUSE_SHARE * archive.retry_timeout_s)
        if quiet_s >= given_up_s and not any(is_alive(worker.pid) for worker in state.found):
            return "given_up"
        if self._failing_since is not None and min(now - self._failing_since, quiet_s) >= FAILING_S:
            return "card_fails"
        batches = self._backlog + 2  # The one at work, those that wait, and the card.
        allowed_s = batches * archive.response_timeout_s + archive.startup_timeout_s
        return "no_answer" if now - self._answered_at > allowed_s else None

    def _restart(self, reason: str, wanted: tuple[int, int], now: float) -> None:
        if self._in_a_row >= MOST_RESTARTS and reason in ("worker_gone", "no_answer"):
            self.failure = f"{self.name} was restarted {MOST_RESTARTS} times and still {REASONS[reason]}"
            return
        if not self._management.scale(self._archive, 0, 0):
            return  # Tried again at the next look.
        self._management.scale(self._archive, *wanted)
        self._in_a_row += 1
        self._restarts[reason] += 1
        self._restarting, self._answered = reason, False
        self._processes, self._found, self._failing_since = (), None, None
        self._changed_at = self._answered_at = self._restarted_at = now
        self._restart_at = now + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
        self._watch.say(f"{self.name}: {REASONS[reason]}; all its workers are started anew")
        self._watch.publish()


class _Card:
    """A question for a model's card; a context manager. It waits piece by piece: to ask again would fill the queue."""

    def __init__(self, listeners: Listeners, archive: Archive) -> None:
        self._connection = http.client.HTTPConnection(reachable(listeners.host), listeners.rest, timeout=READ_S)
        self._path = f"/predictions/{archive.name}/{archive.version}"

    def __enter__(self) -> _Card:
        self.asked_at = time.monotonic()
        try:
            self._connection.request("GET", self._path)
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def verdict(self, wait_s: float) -> str | None:
        """Return what came: `good`, `failed`, or `refused` since the queue is full; None if nothing has come yet.

        Args:
            wait_s: How long to wait.

        Raises:
            OSError, http.client.HTTPException: TorchServe has hung up, or what came is no answer.
        """
        try:
            self._connection.sock.settimeout(wait_s)
            self._connection.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return None
        self._connection.sock.settimeout(READ_S)
        response = self._connection.getresponse()
        body = response.read()
        if response.status == 200:
            return "good"
        try:
            said = json.loads(body)
            error = said.get("error") or {}
        except (ValueError, AttributeError):
            return "failed"
        if isinstance(error, dict) and error.get("code") == "draining":
            return "good"
        return "refused" if said.get("type") == "ServiceUnavailableException" else "failed"
