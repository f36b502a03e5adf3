"""Watches every model while the server runs: requests its card, and restarts its workers if TorchServe does not.

TorchServe restarts a worker that has ended, and ends one that takes longer than responseTimeout for a batch. It does
not notice when its own thread for a worker ends by an exception, and stops restarting a worker that has failed for
maxRetryTimeoutInSec. In both cases its management API reports the worker's last state.

| reason | a model is restarted when |
|---|---|
| `worker_gone` | for 10 s TorchServe has reported a worker as ready whose process has ended or is stopped |
| `given_up` | the model has no process, and TorchServe has started none for longer than it pauses between attempts |
| `card_fails` | for a minute the same workers have responded to requests for the card with errors |
| `no_answer` | the card has waited longer than responseTimeout allows for all that waited before it |

A request for the card waits in the model's queue, so a busy model responds late. None of these reasons mistakes a busy
model for a dead one: the first three depend on processes and responses, and the last limit is what TorchServe itself
enforces for each batch; a silent model (below) gets the time of one batch.

A restart scales the model to no workers and back, which gives it new threads in TorchServe. Queued requests keep
waiting, and other models are not affected. If three restarts in a row bring no response though the workers load, or
TorchServe's management API or Java do not respond either, the launcher ends with a failure. Docker's restart policy,
or whatever started the launcher, then starts it with a new Java and an empty queue.

Whether the replica can take requests (`/ready`, `server.health`) is always known, without a request to the models:

| state of a model | what is known | ready |
|---|---|---|
| `ready` | its last card was good | yes |
| `busy` | its card is late or its queue is full, and its workers compute | yes |
| `dead` | the process of each worker has ended or is stopped, or TorchServe has no worker that has loaded | no |
| `silent` | the request for its card has waited for two intervals, in which its workers used no processor time | no |
| `failing` | two requests for its card in a row failed | no |
| `restarting` | the watch has restarted its workers, and none has responded | no |

Processor time distinguishes a long batch from a worker that hangs: a network that computes uses it, also on a GPU,
where the waiting thread spins. So does a worker in an endless loop, which TorchServe ends after responseTimeout.
Java gets a request for /ping once a second. If it has not responded for five seconds, or its process is stopped, the
replica is not ready. One model that is not ready makes the whole replica not ready, since a replica does not know which
models others serve.

The watch publishes the states of the models in a file of the private directory, for the exporter (`read_published`),
and the models that are served in another, for "Model not found" (`server.patches`, names).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.children import is_alive, processor_s
from server.configuration import Listeners, PrivateDirectory
from server.diagnosis import CAUSES, Death
from server.fetching import fetch
from server.host import describe_host, read_memory
from server.management import Management, ModelState
from server.models import Archive, describe_models
from server.ports import reachable

REASONS = {
    "worker_gone": "TorchServe calls a worker ready whose process has ended or is stopped",
    "given_up": "it has no worker, and TorchServe no longer starts one",
    "card_fails": "its workers answer its card with an error",
    "no_answer": "its card has waited longer than responseTimeout allows",
}
GONE_S = 10.0
FAILING_S = 60.0
LATE_CARDS = 2  # Intervals after which a card is late.
IDLE_SHARE = 0.01  # Share of the time; a process that uses less is idle.
MOST_FAILURES = 2  # Cards in a row.
PING_S, JAVA_S = 2.0, 5.0  # Time limit of a /ping, and time without a response after which Java is silent.
TICK_S = 1.0
LOOK_S = 3.0  # Between requests to the management API while something is wrong: on a GPU it is slow.
# From one restart of a model to the next. Each leaves the metrics files of a worker behind, 160 KB of `cifar`.
BACK_OFF_S, LONGEST_BACK_OFF_S, HEALTHY_S = 10.0, 300.0, 600.0
MOST_RESTARTS = 3  # In a row, without a response between them.
MANAGEMENT_S = 60.0  # Silence of the management API.
READ_S = 10.0  # For a response that has begun.
# Patched, TorchServe pauses for 13 s at most between attempts to start a worker.
GIVEN_UP_S = 30.0


class Watch:
    """Watches Java, and all models, each from a thread of its own.

    Args:
        listeners: Where the server listens.
        archives: The models served, all of which have answered their card.
        directory: The private directory.
        interval_s: Seconds from a response with the card to the next request for it.
        java: Process id of Java.
        rejected: Why other archives are not served, by the file's name; changed when one of `unproven` answers.
        unproven: Archives among the rejected that TorchServe goes on trying to load; until they answer, the replica is
            ready without them.

    Attributes:
        accepted: Set when one of `unproven` has responded.
    """

    def __init__(
        self,
        listeners: Listeners,
        archives: Sequence[Archive],
        directory: PrivateDirectory,
        interval_s: float,
        java: int,
        rejected: dict[str, str],
        unproven: Sequence[Archive] = (),
    ) -> None:
        self.accepted = threading.Event()
        self._directory = directory
        self._rejected = rejected
        self._lock = threading.Lock()
        self._published: dict[Path, str] = {}
        self._troubles: dict[Path, str] = {}  # By file, the last trouble logged.
        self._stopped = threading.Event()
        self._news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._java = _Java(listeners, java, self._stopped, self)
        self._listeners, self._interval_s = listeners, interval_s
        self._models: list[_Model] = []
        self._defaults: dict[str, dict[str, dict[str, float]]] = {}
        self._deaths: dict[str, dict[str, int]] = {}
        self._set_models(
            [
                self._watch(archive, proven=proven)
                for proven, some in ((True, archives), (False, unproven))
                for archive in some
            ]
        )
        self._java_thread = threading.Thread(target=self._java.run, daemon=True)
        self._java_thread.start()

    def serve(self, archives: Sequence[Archive]) -> None:
        """Watch these archives from now on; those that are new have answered their card.

        Args:
            archives: All of them; of several versions of a model the first is the default.
        """
        watched = {model.archive: model for model in self._models}
        models = [
            watched.pop(archive) if archive in watched else self._watch(archive, proven=True) for archive in archives
        ]
        self._set_models(models)
        self._end(watched.values())

    def note_default(self, archive: Archive, counts: Mapping[str, float]) -> None:
        """Publish what TorchServe counted of requests without a version while this one was the default.

        Args:
            archive: The version.
            counts: By the names of TorchServe's counters, without what was counted before that version's time.
        """
        versions = {version: dict(known) for version, known in self._defaults.get(archive.name, {}).items()}
        known = versions.setdefault(archive.version, {})
        for name, count in counts.items():
            known[name] = known.get(name, 0.0) + count
        self._defaults = {**self._defaults, archive.name: versions}

    def counted(self, name: str, counter: str) -> float:
        """Return what `note_default` was told of a model's versions, added up."""
        return sum(counts.get(counter, 0.0) for counts in self._defaults.get(name, {}).values())

    def news(self) -> list[tuple[str, str]]:
        """Return what has happened since the last call: a level (`info`, `error`) and a sentence each."""
        news = []
        with contextlib.suppress(queue.Empty):
            while True:
                news.append(self._news.get_nowait())
        return news

    @property
    def failure(self) -> str | None:
        """Why TorchServe as a whole has to be restarted; None if it need not."""
        failures = [self._java.failure, *(model.failure for model in self._models)]
        return next(filter(None, failures), None)

    @property
    def why_not_ready(self) -> str | None:
        """Why this replica cannot take requests: `java`, or the state of a model; None if it can."""
        return self.judge(self.states())

    def judge(self, states: Mapping[str, str]) -> str | None:
        """Return `why_not_ready` for these states of the models."""
        bad = [state for state in states.values() if state not in ("ready", "busy", "rejected")]
        return (self._java.trouble and "java") or next(iter(bad), None)

    def states(self) -> dict[str, str]:
        """Return the state of each model, by `name/version`."""
        return {model.name: model.state for model in self._models}

    def count_death(self, death: Death) -> None:
        """Count a worker that ended unexpectedly."""
        if death.model is not None and death.model in self._deaths:
            self._deaths[death.model][death.cause] += 1
            self.publish()

    def accept(self, archive: Archive) -> None:
        """Serve an archive that was rejected, since it has answered."""
        self._rejected.pop(archive.path.stem, None)
        self.say(f"archive {archive.path.name}: its model answers now, and is served", "info")
        self.accepted.set()

    def stop(self) -> None:
        """Stop watching; a restart that has begun is finished."""
        self._stopped.set()
        self._end(self._models)
        self._java_thread.join(2 * TICK_S)

    def _watch(self, archive: Archive, *, proven: bool) -> _Model:
        management = Management(self._directory.management_socket)
        return _Model(self._listeners, archive, management, self._interval_s, self, proven)

    def _end(self, models: Collection[_Model]) -> None:
        for model in models:
            model.stopped.set()
        for model in models:
            model.thread.join(2 * TICK_S)

    def _set_models(self, models: list[_Model]) -> None:
        self._deaths = {model.name: self._deaths.get(model.name) or dict.fromkeys(CAUSES, 0) for model in models}
        new, self._models = [model for model in models if model not in self._models], models
        self.publish()
        for model in new:
            model.thread.start()

    def say(self, sentence: str, level: str = "error") -> None:
        """Add to the news."""
        self._news.put((level, sentence))

    def describe_host(self) -> str:
        """Describe memory and disks in a few words."""
        return describe_host(self._directory.path, read_memory())

    def publish(self) -> None:
        """Write what is known, and which models are served, to their files, each as a whole, if it has changed.

        A missing file is written again: some systems clear old files out of /tmp, and this one may not change for days.
        So is a file that holds something else or cannot be read, which is logged once.
        """
        with self._lock:
            known = {
                "ready": self.why_not_ready is None,
                "models": {model.name: model.describe() for model in self._models},
                "deaths": self._deaths,
                "rejected": self._rejected,
                "defaults": self._defaults,
            }
            served = [model.archive for model in self._models if model.state != "rejected"]
            self._write(self._directory.watch_file, json.dumps(known))
            self._write(self._directory.models_file, describe_models(served))

    def _write(self, file: Path, text: str) -> None:
        held, trouble = _read(file), None
        if held == text:
            self._troubles.pop(file, None)
            return
        if held is not None and held != self._published.get(file, held):
            trouble = f"{file} cannot be read, or held something else than was written there, and is written again"
        try:
            draft = file.with_suffix(".draft")
            draft.write_text(text)
            draft.replace(file)
            self._published[file] = text
        except OSError as error:  # A full disk: serving goes on, and the next second tries again.
            trouble = f'{file} cannot be written ({error.strerror}): metrics and "Model not found" are out of date'
        if trouble and trouble != self._troubles.get(file):
            self.say(trouble)
            self._troubles[file] = trouble


