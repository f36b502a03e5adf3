"""Asks the service for a prediction through its gateway, as a caller does, and exports the result to Prometheus.

    python deploy/probe.py --host gateway     # probe every 5 s and serve /metrics on port 8084

Each probe sends a real picture with an API key over a new connection, so DNS, TCP, TLS, keys, routes, replicas and
workers are all part of the test. The probe also compares the certificate that the gateway serves with the one in its
file. A failure of the probe itself (a file that it cannot read) never counts as one of the service: its series
disappear.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import certifi
from convscope import (
    AuthenticationFailed,
    Client,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    Overloaded,
    Prediction,
    ServerError,
)
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

TRANSPORTS = {"rest": "http", "grpc": "grpc"}  # And the scheme of each; with TLS an `s` follows.
REASONS = ("connect", "tls", "unauthorized", "refused", "timeout", "error", "wrong_answer")
METRICS_PORT = 8084
INTERVAL_S = 5.0
DEADLINE_S = 5.0
START_S = 90.0  # A service that has never answered may take this long to start before its failures count.
EXPIRY = "Unix time at which the served certificate ends"
MATCHES = "1 if the served certificate is the one in the file, else 0"
SUM_TOLERANCE = 1e-3  # How far the probabilities of all classes may be from 1 together.


class Trust:
    """The certificates that the probe accepts: the usual authorities, and all that were in the gateway's file.

    A certificate that was in the file before stays trusted. After a failed rotation it is still in service, and callers
    go on trusting it: `convscope_probe_certificate_matches` shows that, and it is no outage.

    Args:
        certificate: The gateway's `tls.crt`.
        folder: Where `bundle` is written.
    """

    def __init__(self, certificate: Path, folder: Path) -> None:
        self._certificate = certificate
        self._lock = threading.Lock()
        self._seen: list[bytes] = []
        self.bundle = folder / "trusted.pem"
        self.update()

    def update(self) -> str | None:
        """Read the file again and renew `bundle`; return the file's text, or None if that holds no certificate."""
        try:
            text = self._certificate.read_text(encoding="ascii")
            ssl.create_default_context(cadata=text)
        except (OSError, ValueError) as error:  # No file, no PEM (an SSLError is an OSError), or not even ASCII.
            log("certificate_unreadable", error=str(error))
            text = None
        with self._lock:
            if text is not None and text.encode() not in self._seen:
                self._seen.append(text.encode())
            content = b"\n".join([Path(certifi.where()).read_bytes(), *self._seen])
            if not self.bundle.exists() or self.bundle.read_bytes() != content:
                fresh = self.bundle.with_suffix(".new")
                fresh.write_bytes(content)
                fresh.rename(self.bundle)
        return text


