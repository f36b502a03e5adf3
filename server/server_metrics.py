"""The metrics of the server: workers, queues, TorchServe's own counters, drain, watch, GPUs, memory and disk.

TorchServe counts requests that name no version under the version `default`; here they count for the version that served
them. Only models that are served have series: names that callers invent have none.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.children import is_alive
from server.configuration import PrivateDirectory
from server.fetching import fetch
from server.host import read_disk, read_memory
from server.management import Management, ModelState
from server.patches import PATCHES
from server.watch import read_published

WAIT_S = 2.0  # For all sources together: Prometheus gives a scrape 4 s.
FETCH_TIMEOUT_S, DESCRIBE_TIMEOUT_S = 2.0, 10.0
KEEP_S = 60.0  # On a GPU TorchServe runs nvidia-smi for every worker that it describes, which may take seconds.
SLOW_S, REST = 0.25, 20  # After an answer that took longer than SLOW_S, the next query waits REST times as long.

T = TypeVar("T")
Model = tuple[str, str]  # Name, version.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # By name and labels.

REQUESTS, WAITED = "ts_inference_requests", "ts_queue_latency_microseconds"
RESPONSES = {"2xx": "Requests2XX", "4xx": "Requests4XX", "5xx": "Requests5XX"}


class Source(Generic[T]):
    """A source of metrics that is queried at every scrape and may hang: one query at a time, and a limited wait.

    Args:
        ask: Returns the answer, or raises. Called in a thread of its own.
        keep_s: Seconds for which an answer is used while there is no newer one; 0 if every scrape needs its own.
    """

    def __init__(self, ask: Callable[[], T], *, keep_s: float = 0.0) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._answered.set()
        self._answer: T | None = None
        self._answered_at = self._due = float("-inf")

    def start(self) -> None:
        """Start a query, unless the last one is still running or was slow a moment ago."""
        with self._lock:
            if not self._answered.is_set() or time.monotonic() < self._due:
                return
            self._answered.clear()
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, deadline: float) -> T | None:
        """Return the last query's answer, or the one before it while it can be used; None if there is neither.

        Args:
            deadline: When to stop waiting (`time.monotonic()`).
        """
        self._answered.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            holds = self._answered.is_set() or time.monotonic() - self._answered_at < self._keep_s
            return self._answer if holds else None

    def _run(self) -> None:
        started = time.monotonic()
        try:
            answer = self._ask()
        except Exception:  # A failure of any kind must not affect the other sources.
            answer = None
        with self._lock:
            self._answer, self._answered_at = answer, time.monotonic()
            took_s = self._answered_at - started
            if self._keep_s and took_s > SLOW_S:
                self._due = self._answered_at + min(took_s * REST, self._keep_s / 2)
            self._answered.set()


class ServerMetrics(Collector):
    """Queries TorchServe and the driver at every scrape; a source that does not answer in time is left out.

    Args:
        models: The models served until the watch publishes others; of several versions the first is the default.
        metrics_port: Port of TorchServe's own metrics, on 127.0.0.1.
        directory: The private directory.
        started: When the server was started, unix time.
        patches: Names of the patches of TorchServe that are active.
    """

    def __init__(
        self,
        models: Sequence[Model],
        metrics_port: int,
        directory: PrivateDirectory,
        started: float,
        patches: Sequence[str] = (),
    ) -> None:
        self._models = models
        self._management = Management(directory.management_socket, DESCRIBE_TIMEOUT_S)
        self._directory = directory
        self._started = started
        self._patches = patches
        self._counters: Source[Samples] = Source(partial(read_counters, metrics_port))
        self._states: Source[dict[Model, ModelState]] = Source(self._describe, keep_s=KEEP_S)
        self._gpus = Source(partial(gpu_families, load_gpu_driver()))

    def collect(self) -> Iterable[Metric]:
        """Query all sources at a time, and yield the metrics of those that answer in time."""
        deadline = time.monotonic() + WAIT_S
        for source in (self._counters, self._states, self._gpus):
            source.start()
        counters, states = self._counters.answer(deadline), self._states.answer(deadline)
        up = counters is not None and states is not None
        yield GaugeMetricFamily(
            "convscope_torchserve_up", "1 if TorchServe's own metrics and its management API answered.", value=up
        )
        patches = GaugeMetricFamily(
            "convscope_server_patch_active",
            "1 if TorchServe's front end runs with this patch, 0 if not.",
            labels=["patch"],
        )
        for patch in PATCHES:
            patches.add_metric([patch.name], patch.name in self._patches)
        yield patches
        published = read_published(self._directory.watch_file)
        yield from status_families(published["ready"], self._directory.drain_file.exists(), self._started)
        yield from _watch_families(published)
        yield from _host_families(self._directory.path)
        if states is not None:
            yield from _state_families(states, published["models"])
        if counters is not None:
            yield from self._counter_families(counters, published)
        yield from self._gpus.answer(deadline) or []

    def _served(self, published: dict[str, Any]) -> list[Model]:
        """Return the models served now without those that cannot be loaded, the default version of each first."""
        models = [(name, version) for name, _, version in (model.partition("/") for model in published["models"])]
        return models or list(self._models)

    def _describe(self) -> dict[Model, ModelState]:
        states = {}
        for model in self._served(read_published(self._directory.watch_file)):
            state = self._management.describe(*model)
            if state is None:
                raise OSError(f"TorchServe does not describe {model[0]} {model[1]}")
            states[model] = state
        return states

    def _counter_families(self, counters: Samples, published: dict[str, Any]) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "convscope_torchserve_requests",
            "Requests that TorchServe took over REST and gRPC, including model cards and those that reached no worker.",
            labels=["model", "version"],
        )
        waits = CounterMetricFamily(
            "convscope_queue_wait_seconds",
            "Time that answered requests waited for a worker; REST only.",
            labels=["model", "version"],
        )
        models, defaults = self._served(published), published["defaults"]
        requested, waited = (_by_model(counters, name, models, defaults) for name in (REQUESTS, WAITED))
        for model in models:
            requests.add_metric(model, requested[model])
            waits.add_metric(model, waited[model] / 1e6)
        responses = CounterMetricFamily(
            "convscope_torchserve_responses",
            "TorchServe's HTTP responses by status; REST only. 2xx includes responses to this server's own requests.",
            labels=["status"],
        )
        for status, name in RESPONSES.items():
            responses.add_metric([status], sum(value for (sample, _), value in counters.items() if sample == name))
        return requests, waits, responses


def read_counters(port: int) -> Samples:
    """Read TorchServe's own metrics.

    Args:
        port: Their port on 127.0.0.1.

    Raises:
        OSError: TorchServe does not respond in time.
    """
    status, body = fetch(http.client.HTTPConnection("127.0.0.1", port), "/metrics", FETCH_TIMEOUT_S)
    if status != 200:
        raise OSError(f"TorchServe's metrics answered {status}")
    families = text_string_to_metric_families(body.decode())
    samples = [sample for family in families for sample in family.samples]
    # The parser gives every counter the suffix that TorchServe gives only some.
    return {(sample.name.removesuffix("_total"), frozenset(sample.labels.items())): sample.value for sample in samples}


def count_unnamed(counters: Samples, counter: str, name: str) -> float:
    """Return TorchServe's count of requests for a model that named no version."""
    return sum(
        value
        for (sample, labels), value in counters.items()
        if sample == counter and {("model_name", name), ("model_version", "default")} <= labels
    )


