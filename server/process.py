"""The Java process: started, watched, stopped, with everything it started in turn.

It runs in a session of its own, so that Ctrl-C in the terminal reaches the launcher alone and requests can finish. If
the launcher is killed outright, the kernel kills Java (Linux), and workers leave when Java is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from server.configuration import LOGGING, PrivateDirectory
from server.failures import Failure
from server.java import Java

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def find_torchserve() -> Path:
    """Return the folder that TorchServe is installed in.

    Raises:
        Failure: This Python has no TorchServe.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / "frontend/model-server.jar").is_file():
        raise Failure(f"TorchServe is not installed in {sys.executable}: pip install torchserve==0.12.0")
    return Path(spec.origin).parent.parent


def build_command(
    java: Java, home: Path, directory: PrivateDirectory, configuration: Path, store: Path, heap_mb: int
) -> list[str]:
    """Build the command line that starts TorchServe in the foreground."""
    return [
        str(java.executable),
        "-Xms512m",
        f"-Xmx{heap_mb}m",
        "-Xmn384m",  # Large replies die young: with the parallel collector 25 to 30 % faster than G1.
        "-XX:+UseParallelGC",
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={directory.path}",
        f"-Dconvscope.logs={directory.logs}",
        f"-Dlog4j.configurationFile={LOGGING.as_uri()}",
        "-cp",
        f"{home}/ts/frontend/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(configuration),
        "-s",
        str(store),
        "-ncs",
    ]


class JavaProcess:
    """TorchServe's Java process and its descendants.

    Args:
        command: Its command line.
        directory: The private directory: working directory and log.
        environment: Its environment.
    """

    def __init__(self, command: list[str], directory: PrivateDirectory, environment: Mapping[str, str]) -> None:
        _adopt_orphans()
        launcher = os.getpid()
        with directory.jvm_log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory.path,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _die_with(launcher),
            )

    @property
    def pid(self) -> int:
        """The process id of Java, and of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status once Java has ended; reap what else has ended meanwhile."""
        _reap_others(self.pid)
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send Java a signal, if it is still there."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait until Java has ended; False if it has not."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill Java and all it started, and wait until they are gone."""
        deadline = time.monotonic() + 5
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            _reap_others(self.pid)
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with(launcher: int) -> None:
    """Have the kernel kill this process, about to become Java, when its launcher ends in whatever way."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # It ended before the kernel was told.
        os._exit(1)


def _adopt_orphans() -> None:
    """Become the parent of Java's workers when Java dies, as process 1 of a container is anyway."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _reap_others(java: int) -> None:
    """Reap adopted children that have ended; Java's own status is left to its `Popen`."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == java:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)
