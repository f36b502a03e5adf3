"""The configuration of one run of TorchServe: private directory, config.properties, environment of the workers.

TorchServe writes all its files (unpacked archives, sockets, pid file, logs) into the private directory, which only this
user can open and which is removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from server.arguments import MEGABYTE, Settings
from server.failures import Failure
from server.models import Archive

TEMPLATE = Path(__file__).with_name("config.properties")
LOGGING = Path(__file__).with_name("log4j2.xml")
MOST_WORKERS = 4  # Most workers of one model, unless the command line or the archive sets more.
LONGEST_SOCKET_PATH = 107  # Bytes; the kernel's limit.
FLUSH_S = 1.0  # Seconds from the last response to the end of the workers, to send the last spans.

# The part of a log that goes to standard error when the server fails: log collectors of containers split longer lines.
SHOWN_BYTES, SHOWN_LINES, SHOWN_CHARACTERS = 16384, 20, 200

# Variables that would redirect TorchServe or its workers: TS_CONFIG_FILE overrides our configuration, and PYTHONPATH
# comes before the archive on a worker's path.
UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME", "LOG_LOCATION")
# Where prometheus_client writes its files; the second is the former name.
METRICS_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""glibc's settings for workers, which keep freed memory for the next request. Otherwise each request maps the memory
for its maps again and faults in every page: 32 pictures take ResNet-18 a tenth longer. Free memory above 256 MiB is
returned to the system."""


@dataclass(frozen=True)
class Listeners:
    """Where the server listens: an IPv4 address and its ports.

    Attributes:
        host: Address of REST, gRPC and metrics.
        rest: REST port.
        grpc: gRPC port.
        metrics: Port of `/metrics`.
        torchserve_metrics: Port of TorchServe's own metrics, always on loopback.
        grpc_management: Port of the management service, always on loopback.
        first_worker: First of the consecutive ports by which workers are numbered.
    """

    host: str
    rest: int
    grpc: int
    metrics: int
    torchserve_metrics: int
    grpc_management: int
    first_worker: int


class PrivateDirectory:
    """The files of one run; `private_directory` makes the folder that holds them.

    Args:
        path: The private directory.
        logs: Folder of the logs; None for a folder inside.

    Attributes:
        management_socket: TorchServe's management API.
        control_socket: The socket that takes requests to reload (`server.control`).
        starting_file: Exists until the server has warmed up. While it exists, readiness fails.
        drain_file: Exists while the server drains. While it exists, readiness fails.
        watch_file: The state of the models as the watch publishes it, for the exporter.
        models_file: The list of models in the message "Model not found", for TorchServe (`server.patches`, names).
        classes: Folder of Java classes that precede TorchServe's own on the class path.
        copies: Folder of copies of the served archives, if signatures are required.
        metrics: Folder of the workers' metrics.
        exporter_log: Output of the exporter, normally empty.
        jvm_log: Output of the Java process itself.
        torchserve_log: Warnings and errors of the front end.
        models_log: Output of the workers.
    """

    def __init__(self, path: Path, logs: Path | None = None) -> None:
        self.path = path
        self.management_socket, self.control_socket = path / "management.sock", path / "control.sock"
        self.starting_file, self.drain_file = path / "starting", path / "draining"
        self.watch_file, self.models_file = path / "watch.json", path / "models.txt"
        self.classes, self.copies, self.metrics = path / "classes", path / "copies", path / "metrics"
        self.logs = logs or path / "logs"
        self.exporter_log, self.jvm_log = self.logs / "exporter.log", self.logs / "java.log"
        self.torchserve_log, self.models_log = self.logs / "torchserve.log", self.logs / "models.log"

    def last_lines(self) -> dict[str, list[str]]:
        """Return the last lines of each log that is not empty, by file name."""
        lines = {path.name: _read_last_lines(path) for path in (self.jvm_log, self.torchserve_log, self.models_log)}
        return {name: last for name, last in lines.items() if last}

    def keep_logs(self) -> Path | None:
        """Move the logs out of the private directory, and return their folder; None if nothing was logged."""
        written = [path for path in self.logs.iterdir() if path.stat().st_size]
        if self.logs.parent != self.path or not written:
            return self.logs if written else None
        kept = Path(tempfile.mkdtemp(prefix="convscope-logs-", dir=self.path.parent))
        for path in written:
            shutil.move(path, kept / path.name)
        return kept


@contextlib.contextmanager
def private_directory(
    parent: Path | None, log_dir: Path | None, *, for_java: bool = True
) -> Iterator[PrivateDirectory]:
    """Make the private directory of one run, and remove it at the end.

    Args:
        parent: Folder to create it in; None for the system's temporary folder.
        log_dir: Folder for logs that are kept after the run; None for a folder inside.
        for_java: Whether to check that Java can use it.

    Raises:
        Failure: It cannot be made, or not be used.
    """
    with contextlib.ExitStack() as stack:
        try:
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix="convscope-", dir=parent)).resolve()
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            directory = PrivateDirectory(path, log_dir and log_dir.resolve())
            directory.logs.mkdir(parents=True, exist_ok=True)
            (path / "tmp").mkdir()
            directory.metrics.mkdir()
            directory.jvm_log.touch()  # An existing folder may not be writable.
        except OSError as error:
            raise Failure(f"cannot write to {error.filename}: {error.strerror}") from error
        if len(os.fsencode(directory.management_socket)) > LONGEST_SOCKET_PATH:
            raise Failure(f"the path {path} is too long for a socket: choose a shorter one with --work-dir")
        if for_java and os.statvfs(path).f_flag & os.ST_NOEXEC:  # As `docker run --tmpfs /tmp` mounts it.
            raise Failure(
                f"programs may not run from {path} (mounted noexec), and Java needs a library that it unpacks"
                " there: mount it with exec (docker: --tmpfs /tmp:exec), or choose another with --work-dir"
            )
        yield directory


