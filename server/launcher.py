"""One run of the server, from the settings until the last process has ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from server import configuration, devices, patches, ports
from server.arguments import Settings
from server.children import describe_ending
from server.configuration import Listeners, private_directory
from server.control import Control, Reloader
from server.diagnosis import Death, Diagnosis, News, explain_java
from server.draining import Traffic
from server.exporter import Exporter
from server.failures import Failure, Interrupted
from server.health import Health, HealthServer
from server.java import Java, find_java
from server.management import Management
from server.models import Archive, copy_checked, describe_models, describe_trust, find_archives
from server.process import JavaProcess, build_command, find_torchserve
from server.reporting import Reporter, write
from server.startup import Readiness
from server.versions import Versions
from server.warming import WarmUp
from server.watch import Watch
from server.worker_log import Relay

PAUSE_S = 0.1
STOP_S = 5.0  # From SIGTERM to SIGKILL for Java, once no request is in flight.


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
        """Return whether to stop."""
        return self.count > 0

    def kill(self) -> bool:
        """Return whether to stop at once."""
        return self.count > 1


class Launcher:
    """Serves the archives that the settings name until a signal arrives.

    Args:
        settings: The settings.
        signals: The signals that have arrived.
        reporter: Reports what happens.
    """

    def __init__(self, settings: Settings, signals: Signals, reporter: Reporter) -> None:
        self._settings = settings
        self._signals = signals
        self._say = reporter.say
        self._reporter = reporter
        self._started = time.monotonic()

    def run(self) -> None:
        """Serve until a signal arrives.

        Raises:
            Failure: The server cannot start, or TorchServe ended by itself.
            Interrupted: A signal arrived before the server was ready.
        """
        settings = self._settings
        self._health = Health()
        if settings.ready_port is not None:
            host = ports.resolve_host(settings.host)
            HealthServer(ports.listen(host, settings.ready_port, "--ready-port"), self._health)
        signers = settings.require_signature
        self._archives, rejected, self._files = find_archives(settings.model_store, settings.models, signers)
        for sentence in describe_trust(self._archives, signers):
            self._say(sentence)
        self._unproven: list[Archive] = []  # Have not responded yet; TorchServe keeps trying to load them.
        self._given_up: list[Archive] = []  # Stay registered, without workers, until the server is ready.
        for name, why in rejected.items():
            self._reject(name, why)
        home, java = find_torchserve(), find_java()
        self._gpus = devices.count_gpus(settings.device)
        self._cores = devices.count_cores()
        self._default_workers = configuration.default_workers(len(self._archives), self._gpus, self._cores)
        self._workers = sum(
            configuration.count_workers(archive, settings, self._default_workers) for archive in self._archives
        )
        self._listeners = self._claim_ports()
        with self._metrics_listener, private_directory(settings.work_dir, settings.log_dir) as directory:
            self._directory = directory
            self._health.drain_file = directory.drain_file
            try:
                self._archives = copy_checked(self._archives, directory.copies, signers)
                self._settings = replace(settings, model_store=self._archives[0].path.parent)
                self._asked = settings
                self._serve(java, home)
            except Failure as failure:
                logs = directory.last_lines()
                # The files of a container are lost when it restarts; its log has the last lines of each.
                kept = None if self._reporter.as_json and not settings.log_dir else directory.keep_logs()
                full = type(failure)(f"{failure}\nthe full logs are in {kept}" if kept else str(failure))
                full.logs = logs
                raise full from failure

    def _claim_ports(self) -> Listeners:
        settings = self._settings
        host = ports.resolve_host(settings.host)
        self._metrics_listener = ports.listen(host, settings.metrics_port, "--metrics-port")
        return Listeners(
            host=host,
            rest=ports.claim_port(host, settings.rest_port, "--rest-port"),
            grpc=ports.claim_port(host, settings.grpc_port, "--grpc-port"),
            metrics=self._metrics_listener.getsockname()[1],
            torchserve_metrics=ports.claim_port("127.0.0.1", 0, "--metrics-port"),
            grpc_management=ports.claim_port("127.0.0.1", 0, "--grpc-port"),
            first_worker=ports.free_worker_ports(self._workers),
        )

    def _start(self, java: Java, home: Path) -> JavaProcess:
        settings, directory = self._settings, self._directory
        directory.starting_file.touch()
        own = dict(os.environ)
        environment = configuration.worker_environment(directory, settings, self._workers, self._cores, own)
        self._patches = patches.apply(home, directory.classes) if settings.patch else []
        directory.models_file.write_text(describe_models(self._archives))  # The watch updates it.
        why = "this TorchServe is not the one that the patch was written for" if settings.patch else "--no-patches"
        for patch in patches.PATCHES:
            if patch.name not in self._patches:
                self._say(f"TorchServe runs without the {patch.name} patch ({why}): {patch.without}", level="warning")
        file = configuration.write_configuration(
            directory,
            settings,
            self._listeners,
            self._archives,
            self._gpus,
            self._default_workers,
            self._patches,
        )
        command = build_command(java, home, directory, file, settings)
        self._diagnosis = Diagnosis(directory, self._archives)
        self._relay = Relay(self._reporter.relay, partial(self._tell_rest, directory.models_log, "worker"))
        self._warnings: Relay[str] = Relay(
            lambda warning: self._say(f"TorchServe warns: {warning}", level="warning", source="torchserve"),
            partial(self._tell_rest, directory.torchserve_log, "torchserve"),
        )
        self._java_log_start = directory.jvm_log.stat().st_size
        process = JavaProcess(command, directory, environment)
        started = time.time() - (time.monotonic() - self._started)
        self._exporter = Exporter(
            self._metrics_listener,
            self._listeners.torchserve_metrics,
            directory,
            self._archives,
            started,
            self._patches,
            own,
            self._reporter,
        )
        return process

    def _serve(self, java: Java, home: Path) -> None:
        process = self._start(java, home)
        try:
            self._await_ready(process)
            watch = Watch(
                self._listeners,
                self._archives,
                self._directory,
                self._settings.watch_s,
                process.pid,
                self._health.rejected,
                self._unproven,
            )
            self._health.watch = watch
            versions = self._manage(process, watch)
            versions.forget_all(self._given_up)
            reloader = Reloader(versions, self._asked, self._reporter)
            control = Control(reloader, self._directory, self._asked, self._files)
            try:
                self._announce(java)
                self._watch(process, watch, versions, reloader)
            finally:
                control.close()
            watch.stop()
            self._archives = versions.served()
            self._drain(process)
        finally:
            process.kill()
            self._exporter.stop()
            self._relay.pass_on(self._diagnosis.read().complaints, time.monotonic())
            self._relay.close()
            self._warnings.close()

    def _manage(self, process: JavaProcess, watch: Watch) -> Versions:
        settings, listeners, directory = self._settings, self._listeners, self._directory
        return Versions(
            settings,
            listeners,
            directory,
            self._default_workers,
            [*self._archives, *self._unproven],
            self._health.rejected,
            watch,
            self._diagnosis,
            Traffic(process, directory, listeners, ()),
            is_patched="reload" in self._patches,
        )

    def _announce(self, java: Java) -> None:
        listeners, host = self._listeners, ports.reachable(self._listeners.host)
        facts: dict[str, Any] = {
            "rest": f"http://{host}:{listeners.rest}",
            "grpc": f"{host}:{listeners.grpc}",
            "metrics": f"http://{host}:{listeners.metrics}/metrics",
            "models": [archive.full_name for archive in self._archives],
            "seconds": round(time.monotonic() - self._started, 3),
            "java": f"{java.version} ({java.source})",
            "patches": sorted(self._patches),
            "logs": str(self._directory.logs),
        }
        if self._reporter.as_json:
            self._say("ready", **facts)
        else:
            write(_describe(facts), sys.stdout)

    def _await_ready(self, process: JavaProcess) -> None:
        management = Management(self._directory.management_socket)
        readiness = Readiness(self._listeners, self._archives, self._settings.startup_timeout_s)
        unscaled = list(self._archives) if self._settings.workers else []
        warm_up: WarmUp | None = None
        try:
            while True:
                news = self._check(process, starting=True)
                for archive, why, is_ours in self._find_ill(news, readiness):
                    self._drop(archive, why, management if is_ours else None)
                    readiness.drop(archive)
                unscaled = [archive for archive in unscaled if archive in self._archives]
                if unscaled and (state := management.describe(unscaled[-1].name, unscaled[-1].version)):
                    archive = unscaled.pop()
                    if state.workers != self._settings.workers:
                        management.scale(archive, self._settings.workers or 1)
                elif unscaled:
                    pass
                elif warm_up is None:
                    if readiness.answered() and self._all_loaded(management):
                        warm_up = WarmUp(self._listeners, self._archives, self._settings.warm_up_s)
                elif warm_up.done():
                    self._directory.starting_file.unlink(missing_ok=True)
                    if readiness.ready():
                        break
                time.sleep(PAUSE_S)
        finally:
            if warm_up is not None:
                warm_up.give_up()
            readiness.give_up()
        if self._settings.device == "cuda":
            slow = [
                f"archive {name}: runs on {device}" for name, device in readiness.devices().items() if device == "cpu"
            ]
            if slow:
                log = self._directory.models_log
                raise Failure("\n".join(slow) + f"\n--device cuda was asked for; {log} has what their workers said")

    def _find_ill(self, news: News, readiness: Readiness) -> list[tuple[Archive, str, bool]]:
        """Return the archives that cannot be served, the reason, and whether the archive is at fault."""
        ill = [
            (archive, death.text, death.is_ours)
            for death in news.deaths
            for archive in self._archives
            if archive.path.stem == death.archive
        ]
        ill += [(archive, why, True) for archive, why in readiness.refused().items()]
        ill += [(archive, why, False) for archive, why in readiness.late().items()]
        return list({archive: (archive, why, is_ours) for archive, why, is_ours in reversed(ill)}.values())

    def _drop(self, archive: Archive, why: str, management: Management | None) -> None:
        """Go on without an archive.

        Args:
            archive: The archive.
            why: The reason, a sentence.
            management: Used to remove its workers; None to let TorchServe keep trying.

        Raises:
            Failure: No archive is left.
        """
        self._archives = [other for other in self._archives if other is not archive]
        self._reject(archive.path.stem, why)
        if not self._archives:
            raise Failure("\n".join(self._health.rejected.values()))
        if management is None:
            self._unproven.append(archive)
        else:
            management.scale(archive, 0)
            self._given_up.append(archive)
        for other in self._archives:  # Otherwise requests without a version would go to this one.
            if other.name == archive.name:
                Management(self._directory.management_socket).set_default(other)
                break

    def _reject(self, name: str, why: str) -> None:
        self._health.rejected[name] = why
        self._say(f"Archive rejected: {why}", level="error")

    def _all_loaded(self, management: Management) -> bool:
        states = management.describe_all(self._archives)
        return states is not None and all(state.loaded >= state.workers for state in states)

    def _watch(self, process: JavaProcess, watch: Watch, versions: Versions, reloader: Reloader) -> None:
        """Serve until a signal comes.

        Raises:
            Failure: Java has ended, or TorchServe has to be started anew.
        """
        while not self._signals.stop():
            for death in self._check(process, starting=False).deaths:
                if not versions.is_loading(death):
                    watch.count_death(death)
                    self._report(death)
            for level, sentence in watch.news():
                self._say(sentence, level=level)
            if watch.accepted.is_set():
                watch.accepted.clear()
                threading.Thread(target=reloader.settle, daemon=True).start()  # A reload may be under way.
            if watch.failure:
                raise Failure(f"TorchServe has to be started anew: {watch.failure}")
            time.sleep(PAUSE_S)

    def _check(self, process: JavaProcess, *, starting: bool) -> News:
        """Check the process, the logs and the signals once; return the new entries of the logs.

        Raises:
            Failure: Java has ended.
            Interrupted: A signal arrived during the start.
        """
        if starting and self._signals.stop():
            raise Interrupted
        status = process.poll()
        news = self._tend()
        if status is not None:
            why = explain_java(self._java_output(), killed=status < 0)
            host = self._diagnosis.describe_host()
            raise Failure(f"TorchServe ended by itself ({describe_ending(status)}): {why}; {host}")
        if not starting:
            self._warnings.pass_on(news.warnings, time.monotonic())
        return news

    def _report(self, death: Death) -> None:
        """Report a worker's death. The runbooks search for the first words of the message."""
        again = "starts it again" if death.retried else "has not said that it starts it again"
        message = f"Worker died: {death.text}; TorchServe {again}"
        fields = {"model": death.model, "cause": death.cause, "log": list(death.lines)}
        self._say(message, level="error", source="worker", **fields)

    def _tend(self) -> News:
        """Check the exporter, read the logs and pass on the workers' messages; return the other entries."""
        self._exporter.check()
        news = self._diagnosis.read()
        self._relay.pass_on(news.complaints, time.monotonic())
        return news

    def _killed(self) -> bool:
        """Return whether to stop at once; called repeatedly while the server drains."""
        self._tend()
        return self._signals.kill()

    def _drain(self, process: JavaProcess) -> None:
        settings = self._settings
        self._directory.drain_file.touch()
        self._say(f"stopping: requests in flight get {settings.drain_s:g} s; send the signal again to stop at once")
        unready_until = time.monotonic() + settings.unready_s
        while time.monotonic() < unready_until and not self._killed() and process.poll() is None:
            time.sleep(PAUSE_S)
        traffic = Traffic(process, self._directory, self._listeners, self._archives)
        if not traffic.wait_until_idle(time.monotonic() + settings.drain_s, self._killed) and not self._killed():
            self._say(f"requests were still in flight after {settings.drain_s:g} s (--drain-s)", level="warning")
        flushed_by = time.monotonic() + configuration.flush_s(os.environ)  # Java kills its workers.
        while time.monotonic() < flushed_by and not self._killed():
            time.sleep(PAUSE_S)
        process.signal(signal.SIGTERM)
        give_up = time.monotonic() + STOP_S
        while process.poll() is None and time.monotonic() < give_up and not self._killed():
            time.sleep(PAUSE_S / 2)
        self._say("stopped" if not self._killed() else "killed")

    def _tell_rest(self, log: Path, source: str, count: int) -> None:
        self._say(f"{count} more such lines in the same second; all are in {log}", level="warning", source=source)

    def _java_output(self) -> list[str]:
        with self._directory.jvm_log.open("rb") as file:
            file.seek(self._java_log_start)
            return file.read().decode("utf-8", "replace").splitlines()


def _describe(facts: Mapping[str, Any]) -> str:
    """Describe a server that is ready, for a person at a terminal, with commands to try."""
    urls: dict[str, str] = {}
    for model in facts["models"]:  # The first version of a model is its default.
        name, _, version = model.partition("/")
        is_default = not any(known.startswith(f"{name} ") for known in urls)
        urls[f"{name} {version}"] = f"{facts['rest']}/predictions/{name if is_default else model}"
    width = max(map(len, urls))
    first = next(iter(urls.values()))
    return "\n".join(
        [
            f"Ready after {facts['seconds']:.1f} s, on Java {facts['java']}.",
            f"  REST     {facts['rest']}",
            f"  gRPC     {facts['grpc']}",
            f"  metrics  {facts['metrics']}",
            *(f"  model    {name:<{width}}  {url}" for name, url in urls.items()),
            f"  patches  {', '.join(facts['patches']) or 'none'} (of TorchServe)",
            f"  logs     {facts['logs']}",
            "Try:",
            f"  curl {first}",
            f"  curl -T picture.png {first}",
            f"  curl -F data=@picture.png -F layers=all -H 'Accept: application/x-npz' -o maps.npz {first}",
            "Ctrl-C stops it.",
        ]
    )
