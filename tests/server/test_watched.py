"""The watch over a real TorchServe, with its patches and without them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import grpc
import pytest

from server.patches import PATCHES
from tests.foreign import INFERENCE, predictions_request
from tests.ports import free_port
from tests.server.harness import CAREFUL, ROOT, Launched, launched, poll, seen, write_archive

NAME = "alpha/1.0"
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
    write_archive(path, "a-careful", CAREFUL)  # The first that is asked in a warm-up.
    return path


@contextlib.contextmanager
def watching(store: Path, *options: str, broken: Path = Path("/nonexistent")):
    work = Path(tempfile.mkdtemp(prefix="srv-"))
    options = ("--warm-up-s", "0", "--watch-s", "0.5", "--ready-port", str(free_port()), *options)
    with launched(store, work, *options, environment={"BROKEN": str(broken)}) as server:
        yield server.await_ready()
    shutil.rmtree(work)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What keeps `failing` from being loaded, once it is there."""
    return tmp_path_factory.mktemp("broken") / "broken"


@pytest.fixture(scope="module")
def server(store, broken):
    """A server of all the archives, whose models fare ill one after the other."""
    with watching(store, "--warm-up-s", "1", broken=broken) as server:
        yield server


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory):
    """A server of `alpha`, and of a model that says what it was asked, on a TorchServe without patches; and its store.

    Two seconds without computing make a model silent: a busy machine does not keep a worker waiting so long.
    """
    path = tmp_path_factory.mktemp("unpatched")
    write_archive(path, "alpha")
    write_archive(path, "careful", CAREFUL)
    with watching(path, "--no-patches", "--watch-s", "1") as server:
        yield server, path


def scrape(server: Launched, *wanted: str) -> list[float]:
    """Return some series' values; they are left out of a scrape where TorchServe takes too long to answer."""

    def values() -> list[float]:
        status, body = server.ask("GET", "/metrics", what="metrics")
        assert status == 200
        pairs = (line.rpartition(" ") for line in body.decode().splitlines())
        found = {name: value for name, _, value in pairs}
        return [float(found[name]) for name in wanted if name in found]

    found = poll(lambda: len(found := values()) == len(wanted) and found, 60, pause_s=0.5)
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


def test_without_a_warm_up_nothing_but_the_card_is_asked(unpatched):
    server, _ = unpatched
    asked = json.loads(server.rest("careful", "seen"))
    assert {(kind, starting) for kind, starting in asked} == {("card", False)}


def test_in_a_warm_up_both_transports_are_asked_before_the_card_is_answered_and_not_after(server):
    asked = json.loads(server.rest("a-careful", "seen"))
    assert {(kind, starting) for kind, starting in asked} == {("REST", True), ("gRPC", True), ("card", False)}


def test_a_reload_is_refused_without_its_patch_since_requests_would_be_lost(unpatched):
    server, store = unpatched
    write_archive(store, "alpha", version="2.0")
    command = [sys.executable, "-m", "server.reload", "--work-dir", str(server.work)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 1
    assert "without the patch `reload`" in answer.stderr
    assert server.rest("alpha") == b"alpha 1.0"


def test_a_busy_model_is_left_alone(unpatched):
    server, _ = unpatched
    said = server.err
    worker = server.rest("alpha", "pid:")
    threads = [threading.Thread(target=server.rest, args=("alpha", "compute:2")) for _ in range(3)]
    with seen(partial(look, server), 0.05) as verdicts:
        for thread in threads:
            thread.start()
        poll(lambda: metric(server, "card_answered", model="alpha", version="1.0") == 0, pause_s=0.5)
        for thread in threads:
            thread.join(120)
    assert {(status, said["models"][NAME]) for status, said in verdicts} == {(200, "ready"), (200, "busy")}
    poll(lambda: metric(server, "card_answered", model="alpha", version="1.0") == 1, pause_s=0.5)
    assert restarts(server, "alpha") == 0
    assert server.rest("alpha", "pid:") == worker
    assert server.err == said


def test_a_model_whose_thread_in_torchserve_has_ended_is_brought_back(unpatched):
    """Unpatched, the sequence leaves TorchServe without a thread for the worker, which it calls ready for good."""
    server, _ = unpatched
    assert "  patches  none (of TorchServe)\n" in server.out
    for patch in PATCHES:
        assert f"server: TorchServe runs without the {patch.name} patch (--no-patches): " in server.err
    sequence = predictions_request("alpha", {b"data": b""}, sequence_id="1")
    with grpc.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
        call = channel.stream_stream(f"/{INFERENCE}.InferenceAPIsService/StreamPredictions2")

        (log,) = server.work.glob("convscope-*/logs/torchserve.log")
        deadline = time.monotonic() + 120
        while "IllegalStateException error" not in log.read_text():
            assert time.monotonic() < deadline
            with pytest.raises(grpc.RpcError):
                list(call(iter([sequence]), timeout=60))
            time.sleep(2)  # Whether it ends the thread depends on which of two is first. What waits ends the next.
    poll(lambda: restarts(server, "alpha") >= 1, 120, pause_s=0.5)
    poll(lambda: ready_workers(server, "alpha") == 1, 240, pause_s=0.5)
    assert server.rest("alpha") == b"alpha 1.0"
    assert "TorchServe's own thread for its worker ended: java.lang.IllegalStateException" in server.err


def test_a_worker_that_is_stopped_is_replaced_and_the_other_models_go_on(server):
    stopped, others = int(server.rest("alpha", "pid:")), server.rest("beta", "pid:")
    assert ready_workers(server, "alpha") == 1
    assert look(server)[0] == 200
    silent = partial(metric, server, "workers", model="alpha", state="silent", version="1.0")
    with seen(partial(look, server), 0.05) as verdicts, seen(silent, 0.5) as counts:
        os.kill(stopped, signal.SIGSTOP)

        def restarted() -> bool:
            assert server.rest("beta", "pid:") == others
            return restarts(server, "alpha") == 1 and ready_workers(server, "alpha") == 1

        poll(restarted, 120, pause_s=0.5)
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
    poll(lambda: restarts(server, "failing") == 1, 120, pause_s=0.5)
    broken.unlink()
    poll(lambda: ready_workers(server, "failing") == 1, 240, pause_s=0.5)
    assert metric(server, "model_restarts_total", model="failing", reason="given_up", version="1.0") >= 1


def test_a_handler_that_hangs_is_not_ready_until_torchserve_has_ended_it(server):
    hung = server.rest("hanging", "pid")

    def hang() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.ask("POST", "/predictions/hanging", "hang")

    thread = threading.Thread(target=hang)
    with seen(partial(look, server), 0.05) as verdicts:
        thread.start()
        poll(lambda: ready_workers(server, "hanging") == 0, pause_s=0.5)
        poll(lambda: ready_workers(server, "hanging") == 1, 120, pause_s=0.5)
    states = [said["models"]["hanging/1.0"] for _, said in verdicts]
    assert states.index("silent") < states.index("dead"), "before TorchServe ended it"
    assert {status for status, said in verdicts if said["models"]["hanging/1.0"] in ("silent", "dead")} == {503}
    assert server.rest("hanging", "pid") != hung
    assert restarts(server, "hanging") == 0
    assert "its worker did not answer within 4 s (responseTimeout)" in server.err
    thread.join(60)