def _read_last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line[:SHOWN_CHARACTERS] for line in text.splitlines()[-SHOWN_LINES:]]


def write_configuration(
    directory: PrivateDirectory,
    settings: Settings,
    listeners: Listeners,
    archives: Sequence[Archive],
    gpus: int,
    workers: int,
    patches: Collection[str] = (),
) -> Path:
    """Write TorchServe's config.properties for this run and return its path.

    Args:
        directory: The private directory.
        settings: Settings of the server.
        listeners: Where to listen.
        archives: Archives to load at the start.
        gpus: Number of GPUs to use.
        workers: Default number of workers per model.
        patches: Names of the patches of TorchServe that are active: without `reload`, no model can be loaded later.
    """
    store = settings.model_store.resolve()
    values = {
        "host": listeners.host,
        "rest_port": listeners.rest,
        "grpc_port": listeners.grpc,
        "metrics_port": listeners.torchserve_metrics,
        "management_socket": directory.management_socket,
        "grpc_management_port": listeners.grpc_management,
        "model_store_pattern": re.escape(str(store)).replace(",", "."),
        "load_models": ",".join(archive.path.name for archive in archives),
        "model_api": str("reload" in patches).lower(),
        "workers": settings.workers or workers,
        "gpus": gpus,
        "worker_port": listeners.first_worker,
        "max_request_bytes": settings.max_request_mb * MEGABYTE,
        "max_response_bytes": settings.max_reply_mb * MEGABYTE,
    }
    # A Java properties file escapes backslashes and what is not ASCII as JSON does.
    escaped = {key: json.dumps(str(value))[1:-1] for key, value in values.items()}
    text = Template(TEMPLATE.read_text()).substitute(escaped)
    path = directory.path / "config.properties"
    path.write_text(text, encoding="ascii")
    return path


def worker_environment(
    directory: PrivateDirectory, settings: Settings, workers: int, cores: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of TorchServe, which its workers inherit.

    Args:
        directory: The private directory.
        settings: Settings of the server.
        workers: Number of workers of all models together. A forward pass gets twice its share of the cores, since not
            all workers are busy all the time; with more, threads of different passes would wait for each other.
        cores: Cores shared by the workers.
        environment: Variables to start from; thread counts set there are kept.
    """
    threads = str(max(1, min(cores, 2 * cores // workers)))
    result = {key: value for key, value in environment.items() if key not in UNWANTED + METRICS_VARIABLES}
    for key in ("CONVSCOPE_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        result.setdefault(key, threads)
    for key, value in MALLOC.items():
        result.setdefault(key, value)
    result["TMPDIR"] = str(directory.path / "tmp")
    result["PYTHONUNBUFFERED"] = "1"
    result["PYTHONFAULTHANDLER"] = "1"  # A worker that crashes prints the signal (server/diagnosis.py).
    result["PROMETHEUS_MULTIPROC_DIR"] = str(directory.metrics)
    result["CONVSCOPE_MAX_RESPONSE_BYTES"] = str(settings.max_reply_mb * MEGABYTE)
    result["CONVSCOPE_DRAIN_FILE"] = str(directory.drain_file)
    result["CONVSCOPE_STARTING_FILE"] = str(directory.starting_file)
    result["CONVSCOPE_HUSH"] = "1"  # Nothing reads the metrics of TorchServe's own worker (server/server_metrics.py).
    result["CONVSCOPE_LOG_REQUESTS_S"] = f"{settings.log_requests_s:g}"
    result["CONVSCOPE_ENGINE"] = settings.engine
    result["CONVSCOPE_PRECISION"] = settings.precision
    result["CONVSCOPE_SCALED_DECODING"] = str(int(settings.scaled_decoding))
    result["CONVSCOPE_PATCHES"] = str(int(settings.patch))
    if settings.device == "cpu":
        result["CUDA_VISIBLE_DEVICES"] = ""
    return result


def flush_s(environment: Mapping[str, str]) -> float:
    """Return the seconds that workers get to send their last spans; 0 if OpenTelemetry's variables request none."""
    return FLUSH_S if any(environment.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT") for kind in ("", "TRACES_")) else 0.0


def default_workers(models: int, gpus: int, cores: int) -> int:
    """Return the default number of workers per model: one per GPU, else one per core, shared among the models.

    At most four, since each worker needs memory of its own. docs/decisions/0021-workers-and-threads.md has figures.
    """
    return gpus or max(1, min(cores, MOST_WORKERS) // max(1, models))


def count_workers(archive: Archive, settings: Settings, default: int) -> int:
    """Return the number of workers of a model, set by the command line, else by the archive, else `default`."""
    return settings.workers or archive.workers or default
