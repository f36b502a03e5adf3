"""The client's histograms: durations by outcome, and the part of them that the server reports."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import weakref
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client
from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from tests.client.stand_in import HANDLER_S, StandIn
from tests.client.wire import BOTH

SECONDS = "convscope_client_request_seconds_count"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def ask(kind: type, url: str, registry: Any, *questions: Any, **settings: Any) -> list[Any]:
    """Ask questions with one client; return answers and errors."""

    async def ask_async() -> list[Any]:
        result: list[Any] = []
        async with AsyncClient(url, metrics=registry, **settings) as client:
            for question in questions:
                try:
                    result.append(await question(client))
                except convscope.ConvscopeError as error:
                    result.append(error)
        return result

    if kind is AsyncClient:
        return asyncio.run(ask_async())
    result: list[Any] = []
    with Client(url, metrics=registry, **settings) as client:
        for question in questions:
            try:
                result.append(question(client))
            except convscope.ConvscopeError as error:
                result.append(error)
    return result


def predict(model: str = "cifar", picture: Any = b"cat", **options: Any) -> Any:
    return lambda client: client.predict(picture, model=model, **options)


def samples(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """The values of all series of a name by their labels, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == name
    }


@BOTH
def test_every_prediction_is_counted_by_what_came_of_it(kind: type, url: str, registry: CollectorRegistry):
    transport = "rest" if url.startswith("http") else "grpc"
    questions = [
        *(predict(), predict(), predict(picture=[b"one", b"bad"])),
        *(predict(picture=b"bad"), predict(layers="conv7"), predict("missing"), predict("full"), predict("stranger")),
        *(predict("error-novel"), predict("error-draining")),
    ]
    ask(kind, url, registry, *questions, retries=0)
    assert samples(registry, SECONDS) == {
        ("ok", "cifar", transport): 3,
        ("bad_image", "cifar", transport): 1,
        ("unknown_layer", "cifar", transport): 1,
        ("model_not_found", "missing", transport): 1,
        ("overloaded", "full", transport): 1,
        ("protocol_error", "stranger", transport): 1,
        ("other", "error-novel", transport): 1,
        ("draining", "error-draining", transport): 1,
    }


@BOTH
def test_the_servers_time_stands_beside_what_is_outside_of_it(kind: type, url: str, registry: CollectorRegistry):
    transport = "rest" if url.startswith("http") else "grpc"
    result, printed = ask(kind, url, registry, predict(), predict(timing=True))
    assert result.timing is None  # The metrics asked, the caller did not.
    assert printed.timing.handler_s == HANDLER_S
    labels = ("cifar", transport)
    assert samples(registry, "convscope_client_server_seconds_sum") == {labels: pytest.approx(2 * HANDLER_S)}
    assert samples(registry, "convscope_client_server_seconds_count") == {labels: 2}
    assert samples(registry, "convscope_client_outside_seconds_count") == {labels: 2}
    total = samples(registry, "convscope_client_request_seconds_sum")[("ok", *labels)]
    assert total >= printed.timing.total_s


def test_a_reply_without_timing_is_counted(url: str, registry: CollectorRegistry):
    ask(Client, url, registry, predict("older"))
    assert list(samples(registry, SECONDS).values()) == [1]
    assert samples(registry, "convscope_client_server_seconds_count") == {}


@BOTH
@pytest.mark.usefixtures("waits")
def test_a_request_counts_once_and_its_retries_apart(
    kind: type, url: str, registry: CollectorRegistry, stand_in: StandIn
):
    transport = "rest" if url.startswith("http") else "grpc"
    stand_in.mishaps[:] = ["full", "reset"]
    ask(kind, url, registry, predict())
    assert samples(registry, SECONDS) == {("ok", "cifar", transport): 1}
    assert samples(registry, "convscope_client_retries_total") == {("cifar", transport): 2}


@BOTH
def test_requests_of_a_stream_are_counted(kind: type, url: str, registry: CollectorRegistry):
    def blocking(client: Client) -> int:
        return len(list(client.predict_many([b"one", b"two", b"three"], model="cifar", batch=2)))

    async def awaited(client: AsyncClient) -> int:
        return len([result async for result in client.predict_many([b"one", b"two", b"three"], model="cifar", batch=2)])

    assert ask(kind, url, registry, awaited if kind is AsyncClient else blocking) == [3]
    assert list(samples(registry, SECONDS).values()) == [2]


