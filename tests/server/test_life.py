"""The server from start to stop, with a real TorchServe."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.server.harness import ROOT, launched, poll, processes, write_archive


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_archive(path, "alpha")
    return path


def assert_stopped_cleanly(server):
    assert server.end(20) == 0
    assert "server: stopped\n" in server.err
    assert "Traceback" not in server.err + server.out
    assert_nothing_is_left(server)


def assert_nothing_is_left(server):
    poll(lambda: not server.descendants(), 20)
    assert not list(server.work.iterdir())


def test_metrics_are_there_through_its_life_and_what_was_asked_before_the_signal_is_answered_in_full(
    store, tmp_path, work
):
    size = 60_000_000  # Far more than the kernel buffers.
    answers = {}
    port = free_port()
    with launched(store, work, "--metrics-port", str(port), "--drain-s", "60") as server:
        with poll(lambda: connect(port)) as caller:
            caller.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: caller.recv(65536), b""))
            assert b"convscope_torchserve_up" in answer
            assert "Ready" not in server.out
        server.await_ready()
        assert os.getpgid(exporter(server)) != os.getpgid(server.process.pid), "Ctrl-C in the terminal is not for it"
        for _ in range(2):
            killed = exporter(server)
            os.kill(killed, signal.SIGKILL)
            assert server.ask("GET", "/metrics", what="metrics")[0] == 200, "a scrape waits for the next one"
            assert exporter(server) != killed
        assert server.rest("alpha") == b"alpha 1.0"
        assert server.err.count("the metrics exporter ended (killed by SIGKILL) and is started again") == 1

        order = f"bytes:{size}".encode()
        head = f"POST /predictions/alpha HTTP/1.1\r\nHost: x\r\nContent-Length: {len(order)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port("REST"))) as slow:
            slow.settimeout(20)
            slow.sendall(head + order)
            received = len(slow.recv(1000))

            def ask(name: str) -> None:
                answers[name] = getattr(server, name.partition(" ")[0])("alpha", f"sleep:{tmp_path / name},1")

            names = ("rest in flight", "grpc behind it", "rest behind it", "grpc last")
            threads = [threading.Thread(target=ask, args=(name,)) for name in names]
            threads[0].start()
            poll((tmp_path / names[0]).exists)
            for thread in threads[1:]:
                thread.start()
            assert not draining(server)
            server.signal(signal.SIGTERM)
            poll(lambda: "stopping" in server.err)
            assert draining(server)
            os.kill(exporter(server), signal.SIGKILL)
            assert draining(server), "started again during the drain too"
            for thread in threads:
                thread.join(30)
            assert answers == dict.fromkeys(names, b"slept")
            time.sleep(1)  # Three times what TorchServe would give the reply that is on its way.
            while received < size and (data := slow.recv(1_000_000)):
                received += len(data)
        assert received >= size
        assert_stopped_cleanly(server)
        assert "still in flight" not in server.err


def test_when_java_dies_by_itself_it_says_so_and_leaves_no_worker_and_no_zombie(store, work):
    with launched(store, work) as server:
        server.await_ready()
        server.rest("alpha", "complain:bad_image,2")  # Failed requests are passed on as text; below as JSON.
        poll(lambda: server.err.count("worker: ") == 2)
        assert "worker: alpha 1.0 request 1: bad_image: no\n" in server.err
        os.kill(server.java(), signal.SIGKILL)
        assert server.end(20) == 1
        assert "TorchServe ended by itself (killed by SIGKILL)" in server.err
        poll(lambda: not server.descendants(), 20)
        assert not list(work.glob("convscope-[!l]*"))


def test_a_replicas_log_in_json_has_what_runbooks_search_for_and_no_flood_and_what_takes_too_long_is_given_up(
    tmp_path, work
):
    operations = (ROOT / "docs/operations.md").read_text()
    searched = set(re.findall(r"logs [^|`]*torchserve[^|`]*\| grep (?:-\w+ (?:\d+ )?)*'([^']+)'", operations))
    searched |= set(re.findall(r'the log (?:around|before) "([^"]+)"', operations))
    assert searched, "no runbook has people search a log any more"
    write_archive(tmp_path / "store", "alpha")
    (tmp_path / "store" / "broken.mar").write_bytes(b"PK")  # Rejected; the other is served.
    with launched(tmp_path / "store", work, "--log-format", "json", "--watch-s", "1", "--drain-s", "1") as server:
        server.await_ready()
        server.rest("alpha", "complain:internal,1")  # A request that fails, with the code that a runbook looks for.
        for number in (signal.SIGKILL, signal.SIGSTOP):  # TorchServe starts the first again, the launcher the second.
            (worker,) = server.workers()
            os.kill(worker, number)
            poll(lambda worker=worker: worker not in (found := server.workers()) and found, 120, 0.1)
            poll(lambda: server.ask("GET", "/predictions/alpha")[0] == 200, 120, 0.1)
        poll(lambda: server.err.count("answers its card again") == 1)
        said = server.err
        missing = {text for text in searched if not re.search(text, said)}
        assert not missing, f"no incident logs {missing}"
        deaths = [json.loads(line) for line in said.splitlines() if "Worker died" in line]
        assert [death["cause"] for death in deaths] == ["killed"], "what the launcher ends itself is no death"
        counted = server.ask("GET", "/metrics", what="metrics")[1].decode()
        assert 'convscope_worker_deaths_total{cause="killed",model="alpha",version="1.0"} 1.0' in counted
        server.rest("alpha", "complain:internal,1000")
        poll(lambda: "more such lines" in server.err)

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.rest("alpha", f"sleep:{tmp_path / 'started'},60")

        thread = threading.Thread(target=ask)
        thread.start()
        poll((tmp_path / "started").exists)
        server.signal(signal.SIGTERM)
        assert server.end(30) == 0
        assert "requests were still in flight after 1 s (--drain-s)" in server.err
        thread.join(10)
        assert_nothing_is_left(server)
        assert server.err.count("Worker died") == 1
        assert server.out == ""
        entries = [json.loads(line) for line in server.err.splitlines()]
    relayed = [entry for entry in entries if entry.get("code") == "internal"]
    unsaid = sum(int(entry["message"].split()[0]) for entry in entries if "more such lines" in entry["message"])
    assert len(relayed) + unsaid == 1001
    assert len(relayed) < 500
    assert all({"time", "level", "message"} <= set(entry) for entry in entries)
    assert entries[-1]["message"] == "stopped"


def exporter(server) -> int:
    """Return the exporter's process."""
    (pid,) = [pid for pid in processes(str(server.work)) if pid in processes("-m server.exporter")]
    return pid


