"""Waits until the requests in flight have finished before TorchServe stops.

TorchServe resets REST requests 0.3 s after the signal to stop, and its API reports only those that still wait for a
worker. Java's thread dump, which it prints on SIGQUIT, shows what each worker does: its thread is in `getRequest` when
it is idle. That costs nothing until it is used, and works for both transports. TorchServe completes gRPC replies
itself.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from server.configuration import Listeners, PrivateDirectory
from server.management import Management
from server.models import Archive
from server.process import JavaProcess

PAUSE_S = 0.1
DUMP_TIMEOUT_S = 2.0
DUMP_END = "JNI global ref"
RUNNING, IDLE, CONNECTING = "WorkerThread.run(", ".getRequest(", "WorkerThread.connect("
# TCP states in which a reply may be unsent: established, FIN-WAIT-1 and 2, CLOSE-WAIT, LAST-ACK.
ESTABLISHED = {"01", "04", "05", "08", "09"}


class Traffic:
    """The requests in flight.

    Args:
        process: Java.
        directory: The private directory, for the output of Java.
        listeners: Where the server listens.
        archives: The models served.
    """

    def __init__(
        self, process: JavaProcess, directory: PrivateDirectory, listeners: Listeners, archives: Sequence[Archive]
    ) -> None:
        self._process = process
        self._log = directory.jvm_log
        self._management = Management(directory.management_socket)
        self._port = listeners.rest
        self._archives = archives

    def wait_until_idle(self, deadline: float, impatient: Callable[[], bool]) -> bool:
        """Wait until no request is in flight.

        Args:
            deadline: When to stop waiting (`time.monotonic()`).
            impatient: Polled; waiting ends when it returns True.

        Returns:
            Whether it is known that no request is in flight.
        """
        idle_since: float | None = None
        batch_delay_s = 0.0
        while not impatient():
            if self._process.poll() is not None:
                return True
            started = time.monotonic()
            if self._busy():
                idle_since = None
            elif idle_since is None:
                idle_since = started
            elif started - idle_since > batch_delay_s:
                # Rarely: TorchServe runs nvidia-smi for every worker each time.
                states = self._management.describe_all(self._archives)
                # A request that waits for its batch to fill is not in a dump until that delay is over.
                batch_delay_s = max((state.batch_delay_s for state in states or ()), default=batch_delay_s)
                if states is None or any(state.pending for state in states):
                    idle_since = None
                elif started - idle_since > batch_delay_s:
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE_S)
        return False

    def is_idle(self, label: str) -> bool:
        """Return whether no worker of an archive is busy and none of its requests is queued.

        An idle worker waits for the queue, so the queue is empty if there is one.

        Args:
            label: Label of the archive.
        """
        dump = self._dump()
        return dump is not None and count_busy_workers(dump, label) == 0

    def _busy(self) -> bool:
        dump = self._dump()
        return dump is None or count_busy_workers(dump) > 0 or unsent_bytes(self._port) > 0

    def _dump(self) -> str | None:
        """Return Java's thread dump; None if it prints none."""
        start = self._log.stat().st_size
        self._process.signal(signal.SIGQUIT)
        give_up = time.monotonic() + DUMP_TIMEOUT_S
        while time.monotonic() < give_up and self._process.poll() is None:
            with self._log.open("rb") as file:
                file.seek(start)
                text = file.read().decode("utf-8", "replace")
            if DUMP_END in text:
                return text
            time.sleep(0.01)
        return None


def count_busy_workers(dump: str, label: str | None = None) -> int:
    """Count the worker threads of a Java thread dump that work on a request.

    Args:
        dump: The thread dump.
        label: Label of the archive whose workers to count; None for all.
    """
    name = re.compile(rf'"W-\d+-{".+" if label is None else re.escape(label)}"')
    stacks = re.split(r"\n(?=\")", dump)
    return sum(
        name.match(stack) is not None and RUNNING in stack and IDLE not in stack and CONNECTING not in stack
        for stack in stacks
    )


def unsent_bytes(port: int, tables: Sequence[Path] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> int:
    """Return the bytes of replies from a local port that clients have not received yet; 0 if that is unknown.

    Args:
        port: The local port.
        tables: The kernel's tables of connections.
    """
    unsent = 0
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if int(fields[1].split(":")[1], 16) == port and fields[3] in ESTABLISHED:
                unsent += int(fields[4].split(":")[0], 16)
    return unsent
