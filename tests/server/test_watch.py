"""The watch: what it takes for a model that needs a restart, with a TorchServe made up for it and with a real one."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest

from server import watch
from server.children import is_alive, processor_s
from server.configuration import Listeners, PrivateDirectory
from server.diagnosis import CAUSES, Death
from server.health import Health
from server.models import Archive
from server.patches import PATCHES
from server.watch import Watch, read_published
from tests.foreign import INFERENCE, predictions_request
from tests.server.harness import Launched, launched, poll, write_archive
from tests.server.standins import Answer, saying, serving

NAME = "alpha/1.0"
GOOD, DRAINING, INTERNAL = (
    saying("{}"),
    saying('{"error": {"code": "draining", "message": "x"}}', "503 Service Unavailable"),
    saying('{"error": {"code": "internal", "message": "x"}}', "500 Internal Server Error"),
)
FULL = saying('{"code": 503, "type": "ServiceUnavailableException"}', "503 Service Unavailable")
DIED = saying('{"code": 500, "type": "InternalServerException", "message": "Worker died."}', "500 x")


@pytest.fixture(scope="module")
def gone() -> int:
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def computing():
    """A process that computes."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        poll(lambda: processor_s(process.pid) > 0)
        yield process.pid
        process.kill()


@pytest.fixture
def idle():
    """A process that does nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def hurried(monkeypatch):
    """Waits of tens of seconds become tenths."""
    for name in ("GONE_S", "FAILING_S", "MANAGEMENT_S", "GIVEN_UP_S"):
        monkeypatch.setattr(watch, name, 0.3)
    for name in ("TICK_S", "LOOK_S", "BACK_OFF_S", "LONGEST_BACK_OFF_S"):
        monkeypatch.setattr(watch, name, 0.05)


class TorchServe:
    """A model as TorchServe describes it, and what asking it for its card brings."""

    def __init__(self, work: Path, **timeouts: int) -> None:
        timeouts = {"response_timeout_s": 1000, "startup_timeout_s": 1000, **timeouts}
        self.archive = Archive(Path("alpha.mar"), "alpha", "1.0", None, frozenset(), **timeouts)
        self.workers = [{"pid": os.getpid(), "status": "READY"}]
        self.after_restart = self.workers
        self.wanted = 1
        self.pending = 0
        self.card = GOOD
        self.asked = 0
        self.scaled: list[str] = []
        self.deaf = threading.Event()  # The management API says nothing.
        self.refuse = 0  # Scalings to refuse.
        self.pingable = True
        self.java = os.getpid()
        self.rejected: dict[str, str] = {}
        self._work = work

    def watched(self, interval_s: float = 0.05, *, proven: bool = True):
        """Serve both APIs and watch; yields the watch, and what it publishes."""
        stack = contextlib.ExitStack()
        directory = stack.enter_context(PrivateDirectory(self._work, None))
        stack.enter_context(serving(directory.management_socket, self._manage))
        port = stack.enter_context(serving(("127.0.0.1", 0), self._answer))
        self.file, self.models_file = directory.watch_file, directory.models_file
        listeners = Listeners("127.0.0.1", port, 0, 0, 0, 0, 0)
        served, unproven = ([self.archive], []) if proven else ([], [self.archive])
        watching = Watch(listeners, served, directory, interval_s, self.java, self.rejected, unproven)
        stack.callback(watching.stop)
        return stack, watching

    def known(self) -> dict:
        return read_published(self.file)["models"][NAME]

    def _answer(self, connection: socket.socket, path: str) -> None:
        if path == "/ping":
            return saying("{}")(connection, path) if self.pingable else None
        assert path == f"/predictions/{NAME}"
        self.asked += 1
        return self.card(connection, path)

    def _manage(self, connection: socket.socket, path: str) -> None:
        if not self.deaf.is_set():
            self._reply(path)(connection, path)

    def _reply(self, path: str) -> Answer:
        _, _, query = path.partition("?min_worker=")
        if query and self.refuse:
            self.refuse -= 1
            return saying("{}", "500 x")
        if query:
            self.scaled.append(query)
            self.wanted = int(query.partition("&")[0])
            self.workers = self.after_restart if self.wanted else []
            return saying('{"status": "Processing worker updates..."}', "202 x")
        model = {"minWorkers": self.wanted, "maxWorkers": self.wanted, "maxBatchDelay": 1, "workers": self.workers}
        return saying(json.dumps([{**model, "jobQueueStatus": {"pendingRequests": self.pending}}]))


@contextlib.contextmanager
def seen(observe: Callable[[], object]) -> Iterator[list[object]]:
    """Observe again and again in another thread, so that no passing state is missed, and collect what was seen."""
    done, found = threading.Event(), []

    def observe_until_done() -> None:
        found.append(observe())
        while not done.wait(0.01):  # States last for longer, and what is tested needs a processor too.
            found.append(observe())

    with ThreadPoolExecutor(1) as pool:
        observing = pool.submit(observe_until_done)
        try:
            yield found
        finally:
            done.set()
        observing.result()


def restarted(torchserve: TorchServe, reason: str) -> bool:
    return torchserve.known()["restarts"][reason] > 0


@pytest.mark.usefixtures("hurried")
class TestRestart:
    def test_of_a_model_whose_worker_is_gone_though_torchserve_calls_it_ready(self, work, gone):
        torchserve = TorchServe(work)
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            assert torchserve.known() == {
                "answered": True,
                "restarting": None,
                "restarts": dict.fromkeys(("worker_gone", "given_up", "card_fails", "no_answer"), 0),
            }
            release = threading.Event()
            torchserve.card = lambda connection, path: release.wait() and GOOD(connection, path)
            torchserve.workers = [{"pid": os.getpid(), "status": "READY"}, {"pid": gone, "status": "READY"}]
            torchserve.after_restart = torchserve.workers[:1] * 2
            poll(lambda: restarted(torchserve, "worker_gone"))
            assert torchserve.known()["restarting"] == "worker_gone"
            assert torchserve.known()["answered"] is False
            assert torchserve.scaled[:2] == ["0&max_worker=0", "1&max_worker=1"]
            release.set()
            poll(lambda: torchserve.known()["answered"])
            assert torchserve.known()["restarting"] is None
            told = [(level, sentence) for level, sentence in watching.news() if "compute nothing" not in sentence]
            assert [level for level, _ in told] == ["error", "info"]
            assert watching.failure is None

    def test_of_one_of_several_workers_while_the_others_answer(self, work, gone):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": os.getpid(), "status": "READY"}, {"pid": gone, "status": "READY"}]
        torchserve.after_restart = torchserve.workers[:1] * 2
        torchserve.wanted = 2
        stack, _ = torchserve.watched()
        with stack:
            poll(lambda: restarted(torchserve, "worker_gone"))
            assert torchserve.scaled == ["0&max_worker=0", "2&max_worker=2"]

    def test_of_a_model_that_torchserve_has_given_up(self, work, gone):
        torchserve = TorchServe(work)
        torchserve.card, torchserve.workers = FULL, [{"pid": gone, "status": "UNLOADING"}]
        stack, _ = torchserve.watched()
        with stack:
            poll(lambda: restarted(torchserve, "given_up"))

    def test_of_a_model_whose_card_keeps_failing(self, work):
        torchserve = TorchServe(work)
        torchserve.card = INTERNAL
        stack, _ = torchserve.watched()
        with stack:
            poll(lambda: restarted(torchserve, "card_fails"))

    def test_of_a_model_that_is_silent_for_longer_than_torchserve_allows(self, work):
        torchserve = TorchServe(work, response_timeout_s=1, startup_timeout_s=0)
        release = threading.Event()
        torchserve.card = lambda *_: release.wait()
        stack, _ = torchserve.watched()
        with stack:
            poll(lambda: restarted(torchserve, "no_answer"))
            release.set()

    def test_that_torchserve_refuses_is_tried_again_and_one_that_broke_off_half_way_is_finished(self, work, gone):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": gone, "status": "READY"}]
        torchserve.after_restart = [{"pid": os.getpid(), "status": "READY"}]
        torchserve.refuse = 1
        release = threading.Event()
        torchserve.card = lambda connection, path: release.wait() and GOOD(connection, path)
        stack, _ = torchserve.watched()
        with stack:
            poll(lambda: restarted(torchserve, "worker_gone"))
            assert torchserve.scaled == ["0&max_worker=0", "1&max_worker=1"]
            torchserve.wanted, torchserve.workers = 0, []
            poll(lambda: torchserve.scaled[2:] == ["1&max_worker=1"])
            release.set()
            poll(lambda: torchserve.known()["answered"])

    def test_three_times_without_an_answer_is_a_failure_of_torchserve(self, work, gone):
        torchserve = TorchServe(work)
        release = threading.Event()
        torchserve.card = lambda *_: release.wait()
        torchserve.workers = torchserve.after_restart = [{"pid": gone, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: watching.failure)
            assert torchserve.known()["restarts"]["worker_gone"] == watch.MOST_RESTARTS
            release.set()


@pytest.mark.usefixtures("hurried")
class TestNoRestart:
    """Each holds for many times as long as a restart would have taken."""

    def hold(self, torchserve: TorchServe, seconds: float = 3.0, interval_s: float = 0.05) -> Watch:
        stack, watching = torchserve.watched(interval_s)
        with stack:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                assert torchserve.scaled == []
                time.sleep(0.05)
        return watching

    def test_of_a_model_that_drains_or_starts(self, work):
        torchserve = TorchServe(work)
        torchserve.card = DRAINING
        self.hold(torchserve)
        assert torchserve.asked > 5

    def test_of_a_model_whose_queue_is_full(self, work):
        torchserve = TorchServe(work)
        torchserve.card = FULL
        self.hold(torchserve)

    def test_of_a_model_that_is_busy_with_what_came_before_the_card(self, work, computing):
        torchserve = TorchServe(work, response_timeout_s=1, startup_timeout_s=0)
        torchserve.workers = [{"pid": computing, "status": "READY"}]
        torchserve.pending = 100
        release = threading.Event()
        torchserve.card = lambda *_: release.wait()
        timer = threading.Timer(6, release.set)
        timer.start()
        self.hold(torchserve, 5.0, interval_s=1.0)  # In two of them a busy machine gives it some time.
        release.set()
        assert torchserve.asked == 1, "the card is asked for once, however long it takes"
        timer.cancel()

    def test_of_a_worker_that_torchserve_keeps_starting(self, work, gone):
        torchserve = TorchServe(work)
        torchserve.card = DIED
        numbers = iter(range(10**9))

        class Attempts(list):
            def __iter__(self):
                return iter([{"pid": -2 - next(numbers), "status": "UNLOADING"}])

            def __len__(self):
                return 1

        torchserve.workers = Attempts([None])
        self.hold(torchserve)

    def test_of_a_worker_that_ends_after_a_long_time_and_is_started_again_by_torchserve(self, work, idle, monkeypatch):
        monkeypatch.setattr(watch, "GONE_S", 2.0)
        monkeypatch.setattr(watch, "GIVEN_UP_S", 2.0)
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            time.sleep(2.5)  # It has been well for longer than it may be gone.
            idle.kill()
            idle.wait()
            poll(lambda: watching.states()[NAME] == "dead")
            time.sleep(1.0)  # For so long TorchServe has not noticed.
            torchserve.workers = [{"pid": os.getpid(), "status": "READY"}]
            poll(lambda: watching.states()[NAME] == "ready")
            assert torchserve.scaled == []

    def test_where_the_management_api_is_silent_but_the_card_is_answered(self, work):
        torchserve = TorchServe(work)
        torchserve.deaf.set()
        assert self.hold(torchserve).failure is None


@pytest.mark.usefixtures("hurried")
class TestReady:
    """What /ready says, by the process and by the card."""

    def ask(self, watching: Watch) -> tuple[int, str]:
        health = Health()
        health.watch = watching
        status, said = health()
        return status, said["models"][NAME]

    def test_no_longer_from_the_moment_the_only_worker_dies_until_a_new_one_answers(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            assert self.ask(watching) == (200, "ready")
            torchserve.card = FULL  # The queue's: TorchServe has no worker.
            torchserve.workers = [{"pid": idle.pid, "status": "UNLOADING"}]
            idle.kill()
            idle.wait()
            assert self.ask(watching) == (503, "dead")
            poll(lambda: not torchserve.known()["answered"])
            torchserve.workers = [{"pid": os.getpid(), "status": "READY"}]
            assert self.ask(watching) == (503, "dead"), "ready for TorchServe is not enough"
            torchserve.card = GOOD
            poll(lambda: self.ask(watching) == (200, "ready"))
            assert "no worker of it runs" in watching.news()[0][1]

    def test_no_longer_though_the_worker_that_died_had_answered_a_card_before(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        held, release = threading.Event(), threading.Event()

        def hold(connection: socket.socket, path: str) -> None:
            torchserve.card = FULL  # For those after this one.
            held.set()
            release.wait()
            GOOD(connection, path)

        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            torchserve.card = hold
            assert held.wait(30)
            torchserve.workers = [{"pid": idle.pid, "status": "UNLOADING"}]
            idle.kill()
            idle.wait()
            poll(lambda: "no worker of it runs" in str(watching.news()))
            asked = torchserve.asked
            with seen(partial(self.ask, watching)) as answers:
                release.set()
                poll(lambda: torchserve.asked > asked)
            assert set(answers) == {(503, "dead")}

    def test_no_longer_while_the_only_worker_is_stopped(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            idle.send_signal(signal.SIGSTOP)
            poll(lambda: not is_alive(idle.pid))
            assert self.ask(watching) == (503, "dead")

    def test_still_while_one_of_several_workers_lives(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": os.getpid(), "status": "READY"}, {"pid": idle.pid, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            idle.kill()
            idle.wait()
            assert self.ask(watching) == (200, "ready")

    def test_no_longer_after_two_late_cards_of_a_worker_that_computes_nothing(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        release = threading.Event()
        stack, watching = torchserve.watched(interval_s=0.5)
        with stack:
            poll(lambda: torchserve.asked)
            torchserve.card = lambda connection, path: release.wait() and GOOD(connection, path)
            asked = torchserve.asked
            with seen(partial(self.ask, watching)) as answers:
                poll(lambda: self.ask(watching) == (503, "silent"))
                assert torchserve.asked <= asked + 1
                assert torchserve.known()["answered"] is False
                release.set()
                poll(lambda: self.ask(watching) == (200, "ready"))
            assert set(answers) <= {(200, "ready"), (200, "busy"), (503, "silent")}
            assert torchserve.scaled == []

    def test_still_while_a_worker_that_answers_late_computes(self, work, computing):
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": computing, "status": "READY"}]
        release = threading.Event()
        stack, watching = torchserve.watched(interval_s=1.0)  # In two of them a busy machine gives it some time.
        with stack:
            poll(lambda: torchserve.asked)
            torchserve.card = lambda *_: release.wait()
            poll(lambda: self.ask(watching) == (200, "busy"))
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                assert self.ask(watching) == (200, "busy")
                time.sleep(0.05)
            release.set()

    def test_still_while_the_queue_is_full(self, work):
        torchserve = TorchServe(work)
        torchserve.card = FULL
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 5)
            assert self.ask(watching) == (200, "busy")

    def test_no_longer_once_two_cards_were_errors(self, work):
        torchserve = TorchServe(work)
        stack, watching = torchserve.watched()
        with stack:
            torchserve.card = INTERNAL
            poll(lambda: self.ask(watching) == (503, "failing"))
            torchserve.card = GOOD
            poll(lambda: self.ask(watching) == (200, "ready"))

    def test_no_longer_once_java_does_not_answer(self, work, monkeypatch):
        monkeypatch.setattr(watch, "JAVA_S", 0.5)
        monkeypatch.setattr(watch, "MANAGEMENT_S", 60.0)
        torchserve = TorchServe(work)
        stack, watching = torchserve.watched()
        with stack:
            torchserve.pingable = False
            poll(lambda: watching.why_not_ready == "java")
            assert self.ask(watching)[0] == 503
            torchserve.pingable = True
            poll(lambda: watching.why_not_ready is None)

    def test_no_longer_from_the_moment_java_is_stopped_and_it_is_a_failure_soon(self, work, idle):
        torchserve = TorchServe(work)
        torchserve.java = idle.pid
        stack, watching = torchserve.watched()
        with stack:
            assert self.ask(watching) == (200, "ready")
            idle.send_signal(signal.SIGSTOP)
            poll(lambda: not is_alive(idle.pid))
            assert watching.why_not_ready == "java"
            poll(lambda: watching.failure)
            assert watching.failure == "Java's process is stopped or has ended"

    def test_before_the_start_and_in_a_drain_not(self, work, tmp_path):
        torchserve = TorchServe(work)
        health = Health()
        assert health()[1]["why"] == "starting"
        stack, health.watch = torchserve.watched()
        with stack:
            assert health()[0] == 200
            health.drain_file = tmp_path / "draining"
            assert health()[0] == 200
            health.drain_file.touch()
            assert (health()[0], health()[1]["why"]) == (503, "draining")

    def test_without_an_archive_that_was_rejected_until_it_answers_after_all(self, work, gone):
        torchserve = TorchServe(work)
        torchserve.rejected["alpha"] = "archive alpha.mar: its worker failed: MemoryError"
        torchserve.card = FULL
        stack, watching = torchserve.watched(proven=False)
        with stack:
            poll(lambda: torchserve.asked > 3)
            assert self.ask(watching) == (200, "rejected")
            assert torchserve.models_file.read_text() == " (models: )"
            torchserve.card = GOOD
            poll(lambda: self.ask(watching) == (200, "ready"))
            assert torchserve.rejected == {}
            poll(lambda: read_published(torchserve.file)["rejected"] == {})
            poll(lambda: torchserve.models_file.read_text() == " (models: alpha/1.0)")


@pytest.mark.usefixtures("hurried")
def test_a_death_is_counted_by_its_cause_from_zero(work):
    torchserve = TorchServe(work)
    stack, watching = torchserve.watched()
    with stack:
        assert read_published(torchserve.file)["deaths"] == {NAME: dict.fromkeys(CAUSES, 0)}
        watching.count_death(Death(NAME, "alpha", "oom", ""))
        assert read_published(torchserve.file)["deaths"][NAME]["oom"] == 1


@pytest.mark.usefixtures("hurried")
def test_a_silent_model_is_restarted_after_the_time_of_one_batch_however_many_wait(work, idle):
    torchserve = TorchServe(work, response_timeout_s=1)
    torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
    torchserve.pending = 1000
    release = threading.Event()
    torchserve.card = lambda *_: release.wait()
    stack, _ = torchserve.watched()
    with stack:
        poll(lambda: restarted(torchserve, "no_answer"))
        release.set()


@pytest.mark.usefixtures("hurried")
def test_what_a_full_disk_kept_from_being_published_is_published_once_there_is_room(work):
    torchserve = TorchServe(work)
    stack, watching = torchserve.watched()
    with stack:
        draft = torchserve.file.with_suffix(".draft")
        draft.mkdir()  # Nothing can be written there.
        watching.count_death(Death(NAME, "alpha", "killed", ""))
        assert read_published(torchserve.file)["deaths"][NAME]["killed"] == 0
        draft.rmdir()
        poll(lambda: read_published(torchserve.file)["deaths"][NAME]["killed"] == 1)


@pytest.mark.usefixtures("hurried")
def test_a_torchserve_that_answers_nothing_is_a_failure(work):
    torchserve = TorchServe(work)
    torchserve.deaf.set()
    torchserve.card = lambda *_: None
    stack, watching = torchserve.watched()
    with stack:
        poll(lambda: watching.failure)
        assert "management API has been silent" in watching.failure


@pytest.mark.usefixtures("hurried")
def test_after_it_is_stopped_nothing_is_asked_or_restarted(work, gone):
    torchserve = TorchServe(work)
    stack, watching = torchserve.watched()
    with stack:
        poll(lambda: torchserve.asked)
        watching.stop()
        torchserve.workers = [{"pid": gone, "status": "READY"}]
        asked = torchserve.asked
        time.sleep(1)
        assert torchserve.asked == asked
        assert torchserve.scaled == []


def test_before_anything_is_published_nothing_is_known(tmp_path):
    nothing = {"ready": False, "models": {}, "deaths": {}, "rejected": {}, "defaults": {}}
    assert read_published(tmp_path / "watch.json") == nothing


def test_a_process_that_is_stopped_ended_or_unknown_is_not_alive(gone):
    assert is_alive(os.getpid())
    assert not is_alive(gone)
    assert not is_alive(-1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        poll(lambda: is_alive(process.pid))
        process.send_signal(signal.SIGSTOP)
        poll(lambda: not is_alive(process.pid))
        process.kill()
        poll(lambda: not is_alive(process.pid))  # A zombie.


# With a real TorchServe.

HANGING = """
import os, threading

