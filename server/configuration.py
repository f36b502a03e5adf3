"""What one run of TorchServe is told: its private directory, config.properties and the workers' environment.

Everything TorchServe writes (unpacked archives, sockets, pid file, logs) goes into the private directory, which only
this user can open and which is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import TracebackType

from server.arguments import MEGABYTE, Settings
from server.failures import Failure
from server.models import Archive

TEMPLATE = Path(__file__).with_name("config.properties")
LOGGING = Path(__file__).with_name("log4j2.xml")
MOST_WORKERS = 4  # Of one model, unless more are asked for.
LONGEST_SOCKET_PATH = 107  # What the kernel takes, in bytes.
FLUSH_S = 1.0  # From the last response to the end of the workers, for the spans of the last requests.

# What of a log goes to standard error when the server fails: the collector of a container's log splits longer lines.
SHOWN_BYTES, SHOWN_LINES, SHOWN_CHARACTERS = 16384, 20, 200

# Variables that would redirect TorchServe or its workers behind our back: TS_CONFIG_FILE overrides the file we wrote,
# PYTHONPATH comes before the archive on a worker's path.
UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME", "LOG_LOCATION")
# Where prometheus_client writes its files, and the name of old.
METRICS_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""glibc's settings for workers: what a request frees is kept for the next. Otherwise the maps of a batch are mapped
anew for every request, and each of their pages is faulted in: 32 pictures take ResNet-18 a tenth longer. Memory above
256 MiB that is free goes back to the system."""


@dataclass(frozen=True)
class Listeners:
    """Where the server listens: an IPv4 address and its ports.

    Attributes:
        host: Address of REST, gRPC and metrics.
        rest: REST port.
        grpc: gRPC port.
        metrics: Port of `/metrics`.
        torchserve_metrics: Port of TorchServe's own metrics, on loopback whatever `host` is.
        grpc_management: Port of the management service, on loopback whatever `host` is.
        first_worker: First of the neighbouring ports the workers are numbered by.
    """

    host: str
    rest: int
    grpc: int
    metrics: int
    torchserve_metrics: int
    grpc_management: int
    first_worker: int


class PrivateDirectory:
    """The private directory of one run, as a context manager: made on entry, removed on exit.

    Args:
        parent: Folder to make it in; None for the system's temporary folder.
        log_dir: Folder for the logs that outlives the run; None for a folder inside.
        for_java: Check that Java can use it too.
    """

    def __init__(self, parent: Path | None, log_dir: Path | None, *, for_java: bool = True) -> None:
        self._parent = parent
        self._log_dir = log_dir
        self._for_java = for_java

    def __enter__(self) -> PrivateDirectory:
        with contextlib.ExitStack() as undo:
            try:
                if self._parent:
                    self._parent.mkdir(parents=True, exist_ok=True)
                self.path = Path(tempfile.mkdtemp(prefix="convscope-", dir=self._parent)).resolve()
                undo.callback(shutil.rmtree, self.path, ignore_errors=True)
                self.logs = self._log_dir.resolve() if self._log_dir else self.path / "logs"
                self.logs.mkdir(parents=True, exist_ok=True)
                (self.path / "tmp").mkdir()
                self.metrics.mkdir()
                self.jvm_log.touch()  # A folder that was there already may not be ours to write to.
            except OSError as error:
                raise Failure(f"cannot write to {error.filename}: {error.strerror}") from error
            if len(os.fsencode(self.management_socket)) > LONGEST_SOCKET_PATH:
                raise Failure(f"the path {self.path} is too long for a socket: choose a shorter one with --work-dir")
            if (
                self._for_java and os.statvfs(self.path).f_flag & os.ST_NOEXEC
            ):  # As `docker run --tmpfs /tmp` mounts it.
                raise Failure(
                    f"programs may not run from {self.path} (mounted noexec), and Java needs a library that it unpacks"
                    " there: mount it with exec (docker: --tmpfs /tmp:exec), or choose another with --work-dir"
                )
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def management_socket(self) -> Path:
        """TorchServe's management API."""
        return self.path / "management.sock"

    @property
    def control_socket(self) -> Path:
        """Where the server is asked to reload (`server.control`)."""
        return self.path / "control.sock"

    @property
    def starting_file(self) -> Path:
        """The file that is there until the server has warmed up; as long, readiness fails."""
        return self.path / "starting"

    @property
    def classes(self) -> Path:
        """Folder of Java classes that go before TorchServe's own."""
        return self.path / "classes"

    @property
    def drain_file(self) -> Path:
        """The file whose existence makes readiness fail."""
        return self.path / "draining"

    @property
    def watch_file(self) -> Path:
        """What the watch knows of the models, for the exporter and for readiness."""
        return self.path / "watch.json"

    @property
    def models_file(self) -> Path:
        """What "Model not found" says of the models that are served, for TorchServe (`server.patches`, names)."""
        return self.path / "models.txt"

    @property
    def copies(self) -> Path:
        """Folder of the archives that are served, where signatures are required."""
        return self.path / "copies"

    @property
    def metrics(self) -> Path:
        """Where the workers write their metrics; empty at every start, as the directory is new."""
        return self.path / "metrics"

    @property
    def exporter_log(self) -> Path:
        """What the exporter prints: nothing, as a rule."""
        return self.logs / "exporter.log"

    @property
    def jvm_log(self) -> Path:
        """What the Java process itself prints."""
        return self.logs / "java.log"

    @property
    def torchserve_log(self) -> Path:
        """Warnings and errors of the front end."""
        return self.logs / "torchserve.log"

    @property
    def models_log(self) -> Path:
        """What the workers print."""
        return self.logs / "models.log"

    def last_lines(self) -> dict[str, list[str]]:
        """Return the last lines of each log that is not empty, by file name."""
        lines = {path.name: _read_last_lines(path) for path in (self.jvm_log, self.torchserve_log, self.models_log)}
        return {name: last for name, last in lines.items() if last}

    def keep_logs(self) -> Path | None:
        """Move the logs out of the private directory, so that they outlive it; return where they are.

        None if nothing was logged.
        """
        written = [path for path in self.logs.iterdir() if path.stat().st_size]
        if self._log_dir or not written:
            return self.logs if written else None
        kept = Path(tempfile.mkdtemp(prefix="convscope-logs-", dir=self._parent))
        for path in written:
            shutil.move(path, kept / path.name)
        return kept


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
        settings: What was asked for.
        listeners: Where to listen.
        archives: What to load at the start.
        gpus: How many there are to use.
        workers: Of a model, by default.
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
    text = Template(TEMPLATE.read_text()).substitute({key: _escape(str(value)) for key, value in values.items()})
    path = directory.path / "config.properties"
    path.write_text(text, encoding="ascii")
    return path