class Probe:
    """Probes one service over both transports.

    Args:
        host: Name of the gateway, as in its certificate.
        port: Its port.
        door: `tls` or `plain`.
        model: Returns the name of the model to ask for.
        picture: The picture to send.
        key: File with the API key.
        certificate: The gateway's `tls.crt`.
        folder: Where the trusted certificates are written.
        registry: Where the metrics go.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        door: str,
        model: Callable[[], str],
        picture: Path,
        key: Path,
        certificate: Path,
        folder: Path,
        registry: CollectorRegistry,
    ) -> None:
        self._host, self._port, self._secure = host, port, door == "tls"
        self._model, self._picture, self._key = model, picture, key
        self._trust = Trust(certificate, folder) if self._secure else None
        self._started = time.monotonic()
        self._last: dict[str, str] = {}  # The last result by transport: "ok" or a reason.
        self._answered: set[str] = set()
        self._served = b""  # The certificate that was served last, DER.

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"convscope_probe_{name}", text, labels, registry=registry)

        self._success = gauge("success", "1 if the last probe got a right answer, else 0", "transport")
        self._seconds = gauge("seconds", "How long the last probe took", "transport")
        self._probes = Counter("convscope_probes", "Probes sent", ["transport"], registry=registry)
        self._failures = Counter(
            "convscope_probe_failures", "Probes that failed", ["transport", "reason"], registry=registry
        )
        for transport in TRANSPORTS:
            self._probes.labels(transport)
            for reason in REASONS:
                self._failures.labels(transport, reason)
        # Registered with the first certificate that is served: without one there is no value.
        self._expiry = Gauge("convscope_probe_certificate_expiry_seconds", EXPIRY, registry=None)
        self._matches = Gauge("convscope_probe_certificate_matches", MATCHES, registry=None)
        self._registry, self._registered = registry, False

    def probe(self, transport: str) -> None:
        """Send one picture over one transport, and export the result."""
        started = time.monotonic()
        try:
            reason, message = self._ask(transport)
        except Exception as error:  # The probe itself failed, which says nothing about the service.
            log("probe_ill", transport=transport, error=f"{type(error).__name__}: {error}")
            for series in (self._success, self._seconds):
                with contextlib.suppress(KeyError):
                    series.remove(transport)
            return
        took_s = time.monotonic() - started
        if reason != self._last.get(transport):
            log("probe", transport=transport, result=reason, message=message, seconds=round(took_s, 3))
        self._last[transport] = reason
        if reason == "ok":
            self._answered.add(transport)
        elif transport not in self._answered and time.monotonic() - self._started < START_S:
            return
        self._probes.labels(transport).inc()
        if reason != "ok":
            self._failures.labels(transport, reason).inc()
        self._seconds.labels(transport).set(took_s)
        self._success.labels(transport).set(reason == "ok")

    def _ask(self, transport: str) -> tuple[str, str]:
        """Return the result of a prediction, "ok" or a reason, and a message."""
        scheme = TRANSPORTS[transport] + "s" * self._secure
        key, model, picture = self._key.read_text().strip(), self._model(), self._picture.read_bytes()
        ca_file = self._trust.bundle if self._trust else None
        with Client(
            f"{scheme}://{self._host}:{self._port}", api_key=key, ca_file=ca_file, deadline_s=DEADLINE_S, retries=0
        ) as client:
            try:
                prediction = client.predict(picture, model=model, top_k=0)
                has_classes = bool(prediction.top) or bool(client.model_card(model).classes)
                fault = find_fault(prediction) if has_classes else ""
            except ConvscopeError as error:
                return self._reason(error), str(error)
        return ("wrong_answer", fault) if fault else ("ok", prediction.top[0].label if has_classes else "no classes")

    def _reason(self, error: ConvscopeError) -> str:
        """Return the reason that an exception of the client counts as."""
        if isinstance(error, (ConnectError, DeadlineExceeded)) and (fault := self._find_connection_fault()):
            return fault
        kinds = {
            AuthenticationFailed: "unauthorized",
            ConnectError: "connect",
            DeadlineExceeded: "timeout",
            Overloaded: "refused",
            ServerError: "error",
        }
        return next((reason for kind, reason in kinds.items() if isinstance(error, kind)), "wrong_answer")

    def _find_connection_fault(self) -> str | None:
        """Return "connect" or "tls" if no connection can be made now, else None; the client does not tell which."""
        try:
            with socket.create_connection((self._host, self._port), DEADLINE_S) as connection:
                if self._trust is None:
                    return None
                context = ssl.create_default_context(cafile=str(self._trust.bundle))
                try:
                    context.wrap_socket(connection, server_hostname=self._host).close()
                except OSError:  # SSLError is one; so is a connection that the gateway closes at once.
                    return "tls"
        except OSError:
            return "connect"
        return None

    def look_at_certificate(self) -> None:
        """Export when the served certificate ends, and whether it is the one in the file.

        While none is served, both stay as they were.
        """
        if self._trust is None:
            return
        text = self._trust.update()
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # An expired certificate has to be read, too.
        try:
            with (
                socket.create_connection((self._host, self._port), DEADLINE_S) as connection,
                context.wrap_socket(connection, server_hostname=self._host) as secured,
            ):
                served = secured.getpeercert(binary_form=True) or b""
        except OSError:
            return
        if served != self._served:
            self._served, ends = served, end_of(served)
            log("certificate", ends=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends)))
            self._expiry.set(ends)
        self._matches.set(text is not None and served == first_certificate(text))
        if not self._registered:
            self._registry.register(self._expiry)
            self._registry.register(self._matches)
            self._registered = True


def find_fault(prediction: Prediction) -> str:
    """Return what is wrong with a prediction of all classes, or numbers; "" if nothing is."""
    if prediction.scores == "value":
        finite = all(math.isfinite(score.value or 0.0) for score in prediction.top)
        return "" if finite else "a number is not finite"
    probabilities = [score.probability for score in prediction.top]
    if not probabilities:
        return "no class"
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in probabilities):
        return "a probability is not between 0 and 1"
    if prediction.scores != "sigmoid" and abs(sum(probabilities) - 1) > SUM_TOLERANCE:
        return f"the probabilities add up to {sum(probabilities):.4f}"
    if probabilities != sorted(probabilities, reverse=True):
        return "the classes are not in the order of their probability"
    return ""


def first_certificate(text: str) -> bytes | None:
    """Return the first certificate of a PEM file as DER; None if there is none."""
    _, _, rest = text.partition("-----BEGIN CERTIFICATE-----")
    body, end, _ = rest.partition("-----END CERTIFICATE-----")
    try:
        return ssl.PEM_cert_to_DER_cert(f"-----BEGIN CERTIFICATE-----{body}{end}\n") if end else None
    except ValueError:
        return None


def end_of(certificate: bytes) -> float:
    """Return the unix time at which a certificate (DER) ends; Python's own library reads trusted ones only."""
    command = ["openssl", "x509", "-inform", "DER", "-noout", "-enddate"]
    said = subprocess.run(command, input=certificate, capture_output=True, check=True).stdout.decode()
    return float(ssl.cert_time_to_seconds(said.strip().partition("=")[2]))


