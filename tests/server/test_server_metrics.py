"""The exporter's queries to TorchServe and the GPU driver, and what it leaves out when they do not answer."""

import itertools
import json
import sys
import threading
import time
import types

import pytest

from server.configuration import PrivateDirectory
from server.fetching import fetch
from server.host import read_memory
from server.management import UnixConnection
from server.server_metrics import ServerMetrics, Source, gpu_families, load_gpu_driver
from tests.server.harness import poll
from tests.server.standins import COUNTERS, describe, dripping, saying, serving, silent

MODELS = [("cifar", "2.0"), ("cifar", "1.0")]
SCRAPE_TIMEOUT_S = 4.0
LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def stop():
    event = threading.Event()
    yield event
    event.set()


def publish(work, answered: bool = True, **restarts: int) -> None:
    """Publish what a watch knows of both models."""
    known = {"answered": answered, "restarting": None, "restarts": restarts}
    (work / "watch.json").write_text(json.dumps({"models": {"cifar/2.0": known, "cifar/1.0": known}}))


def collect(work, port, models=MODELS) -> dict[tuple, float]:
    """Collect once; samples by name and label values."""
    server = ServerMetrics(models, port, PrivateDirectory(work), 1234.5)
    return samples(server)


def samples(server) -> dict[tuple, float]:
    return {
        (sample.name.removeprefix("convscope_"), *sorted(sample.labels.values())): sample.value
        for metric in server.collect()
        for sample in metric.samples
    }


def test_what_torchserve_says_comes_under_our_names_with_the_default_version_under_its_own(work):
    publish(work)
    with serving(LOOPBACK, saying(COUNTERS)) as port, serving(work / "management.sock", saying(describe(3, 1, 2, 5))):
        found = collect(work, port)
    assert found[("torchserve_up",)] == 1
    assert found[("torchserve_requests_total", "2.0", "cifar")] == 10
    assert found[("torchserve_requests_total", "1.0", "cifar")] == 1
    assert found[("queue_wait_seconds_total", "2.0", "cifar")] == 1.5
    assert found[("queue_wait_seconds_total", "1.0", "cifar")] == 0
    assert [found[("torchserve_responses_total", status)] for status in ("2xx", "4xx", "5xx")] == [10, 0, 2]
    assert found[("workers", "2.0", "cifar", "ready")] == 1
    assert found[("workers", "2.0", "cifar", "loading")] == 2
    assert found[("workers_wanted", "2.0", "cifar")] == 2
    assert found[("queue_requests", "2.0", "cifar")] == 5
    assert not [key for key in found if "invented" in key]
    assert found[("server_start_time_seconds",)] == 1234.5


@pytest.mark.parametrize("answered", [True, False])
def test_workers_are_ready_only_while_the_model_answers_its_card_and_their_processes_run(answered, work):
    publish(work, answered, worker_gone=3, no_answer=0)
    for pid, running in ((None, True), (2**30, False)):
        with serving(work / "management.sock", saying(describe(3, 2, 3, pid=pid))):
            found = collect(work, port=1)
        (work / "management.sock").unlink()
        ready = 2 if answered and running else 0
        assert found[("workers", "1.0", "cifar", "ready")] == ready
        assert found[("workers", "1.0", "cifar", "silent")] == 2 - ready
        assert found[("workers", "1.0", "cifar", "loading")] == 1
        assert found[("card_answered", "1.0", "cifar")] == answered
        assert found[("model_restarts_total", "1.0", "cifar", "worker_gone")] == 3
        assert found[("model_restarts_total", "1.0", "cifar", "no_answer")] == 0


