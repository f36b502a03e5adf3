"""From the first signal to the last process gone, with a real TorchServe."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

from tests.server.harness import launched, poll, write_archive


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_archive(path, "alpha")
    return path


def assert_nothing_is_left(server):
    poll(lambda: not server.descendants(), 20)
    assert not list(server.work.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(number, store, tmp_path, work):
    with launched(store, work) as server:
        server.await_ready()
        server.signal(number)
        assert server.end(20) == 0
        assert "server: stopped\n" in server.err
        assert "Traceback" not in server.err + server.out
        assert_nothing_is_left(server)


def test_a_signal_before_it_is_ready_stops_it_cleanly(store, tmp_path, work):
    with launched(store, work) as server:
        poll(lambda: list(work.glob("convscope-*/logs/java.log")))
        server.signal(signal.SIGINT)
        assert server.end(10) == 0
        assert "stopped before it was ready" in server.err
        assert_nothing_is_left(server)


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_a_request_in_flight_and_one_behind_it_are_answered_in_full_before_it_stops(transport, store, tmp_path, work):
    answers = {}
    first, second = tmp_path / "first", tmp_path / "second"
    with launched(store, work, "--drain-s", "30") as server:
        server.await_ready()
        ask = getattr(server, transport)
        threads = [
            threading.Thread(target=lambda path=path: answers.update({path.name: ask("alpha", f"sleep:{path},2")}))
            for path in (first, second)
        ]
        threads[0].start()
        poll(first.exists)
        threads[1].start()
        server.signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert answers == {"first": b"slept", "second": b"slept"}
        assert server.end(20) == 0
        assert "still in flight" not in server.err
        assert_nothing_is_left(server)


def test_a_reply_on_its_way_to_a_slow_caller_arrives_in_full(store, work):
    size = 60_000_000  # Far more than the kernel buffers.
    with launched(store, work, "--drain-s", "30") as server:
        server.await_ready()
        order = f"bytes:{size}".encode()
        head = f"POST /predictions/alpha HTTP/1.1\r\nHost: x\r\nContent-Length: {len(order)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port("REST"))) as caller:
            caller.settimeout(20)
            caller.sendall(head + order)
            received = len(caller.recv(1000))
            server.signal(signal.SIGTERM)
            poll(lambda: "stopping" in server.err)
            time.sleep(1)  # Three times what TorchServe would give it.
            while received < size and (data := caller.recv(1_000_000)):
                received += len(data)
        assert received >= size
        assert server.end(20) == 0


def test_readiness_fails_first_while_requests_go_on(store, tmp_path, work):
    started = tmp_path / "started"
    with launched(store, work, "--unready-s", "60") as server:
        server.await_ready()
        server.signal(signal.SIGTERM)
        drain_file = poll(lambda: list(work.glob("convscope-*/draining")))
        assert server.rest("alpha", "environment:CONVSCOPE_DRAIN_FILE").decode() == f"'{drain_file[0]}'"
        assert server.rest("alpha", f"sleep:{started},0.1") == b"slept"
        server.signal(signal.SIGTERM)
        assert server.end(10) == 1


def test_a_request_that_takes_too_long_is_given_up_after_the_drain_time(store, tmp_path, work):
    started = tmp_path / "started"
    with launched(store, work, "--drain-s", "1") as server:
        server.await_ready()

        def ask():
            with contextlib.suppress(OSError):
                server.rest("alpha", f"sleep:{started},60")

        thread = threading.Thread(target=ask)
        thread.start()
        poll(started.exists)
        server.signal(signal.SIGTERM)
        assert server.end(20) == 0
        assert "requests were still in flight after 1 s (--drain-s)" in server.err
        thread.join(10)
        assert_nothing_is_left(server)


def test_a_second_signal_kills_at_once(store, tmp_path, work):
    started = tmp_path / "started"
    with launched(store, work, "--drain-s", "60") as server:
        server.await_ready()

        def ask():
            with contextlib.suppress(OSError):
                server.rest("alpha", f"sleep:{started},60")

        thread = threading.Thread(target=ask)
        thread.start()
        poll(started.exists)
        server.signal(signal.SIGINT)
        poll(lambda: "stopping" in server.err)
        server.signal(signal.SIGINT)
        assert server.end(5) == 1
        thread.join(10)
        assert_nothing_is_left(server)


def test_when_java_dies_by_itself_it_says_so_and_leaves_no_worker_and_no_zombie(store, tmp_path, work):
    with launched(store, work) as server:
        server.await_ready()
        os.kill(server.java(), signal.SIGKILL)
        assert server.end(20) == 1
        assert "TorchServe ended by itself (killed by SIGKILL)" in server.err
        poll(lambda: not server.descendants(), 20)
        assert not list(work.glob("convscope-[!l]*"))


def test_when_the_launcher_is_killed_java_and_its_workers_go_too(store, tmp_path, work):
    with launched(store, work) as server:
        server.await_ready()
        assert len(server.descendants()) == 2
        server.process.kill()
        server.end()
        poll(lambda: not server.descendants(), 20)
