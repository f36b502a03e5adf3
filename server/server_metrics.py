"""What only the server knows: workers, queues, TorchServe's own counters, drain, watch, GPUs, memory and disk.

TorchServe calls the version that callers get who name none `default`; it is counted under its own name here. Only the
models served have series: what callers invent has none.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.children import is_alive
from server.fetching import fetch
from server.gpu_metrics import Gpus, gpu_families
from server.host import read_disk, read_memory
from server.management import Management, ModelState
from server.patches import PATCHES
from server.sources import Source
from server.watch import read_published

WAIT_S = 2.0  # For all questions together: Prometheus gives a scrape 4 s.
FETCH_TIMEOUT_S, DESCRIBE_TIMEOUT_S = 2.0, 10.0
KEEP_S = 60.0  # On a GPU TorchServe runs nvidia-smi for every worker it describes: seconds, now and then.

Model = tuple[str, str]  # Name, version.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # By name and labels.

REQUESTS, WAITED = "ts_inference_requests", "ts_queue_latency_microseconds"
RESPONSES = {"2xx": "Requests2XX", "4xx": "Requests4XX", "5xx": "Requests5XX"}


class ServerMetrics(Collector):
    """Asks TorchServe and the driver at every scrape; what does not answer in time is left out.

    Args:
        models: The models served until the watch publishes others; of several versions the first is the default.
        metrics_port: Port of TorchServe's own metrics, on 127.0.0.1.
        management_socket: TorchServe's management API.
        drain_file: The file that exists while the server drains.
        watch_file: What the launcher's watch publishes of the models.
        started: When the server was started, unix time.
        patches: Names of the patches of TorchServe that are active.
    """

    def __init__(
        self,
        models: Sequence[Model],
        metrics_port: int,
        management_socket: Path,
        drain_file: Path,
        watch_file: Path,
        started: float,
        patches: Sequence[str] = (),
    ) -> None:
        self._models = models
        self._metrics_port = metrics_port
        self._management = Management(management_socket, DESCRIBE_TIMEOUT_S)
        self._drain_file = drain_file
        self._watch_file = watch_file
        self._started = started
        self._patches = patches
        self._counters: Source[Samples] = Source(self._read_counters)
        self._states: Source[dict[Model, ModelState]] = Source(self._describe, keep_s=KEEP_S)
        self._gpus = Source(Gpus().read)

    def collect(self) -> Iterable[Metric]:
        """Ask everybody at once and return what was answered in time."""
        deadline = time.monotonic() + WAIT_S
        for source in (self._counters, self._states, self._gpus):
            source.start()
        counters, states = self._counters.answer(deadline), self._states.answer(deadline)
        up = counters is not None and states is not None
        yield GaugeMetricFamily(
            "convscope_torchserve_up", "1 if TorchServe's own metrics and its management API answered.", value=up
        )
        yield GaugeMetricFamily(
            "convscope_draining", "1 while the server drains: readiness fails.", value=self._drain_file.exists()
        )
        yield GaugeMetricFamily(
            "convscope_server_start_time_seconds", "When the server was started, unix time.", value=self._started
        )
        patches = GaugeMetricFamily(
            "convscope_server_patch_active",
            "1 if TorchServe's front end runs with this patch, 0 if not.",
            labels=["patch"],
        )
        for patch in PATCHES:
            patches.add_metric([patch.name], patch.name in self._patches)
        yield patches
        published = read_published(self._watch_file)
        yield GaugeMetricFamily(
            "convscope_ready",
            "1 if the replica is to be given requests, as /ready says.",
            value=published["ready"] and not self._drain_file.exists(),
        )
        yield from _watch_families(published)
        yield from _host_families(self._watch_file.parent)
        if states is not None:
            yield from _state_families(states, published["models"])
        if counters is not None:
            yield from self._counter_families(counters, published)
        yield from gpu_families(self._gpus.answer(deadline) or [])

    def _served(self, published: dict[str, Any]) -> list[Model]:
        """Return the models served now, the default version of each first; without those that cannot be loaded."""
        models = [(name, version) for name, _, version in (model.partition("/") for model in published["models"])]
        return models or list(self._models)

    def _describe(self) -> dict[Model, ModelState]:
        states = {}
        for model in self._served(read_published(self._watch_file)):
            state = self._management.describe(*model)
            if state is None:
                raise OSError(f"TorchServe does not describe {model[0]} {model[1]}")
            states[model] = state
        return states

    def _read_counters(self) -> Samples:
        return read_counters(self._metrics_port)

    def _counter_families(self, counters: Samples, published: dict[str, Any]) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "convscope_torchserve_requests",
            "Requests that TorchServe took over REST and gRPC, model cards and those that reached no worker included.",
            labels=["model", "version"],
        )
        waits = CounterMetricFamily(
            "convscope_queue_wait_seconds",
            "Time that requests over REST waited for a worker, added up once they are answered. REST only.",
            labels=["model", "version"],
        )
        models, defaults = self._served(published), published["defaults"]
        requested, waited = (_by_model(counters, name, models, defaults) for name in (REQUESTS, WAITED))
        for model in models:
            requests.add_metric(model, requested[model])
            waits.add_metric(model, waited[model] / 1e6)
        responses = CounterMetricFamily(
            "convscope_torchserve_responses",
            "TorchServe's HTTP answers by status, REST only; 2xx counts those to this server's own questions too.",
            labels=["status"],
        )
        for status, name in RESPONSES.items():
            responses.add_metric([status], sum(value for (sample, _), value in counters.items() if sample == name))
        return requests, waits, responses


def read_counters(port: int) -> Samples:
    """Read TorchServe's own metrics.

    Args:
        port: Where they are, on 127.0.0.1.

    Raises:
        OSError: They are not answered in time.
    """
    status, body = fetch(http.client.HTTPConnection("127.0.0.1", port), "/metrics", FETCH_TIMEOUT_S)
    if status != 200:
        raise OSError(f"TorchServe's metrics answered {status}")
    families = text_string_to_metric_families(body.decode())
    samples = [sample for family in families for sample in family.samples]
    # The parser gives every counter the suffix that TorchServe gives only some.
    return {(sample.name.removesuffix("_total"), frozenset(sample.labels.items())): sample.value for sample in samples}


def count_unnamed(counters: Samples, counter: str, name: str) -> float:
    """Return what TorchServe has counted for callers of a model who named no version."""
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
        counters: TorchServe's.
        counter: Name of the one.
        models: Those served, the default version of each first.
        defaults: What was counted without a version while other versions were the default: by model, version, counter.
    """
    totals = dict.fromkeys(models, 0.0)
    for (sample, labels), value in counters.items():
        told = dict(labels)
        model = (told.get("model_name", ""), told.get("model_version", ""))
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
        "1 if the model answered its last card, asked for by the launcher, in time.",
        labels=["model", "version"],
    )
    restarts = CounterMetricFamily(
        "convscope_model_restarts",
        "Times that the launcher started all workers of a model anew, by reason; TorchServe's own restarts apart.",
        labels=["model", "version", "reason"],
    )
    deaths = CounterMetricFamily(
        "convscope_worker_deaths",
        "Workers that ended without anybody having planned it, by cause.",
        labels=["model", "version", "cause"],
    )
    rejected = GaugeMetricFamily(
        "convscope_archive_rejected",
        "1 for an archive that is not served, by its file's name; 0 for a model that is.",
        labels=["model"],
    )
    for name, known in published["models"].items():
        model = name.split("/")
        answered.add_metric(model, known["answered"])
        for reason, count in known["restarts"].items():
            restarts.add_metric([*model, reason], count)
    for name, counts in published["deaths"].items():
        for cause, count in counts.items():
            deaths.add_metric([*name.split("/"), cause], count)
    served = {name.split("/")[0]: 0 for name in published["models"]}
    for name, value in {**served, **dict.fromkeys(published["rejected"], 1)}.items():
        rejected.add_metric([name], value)
    return answered, restarts, deaths, rejected


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
        text = "Processes of the control group that the kernel has killed for want of memory."
        yield CounterMetricFamily("convscope_oom_kills", text, value=memory.kills)


def _state_families(states: dict[Model, ModelState], watched: dict[str, dict[str, Any]]) -> Iterable[Metric]:
    workers = GaugeMetricFamily(
        "convscope_workers",
        "Workers by state: ready (the model answers its card and the worker's process runs), silent (TorchServe calls "
        "it ready, and that is not so), or loading (starting, restarting, or given up by TorchServe).",
        labels=["model", "version", "state"],
    )
    wanted = GaugeMetricFamily(
        "convscope_workers_wanted", "Workers the model is meant to have.", labels=["model", "version"]
    )
    waiting = GaugeMetricFamily(
        "convscope_queue_requests", "Requests that wait for a worker now.", labels=["model", "version"]
    )
    for model, state in states.items():
        answers = watched.get("/".join(model), {}).get("answered", False)
        ready = sum(worker.ready and is_alive(worker.pid) for worker in state.found) if answers else 0
        workers.add_metric([*model, "ready"], ready)
        workers.add_metric([*model, "silent"], state.loaded - ready)
        workers.add_metric([*model, "loading"], len(state.found) - state.loaded)
        wanted.add_metric(model, state.workers)
        waiting.add_metric(model, state.pending)
    return workers, wanted, waiting
