"""The watch: when a model is restarted, with a stand-in for TorchServe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from server import watch
from server.children import is_alive, processor_s
from server.configuration import Listeners, private_directory
from server.diagnosis import CAUSES, Death
from server.health import Health
from server.models import Archive
from server.watch import Watch, read_published
from tests.server.harness import poll, seen
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
    """A process that computes: a tenth of the time, ten times what counts as idle."""
    code = "import time\nwhile True: sum(range(100_000)); time.sleep(0.02)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
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
        directory = stack.enter_context(private_directory(self._work, None))
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

    def hold(self, torchserve: TorchServe, seconds: float = 1.5, interval_s: float = 0.05) -> Watch:
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
        timer = threading.Timer(4, release.set)
        timer.start()
        self.hold(torchserve, 3.0, interval_s=0.5)  # In two of them a busy machine gives it some time.
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
        monkeypatch.setattr(watch, "GONE_S", 1.0)
        monkeypatch.setattr(watch, "GIVEN_UP_S", 1.0)
        torchserve = TorchServe(work)
        torchserve.workers = [{"pid": idle.pid, "status": "READY"}]
        stack, watching = torchserve.watched()
        with stack:
            poll(lambda: torchserve.asked > 2)
            time.sleep(1.2)  # It has been well for longer than it may be gone.
            idle.kill()
            idle.wait()
            poll(lambda: watching.states()[NAME] == "dead")
            time.sleep(0.5)  # For so long TorchServe has not noticed.
            torchserve.workers = [{"pid": os.getpid(), "status": "READY"}]
            poll(lambda: watching.states()[NAME] == "ready")
            assert torchserve.scaled == []

    def test_where_the_management_api_is_silent_but_the_card_is_answered(self, work, monkeypatch):
        monkeypatch.setattr(watch, "MANAGEMENT_S", 1.0)  # The first card must be answered before.
        torchserve = TorchServe(work)
        torchserve.deaf.set()
        assert self.hold(torchserve, 2.0).failure is None


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
        stack, watching = torchserve.watched(interval_s=0.5)  # In two of them a busy machine gives it some time.
        with stack:
            poll(lambda: torchserve.asked)
            torchserve.card = lambda *_: release.wait()
            poll(lambda: self.ask(watching) == (200, "busy"))
            deadline = time.monotonic() + 2.5
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
def test_what_is_published_is_written_again_where_it_is_cleared_away(work):
    torchserve = TorchServe(work)
    stack, _ = torchserve.watched()
    with stack:
        for file in (torchserve.models_file, torchserve.file):
            poll(file.exists)
            text = file.read_text()
            file.unlink()
            poll(file.exists)
            assert file.read_text() == text


@pytest.mark.usefixtures("hurried")
def test_what_is_published_is_written_again_where_it_cannot_be_read_and_that_is_said_once(work):
    torchserve = TorchServe(work)
    stack, watching = torchserve.watched()
    with stack:
        poll(torchserve.models_file.exists)
        torchserve.models_file.write_bytes(b"\xff\xfe")
        poll(lambda: torchserve.models_file.read_bytes() == b" (models: alpha/1.0)")
        [(level, said)] = poll(watching.news)
        assert level == "error"
        assert said.startswith(f"{torchserve.models_file} cannot be read, or held something else")

        def obstruct() -> bool:
            torchserve.models_file.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # It has been written again meanwhile.
                torchserve.models_file.mkdir()
            return torchserve.models_file.is_dir()

        poll(obstruct)
        news = list(poll(watching.news))
        time.sleep(10 * watch.TICK_S)
        [(_, said)] = news + watching.news()
        assert f"{torchserve.models_file} cannot be written (Is a directory)" in said
        torchserve.models_file.rmdir()
        poll(torchserve.models_file.is_file)
        assert torchserve.models_file.read_text() == " (models: alpha/1.0)"


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