@BOTH
def test_cards_and_argument_errors_are_not_counted(kind: type, url: str, registry: CollectorRegistry):
    def wrong(client: Any) -> Any:
        return client.predict(b"cat", model="cifar", deadline_s=-1)

    ask(kind, url, registry, lambda client: client.model_card("cifar"), lambda client: client.ready("cifar"))
    with pytest.raises(ValueError, match="deadline_s"):
        ask(kind, url, registry, wrong)
    assert samples(registry, SECONDS) == {}


def test_a_request_given_up_is_counted_as_such(url: str, registry: CollectorRegistry, stand_in: StandIn):
    async def give_up() -> None:
        async with AsyncClient(url, metrics=registry) as client:
            question = asyncio.create_task(client.predict(b"cat", model="slow"))
            while not stand_in.requests:
                await asyncio.sleep(0.01)
            question.cancel()
            with pytest.raises(asyncio.CancelledError):
                await question

    stand_in.release.clear()
    try:
        asyncio.run(give_up())
    finally:
        stand_in.release.set()
    assert [labels[0] for labels in samples(registry, SECONDS)] == ["cancelled"]


def test_a_deadline_that_passed_and_a_server_that_is_not_there_have_codes(
    url: str, registry: CollectorRegistry, stand_in: StandIn
):
    stand_in.release.clear()
    try:
        ask(Client, url, registry, predict("slow", deadline_s=0.2))
    finally:
        stand_in.release.set()
    ask(Client, f"{url.partition(':')[0]}://127.0.0.1:1", registry, predict(), retries=0)
    assert {labels[0] for labels in samples(registry, SECONDS)} == {"deadline_exceeded", "connect_error"}


def test_clients_of_one_registry_share_its_metrics(stand_in: StandIn, registry: CollectorRegistry):
    ask(Client, stand_in.rest_url, registry, predict(), predict())
    ask(AsyncClient, stand_in.grpc_url, registry, predict())
    ask(Client, stand_in.grpc_url, registry, predict())
    assert samples(registry, SECONDS) == {("ok", "cifar", "rest"): 2, ("ok", "cifar", "grpc"): 2}


def test_a_registry_that_nobody_needs_is_not_kept(url: str):
    registry = CollectorRegistry()
    Client(url, metrics=registry).close()
    gone = weakref.ref(registry)
    del registry
    gc.collect()
    assert gone() is None


def test_true_means_the_librarys_own_registry(url: str):
    labels = ("ok", "counted", "rest" if url.startswith("http") else "grpc")
    ask(Client, url, True, predict(model="counted"))
    assert samples(REGISTRY, SECONDS)[labels] == 1


def test_every_metric_says_what_it_means_and_has_the_workers_buckets(url: str, registry: CollectorRegistry):
    ask(Client, url, registry, predict())
    metrics = {metric.name: metric for metric in registry.collect()}
    assert set(metrics) == {
        *(f"convscope_client_{part}_seconds" for part in ("request", "server", "outside")),
        "convscope_client_retries",
    }
    assert all(metric.documentation.endswith(".") for metric in metrics.values())
    bounds = [
        sample.labels["le"]
        for sample in metrics["convscope_client_request_seconds"].samples
        if sample.name.endswith("_bucket")
    ]
    words = "0.0001 0.00025 0.0005 0.00075 0.001 0.0015 0.002 0.003 0.005 0.0075 0.01 0.015 0.02 0.03 0.05 0.075 0.1"
    words += " 0.15 0.2 0.3 0.5 0.75 1 1.5 2 3 5 7.5 10 30"
    assert [float(bound) for bound in bounds] == [*map(float, words.split()), float("inf")]


@pytest.mark.parametrize("metrics", [None, 1, "yes", object()], ids=["None", "1", "yes", "object"])
def test_what_is_not_a_registry_is_rejected(metrics: Any):
    with pytest.raises(TypeError, match="metrics must be True, False or a CollectorRegistry"):
        Client("http://localhost:1", metrics=metrics)


def test_a_name_that_is_taken_says_so(registry: CollectorRegistry):
    Gauge("convscope_client_request_seconds", "something else", registry=registry)
    with pytest.raises(ValueError, match="convscope_client_request_seconds"):
        Client("http://localhost:1", metrics=registry)


@BOTH
def test_without_prometheus_client_the_error_names_the_extra(kind: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "convscope._metrics", raising=False)
    monkeypatch.delattr(convscope, "_metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"convscope\[metrics\]"):
        kind("http://localhost:1", metrics=True)


def test_nothing_is_counted_unless_requested(client: Client, stand_in: StandIn):
    client.predict(b"cat", model="cifar")
    assert inspect.signature(Client).parameters["metrics"].default is False
    assert stand_in.requests[-1][2].timing is False