def connect(port: int) -> socket.socket | None:
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection(("127.0.0.1", port), timeout=60)
    return None


def draining(server) -> bool:
    status, body = server.ask("GET", "/metrics", what="metrics")
    assert status == 200
    return b"convscope_draining 1.0\n" in body


def test_when_the_launcher_is_killed_all_go_and_the_next_start_has_an_empty_metrics_directory_of_its_own(store, work):
    with launched(store, work) as server:
        server.await_ready()
        folder = Path(server.rest("alpha", "environment:PROMETHEUS_MULTIPROC_DIR").decode().strip("'"))
        assert list(folder.iterdir()) == []
        (folder / "counter_9000.db").write_bytes(b"left behind")
        assert len(server.descendants()) == 3, "Java, a worker, the exporter"
        server.process.kill()
        server.end()
        poll(lambda: not server.descendants(), 20)
    left = set(work.iterdir())
    with launched(store, work) as server:
        poll(lambda: [path for path in work.glob("convscope-*/logs/java.log") if path.parents[1] not in left])
        [new] = set(work.glob("convscope-*/metrics")) - {folder}
        assert list(new.iterdir()) == []
        server.signal(signal.SIGINT)  # Before it is ready.
        assert server.end(10) == 0
        assert "stopped before it was ready" in server.err
        poll(lambda: not server.descendants(), 20)
    assert set(work.iterdir()) == left
    assert (folder / "counter_9000.db").exists()


def test_it_serves_on_and_stops_cleanly_where_nothing_that_it_says_can_be_written(store, work):
    port = free_port()

    def ask(order: str = "") -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("POST" if order else "GET", "/predictions/alpha", order.encode() or None)
            return connection.getresponse().status
        return None

    with launched(store, work, "--rest-port", str(port), deaf=True) as server:
        ended = server.process.poll
        poll(lambda: ended() is not None or (ask() == 200 and not list(work.glob("convscope-*/starting"))), 240, 0.1)
        assert ended() is None
        (folder,) = work.glob("convscope-*")
        for _ in range(2):
            assert ask("complain:bad_image,2") == 200
        poll(lambda: (folder / "logs" / "models.log").read_text().count("bad_image") == 4)
        killed = exporter(server)
        os.kill(killed, signal.SIGKILL)
        poll(lambda: killed not in server.descendants() and len(server.descendants()) == 3, 20)
        assert ask() == 200
        server.signal(signal.SIGTERM)
        assert server.end(20) == 0
        assert_nothing_is_left(server)