def test_deaths_rejected_archives_and_readiness_are_as_the_watch_publishes_them(work):
    publish(work)
    published = json.loads((work / "watch.json").read_text())
    deaths = {"cifar/2.0": {"oom": 2, "killed": 0}}
    (work / "watch.json").write_text(
        json.dumps({**published, "ready": True, "deaths": deaths, "rejected": {"wide": "it is damaged"}})
    )
    found = collect(work, port=1)
    assert found[("worker_deaths_total", "2.0", "cifar", "oom")] == 2
    assert found[("worker_deaths_total", "2.0", "cifar", "killed")] == 0
    assert (found[("archive_rejected", "wide")], found[("archive_rejected", "cifar")]) == (1, 0)
    assert found[("ready",)] == 1
    (work / "draining").touch()
    assert collect(work, port=1)[("ready",)] == 0


def test_a_model_that_is_not_served_after_all_does_not_hide_the_workers_of_the_others(work):
    (work / "watch.json").write_text(
        json.dumps({"models": {"cifar/2.0": {"answered": True, "restarting": None, "restarts": {}}}})
    )

    def answer(connection, path: str) -> None:
        body, status = (describe(1, 1), "200 OK") if path == "/models/cifar/2.0" else ("{}", "404 Not Found")
        saying(body, status)(connection, path)

    with serving(work / "management.sock", answer):
        found = collect(work, port=1)
    assert found[("workers", "2.0", "cifar", "ready")] == 1


def test_memory_and_disk_are_the_kernels(work):
    found = collect(work, port=1)
    assert 0 < found[("disk_free_bytes",)] <= found[("disk_size_bytes",)]
    memory = read_memory()
    assert (("memory_used_bytes",) in found) == (memory.used is not None)
    assert (("memory_limit_bytes",) in found) == (memory.limit is not None)
    assert found.get(("oom_kills_total",)) == memory.kills


def test_before_the_watch_has_said_anything_no_worker_is_ready(work):
    with serving(work / "management.sock", saying(describe(1, 1))):
        found = collect(work, port=1)
    assert found[("workers", "1.0", "cifar", "ready")] == 0
    assert not [key for key in found if key[0] == "card_answered"]


def test_the_drain_shows(work):
    server = ServerMetrics(MODELS, 1, PrivateDirectory(work), 0)
    assert samples(server)[("draining",)] == 0
    (work / "draining").touch()
    assert samples(server)[("draining",)] == 1


def test_without_torchserve_its_series_are_left_out_and_up_is_0(work):
    found = collect(work, port=1)
    assert set(found) >= {("torchserve_up",), ("draining",), ("server_start_time_seconds",)}
    assert found[("torchserve_up",)] == 0
    assert not [key for key in found if key[0].startswith(("workers", "queue", "torchserve_re"))]


@pytest.mark.parametrize(
    "metrics",
    [saying("{", "200 OK"), saying(COUNTERS, "500 Oops"), saying("\x00 nonsense {"), lambda caller, path: None],
    ids=["half", "500", "nonsense", "hangs up"],
)
def test_broken_metrics_leave_the_workers_shown(metrics, work):
    publish(work)
    with serving(LOOPBACK, metrics) as port, serving(work / "management.sock", saying(describe(1, 1))):
        found = collect(work, port)
    assert found[("torchserve_up",)] == 0
    assert found[("workers", "1.0", "cifar", "ready")] == 1
    assert not [key for key in found if key[0].startswith("torchserve_re")]


@pytest.mark.parametrize("management", [saying("[]"), saying("[{}]"), saying("no", "404 Not Found"), saying("{")])
def test_a_broken_management_api_leaves_the_counters_shown(management, work):
    with serving(LOOPBACK, saying(COUNTERS)) as port, serving(work / "management.sock", management):
        found = collect(work, port)
    assert found[("torchserve_up",)] == 0
    assert found[("torchserve_requests_total", "1.0", "cifar")] == 1
    assert not [key for key in found if key[0].startswith(("workers", "queue_requests"))]


@pytest.mark.parametrize("slow", [dripping, silent])
def test_a_torchserve_that_drips_or_hangs_does_not_hold_up_a_scrape(slow, work, stop):
    with serving(LOOPBACK, slow(stop)) as port, serving(work / "management.sock", slow(stop)):
        server = ServerMetrics(MODELS, port, PrivateDirectory(work), 0)
        for _ in range(2):
            started = time.monotonic()
            found = samples(server)
            assert time.monotonic() - started < SCRAPE_TIMEOUT_S
            assert found[("torchserve_up",)] == 0
        stop.set()


