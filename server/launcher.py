"""One run of the server, from the settings to the last process gone."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from server import configuration, devices, ports
from server.announcement import describe_listeners
from server.arguments import Settings
from server.configuration import Listeners, PrivateDirectory
from server.diagnosis import Diagnosis, explain_java
from server.draining import Traffic
from server.failures import Failure, Interrupted
from server.java import Java, find_java
from server.management import Management
from server.models import find_archives
from server.process import JavaProcess, build_command, find_torchserve
from server.readiness import Readiness

PAUSE_S = 0.1
STOP_S = 5.0  # What Java gets between SIGTERM and SIGKILL, once no request is in flight.


def say(text: str) -> None:
    """Tell the person at the terminal, line by line."""
    for line in text.splitlines():
        print(f"server: {line}", file=sys.stderr, flush=True)


class Signals:
    """Counts the signals that ask the server to stop: the first drains, the second kills."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup wants it ignored.
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def stop(self) -> bool:
        """Tell whether to stop."""
        return self.count > 0

    def kill(self) -> bool:
        """Tell whether to stop at once."""
        return self.count > 1


class Launcher:
    """Serves the archives that the settings name until a signal comes.

    Args:
        settings: What was asked for.
        signals: What comes meanwhile.
    """

    def __init__(self, settings: Settings, signals: Signals) -> None:
        self._settings = settings
        self._signals = signals
        self._started = time.monotonic()

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            Failure: The server cannot start, or TorchServe ended by itself.
            Interrupted: It was told to stop before it was ready.
        """
        settings = self._settings
        self._archives = find_archives(settings.model_store, settings.models)
        home, java = find_torchserve(), find_java()
        self._gpus = devices.count_gpus(settings.device)
        self._listeners = self._claim_ports()
        with PrivateDirectory(settings.work_dir, settings.log_dir) as directory:
            self._directory = directory
            try:
                self._serve(java, self._start(java, home))
            except Failure as failure:
                kept = directory.keep_logs()
                raise type(failure)(f"{failure}\nthe full logs are in {kept}" if kept else str(failure)) from failure

    def _claim_ports(self) -> Listeners:
        settings = self._settings
        host = ports.resolve_host(settings.host)
        workers = sum(configuration.count_workers(archive, settings, self._gpus) for archive in self._archives)
        return Listeners(
            host=host,
            rest=ports.claim_port(host, settings.rest_port, "--rest-port"),
            grpc=ports.claim_port(host, settings.grpc_port, "--grpc-port"),
            metrics=ports.claim_port(host, settings.metrics_port, "--metrics-port"),
            grpc_management=ports.claim_port("127.0.0.1", 0, "--grpc-port"),
            first_worker=ports.free_worker_ports(workers),
        )

    def _start(self, java: Java, home: Path) -> JavaProcess:
        settings, directory = self._settings, self._directory
        most = max(configuration.count_workers(archive, settings, self._gpus) for archive in self._archives)
        file = configuration.write_configuration(directory, settings, self._listeners, self._archives, self._gpus)
        environment = configuration.worker_environment(
            directory, settings, most, devices.count_cores(), configuration.own_environment()
        )
        command = build_command(java, home, directory, file, settings.model_store.resolve(), settings.heap_mb)
        self._diagnosis = Diagnosis(directory, self._archives)
        self._java_log_start = directory.jvm_log.stat().st_size if directory.jvm_log.exists() else 0
        return JavaProcess(command, directory, environment)

    def _serve(self, java: Java, process: JavaProcess) -> None:
        try:
            self._await_ready(process)
            seconds = time.monotonic() - self._started
            print(describe_listeners(self._listeners, self._archives, java, seconds, self._directory.logs), flush=True)
            self._watch(process)
            self._drain(process)
        finally:
            process.kill()

    def _await_ready(self, process: JavaProcess) -> None:
        management = Management(self._directory.management_socket)
        readiness = Readiness(self._listeners, self._archives, self._settings.startup_timeout_s)
        unscaled = list(self._archives) if self._settings.workers else []
        try:
            while True:
                self._check(process, starting=True)
                if unscaled and (state := management.describe(unscaled[-1].name, unscaled[-1].version)):
                    archive = unscaled.pop()
                    if state.workers != self._settings.workers:
                        management.scale(archive, self._settings.workers or 1)
                elif readiness.ready() and not unscaled:
                    states = management.describe_all(self._archives)
                    if states and all(state.loaded >= state.workers for state in states):
                        break
                time.sleep(PAUSE_S)
        finally:
            readiness.give_up()
        if self._settings.device == "cuda":
            slow = [
                f"archive {name}: runs on {device}" for name, device in readiness.devices().items() if device == "cpu"
            ]
            if slow:
                raise Failure("\n".join(slow) + "\n--device cuda needs a torch that was built with CUDA")

    def _watch(self, process: JavaProcess) -> None:
        while not self._signals.stop():
            self._check(process, starting=False)
            time.sleep(PAUSE_S)

    def _check(self, process: JavaProcess, *, starting: bool) -> None:
        """Look at the process, the logs and the signals once.

        Raises:
            Failure: Java has ended, or (while starting) an archive cannot be served.
            Interrupted: A signal came while starting.
        """
        if starting and self._signals.stop():
            raise Interrupted
        status = process.poll()
        failures, warnings = self._diagnosis.read()
        if starting and failures:
            raise Failure("\n".join(failures))
        if status is not None:
            raise Failure(f"TorchServe ended by itself ({_ending(status)}): {explain_java(self._java_output())}")
        for failure in failures:
            say(f"{failure}; TorchServe starts it again")
        if not starting:
            for warning in warnings:
                say(f"TorchServe warns: {warning}")

    def _drain(self, process: JavaProcess) -> None:
        settings, signals = self._settings, self._signals
        self._directory.drain_file.touch()
        say(f"stopping: requests in flight get {settings.drain_s:g} s; again stops at once")
        unready_until = time.monotonic() + settings.unready_s
        while time.monotonic() < unready_until and not signals.kill() and process.poll() is None:
            time.sleep(PAUSE_S)
        traffic = Traffic(process, self._directory, self._listeners, self._archives)
        if not traffic.wait_until_idle(time.monotonic() + settings.drain_s, signals.kill) and not signals.kill():
            say(f"requests were still in flight after {settings.drain_s:g} s (--drain-s)")
        process.signal(signal.SIGTERM)
        give_up = time.monotonic() + STOP_S
        while process.poll() is None and time.monotonic() < give_up and not signals.kill():
            time.sleep(PAUSE_S / 2)
        say("stopped" if not signals.kill() else "killed")

    def _java_output(self) -> list[str]:
        with self._directory.jvm_log.open("rb") as file:
            file.seek(self._java_log_start)
            return file.read().decode("utf-8", "replace").splitlines()


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
