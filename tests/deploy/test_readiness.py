"""What a replica says when the gateway asks whether it is ready, TorchServe being a fake one."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("readiness", ROOT / "deploy/readiness.py")
assert SPEC
assert SPEC.loader
readiness = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readiness)

SILENT = 0


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class TorchServe:
    """Lists models over its management socket and answers their cards with what `cards` says."""

    def __init__(self, folder: Path) -> None:
        self.cards: dict[str, int] = {}
        self.asked: list[str] = []
        self.folder = folder
        self.release = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> TorchServe:
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.asked.append(self.path)
                if self.path.startswith("/models"):
                    return self.reply(200, {"models": [{"modelName": name} for name in told.cards]})
                status = told.cards.get(self.path.removeprefix("/predictions/"), 404)
                if status == SILENT:
                    told.release.wait(30)
                return self.reply(status or 200, {})

            def reply(self, status: int, said: Any) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def address_string(self) -> str:
                return "somebody"

            def log_message(self, *_: Any) -> None:
                pass

        private = self.folder / "convscope-1"
        private.mkdir()
        management = UnixServer(str(private / "management.sock"), Handler)
        rest = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        rest.daemon_threads = True
        self.port = rest.server_address[1]
        for server in (management, rest):
            self._stack.enter_context(served(server))
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._stack.close()

    def ready(self, timeout_s: float = 20.0) -> tuple[int, dict[str, Any]]:
        found = readiness.look(self.folder, self.port, timeout_s)
        assert isinstance(found, tuple)
        return found


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def torchserve() -> Iterator[TorchServe]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory() as folder, TorchServe(Path(folder)) as fake:
        yield fake


def test_a_replica_is_ready_once_every_model_has_answered_its_card(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200, "another": 200}
    assert torchserve.ready() == (200, {"ready": True, "models": {"one": 200, "another": 200}})
    assert sorted(torchserve.asked) == ["/models?limit=1000", "/predictions/another", "/predictions/one"]


def test_one_model_that_drains_makes_it_not_ready_at_once(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200, "another": 503, "broken": 500}
    status, said = torchserve.ready()
    assert status == 503
    assert not said["ready"]


def test_a_card_that_fails_otherwise_is_an_error_that_the_gateway_counts(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200, "another": 507}
    assert torchserve.ready() == (500, {"ready": False, "models": {"one": 200, "another": 507}})


def test_a_busy_model_does_not_take_the_others_away(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200, "busy": SILENT}
    assert torchserve.ready(timeout_s=1.0) == (200, {"ready": True, "models": {"one": 200, "busy": None}})


def test_a_model_that_the_watch_restarts_makes_it_not_ready_though_the_others_answer(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200, "restarted": 200}
    file = torchserve.folder / "convscope-1" / "watch.json"
    for restarting, status in (("worker_gone", 503), (None, 200)):
        known = {"answered": restarting is None, "restarting": restarting, "restarts": {"worker_gone": 1}}
        file.write_text(json.dumps({"models": {"one/1.0": known | {"restarting": None}, "restarted/1.0": known}}))
        assert torchserve.ready()[0] == status
        assert torchserve.ready()[1].get("restarting") == ({"restarted/1.0": restarting} if restarting else None)


def test_a_replica_all_of_whose_models_are_silent_says_so(torchserve: TorchServe) -> None:
    torchserve.cards = {"busy": SILENT}
    assert torchserve.ready(timeout_s=0.3) == (504, {"ready": False, "models": {"busy": None}})


def test_nothing_is_ready_without_a_model(torchserve: TorchServe) -> None:
    assert torchserve.ready()[0] == 503


def test_nothing_is_ready_before_torchserve_is_there(tmp_path: Path) -> None:
    assert readiness.look(tmp_path, 1)[0] == 503


def test_a_closed_port_is_not_ready(torchserve: TorchServe) -> None:
    torchserve.cards = {"one": 200}
    port = torchserve.port
    torchserve.port = 1
    assert torchserve.ready()[0] == 503
    torchserve.port = port
    assert torchserve.ready()[0] == 200


def test_all_who_ask_at_once_share_one_look() -> None:
    looks: list[int] = []
    entered, release = threading.Event(), threading.Event()

    def look() -> tuple[int, dict[str, Any]]:
        looks.append(1)
        entered.set()
        assert release.wait(30)
        return 200, {}

    latest = readiness.Latest(look, fresh_s=60.0)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(latest) for _ in range(4)]
        assert entered.wait(30)
        release.set()
        assert [answer.result(30) for answer in answers] == [(200, {})] * 4
    assert len(looks) == 1


def test_an_answer_that_is_no_longer_fresh_is_looked_up_again() -> None:
    statuses = iter([200, 503])
    latest = readiness.Latest(lambda: (next(statuses), {}), fresh_s=-1.0)
    assert [latest()[0], latest()[0]] == [200, 503]


def test_ready_is_answered_over_http_on_a_kept_connection_and_nothing_else_is() -> None:
    server = readiness.build_server(("127.0.0.1", 0), lambda: (503, {"ready": False}))
    server.daemon_threads = True
    with served(server):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
        answers = []
        for path in ("/ready", "/models", "/ready"):
            connection.request("GET", path)
            response = connection.getresponse()
            answers.append((response.status, json.loads(response.read())))
            assert not response.will_close
        connection.close()
    assert answers[0] == answers[2] == (503, {"ready": False})
    assert answers[1][0] == 404
