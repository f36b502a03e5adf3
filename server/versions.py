"""The versions that TorchServe serves: loads a new one, makes it the default, then drains and removes the old one.

What TorchServe does when a version is unregistered decides the order. It kills the workers at once, and puts the
requests that they had back into a queue that nothing reads any more, so those callers wait until their deadlines.
Patched (`server.patches`, reload) it only forgets the version: requests that name it get 404 from that moment on, and
the workers go on with what is in its queue. When they are idle, they are ended here.

A registration that waits for its workers, which is TorchServe's default, or that has an archive to unpack would hold up
the thread that it shares with requests. So archives are unpacked here, and workers are polled.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from server import configuration
from server.arguments import Settings
from server.children import PROCESSES
from server.configuration import Listeners, PrivateDirectory
from server.control import check_room, unpack
from server.diagnosis import Death, Diagnosis
from server.draining import Traffic
from server.failures import Failure
from server.management import Management, ModelState
from server.models import Archive, Found
from server.server_metrics import REQUESTS, WAITED, count_unnamed, read_counters
from server.startup import Readiness
from server.watch import Watch

PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0  # Between two checks. Each thread dump is 50 KB in Java's log.
UNPATCHED = (
    "TorchServe runs without the patch `reload` (the log says why), and requests in flight would be lost: restart the "
    "server instead"
)
IDLE_LOOKS = 2  # In a row: a request may just be on its way from the queue to a worker.


class Versions:
    """The archives that TorchServe serves; implements `control.Host`.

    Args:
        settings: Settings of the server.
        listeners: Where the server listens.
        directory: The private directory.
        default_workers: Number of workers of a model if neither settings nor archive give one.
        archives: The registered archives, in order of registration: the newest version of a model first.
        rejected: Why other archives are not served.
        watch: Watches the served models.
        diagnosis: Explains the deaths of workers.
        traffic: Knows which workers are idle.
        is_patched: Whether TorchServe runs with the patch `reload`.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: Listeners,
        directory: PrivateDirectory,
        default_workers: int,
        archives: Sequence[Archive],
        rejected: dict[str, str],
        watch: Watch,
        diagnosis: Diagnosis,
        traffic: Traffic,
        *,
        is_patched: bool,
    ) -> None:
        self.why_not = None if is_patched else UNPATCHED
        self.rejected = rejected
        self.stopping = threading.Event()
        self._settings, self._listeners, self._directory = settings, listeners, directory
        self._default_workers = default_workers
        self._archives = list(archives)
        self._watch, self._diagnosis, self._traffic = watch, diagnosis, traffic
        self._management = Management(directory.management_socket)
        self._counter = itertools.count(1)
        self._loading: Archive | None = None
        self._deaths: list[Death] = []
        self._leftovers: list[Path] = []

    def served(self) -> list[Archive]:
        """Return the archives served, of several versions of a model the default first."""
        states = self._watch.states()
        return [archive for archive in self._archives if states.get(archive.full_name, "rejected") != "rejected"]

    def is_loading(self, death: Death) -> bool:
        """Record a worker's death if it belongs to the archive being loaded; return whether it does."""
        if self._loading is None or death.model != self._loading.full_name:
            return False
        self._deaths.append(death)
        return True

    def take_in(self, archive: Archive) -> None:
        """Register an archive and wait until it has responded with its card.

        Raises:
            Failure: The archive does not respond with its card; it is removed completely.
        """
        for path in self._leftovers:  # Metrics of workers that ended at the last reload, scraped by now.
            path.unlink(missing_ok=True)
        self._leftovers = []
        for other in self._unproven():
            if other.full_name == archive.full_name:
                self._give_up(other)
        if self._management.describe(archive.name, archive.version) is not None:
            self._forget(archive)  # TorchServe has it, but it was never served.
        workers = configuration.count_workers(archive, self._settings, self._default_workers)
        states = {one: self._describe(one) for one in self.served()}
        processes = {one: [worker.pid for worker in state.found if worker.pid > 0] for one, state in states.items()}
        check_room(
            archive,
            workers,
            itertools.chain.from_iterable(processes.values()),
            itertools.chain.from_iterable(found for one, found in processes.items() if one.name == archive.name),
            self._directory.path,
        )
        folder = self._directory.path / "archives" / f"{next(self._counter)}-{archive.full_name.replace('/', '-')}"
        unpack(archive, folder, self._settings.require_signature)
        self._deaths, self._loading = [], archive
        self._diagnosis.follow(archive)
        try:
            if why := self._management.register(folder, workers):
                raise Failure(f"archive {archive.path.name}: TorchServe does not take it: {why}")
            self._await_card(archive, workers)
        except BaseException:
            self._forget(archive)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self._loading = None
        self._archives.append(archive)

    def serve(self, archives: Sequence[Archive]) -> None:
        """Make the first version of each model its default, and watch these archives.

        Raises:
            Failure: TorchServe does not change a default; the served archives stay the same.
        """
        before = _defaults(self.served())
        for name, archive in _defaults(archives).items():
            if before.get(name) == archive:
                continue
            if why := self._management.set_default(archive):
                raise Failure(f"archive {archive.path.name}: TorchServe does not make it the default: {why}")
            if name not in before:
                continue
            # Counted a moment late, so that no series falls.
            with contextlib.suppress(OSError):
                counters = read_counters(self._listeners.torchserve_metrics)
                counts = {
                    counter: count_unnamed(counters, counter, name) - self._watch.counted(name, counter)
                    for counter in (REQUESTS, WAITED)
                }
                self._watch.note_default(before[name], counts)
        self._archives = [*archives, *self._unproven()]
        self._watch.serve(self._archives)

    def retire(self, archive: Archive) -> None:
        """Have TorchServe forget a version, wait until its workers have nothing to do, and end them.

        The batch that a worker has may take as long as TorchServe allows, responseTimeout.

        Raises:
            Failure: TorchServe does not forget it.
        """
        self._archives = [other for other in self._archives if other != archive]
        state = self._describe(archive)
        self._diagnosis.ignore(archive)
        if why := self._management.unregister(archive):
            raise Failure(f"{archive.full_name} is not taken away: TorchServe does not forget it: {why}")
        idle, pauses = 0, _pauses()
        while idle < IDLE_LOOKS and not self.stopping.is_set():
            self.stopping.wait(next(pauses))
            idle = idle + 1 if self._traffic.is_idle(archive.label) else 0
        if not self.stopping.is_set():  # Else the launcher waits for them with all others.
            self._end(state)

    def forget(self, found: Found) -> None:
        """Give up archives that were rejected at the start and are no longer in the store.

        Args:
            found: Content of the store. An archive whose file cannot be read now is kept.
        """
        held = {(archive.path.name, archive.full_name, archive.fingerprint) for archive in found.archives}
        for archive in self._unproven():
            is_held = (archive.path.name, archive.full_name, archive.fingerprint) in held
            if not is_held and archive.path.stem not in found.rejected:
                self._give_up(archive)

    def forget_all(self, archives: Iterable[Archive]) -> None:
        """Make TorchServe forget archives that it cannot load, if it is able to: callers then get 404, not 503."""
        if self.why_not is None:
            for archive in archives:
                self._forget(archive)

    def _unproven(self) -> list[Archive]:
        """Return the archives that were rejected at the start and that TorchServe goes on trying to load."""
        states = self._watch.states()
        return [archive for archive in self._archives if states.get(archive.full_name) == "rejected"]

    def _give_up(self, archive: Archive) -> None:
        """Stop trying to serve an archive that was never ready."""
        self._archives = [other for other in self._archives if other != archive]
        self._watch.serve(self._archives)
        self._forget(archive)

    def _await_card(self, archive: Archive, workers: int) -> None:
        """Wait until the model responds with its card and all workers have loaded the archive.

        Raises:
            Failure: A worker dies, the card is an error, or it takes too long.
        """
        readiness = Readiness(self._listeners, [archive], self._settings.startup_timeout_s)
        try:
            while True:
                why = [death.text for death in self._deaths]
                why += [*readiness.refused().values(), *readiness.late().values()]
                if why:
                    raise Failure(" ".join(why[0].splitlines()))
                if self.stopping.is_set():
                    raise Failure("the server is stopping")
                state = self._management.describe(archive.name, archive.version)
                if state is not None and state.workers != workers:
                    self._management.scale(archive, workers)
                elif state is not None and state.loaded >= workers and readiness.ready():
                    break
                time.sleep(PAUSE_S)
        finally:
            readiness.give_up()
        if self._settings.device == "cuda" and "cpu" in readiness.devices().values():
            raise Failure(f"archive {archive.path.name}: runs on cpu, and --device cuda was asked for")

    def _describe(self, archive: Archive) -> ModelState:
        state = self._management.describe(archive.name, archive.version)
        if state is None:
            raise Failure(f"TorchServe does not describe {archive.full_name}")
        return state

    def _forget(self, archive: Archive) -> None:
        """Unregister an archive that never served, so no request waits for it."""
        self._diagnosis.ignore(archive)
        state = self._management.describe(archive.name, archive.version)
        if state is None:
            return
        for other in self.served():  # TorchServe does not forget the default while it has other versions.
            if other.name == archive.name:
                self._management.set_default(other)
                break
        self._management.scale(archive, 0)
        self._management.unregister(archive)
        self._end(state)

    def _end(self, state: ModelState) -> None:
        """Kill workers, and remove the folders of their archives."""
        folders = set()
        for worker in state.found:
            self._leftovers += self._directory.metrics.glob(f"*_slot{worker.slot}.db")
            with contextlib.suppress(OSError):
                folder = (PROCESSES / str(worker.pid) / "cwd").readlink()
                if self._directory.path in folder.parents:  # Else it has ended, and its number is another's.
                    os.kill(worker.pid, signal.SIGKILL)
                    folders.add(folder)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _defaults(archives: Sequence[Archive]) -> dict[str, Archive]:
    """Return the first archive of each model."""
    return {archive.name: archive for archive in reversed(archives)}


def _pauses() -> Iterator[float]:
    """Yield ever longer pauses."""
    pause_s = PAUSE_S
    while True:
        yield pause_s
        pause_s = min(1.2 * pause_s, LONGEST_PAUSE_S)
