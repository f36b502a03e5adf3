"""The number of requests in flight, read from Java's thread dump and the kernel's tables."""

import math
import socket
from pathlib import Path

import pytest

from server.configuration import Listeners, private_directory
from server.draining import DUMP_END, Traffic, count_busy_workers, unsent_bytes
from server.models import Archive
from tests.server.standins import describe, saying, serving

IDLE = """
"W-9000-a_1.0" #16 prio=5 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
\tat org.pytorch.serve.wlm.Model.pollBatch(Model.java:482)
\tat org.pytorch.serve.wlm.BatchAggregator.getRequest(BatchAggregator.java:36)
\tat org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:195)

"""
BUSY = """
"W-9001-b_1.0" #17 prio=5 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
\tat java.util.concurrent.ArrayBlockingQueue.poll(java.base@17.0.15/ArrayBlockingQueue.java:435)
\tat org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:234)

"""
STARTING = BUSY.replace(
    "ArrayBlockingQueue.poll(", "CountDownLatch.await(X.java:1)\n\tat org.pytorch.serve.wlm.WorkerThread.connect("
)
OTHER = """
"W-9000-a_1.0-stdout" #25 runnable
\tat java.io.FileInputStream.readBytes(Native Method)

"main" #1
\tat x.run(
"""


def test_a_worker_that_waits_for_a_request_is_not_busy_and_one_that_waits_for_its_backend_is():
    assert count_busy_workers(IDLE + OTHER) == 0
    assert count_busy_workers(IDLE + BUSY + OTHER + BUSY) == 2


def test_a_worker_that_is_being_started_has_no_request():
    assert count_busy_workers(STARTING) == 0


def test_a_reply_the_caller_has_not_taken_counts_as_unsent():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            server, _ = listener.accept()
            with server:
                assert unsent_bytes(port) == 0
                server.setblocking(False)
                try:
                    while True:
                        server.send(b"x" * 65536)
                except BlockingIOError:
                    pass
                assert unsent_bytes(port) > 0
                caller.close()


class IdleJava:
    """A process without work that prints its thread dump when asked."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def poll(self) -> int | None:
        return None

    def signal(self, number: int) -> None:
        with self._log.open("a") as file:
            file.write(f"{IDLE}{DUMP_END}s: 1\n")


@pytest.fixture
def directory(work):
    with private_directory(work, None) as made:
        yield made


def wait_until_idle(directory, most_looks: int) -> bool:
    """Drain two models on a port that nobody uses; impatient after so many looks."""
    archives = [Archive(Path("a.mar"), name, "1.0", None, frozenset()) for name in ("a", "b")]
    traffic = Traffic(IdleJava(directory.jvm_log), directory, Listeners("127.0.0.1", 0, 0, 0, 0, 0, 0), archives)
    looks = iter(range(most_looks))
    return traffic.wait_until_idle(math.inf, lambda: next(looks, None) is None)


def test_requests_may_wait_where_the_management_api_does_not_say(directory):
    asked = []

    def refuse(connection, path):
        asked.append(path)
        saying("{}", "503 Service Unavailable")(connection, path)

    with serving(directory.management_socket, refuse):
        assert not wait_until_idle(directory, 6)
    assert asked == ["/models/a/1.0"] * 3, "every other look, and nobody is asked for the second model in vain"


def test_a_management_api_that_answers_again_ends_the_drain_once_nothing_waits(directory):
    asked = []
    script = ["{}", describe(1, 1, pending=1)]

    def answer(connection, path):
        asked.append(path)
        saying(script.pop(0) if script else describe(1, 1))(connection, path)

    with serving(directory.management_socket, answer):
        assert wait_until_idle(directory, 1000)
    assert asked.count("/models/b/1.0") >= 2
