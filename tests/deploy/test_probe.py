"""The probe against real servers on both transports: what it exports for each way in which a service can fail."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry

import deploy.probe
from deploy.probe import Probe, choose_model, find_fault
from handlers.images.preprocessing import Preprocessing
from handlers.networks import Edges
from tests.client.served import serving
from tests.client.stand_in import StandIn, serve
from tests.client.wire import certificate_files, make_certificate
from tests.handlers.support import make_service
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
TRANSPORTS = ("rest", "grpc")


class Probed:
    """A probe of one address, and what it exports."""

    def __init__(self, folder: Path, port: int, *, door: str = "plain", model: str = "cifar") -> None:
        self.registry = CollectorRegistry()
        self.key, self.certificate, self.model = folder / "probe-key", folder / "tls.crt", model
        self.key.write_text("the probe's key\n")
        self.probe = Probe(
            host="localhost" if door == "tls" else "127.0.0.1",
            port=port,
            door=door,
            model=lambda: self.model,
            picture=ROOT / "samples/cat.png",
            key=self.key,
            certificate=self.certificate,
            folder=folder,
            registry=self.registry,
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"convscope_probe_{name}", labels)

    def result(self, transport: str) -> str | None:
        """Probe once; return what was exported: "ok", the reason of the failure, or None for nothing."""
        before = {reason: self._failures(transport, reason) for reason in deploy.probe.REASONS}
        self.probe.probe(transport)
        rose = [reason for reason, count in before.items() if self._failures(transport, reason) > count]
        success = self.value("success", transport=transport)
        if success is None:
            assert not rose
            return None
        assert success == (not rose)
        return rose[0] if rose else "ok"

    def _failures(self, transport: str, reason: str) -> float:
        return self.value("failures_total", transport=transport, reason=reason) or 0.0


@pytest.fixture(autouse=True)
def counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export failures from the first probe on."""
    monkeypatch.setattr(deploy.probe, "START_S", 0.0)


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    """A folder with `tls.crt` and `tls.key` for localhost."""
    folder = tmp_path / "certificate"
    folder.mkdir()
    for file, name in zip(certificate_files("DNS:localhost,IP:127.0.0.1"), ("tls.crt", "tls.key"), strict=True):
        shutil.copy(file, folder / name)
    return folder


def port(stand_in: StandIn, transport: str) -> int:
    return urlsplit(getattr(stand_in, f"{transport}_url")).port or 0