def _read(file: Path) -> str | None:
    """Return what a file holds; None if it is missing, and a text that is never written there if it cannot be read."""
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "\0"


def read_published(file: Path) -> dict[str, Any]:
    """Return what a watch has published, the default version of each model first; empty before it has.

    `{"ready": true, "models": {"cifar/1.0": {"answered": true, "restarting": null, "restarts": {"worker_gone": 0}}},
    "deaths": {"cifar/1.0": {"oom": 0}}, "rejected": {"wide": "archive wide.mar: it is damaged"},
    "defaults": {"cifar": {"0.9": {"ts_inference_requests": 7.0}}}}`
    """
    try:
        published = json.loads(file.read_text())
    except (OSError, ValueError):
        published = {}
    return {"ready": False, "models": {}, "deaths": {}, "rejected": {}, "defaults": {}, **published}


class _Java:
    """Watches the Java process: whether it runs and responds."""

    def __init__(self, listeners: Listeners, process: int, stopped: threading.Event, watch: Watch) -> None:
        self.failure: str | None = None
        self._listeners = listeners
        self._process = process
        self._stopped = stopped
        self._watch = watch
        self._answered_at = self._well_at = time.monotonic()
        self._said: str | None = None

    @property
    def trouble(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        if not is_alive(self._process):
            return "Java's process is stopped or has ended"
        silent_s = time.monotonic() - self._answered_at
        return None if silent_s < JAVA_S else f"Java has answered nothing for {JAVA_S:g} s"

    def run(self) -> None:
        """Check once a second until stopped."""
        while not self._stopped.wait(TICK_S):
            try:
                self._look()
            except Exception as failure:  # No threads or no memory left: that must not end the watch.
                self._watch.say(f"watching Java failed and goes on: {failure!r}")

    def _look(self) -> None:
        connection = http.client.HTTPConnection(reachable(self._listeners.host), self._listeners.rest)
        with contextlib.suppress(OSError):
            fetch(connection, "/ping", PING_S)
            self._answered_at = time.monotonic()
        self._judge(time.monotonic())
        self._watch.publish()

    def _judge(self, now: float) -> None:
        trouble = self.trouble
        if trouble is None:
            self._well_at = now
        elif now - self._well_at > (MANAGEMENT_S if is_alive(self._process) else GONE_S):
            self.failure = trouble
        if trouble != self._said:
            self._said = trouble
            self._watch.say(trouble or "Java answers again", "error" if trouble else "info")


class _Model:
    """Watches one model: card, workers, restarts. It has its own thread; others read `describe` and `failure`."""

    def __init__(
        self,
        listeners: Listeners,
        archive: Archive,
        management: Management,
        interval_s: float,
        watch: Watch,
        proven: bool,
    ) -> None:
        now = time.monotonic()
        self.name = archive.full_name
        self.failure: str | None = None
        self._listeners = listeners
        self.archive = archive
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self._management = management
        self._interval_s = interval_s
        self._watch = watch
        self._restarts = dict.fromkeys(REASONS, 0)
        self._restarting: str | None = None
        self._wanted: tuple[int, int] | None = None  # Workers, and at most.
        # The card.
        self._answered = self._proven = proven  # Proven: it has responded at least once.
        self._answered_at = now
        self._asked_at = now
        self._failing_since: float | None = None
        self._failures = 0  # In a row.
        self._is_late = False
        self._silent_since: float | None = None
        self._computed: deque[tuple[float, dict[int, float]]] = deque()  # When; each worker's processor time.
        self._backlog = 0  # Most requests queued since the last response.
        # The workers, as last described.
        self._processes: tuple[int, ...] = ()
        self._died_at: float | None = (
            None  # When the last of them was found to have ended; until a new one has responded.
        )
        self._found: object = None
        self._changed_at = now
        self._mute_since: float | None = None
        # When to check and to restart again.
        self._look_at = self._restart_at = self._restarted_at = float("-inf")
        self._back_off_s = BACK_OFF_S
        self._in_a_row = 0

    @property
    def state(self) -> str:
        """Its state, as in the table above; `rejected` until it has responded once."""
        if not self._proven:
            return "rejected"
        if self._restarting:
            return "restarting"
        if self._died_at is not None or self._are_gone():
            return "dead"
        if self._silent_since is not None:
            return "silent"
        if self._failures >= MOST_FAILURES:
            return "failing"
        return "busy" if self._is_late else "ready"

    def describe(self) -> dict[str, Any]:
        """Return its values in the published file."""
        return {"answered": self._answered, "restarting": self._restarting, "restarts": dict(self._restarts)}

    def run(self) -> None:
        """Wait, check and request the card until stopped; at the beginning the model has just responded."""
        while not self.stopped.is_set():
            try:
                self._pause()
                if not self.stopped.is_set():
                    self._ask()
            except Exception as failure:  # An error in this class must not end the watch.
                self._watch.say(f"watching {self.name} failed and goes on: {failure!r}")
                self.stopped.wait(self._interval_s)

    def _ask(self) -> None:
        """Request the card, and record the result."""
        try:
            verdict = self._await_card()
        except (OSError, http.client.HTTPException):
            verdict = "unreachable"
        if verdict is not None:
            self._note(verdict)

    def _pause(self) -> None:
        """Wait until the next request is due, and check the workers; only a tick if the last card was not good."""
        due = time.monotonic() + self._interval_s
        while not self.stopped.wait(min(TICK_S, self._interval_s)):
            self._look()
            if time.monotonic() >= due or not self._answered:
                return

    def _await_card(self) -> str | None:
        """Request the card and wait for it without a limit; return the verdict, or None if the model was restarted.

        It waits in steps: repeated requests would fill the queue.
        """
        self._computed.clear()
        address = reachable(self._listeners.host), self._listeners.rest
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=READ_S)) as connection:
            self._asked_at = time.monotonic()
            connection.request("GET", self.archive.predictions_path)
            restarts = sum(self._restarts.values())
            while not self.stopped.is_set() and restarts == sum(self._restarts.values()):
                verdict = _find_verdict(connection, TICK_S)
                if verdict is not None:
                    return verdict
                if time.monotonic() - self._asked_at > LATE_CARDS * self._interval_s:
                    self._is_late = True
                    self._set_answered(answered=False)
                self._listen(time.monotonic())
                self._look()
        return None

    def _listen(self, now: float) -> None:
        """Mark the model as silent if its workers are idle while the card is late, until it responds."""
        window_s = LATE_CARDS * self._interval_s
        spent = {process: processor_s(process) for process in self._processes}
        self._computed.append((now, spent))
        while len(self._computed) > 1 and self._computed[1][0] <= now - window_s:
            self._computed.popleft()
        since, before = self._computed[0]
        # Of a worker that did not exist then, all of its time counts.
        used_s = sum(seconds - before.get(process, 0.0) for process, seconds in spent.items())
        is_silent = self._died_at is None and bool(spent) and now - since >= window_s and used_s < IDLE_SHARE * window_s
        if is_silent and self._silent_since is None:
            self._silent_since = now
            self._watch.say(
                f"{self.name}: its card has waited for {now - self._asked_at:.0f} s and its workers compute nothing; "
                "it is not ready until it answers"
            )
            self._watch.publish()

    def _note(self, verdict: str) -> None:
        now = time.monotonic()
        self._is_late, self._silent_since = verdict == "refused", None
        self._failures = self._failures + 1 if verdict in ("failed", "unreachable") else 0
        if verdict == "good":
            if self._died_at is not None:
                if self._asked_at < self._died_at:  # The worker that responded has ended.
                    return
                # The known processes have ended: TorchServe is queried at the next tick.
                self._died_at, self._processes, self._look_at = None, (), float("-inf")
            self._answered_at, self._failing_since, self._backlog, self._in_a_row = now, None, 0, 0
            if now - self._restarted_at > HEALTHY_S:
                self._back_off_s = BACK_OFF_S
            if self._restarting:
                self._watch.say(f"{self.name} answers its card again", "info")
            if not self._proven:
                self._proven = True
                self._watch.accept(self.archive)
        elif verdict == "failed" and self._failing_since is None:
            self._failing_since = now
        self._set_answered(answered=verdict == "good")

    def _set_answered(self, *, answered: bool) -> None:
        before = self._answered, self._restarting
        self._answered = answered
        self._restarting = None if answered else self._restarting
        if (self._answered, self._restarting) != before:
            self._watch.publish()

    def _look(self) -> None:
        """Check the workers if something is wrong, and restart them if TorchServe does not."""
        now = time.monotonic()
        if self._are_gone():
            self._die(now)
        whole = self._processes and all(map(is_alive, self._processes))
        if now < self._look_at or (self._answered and whole):
            return
        state = self._management.describe(self.archive.name, self.archive.version)
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
        # Including which processes run: TorchServe notices the end of a worker a little later.
        found = (state.found, [is_alive(worker.pid) for worker in state.found])
        if found != self._found:
            self._found, self._changed_at = found, now
        self._backlog = max(self._backlog, state.pending)
        if not self._processes:
            self._die(now)
        if state.workers < self._wanted[0]:  # A restart was not completed.
            self._management.scale(self.archive, *self._wanted)
        elif now >= self._restart_at and (reason := self._find_reason(state, now)):
            self._restart(reason, self._wanted, now)

    def _are_gone(self) -> bool:
        return bool(self._processes) and not any(map(is_alive, self._processes))

    def _die(self, now: float) -> None:
        """Record, once, that no worker is left."""
        if self._died_at is not None:
            return
        self._died_at, self._silent_since = now, None
        if not self._restarting:
            host = self._watch.describe_host()
            self._watch.say(f"{self.name}: no worker of it runs; it is not ready until one answers ({host})")
        self._set_answered(answered=False)

    def _find_reason(self, state: ModelState, now: float) -> str | None:
        quiet_s = now - self._changed_at
        archive = self.archive
        if quiet_s >= GONE_S and any(worker.ready and not is_alive(worker.pid) for worker in state.found):
            return "worker_gone"
        if quiet_s >= GIVEN_UP_S and not any(is_alive(worker.pid) for worker in state.found):
            return "given_up"
        if self._failing_since is not None and min(now - self._failing_since, quiet_s) >= FAILING_S:
            return "card_fails"
        silent_s = 0.0 if self._silent_since is None else min(now - self._silent_since, quiet_s)
        if silent_s > archive.response_timeout_s + GONE_S:
            return "no_answer"  # A batch would have ended by now.
        batches = self._backlog + 2  # The current one, those that wait, and the card.
        allowed_s = batches * archive.response_timeout_s + archive.startup_timeout_s
        return "no_answer" if now - self._answered_at > allowed_s else None

    def _restart(self, reason: str, wanted: tuple[int, int], now: float) -> None:
        if self._in_a_row >= MOST_RESTARTS and reason in ("worker_gone", "no_answer"):
            self.failure = f"{self.name} was restarted {MOST_RESTARTS} times and still {REASONS[reason]}"
            return
        if not self._management.scale(self.archive, 0, 0):
            return  # Tried again at the next check.
        self._management.scale(self.archive, *wanted)
        self._in_a_row += 1
        self._restarts[reason] += 1
        self._restarting, self._answered = reason, False
        self._processes, self._found, self._failing_since = (), None, None
        self._is_late, self._silent_since, self._failures = False, None, 0
        self._changed_at = self._answered_at = self._restarted_at = now
        self._restart_at = now + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
        self._watch.say(f"{self.name}: {REASONS[reason]}; restarting all its workers")
        self._watch.publish()


def _find_verdict(connection: http.client.HTTPConnection, wait_s: float) -> str | None:
    """Return the response to a request for a card: `good`, `failed`, or `refused` if the queue is full; None without.

    Args:
        connection: Where the request was sent.
        wait_s: Seconds to wait for the response.

    Raises:
        OSError, http.client.HTTPException: TorchServe has closed the connection, or sent no HTTP response.
    """
    try:
        connection.sock.settimeout(wait_s)
        connection.sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return None
    connection.sock.settimeout(READ_S)
    response = connection.getresponse()
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