class Handler:
    def initialize(self, context):
        pass

    def handle(self, rows, context):
        if any(bytes(row.get("body") or b"") == b"hang" for row in rows):
            threading.Event().wait()
        return [str(os.getpid()).encode() for row in rows]
"""


FAILING = """
import os, pathlib

class Handler:
    def initialize(self, context):
        if pathlib.Path(os.environ["BROKEN"]).exists():
            raise ValueError("broken")

    def handle(self, rows, context):
        return [str(os.getpid()).encode() for row in rows]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_archive(path, "alpha")
    write_archive(path, "beta")
    write_archive(path, "hanging", HANGING, config="responseTimeout: 4\n")
    write_archive(path, "failing", FAILING, config="maxRetryTimeoutInSec: 1\n")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def watching(store: Path, work: Path, *options: str, broken: Path = Path("/nonexistent")):
    options = ("--warm-up-s", "0", "--watch-s", "0.5", "--ready-port", str(free_port()), *options)
    with launched(store, work, *options, environment={"BROKEN": str(broken)}) as server:
        yield server.await_ready()


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What keeps `failing` from being loaded, once it is there."""
    return tmp_path_factory.mktemp("broken") / "broken"


@pytest.fixture(scope="module")
def server(store, broken):
    """A server of all the archives, whose models fare ill one after the other."""
    work = Path(tempfile.mkdtemp(prefix="srv-"))
    with watching(store, work, broken=broken) as server:
        yield server
    shutil.rmtree(work)


def scrape(server: Launched, *wanted: str) -> list[float]:
    """Return some series' values; they are left out of a scrape where TorchServe takes too long to answer."""

    def values() -> list[float]:
        status, body = server.ask("GET", "/metrics", what="metrics")
        assert status == 200
        pairs = (line.rpartition(" ") for line in body.decode().splitlines())
        found = {name: value for name, _, value in pairs}
        return [float(found[name]) for name in wanted if name in found]

    found = poll(lambda: len(found := values()) == len(wanted) and found, 60, pause_s=0.1)
    assert isinstance(found, list)
    return found