def worker_environment(
    directory: PrivateDirectory, settings: Settings, workers: int, cores: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of TorchServe, which its workers inherit.

    Args:
        directory: The private directory.
        settings: What was asked for.
        workers: Of all models together. A pass gets twice its share of the cores, since not all workers are busy at
            all times; with more, the threads of one pass wait for those of others.
        cores: Cores to share among them.
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
    result["PYTHONFAULTHANDLER"] = "1"  # A worker that crashes says by which signal (server/diagnosis.py).
    result["PROMETHEUS_MULTIPROC_DIR"] = str(directory.metrics)
    result["CONVSCOPE_MAX_RESPONSE_BYTES"] = str(settings.max_reply_mb * MEGABYTE)
    result["CONVSCOPE_DRAIN_FILE"] = str(directory.drain_file)
    result["CONVSCOPE_STARTING_FILE"] = str(directory.starting_file)
    result["CONVSCOPE_HUSH"] = "1"  # Of TorchServe's workers' own metrics none is read (server/server_metrics.py).
    result["CONVSCOPE_LOG_REQUESTS_S"] = f"{settings.log_requests_s:g}"
    result["CONVSCOPE_ENGINE"] = settings.engine
    result["CONVSCOPE_PRECISION"] = settings.precision
    result["CONVSCOPE_SCALED_DECODING"] = str(int(settings.scaled_decoding))
    result["CONVSCOPE_PATCHES"] = str(int(settings.patch))
    if settings.device == "cpu":
        result["CUDA_VISIBLE_DEVICES"] = ""
    return result


def flush_s(environment: Mapping[str, str]) -> float:
    """Return the seconds that workers get for their last spans; 0 if OpenTelemetry's variables ask for none."""
    return FLUSH_S if any(environment.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT") for kind in ("", "TRACES_")) else 0.0


def default_workers(models: int, gpus: int, cores: int) -> int:
    """Return how many workers a model gets where nobody says: one per GPU, else one per core, shared among the models.

    Four at most, since each needs memory of its own. benchmarks/README.md has what workers and threads bring.
    """
    return gpus or max(1, min(cores, MOST_WORKERS) // max(1, models))


def count_workers(archive: Archive, settings: Settings, default: int) -> int:
    """Return how many workers a model gets: the command line, else the archive, else `default`."""
    return settings.workers or archive.workers or default


def _escape(text: str) -> str:
    """Return text as a value of a Java properties file: ASCII, backslashes doubled."""
    doubled = text.replace("\\", "\\\\")
    return "".join(
        character if character.isascii() else "".join(f"\\u{unit:04x}" for unit in _utf16(character))
        for character in doubled
    )


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be")
    return [int.from_bytes(data[start : start + 2]) for start in range(0, len(data), 2)]