@contextmanager
def listening(answer: Any) -> Iterator[int]:
    """Accept connections one after another and hand each to a function."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_right_answer_over_tls_is_a_success(certified: Path, transport: str) -> None:
    with serve((str(certified / "tls.crt"), str(certified / "tls.key"))) as stand_in:
        probed = Probed(certified, port(stand_in, transport), door="tls")
        assert probed.result(transport) == "ok"
        assert stand_in.keys == ["the probe's key"]
        probed.probe.look_at_certificate()
        assert probed.value("certificate_matches") == 1
        ends = probed.value("certificate_expiry_seconds")
        assert ends
        assert 86_400 < ends - time.time() <= 2 * 86_400  # `make_certificate` gives it two days.
        assert (probed.value("seconds", transport=transport) or 0) > 0
        assert probed.registry.get_sample_value("convscope_probes_total", {"transport": transport}) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_network_without_classes_need_not_answer_any(tmp_path: Path, transport: str) -> None:
    services = {"edges": make_service(Edges, Preprocessing(1, None, None), ())}
    with serving(services) as stand_in:
        assert Probed(tmp_path, port(stand_in, transport), model="edges").result(transport) == "ok"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_network_with_classes_that_answers_none_is_a_wrong_answer(tmp_path: Path, transport: str) -> None:
    with serve() as stand_in:
        take = stand_in.take

        def without_scores(*asked: Any) -> Any:
            reply = take(*asked)
            for result in reply.results:
                del result.top[:]
            return reply

        stand_in.take = without_scores  # type: ignore[method-assign]
        assert Probed(tmp_path, port(stand_in, transport)).result(transport) == "wrong_answer"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_probe_makes_a_connection_of_its_own(tmp_path: Path, transport: str) -> None:
    with serve() as stand_in:
        probed = Probed(tmp_path, port(stand_in, transport))
        results = [probed.result(transport) for _ in range(3)]
        assert results == ["ok"] * 3
        if transport == "rest":
            assert len(stand_in.connections) == 3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_listens(tmp_path: Path, certified: Path, transport: str) -> None:
    assert Probed(tmp_path, free_port()).result(transport) == "connect"
    assert Probed(certified, free_port(), door="tls").result(transport) == "connect"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_that_ends_in_the_handshake(certified: Path, transport: str) -> None:
    with listening(lambda connection: None) as broken:  # As a gateway does that has no private key.
        assert Probed(certified, broken, door="tls").result(transport) == "tls"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_certificate_that_nobody_trusts(tmp_path: Path, certified: Path, transport: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    certificate, _ = make_certificate(other, "DNS:localhost")
    certificate.rename(other / "tls.crt")
    with serve((str(certified / "tls.crt"), str(certified / "tls.key"))) as stand_in:
        assert Probed(other, port(stand_in, transport), door="tls").result(transport) == "tls"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("model", "reason"), [("full", "refused"), ("died", "error"), ("missing", "wrong_answer"), ("slow", "timeout")]
)
def test_what_a_service_can_answer_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, model: str, reason: str
) -> None:
    monkeypatch.setattr(deploy.probe, "DEADLINE_S", 0.5 if model == "slow" else 10.0)
    with serve() as stand_in:
        assert Probed(tmp_path, port(stand_in, transport), model=model).result(transport) == reason


def test_a_key_that_does_not_hold(tmp_path: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert Probed(tmp_path, server.server_port).result("rest") == "unauthorized"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rotation_that_failed_is_told_and_is_no_outage(tmp_path: Path, certified: Path, transport: str) -> None:
    with serve((str(certified / "tls.crt"), str(certified / "tls.key"))) as stand_in:
        probed = Probed(certified, port(stand_in, transport), door="tls")
        assert probed.result(transport) == "ok"
        probed.probe.look_at_certificate()
        served = probed.value("certificate_expiry_seconds")
        renewed = tmp_path / "renewed"
        renewed.mkdir()
        certificate, _ = make_certificate(renewed, "DNS:localhost")
        certificate.rename(certified / "tls.crt")
        probed.probe.look_at_certificate()
        assert probed.value("certificate_matches") == 0
        assert probed.value("certificate_expiry_seconds") == served
        assert probed.result(transport) == "ok"
        (certified / "tls.crt").write_text("-----BEGIN CERTIFICATE-----\nnot one\n-----END CERTIFICATE-----\n")
        probed.probe.look_at_certificate()
        assert probed.value("certificate_matches") == 0
        assert probed.result(transport) == "ok"


def test_an_expired_certificate_is_read(certified: Path) -> None:
    request, ending = certified / "request", certified / "tls.crt"
    for command in (
        ("req", "-new", "-subj", "/CN=test", "-addext", "subjectAltName=DNS:localhost", "-out", request),
        ("x509", "-req", "-in", request, "-copy_extensions", "copy", "-days", "-1", "-out", ending),
    ):
        key = ("-key" if command[0] == "req" else "-signkey", certified / "tls.key")
        subprocess.run(["openssl", *command, *key], check=True, capture_output=True)
    with serve((str(certified / "tls.crt"), str(certified / "tls.key"))) as stand_in:
        probed = Probed(certified, port(stand_in, "rest"), door="tls")
        probed.probe.look_at_certificate()
        ends = probed.value("certificate_expiry_seconds")
        assert ends
        assert ends < time.time()
        assert probed.value("certificate_matches") == 1
        assert probed.result("rest") == "tls"


def test_without_a_certificate_nothing_is_told_of_one(tmp_path: Path, certified: Path) -> None:
    for probed in (Probed(tmp_path, free_port()), Probed(certified, free_port(), door="tls")):
        probed.probe.look_at_certificate()
        assert probed.value("certificate_expiry_seconds") is None
        assert probed.value("certificate_matches") is None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_trouble_of_the_probes_own_is_no_failure_of_the_service(tmp_path: Path, transport: str) -> None:
    with serve() as stand_in:
        probed = Probed(tmp_path, port(stand_in, transport))
        assert probed.result(transport) == "ok"
        probed.key.unlink()
        assert probed.result(transport) is None
        probed.key.write_text("back")
        assert probed.result(transport) == "ok"


def test_a_service_that_starts_is_not_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.probe, "START_S", 3600.0)
    with serve() as stand_in:
        probed = Probed(tmp_path, port(stand_in, "rest"), model="full")
        assert probed.result("rest") is None
        probed.model = "cifar"
        assert probed.result("rest") == "ok"
        probed.model = "full"
        assert probed.result("rest") == "refused"


def test_the_model_is_the_first_named_or_the_first_in_the_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no archive"):
        choose_model("", tmp_path)
    for name in ("digits", "cifar"):
        (tmp_path / f"{name}.mar").touch()
    assert choose_model("", tmp_path) == "cifar"
    assert choose_model("digits, cifar", tmp_path) == "digits"


class Seen:
    """A prediction of all classes, as far as the probe reads it."""

    def __init__(self, *probabilities: float) -> None:
        self.top = [type("Score", (), {"probability": value, "value": value})() for value in probabilities]
        self.scores = "softmax"


@pytest.mark.parametrize(
    ("probabilities", "fault"),
    [
        ((0.7, 0.2, 0.1), ""),
        ((), "no class"),
        ((0.7, 0.1), "add up to 0.8000"),
        ((1.5, -0.5), "not between 0 and 1"),
        ((float("nan"), 1.0), "not between 0 and 1"),
        ((0.1, 0.9), "not in the order"),
    ],
)
def test_what_is_wrong_with_an_answer_is_found(probabilities: tuple[float, ...], fault: str) -> None:
    found = find_fault(Seen(*probabilities))  # type: ignore[arg-type]
    assert fault in found
    assert bool(fault) == bool(found)


@pytest.mark.parametrize(
    ("scores", "numbers", "fault"),
    [
        ("sigmoid", (0.7, 0.6), ""),
        ("sigmoid", (1.7, 0.6), "not between 0 and 1"),
        ("value", (-3.0, 40.0), ""),
        ("value", (float("inf"), 1.0), "not finite"),
    ],
)
def test_what_is_right_goes_by_what_the_scores_mean(scores: str, numbers: tuple[float, ...], fault: str) -> None:
    seen = Seen(*numbers)
    seen.scores = scores
    found = find_fault(seen)  # type: ignore[arg-type]
    assert fault in found
    assert bool(fault) == bool(found)
