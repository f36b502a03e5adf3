"""The Java process of TorchServe and its descendants. Workers end when Java ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from server import children
from server.arguments import Settings
from server.configuration import LOGGING, PrivateDirectory
from server.failures import Failure
from server.java import Java
from server.patches import MODELS_PROPERTY


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
    java: Java, home: Path, directory: PrivateDirectory, configuration: Path, settings: Settings
) -> list[str]:
    """Build the command line that starts TorchServe in the foreground.

    Patched classes, if `directory.classes` holds any, come before TorchServe's own.
    """
    return [
        str(java.executable),
        "-Xms512m",
        f"-Xmx{settings.heap_mb}m",
        "-Xmn384m",  # Large replies are freed soon: with the parallel collector 25 to 30 % faster than G1.
        "-XX:+UseParallelGC",
        # The first collections copied to memory that was never used, which the system clears first: all requests waited
        # for 50 to 100 ms. With the heap touched at the start they take 4 to 6 ms. And netty's 34 MB of buffers move to
        # the old generation at once, instead of being copied several times: 1 ms.
        "-XX:+AlwaysPreTouch",
        "-XX:MaxTenuringThreshold=1",
        # A thread that compiles occupies its core for milliseconds, for which requests wait. With compilation at half
        # the usual counts more of it happens before the server is ready: p99 of the first scores is 0.7 of what it was.
        "-XX:CompileThresholdScaling=0.5",
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={directory.path}",
        f"-Dconvscope.logs={directory.logs}",
        f"-D{MODELS_PROPERTY}={directory.models_file}",
        f"-Dlog4j.configurationFile={LOGGING.as_uri()}",
        "-cp",
        os.pathsep.join([str(directory.classes), f"{home}/ts/frontend/*"]),
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(configuration),
        "-s",
        str(settings.model_store.resolve()),
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
        children.adopt_orphans()
        launcher = os.getpid()
        self._process = children.start(
            command,
            environment=environment,
            log=directory.jvm_log,
            folder=directory.path,
            before=lambda: children.die_with(launcher),  # Java cannot ask the kernel itself.
        )

    @property
    def pid(self) -> int:
        """The process id of Java, and of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status if Java has ended; reap other children that have ended."""
        children.reap()
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send Java a signal, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill Java and its descendants, and wait until they have ended."""
        deadline = time.monotonic() + 5
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            children.reap()
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