def choose_model(names: str, store: Path) -> str:
    """Return the first of a comma-separated list of models, or else the first archive of a store by name.

    Raises:
        ValueError: There is neither.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()] or sorted(
        path.stem for path in store.glob("*.mar")
    )
    if not chosen:
        raise ValueError(f"no model is named and {store} holds no archive")
    return chosen[0]


def repeat(action: Callable[[], None]) -> None:
    """Do something every `INTERVAL_S` for ever."""
    while True:
        started = time.monotonic()
        try:
            action()
        except Exception as error:
            log("probe_ill", error=f"{type(error).__name__}: {error}")
        time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - started)))


def log(event: str, **facts: object) -> None:
    """Write a JSON line."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": now, "event": event, **facts}), flush=True)


def main() -> None:
    """Probe until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="localhost", help="name of the gateway, as in its certificate")
    parser.add_argument("--port", type=int, default=8443, help="port of the gateway")
    parser.add_argument("--door", choices=("tls", "plain"), default="tls", help="whether the gateway speaks TLS")
    parser.add_argument("--models", default="", help="asks the first; default: of --store")
    parser.add_argument("--store", type=Path, default=Path("/models"), help="folder of the archives")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "samples/cat.png")
    parser.add_argument("--key", type=Path, default=Path("/run/secrets/probe_key"), help="file with the API key")
    parser.add_argument("--certificate", type=Path, default=Path("/run/secrets/certificate/tls.crt"))
    parser.add_argument("--replicas", type=int, default=1, help="how many replicas should run, for Prometheus")
    parser.add_argument("--metrics-port", type=int, default=METRICS_PORT)
    options = parser.parse_args()
    registry = CollectorRegistry()
    wanted = Gauge("convscope_replicas_wanted", "Replicas that should run (CONVSCOPE_REPLICAS)", registry=registry)
    wanted.set(options.replicas)
    # Inside a container `localhost` is the container. The test certificate names `gateway` as well.
    host = "gateway" if options.host == "localhost" and Path("/.dockerenv").exists() else options.host
    probe = Probe(
        host=host,
        port=options.port,
        door=options.door,
        model=lambda: choose_model(options.models, options.store),
        picture=options.picture,
        key=options.key,
        certificate=options.certificate,
        folder=Path(tempfile.mkdtemp(prefix="probe-")),
        registry=registry,
    )
    start_http_server(options.metrics_port, registry=registry)
    for transport in TRANSPORTS:
        threading.Thread(target=repeat, args=(lambda name=transport: probe.probe(name),), daemon=True).start()
    repeat(probe.look_at_certificate)


if __name__ == "__main__":
    main()
