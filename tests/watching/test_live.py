"""The real service, a real Prometheus, known traffic: what the panels and rules say must be what was sent.

The gateway's queries are asked in tests/docker, a GPU's nowhere here.
"""

from __future__ import annotations

import bisect
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from convscope import ConvscopeError

from tests.server.harness import ROOT, Launched, launched, poll
from tests.watching.promql import Query, alerts, documented, needs, panel_queries, rule_queries, selectors
from tests.watching.tools import Prometheus, promtool, watching
from tests.watching.traffic import Sender

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("prometheus_installed")]

LIMIT_S = 120
ELSEWHERE = (
    *("envoy_", "convscope_gpu_", "convscope_probe", "convscope_replicas_wanted", "alertmanager_", "prometheus_"),
    *("process_start", "convscope_memory_limit"),  # The last where the machine sets one.
)
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 30),
)


class Watched(NamedTuple):
    """The service, who asks it, and who watches it."""

    server: Launched
    sender: Sender
    prometheus: Prometheus


def here(query: Query) -> bool:
    return not any(needs(query.text, prefix) for prefix in ELSEWHERE)


@pytest.fixture(scope="module")
def watched(prometheus_installed: None, quick_starts: None) -> Iterator[Watched]:
    work = Path(tempfile.mkdtemp(prefix="watching-"))
    (work / "store").mkdir()
    for model in ("cifar", "digits"):
        shutil.copy(ROOT / f"model_store/{model}.mar", work / "store")
    with launched(work / "store", work / "server", "--workers", "1") as server:
        server.await_ready()
        with watching(work / "prometheus", server.port("metrics")) as prometheus:
            sender = Sender(server)
            # A rate sees only what comes after the first scrape.
            poll(lambda: prometheus.query('convscope_requests_total{model="digits"}'), LIMIT_S)
            poll(lambda: prometheus.query('convscope_requests_total{model="cifar"}'), LIMIT_S)
            send_everything(sender)
            settle(sender, prometheus)
            yield Watched(server, sender, prometheus)
            sender.close()
    shutil.rmtree(work)


def send_everything(sender: Sender) -> None:
    """Good, bad and slow requests of every kind; those to `digits` are all good, so that their times are all known."""
    for transport in ("rest", "grpc"):
        for _ in range(40):
            sender.send(transport, "digits")
        for _ in range(5):
            sender.send(transport, "cifar", layers=("conv1", "conv2"))
        for _ in range(3):
            sender.send_bad(transport, "cifar", "bad_image")
        for _ in range(2):
            sender.send_bad(transport, "cifar", "unknown_layer")
        sender.send(transport, "digits", pictures=16)
        sender.send_noise(transport, "cifar", 1500)
    for kind in ("json", "npz", "png"):
        sender.send_as(kind, "cifar", "conv1")


def counted(prometheus: Prometheus, metric: str, labels: tuple[str, ...]) -> Counter[tuple[str, ...]]:
    """Return a counter's values by some of its labels, also after a scrape that failed; those at 0 are left out."""
    samples = prometheus.query(f"sum by ({', '.join(labels)}) (last_over_time({metric}[1m])) > 0")
    return Counter({tuple(found[label] for label in labels): int(value) for found, value in samples})


def settle(sender: Sender, prometheus: Prometheus) -> None:
    """Wait until Prometheus has seen all that was sent, and some more scrapes after it."""
    wanted = sender.tally.requests.total()
    poll(lambda: prometheus.value("sum(convscope_requests_total)") >= wanted, LIMIT_S)
    await_scrapes(prometheus)


def await_scrapes(prometheus: Prometheus) -> None:
    """Wait for three more scrapes."""
    scrapes = "sum(count_over_time(up{job='torchserve'}[1h]))"
    enough = prometheus.value(scrapes) + 3
    poll(lambda: prometheus.value(scrapes) >= enough, LIMIT_S)