def _by_model(
    counters: Samples, counter: str, models: Sequence[Model], defaults: dict[str, dict[str, dict[str, float]]]
) -> dict[Model, float]:
    """Add up a counter of TorchServe for each model served.

    Args:
        counters: TorchServe's counters.
        counter: Name of the counter.
        models: The models served, the default version of each first.
        defaults: Counts of requests without a version while other versions were the default: by model, version,
            counter.
    """
    totals = dict.fromkeys(models, 0.0)
    for (sample, labels), value in counters.items():
        values = dict(labels)
        model = (values.get("model_name", ""), values.get("model_version", ""))
        if sample == counter and model in totals:
            totals[model] += value
    for name in dict.fromkeys(name for name, _ in models):
        first = next(model for model in models if model[0] == name)
        totals[first] += count_unnamed(counters, counter, name)
        for version, counts in defaults.get(name, {}).items():
            count = counts.get(counter, 0.0)
            totals[first] -= count
            if (name, version) in totals:
                totals[name, version] += count
        totals[first] = max(totals[first], 0.0)  # The counters were read a moment before the watch's file.
    return totals


def _watch_families(published: dict[str, Any]) -> Iterable[Metric]:
    answered = GaugeMetricFamily(
        "convscope_card_answered",
        "1 if the model responded in time to the launcher's last request for its card.",
        labels=["model", "version"],
    )
    restarts = CounterMetricFamily(
        "convscope_model_restarts",
        "Restarts of all workers of a model by the launcher, by reason, without TorchServe's own restarts.",
        labels=["model", "version", "reason"],
    )
    for name, known in published["models"].items():
        model = name.split("/")
        answered.add_metric(model, known["answered"])
        for reason, count in known["restarts"].items():
            restarts.add_metric([*model, reason], count)
    served = [name.split("/")[0] for name in published["models"]]
    return answered, restarts, deaths_family(published["deaths"]), rejected_family(served, published["rejected"])