def series(name: str, **labels: str) -> str:
    return f"convscope_{name}{{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "}"


def metric(server: Launched, name: str, **labels: str) -> float:
    [value] = scrape(server, series(name, **labels))
    return value


def restarts(server: Launched, model: str) -> float:
    reasons = ("worker_gone", "given_up", "card_fails", "no_answer")
    return sum(
        scrape(
            server, *(series("model_restarts_total", model=model, reason=reason, version="1.0") for reason in reasons)
        )
    )


def ready_workers(server: Launched, model: str) -> float:
    return metric(server, "workers", model=model, state="ready", version="1.0")


def look(server: Launched) -> tuple[int, dict]:
    """Ask /ready."""
    arguments = server.process.args
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(arguments[arguments.index("--ready-port") + 1]), timeout=60
    )
    with contextlib.closing(connection):
        connection.request("GET", "/ready")
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_a_model_whose_thread_in_torchserve_has_ended_is_brought_back(store, work):
    """Unpatched, the sequence leaves TorchServe without a thread for the worker, which it calls ready for good."""
    with watching(store, work, "--no-patches", "--models", "alpha") as server:
        assert "  patches  none (of TorchServe)\n" in server.out
        for patch in PATCHES:
            assert f"server: TorchServe runs without the {patch.name} patch (--no-patches): " in server.err
        sequence = predictions_request("alpha", {b"data": b""}, sequence_id="1")
        with grpc.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
            call = channel.stream_stream(f"/{INFERENCE}.InferenceAPIsService/StreamPredictions2")

            (log,) = work.glob("convscope-*/logs/torchserve.log")
            deadline = time.monotonic() + 120
            while "IllegalStateException error" not in log.read_text():
                assert time.monotonic() < deadline
                with pytest.raises(grpc.RpcError):
                    list(call(iter([sequence]), timeout=60))
                time.sleep(2)  # Whether it ends the thread depends on which of two is first. What waits ends the next.
        poll(lambda: restarts(server, "alpha") >= 1, 120, pause_s=0.1)
        poll(lambda: ready_workers(server, "alpha") == 1, 240, pause_s=0.1)
        assert server.rest("alpha") == b"alpha 1.0"
        assert "TorchServe's own thread for its worker ended: java.lang.IllegalStateException" in server.err


