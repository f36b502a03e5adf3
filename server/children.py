"""The processes that the launcher starts, each in a session of its own; it reaps them when they end.

Because of its session, Ctrl-C in the terminal does not reach a child, so requests can finish. If the launcher itself is
killed, the kernel kills its children.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROCESSES = Path("/proc")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

_started: dict[int, subprocess.Popen[bytes]] = {}


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    folder: Path | None = None,
    descriptors: Sequence[int] = (),
    before: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child process.

    Args:
        command: Its command line.
        environment: Its environment.
        log: File to which its output is appended.
        folder: Its working directory; None for the launcher's own.
        descriptors: File descriptors that it inherits.
        before: Called in the child before the program is loaded. The launcher must have no other thread.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(descriptors),
            preexec_fn=before,
        )
    _started[process.pid] = process
    return process


def reap() -> None:
    """Reap every child that has ended, adopted ones too. Processes returned by `start` keep their exit status."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        if own := _started.pop(ended.si_pid, None):
            own.poll()
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)


def adopt_orphans() -> None:
    """Adopt the children of a child that ends, as process 1 of a container does anyway."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(launcher: int) -> None:
    """Have the kernel kill this process when its parent, the launcher, ends for any reason.

    Args:
        launcher: Process id of the launcher.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # It ended before prctl was called.
        os._exit(1)


def is_alive(process: int) -> bool:
    """Return whether the process of an id runs: False if it has ended, is a zombie, or is stopped."""
    fields = _read_stat(process)
    return bool(fields) and fields[0] not in "ZXTt"


def processor_s(process: int) -> float:
    """Return the processor time that a process has used with all its threads, in seconds; 0 if it is unknown."""
    fields = _read_stat(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0  # utime and stime.


def _read_stat(process: int) -> list[str]:
    """Return the fields of /proc/<id>/stat behind the name (proc(5)), the state first; empty if there is no process."""
    try:
        return (PROCESSES / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def describe_ending(status: int) -> str:
    """Describe an exit status, as `subprocess` reports it."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