def status_families(is_ready: bool, is_draining: bool, started: float) -> list[Metric]:
    """Return the metrics of the state of the replica; `started` is in unix time."""
    return [
        GaugeMetricFamily("convscope_ready", "1 if the replica can take requests.", value=is_ready and not is_draining),
        GaugeMetricFamily("convscope_draining", "1 while the server drains: readiness fails.", value=is_draining),
        GaugeMetricFamily("convscope_server_start_time_seconds", "Start of the server, unix time.", value=started),
    ]


def deaths_family(deaths: Mapping[str, Mapping[str, int]]) -> Metric:
    """Return the metric of workers that ended unexpectedly, from counts by `name/version` and cause."""
    family = CounterMetricFamily(
        "convscope_worker_deaths",
        "Workers that ended unexpectedly, by cause.",
        labels=["model", "version", "cause"],
    )
    for model, counts in deaths.items():
        for cause, count in counts.items():
            family.add_metric([*model.split("/"), cause], count)
    return family


def rejected_family(served: Iterable[str], rejected: Iterable[str]) -> Metric:
    """Return the metric of rejected archives, from names of models and of files without `.mar`."""
    family = GaugeMetricFamily(
        "convscope_archive_rejected",
        "1 for an archive that is not served, by its file's name; 0 for a model that is.",
        labels=["model"],
    )
    for name, value in {**dict.fromkeys(served, 0), **dict.fromkeys(rejected, 1)}.items():
        family.add_metric([name], value)
    return family


def worker_families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    """Return the metrics of workers, of the number that there should be, and of the queue, without samples."""
    labels = ["model", "version"]
    return (
        GaugeMetricFamily(
            "convscope_workers",
            "Workers by state: ready (the model responds with its card and the worker's process runs), silent (only "
            "TorchServe regards it as ready), or loading (starting, restarting, or given up by TorchServe).",
            labels=[*labels, "state"],
        ),
        GaugeMetricFamily("convscope_workers_wanted", "Workers that the model should have.", labels=labels),
        GaugeMetricFamily("convscope_queue_requests", "Requests that wait for a worker now.", labels=labels),
    )


def load_gpu_driver() -> Any:
    """Return the initialised module of the package `nvidia-ml-py`; None without the package or the driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # The package or the driver is missing, or they do not match.
        return None
    return pynvml


def gpu_families(driver: Any) -> list[Metric]:
    """Read the memory and load of every GPU; return the metrics that have a value.

    Args:
        driver: From `load_gpu_driver`.
    """
    used = GaugeMetricFamily("convscope_gpu_memory_used_bytes", "GPU memory in use, by all processes.", labels=["gpu"])
    total = GaugeMetricFamily("convscope_gpu_memory_total_bytes", "GPU memory in all.", labels=["gpu"])
    load = GaugeMetricFamily(
        "convscope_gpu_utilization_ratio",
        "Share of the driver's last sampling period in which something ran on the GPU, 0 to 1.",
        labels=["gpu"],
    )
    for index in range(driver.nvmlDeviceGetCount() if driver else 0):
        with contextlib.suppress(driver.NVMLError):
            handle = driver.nvmlDeviceGetHandleByIndex(index)
            memory = driver.nvmlDeviceGetMemoryInfo(handle)
            used.add_metric([str(index)], memory.used)
            total.add_metric([str(index)], memory.total)
            # Last, since a GPU that is divided into instances does not report it.
            load.add_metric([str(index)], driver.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    return [family for family in (used, total, load) if family.samples]


def _host_families(folder: Path) -> Iterable[Metric]:
    memory, disk = read_memory(), read_disk(folder)
    values = {
        "convscope_memory_used_bytes": (memory.used, "Memory of the control group, without cache that can be dropped."),
        "convscope_memory_limit_bytes": (memory.limit, "Memory that the control group may use."),
        "convscope_disk_free_bytes": (
            disk.free if disk else None,
            "Free bytes of the file system the server writes to.",
        ),
        "convscope_disk_size_bytes": (disk.size if disk else None, "All bytes of that file system."),
    }
    for name, (value, text) in values.items():
        if value is not None:
            yield GaugeMetricFamily(name, text, value=value)
    if memory.kills is not None:
        text = "Processes of the control group that the kernel has killed for lack of memory."
        yield CounterMetricFamily("convscope_oom_kills", text, value=memory.kills)


def _state_families(states: dict[Model, ModelState], watched: dict[str, dict[str, Any]]) -> Iterable[Metric]:
    workers, wanted, waiting = worker_families()
    for model, state in states.items():
        answers = watched.get("/".join(model), {}).get("answered", False)
        ready = sum(worker.ready and is_alive(worker.pid) for worker in state.found) if answers else 0
        workers.add_metric([*model, "ready"], ready)
        workers.add_metric([*model, "silent"], state.loaded - ready)
        workers.add_metric([*model, "loading"], len(state.found) - state.loaded)
        wanted.add_metric(model, state.workers)
        waiting.add_metric(model, state.pending)
    return workers, wanted, waiting
