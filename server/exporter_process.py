"""Runs the exporter as a child of the launcher, and restarts it when it dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from server import children
from server.configuration import METRICS_VARIABLES, PrivateDirectory
from server.models import Archive
from server.reporting import Reporter

BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
HEALTHY_S = 60.0  # After it has run for so long, the back-off is reset.
STOP_S = 2.0
ROOT = Path(__file__).resolve().parent.parent


class Exporter:
    """The exporter's process.

    Args:
        listener: The socket on which it serves metrics.
        torchserve_port: Port of TorchServe's own metrics, on 127.0.0.1.
        directory: The private directory.
        archives: The archives served, the newest version of a model first.
        started: When the server was started, unix time.
        patches: Names of the patches of TorchServe that are active.
        environment: Environment to start from.
        reporter: Reports its death.
    """

    def __init__(
        self,
        listener: socket.socket,
        torchserve_port: int,
        directory: PrivateDirectory,
        archives: Sequence[Archive],
        started: float,
        patches: Sequence[str],
        environment: Mapping[str, str],
        reporter: Reporter,
    ) -> None:
        self._listener = listener
        self._log = directory.exporter_log
        self._reporter = reporter
        # With these set, prometheus_client would write files of its own among the workers'.
        self._environment = {key: value for key, value in environment.items() if key not in METRICS_VARIABLES}
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        self._command = [
            *(sys.executable, "-m", "server.exporter"),
            *("--listener", str(listener.fileno())),
            *("--folder", str(directory.metrics)),
            *("--torchserve-port", str(torchserve_port)),
            *("--management-socket", str(directory.management_socket)),
            *("--drain-file", str(directory.drain_file)),
            *("--watch-file", str(directory.watch_file)),
            *("--models", *(archive.full_name for archive in archives)),
            *("--started", f"{started:.3f}"),
            *("--patches", *patches),
            *("--launcher", str(os.getpid())),
        ]
        self._back_off_s = BACK_OFF_S
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._due = time.monotonic()
        self._start()

    def check(self) -> None:
        """Restart it if it has ended, after a pause that grows with each death."""
        if self._process is None:
            if time.monotonic() >= self._due:
                self._start()
            return
        if (status := self._process.poll()) is not None:
            self._process = None
            self._put_off(children.describe_ending(status))

    def stop(self) -> None:
        """Stop it, and close its socket."""
        self._listener.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._process = children.start(
                self._command, environment=self._environment, log=self._log, descriptors=[self._listener.fileno()]
            )
        except OSError as error:  # No memory, no more processes: serving goes on.
            self._put_off(str(error))

    def _put_off(self, why: str) -> None:
        """Schedule the next start; report the first death since it ran for long."""
        now = time.monotonic()
        if now - self._started_at > HEALTHY_S:
            self._back_off_s = BACK_OFF_S
        if self._back_off_s == BACK_OFF_S:
            self._reporter.say(
                f"the metrics exporter ended ({why}) and is started again; see {self._log}", level="warning"
            )
        self._due = now + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