def test_a_busy_model_is_left_alone(store, work):
    # Four seconds without computing make a model silent: a busy machine does not keep a worker waiting so long.
    with watching(store, work, "--models", "alpha", "--watch-s", "2") as server:
        worker = server.rest("alpha", "pid:")
        threads = [threading.Thread(target=server.rest, args=("alpha", "compute:4")) for _ in range(3)]
        with seen(partial(look, server)) as verdicts:
            for thread in threads:
                thread.start()
            poll(lambda: metric(server, "card_answered", model="alpha", version="1.0") == 0, pause_s=0.1)
            for thread in threads:
                thread.join(120)
        assert {(status, said["models"][NAME]) for status, said in verdicts} == {(200, "ready"), (200, "busy")}
        poll(lambda: metric(server, "card_answered", model="alpha", version="1.0") == 1, pause_s=0.1)
        assert restarts(server, "alpha") == 0
        assert server.rest("alpha", "pid:") == worker
        assert server.err == ""


def test_a_worker_that_is_stopped_is_replaced_and_the_other_models_go_on(server):
    stopped, others = int(server.rest("alpha", "pid:")), server.rest("beta", "pid:")
    assert ready_workers(server, "alpha") == 1
    assert look(server)[0] == 200
    silent = partial(metric, server, "workers", model="alpha", state="silent", version="1.0")
    with seen(partial(look, server)) as verdicts, seen(lambda: time.sleep(0.1) or silent()) as counts:
        os.kill(stopped, signal.SIGSTOP)

        def restarted() -> bool:
            assert server.rest("beta", "pid:") == others
            return restarts(server, "alpha") == 1 and ready_workers(server, "alpha") == 1

        poll(restarted, 120, pause_s=0.1)
    assert {(status, said["models"][NAME]) for status, said in verdicts} >= {(503, "dead"), (503, "restarting")}
    assert (200, "dead") not in {(status, said["models"][NAME]) for status, said in verdicts}
    assert {said["models"]["beta/1.0"] for _, said in verdicts} <= {"ready", "busy"}
    assert 1 in counts
    assert int(server.rest("alpha", "pid:")) != stopped
    assert look(server)[0] == 200
    assert metric(server, "card_answered", model="alpha", version="1.0") == 1
    assert restarts(server, "beta") == 0
    assert f"server: {NAME}: TorchServe calls a worker ready whose process has ended or is stopped" in server.err
    assert f"server: {NAME} answers its card again\n" in server.err