def test_an_answer_is_given_up_when_its_time_is_over_however_it_drips(work, stop):
    with serving(work / "management.sock", dripping(stop)):
        started = time.monotonic()
        with pytest.raises(OSError, match=r"no whole answer in 0\.5 s|no HTTP answer"):
            fetch(UnixConnection(work / "management.sock", 0.5), "/x", 0.5)
        assert 0.4 < time.monotonic() - started < SCRAPE_TIMEOUT_S
        stop.set()


def test_an_answer_cut_short_is_an_error(work):
    def cut(connection, path):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    with serving(work / "management.sock", cut), pytest.raises(OSError, match="cut short"):
        fetch(UnixConnection(work / "management.sock", 5), "/x", 5)


def test_a_question_is_open_once_and_its_last_answer_holds_as_long_as_it_may():
    go, calls = threading.Semaphore(1), itertools.count()

    def ask() -> int:
        number = next(calls)
        go.acquire()
        return number

    kept = Source(ask, keep_s=60)
    kept.start()
    assert kept.answer(time.monotonic() + 60) == 0
    for _ in range(3):
        kept.start()
        assert kept.answer(time.monotonic()) == 0, "the last answer, while the next is not there"
    go.release()
    assert poll(lambda: kept.answer(time.monotonic()) == 1)
    assert next(calls) == 2, "three starts, one question"


def test_a_question_that_is_a_burden_is_not_asked_again_at_once():
    calls = []

    def ask() -> str:
        calls.append(time.sleep(0.3))
        return "answer"

    burden, fresh = Source(ask, keep_s=60), Source(ask)
    for source in (burden, fresh):
        calls.clear()
        for _ in range(2):
            source.start()
            assert source.answer(time.monotonic() + 60) == "answer"
        assert len(calls) == (1 if source is burden else 2)


def test_a_failure_is_no_answer_even_where_an_older_one_would_hold():
    answers = iter(["good"])
    source = Source(lambda: next(answers), keep_s=60)
    for expected in ("good", None):
        source.start()
        assert source.answer(time.monotonic() + 60) == expected


def fake_driver(monkeypatch, **functions) -> None:
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    vars(module).update({"nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda index: index, **functions})
    monkeypatch.setitem(sys.modules, "pynvml", module)


def gpu_samples() -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["gpu"]): sample.value
        for metric in gpu_families(load_gpu_driver())
        for sample in metric.samples
    }


def test_a_gpus_memory_and_load_are_shown(monkeypatch):
    fake_driver(
        monkeypatch,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=100 * (gpu + 1), total=1000),
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=25),
    )
    assert gpu_samples() == {
        ("convscope_gpu_memory_used_bytes", "0"): 100,
        ("convscope_gpu_memory_used_bytes", "1"): 200,
        ("convscope_gpu_memory_total_bytes", "0"): 1000,
        ("convscope_gpu_memory_total_bytes", "1"): 1000,
        ("convscope_gpu_utilization_ratio", "0"): 0.25,
        ("convscope_gpu_utilization_ratio", "1"): 0.25,
    }


def test_what_a_driver_does_not_tell_is_left_out(monkeypatch):
    def refuse(gpu):
        raise sys.modules["pynvml"].NVMLError

    fake_driver(
        monkeypatch,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=1, total=2),
        nvmlDeviceGetUtilizationRates=refuse,
    )
    assert [name for name, _ in gpu_samples()] == [
        "convscope_gpu_memory_used_bytes",
        "convscope_gpu_memory_total_bytes",
    ]


@pytest.mark.parametrize("package", [None, "no driver"])
def test_without_package_or_driver_there_are_no_gpu_series(package, monkeypatch):
    if package:

        def refuse():
            raise sys.modules["pynvml"].NVMLError

        fake_driver(monkeypatch, nvmlInit=refuse)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_samples() == {}