def test_every_request_is_counted_exactly(watched: Watched) -> None:
    tally, prometheus = watched.sender.tally, watched.prometheus
    by_code = ("model", "transport", "format", "code")
    assert counted(prometheus, "convscope_requests_total", by_code) == tally.requests
    assert counted(prometheus, "convscope_pictures_total", ("model", "transport", "code")) == tally.pictures
    assert counted(prometheus, "convscope_layer_requests_total", ("model", "layer")) == tally.layers
    assert counted(prometheus, "convscope_predicted_class_total", ("model", "class")) == tally.classes


def test_histograms_hold_every_request_once(watched: Watched) -> None:
    tally, prometheus = watched.sender.tally, watched.prometheus
    sent: Counter[tuple[str, ...]] = Counter()
    for (model, transport, _, _), number in tally.requests.items():
        sent[model, transport] += number
    assert counted(prometheus, "convscope_handler_seconds_count", ("model", "transport")) == sent
    encoded = 'convscope_stage_seconds_count{model="digits", stage="encode"}'
    assert counted(prometheus, encoded, ("model", "transport")) == Counter(
        {key: number for key, number in sent.items() if key[0] == "digits"}
    )
    answered: Counter[tuple[str, ...]] = Counter()
    for (model, _, code), number in tally.pictures.items():
        answered[(model,)] += number * (code == "ok")
    assert counted(prometheus, "convscope_confidence_count", ("model",)) == answered


@pytest.mark.parametrize("transport", ["rest", "grpc"])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_percentiles_lie_within_a_bucket_of_what_callers_were_told(
    watched: Watched, transport: str, quantile: float
) -> None:
    times = sorted(watched.sender.tally.handler_s["digits", transport])
    own = times[math.ceil(quantile * len(times)) - 1]
    labels = f'model="digits", transport="{transport}"'
    rule = f'model:convscope_handler_seconds:quantile5m{{{labels}, quantile="{quantile}"}}'
    buckets = f"sum by (le) (convscope_handler_seconds_bucket{{{labels}}})"
    for query in (rule, f"histogram_quantile({quantile}, {buckets})"):
        value = watched.prometheus.value(query)
        assert abs(bisect.bisect_left(SECONDS, value) - bisect.bisect_left(SECONDS, own)) <= 1, (query, value, own)


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_the_time_in_the_handler_is_what_callers_were_told(watched: Watched, transport: str) -> None:
    tally = watched.sender.tally
    told, waited = (sum(times["digits", transport]) for times in (tally.handler_s, tally.total_s))
    summed = watched.prometheus.value(f'sum(convscope_handler_seconds_sum{{model="digits", transport="{transport}"}})')
    assert summed == pytest.approx(told, rel=0.1)
    assert summed < waited


@pytest.mark.parametrize("query", [query for query in panel_queries() + rule_queries() if here(query)], ids=str)
def test_a_query_returns_data(watched: Watched, query: Query) -> None:
    samples = watched.prometheus.query(query.text)
    if not samples:  # A rule that builds on rules may be a second behind.
        poll(lambda: watched.prometheus.query(query.text), 20)
        samples = watched.prometheus.query(query.text)
    assert any(math.isfinite(value) for _, value in samples)
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert all(label in labels for labels, _ in samples), label


@pytest.mark.parametrize("alert", [name for name, rule in alerts().items() if here(Query(name, rule["expr"]))])
def test_an_alert_watches_series_that_there_are(watched: Watched, alert: str) -> None:
    for selector in selectors(alerts()[alert]["expr"]):
        assert watched.prometheus.query(selector), selector


def test_alerts_fire_for_what_is_wrong_here_and_for_nothing_else(watched: Watched) -> None:
    firing = {alert["labels"]["alertname"]: alert for alert in watched.prometheus.alerts()}
    # No gateway, no probe, no Alertmanager; and a quarter of these requests are bad.
    wrong_here = {"MetricsMissing", "GatewayDown", "CallerErrorsRising", "Watchdog"}
    disk = shutil.disk_usage(tempfile.gettempdir())
    least = watched.prometheus.value("convscope:objective:disk_free_ratio")
    if disk.free / disk.total < least + 0.01:  # This machine's own disk; it changes while the tests run.
        wrong_here.add("ReplicaDiskFull")
    assert set(firing) <= wrong_here
    assert {"MetricsMissing", "Watchdog"} <= set(firing)
    annotations = firing["MetricsMissing"]["annotations"]
    assert annotations["summary"].startswith("Prometheus gets nothing from ")
    assert not any("error" in text for text in annotations.values())