def test_a_model_that_torchserve_has_given_up_is_started_again(server, broken):
    broken.touch()
    os.kill(int(server.rest("failing", "pid")), signal.SIGKILL)
    (log,) = server.work.glob("convscope-*/logs/models.log")
    poll(lambda: "ValueError: broken" in log.read_text(), 120)
    poll(lambda: restarts(server, "failing") == 1, 120, pause_s=0.1)
    broken.unlink()
    poll(lambda: ready_workers(server, "failing") == 1, 240, pause_s=0.1)
    assert metric(server, "model_restarts_total", model="failing", reason="given_up", version="1.0") >= 1


def test_a_handler_that_hangs_is_not_ready_until_torchserve_has_ended_it(server):
    hung = server.rest("hanging", "pid")

    def hang() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.ask("POST", "/predictions/hanging", "hang")

    thread = threading.Thread(target=hang)
    with seen(partial(look, server)) as verdicts:
        thread.start()
        poll(lambda: ready_workers(server, "hanging") == 0, pause_s=0.1)
        poll(lambda: ready_workers(server, "hanging") == 1, 120, pause_s=0.1)
    states = [said["models"]["hanging/1.0"] for _, said in verdicts]
    assert states.index("silent") < states.index("dead"), "before TorchServe ended it"
    assert {status for status, said in verdicts if said["models"]["hanging/1.0"] in ("silent", "dead")} == {503}
    assert server.rest("hanging", "pid") != hung
    assert restarts(server, "hanging") == 0
    assert "its worker did not answer within 4 s (responseTimeout)" in server.err
    thread.join(60)
