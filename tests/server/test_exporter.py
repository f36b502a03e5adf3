"""The exporter over HTTP, in this process and as the process the launcher starts."""

import contextlib
import gzip
import http.client
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from server import exporter, ports
from server.configuration import PrivateDirectory
from server.server_metrics import ServerMetrics
from tests.server.harness import ROOT, poll, processes
from tests.server.writers import writing


@pytest.fixture
def metrics_folder(work):
    (work / "metrics").mkdir()
    return work / "metrics"


@pytest.fixture
def address(work, metrics_folder):
    listener = ports.listen("127.0.0.1", 0, "--metrics-port")
    server = ServerMetrics([("m", "1")], 1, PrivateDirectory(work), 0)
    app = exporter.build_app(metrics_folder, server)
    server = exporter.Server(listener, app)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield listener.getsockname()
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address, method="GET", path="/metrics", headers=None) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_workers_and_server_are_in_one_answer(address, metrics_folder):
    with writing(metrics_folder, "9000") as worker:
        worker.tell("count 3")
        status, headers, body = ask(address)
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    lines = body.decode().splitlines()
    assert 'convscope_requests_total{model="m",version="1"} 3.0' in lines
    assert "convscope_torchserve_up 0.0" in lines
    assert not [line for line in lines if line.startswith(("python_", "process_"))]


def test_openmetrics_and_compression_are_negotiated(address):
    status, headers, body = ask(address, headers={"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"})
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"# EOF\n")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/favicon.ico", "/models"])
def test_there_is_nothing_but_metrics(path, address):
    assert ask(address, path=path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_metrics_are_only_read(method, address):
    assert ask(address, method)[0] == 405


def test_callers_that_say_nothing_take_a_bounded_number_of_threads_and_are_let_go(address, monkeypatch):
    monkeypatch.setattr(exporter.Handler, "timeout", 1.0)
    before = threading.active_count()
    mute = [socket.create_connection(address, timeout=30) for _ in range(3 * exporter.MOST_THREADS)]
    try:
        most = 0
        started = time.monotonic()
        while time.monotonic() - started < 0.5:
            most = max(most, threading.active_count() - before)
        assert 0 < most <= 2 * exporter.MOST_THREADS, "a thread for each, and the clock that ends it"
        assert ask(address)[0] == 200
        assert [caller.recv(1) for caller in mute] == [b""] * len(mute)
    finally:
        for caller in mute:
            caller.close()


def test_callers_that_drip_are_cut_off(address, monkeypatch):
    monkeypatch.setattr(exporter, "CALLER_S", 1.0)
    stop = threading.Event()

    def drip():
        while not stop.wait(0.1):
            for caller in dripping:
                with contextlib.suppress(OSError):
                    caller.sendall(b"G")

    dripping = [socket.create_connection(address, timeout=30) for _ in range(exporter.MOST_THREADS)]
    dripper = threading.Thread(target=drip)
    dripper.start()
    try:
        assert ask(address)[0] == 200, "long before they are through"
    finally:
        stop.set()
        dripper.join()
        for caller in dripping:
            caller.close()


def command(work, listener: socket.socket) -> list[str]:
    """The command line that the launcher gives it, but for the launcher's own number at its end."""
    return [
        *(sys.executable, "-m", "server.exporter", "--listener", str(listener.fileno()), "--torchserve-port", "1"),
        *("--directory", str(work), "--models", "m/1", "--started", "7", "--launcher"),
    ]


def test_its_address_answers_from_before_it_starts_until_after_it_died_and_came_back(work, metrics_folder):
    with ports.listen("127.0.0.1", 0, "--metrics-port") as listener:
        answers = []
        for _ in range(2):
            caller = threading.Thread(target=lambda: answers.append(ask(listener.getsockname())))
            caller.start()
            process = subprocess.Popen(
                [*command(work, listener), str(os.getpid())], pass_fds=[listener.fileno()], cwd=ROOT
            )
            caller.join(30)
            process.kill()
            process.wait()
        assert [status for status, _, _ in answers] == [200, 200]
        assert b"convscope_server_start_time_seconds 7.0" in answers[1][2]
        assert list(metrics_folder.iterdir()) == []


def test_it_does_not_start_for_a_launcher_that_has_gone(work, metrics_folder):
    with ports.listen("127.0.0.1", 0, "--metrics-port") as listener:
        orphan = subprocess.Popen([*command(work, listener), "1"], pass_fds=[listener.fileno()], cwd=ROOT)
        assert orphan.wait(30) == 1


def test_it_ends_when_its_launcher_is_killed(work, metrics_folder):
    code = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([*sys.argv[2:], str(os.getpid())], pass_fds=[int(sys.argv[1])])\n"
        "time.sleep(600)"
    )
    with ports.listen("127.0.0.1", 0, "--metrics-port") as listener:
        fd = listener.fileno()
        words = [sys.executable, "-c", code, str(fd), *command(work, listener)]
        launcher = subprocess.Popen(words, pass_fds=[fd], cwd=ROOT)
        try:
            assert ask(listener.getsockname())[0] == 200
        finally:
            launcher.kill()
            launcher.wait()
        poll(lambda: not processes(str(work)))