def test_no_rule_fails(watched: Watched) -> None:
    assert watched.prometheus.unwell() == []


def test_the_metrics_are_those_documented(watched: Watched) -> None:
    found = watched.prometheus.kinds().items()
    # OpenMetrics names a counter without its ending.
    kinds = {
        name + "_total" * (kind == "counter" and not name.endswith("_total")): kind
        for name, kind in found
        if name.startswith("convscope_") and not name.startswith(ELSEWHERE)
    }
    wanted = {name: metric for name, metric in documented().items() if not name.startswith(ELSEWHERE)}
    assert kinds == {name: metric.kind for name, metric in wanted.items()}
    for metric in wanted.values():
        for series in metric.series:
            for labels, _ in watched.prometheus.query(series):
                extra = {"__name__", "instance", "job"} | ({"le"} if series.endswith("_bucket") else set())
                assert set(labels) - extra == metric.labels, series


def test_promtool_finds_no_fault_with_the_metrics(watched: Watched) -> None:
    text = httpx.get(f"http://127.0.0.1:{watched.server.port('metrics')}/metrics", timeout=30).text
    assert "convscope_requests_total" in text
    promtool("check", "metrics", text=text)


def test_a_worker_killed_under_load_costs_no_count(watched: Watched) -> None:
    prometheus, sender = watched.prometheus, watched.sender
    counts = 'sum(convscope_requests_total{model="digits"})'
    before, starts = prometheus.value(counts), prometheus.value('convscope_worker_starts_total{model="digits"}')
    stop, answered, failed = threading.Event(), Counter[str](), Counter[str]()

    def ask(transport: str) -> None:
        while not stop.is_set():
            try:
                sender.clients[transport].predict(ROOT / "samples/digit-3.png", model="digits")
            except ConvscopeError:
                failed[transport] += 1
                stop.wait(0.05)
            else:
                answered[transport] += 1
                stop.wait(0.02)  # Or the callers, and not the scrapes that are waited for, have the processor.

    threads = [threading.Thread(target=ask, args=(transport,)) for transport in ("rest", "grpc")]
    for thread in threads:
        thread.start()
    try:
        poll(lambda: min(answered["rest"], answered["grpc"]) >= 20, LIMIT_S)
        kill_workers(watched.server, "digits")
        poll(lambda: prometheus.value('convscope_worker_starts_total{model="digits"}') == starts + 1, LIMIT_S)
        again = Counter(answered)
        poll(lambda: all(answered[transport] >= again[transport] + 20 for transport in again), LIMIT_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
    poll(lambda: prometheus.value(counts) >= before + answered.total(), LIMIT_S)
    poll(lambda: prometheus.value('sum(convscope_in_flight{model="digits"})') == 0, LIMIT_S)
    await_scrapes(prometheus)
    # What was answered is counted, once. A request may have been counted whose answer died with its worker: one batch.
    more = prometheus.value(counts) - before - answered.total()
    assert 0 <= more <= min(2, failed.total())
    for metric in ("convscope_requests_total", "convscope_pictures_total", "convscope_handler_seconds_count"):
        assert prometheus.value(f"sum(resets({metric}[1h]))") == 0


def kill_workers(server: Launched, model: str) -> None:
    """Kill -9 the workers of a model, found by their command lines."""
    mine = set(server.workers())
    chosen = [pid for pid in mine if serves(pid, model)]
    assert chosen, "no worker of that model"
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)


def serves(pid: int, model: str) -> bool:
    """Tell whether a worker serves a model: its working directory is the unpacked archive, which holds the card."""
    folder = Path(f"/proc/{pid}/cwd").resolve()
    return (folder / "MAR-INF/MANIFEST.json").exists() and f'"{model}"' in (
        folder / "MAR-INF/MANIFEST.json"
    ).read_text()
