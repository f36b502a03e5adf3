"""A real TorchServe with three models, two versions of one, and two workers of another."""

import threading
import time

import pytest

from server.patches import PATCHES
from tests.server.harness import launched, poll, processes, write_archive

ENVIRONMENT = {
    "PYTHONPATH": "/nonexistent/leak",
    "CUDA_VISIBLE_DEVICES": "0",
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent/stale",
    "prometheus_multiproc_dir": "/nonexistent/older",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    write_archive(store, "alpha", version="1.0", file="alpha-1", config="minWorkers: 1\nmaxWorkers: 1\n")
    write_archive(store, "alpha", version="2.0", file="alpha-2", config="minWorkers: 1\nmaxWorkers: 1\n")
    write_archive(store, "beta")
    options = ("--workers", "2", "--max-request-mb", "1", "--max-reply-mb", "3")
    with launched(store, tmp_path_factory.mktemp("w"), *options, environment=ENVIRONMENT) as started:
        yield started.await_ready()


def test_it_says_where_it_listens_and_what_to_try(server):
    assert "Ready after" in server.out
    assert f"model    beta 1.0   http://127.0.0.1:{server.port('REST')}/predictions/beta\n" in server.out
    assert f"model    alpha 1.0  http://127.0.0.1:{server.port('REST')}/predictions/alpha/1.0\n" in server.out
    assert "curl -T picture.png" in server.out
    assert "  patches  blame, latency, names, reload, safety (of TorchServe)\n" in server.out
    assert server.err == ""


def test_every_model_answers_over_rest_and_grpc(server):
    assert server.rest("beta") == server.grpc("beta") == b"beta 1.0"


def test_the_newest_version_is_the_default_and_the_others_have_their_own_address(server):
    assert server.rest("alpha") == server.grpc("alpha") == b"alpha 2.0"
    assert server.rest("alpha/1.0") == b"alpha 1.0"


def test_the_workers_of_the_command_line_are_there_when_it_is_ready(server):
    assert len(server.workers()) == 6


def test_workers_see_the_archive_and_the_settings_but_nothing_of_ours(server):
    path = server.rest("beta", "path:").decode().splitlines()
    assert not [entry for entry in path if "leak" in entry]
    assert server.rest("beta", "environment:CUDA_VISIBLE_DEVICES") == b"''"
    assert server.rest("beta", "environment:CONVSCOPE_MAX_RESPONSE_BYTES") == b"'3145728'"
    assert server.rest("beta", "environment:CONVSCOPE_THREADS") != b"None"
    assert str(server.work) in server.rest("beta", "environment:CONVSCOPE_DRAIN_FILE").decode()


def metrics(server) -> dict[str, float]:
    status, body = server.ask("GET", "/metrics", what="metrics")
    assert status == 200
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


def test_the_metrics_count_requests_of_both_transports_by_the_version_that_answered(server):
    before = metrics(server)
    server.rest("alpha")
    server.grpc("alpha")
    server.rest("alpha/1.0")
    after = metrics(server)
    for version, more in (("2.0", 2), ("1.0", 1)):
        series = f'convscope_torchserve_requests_total{{model="alpha",version="{version}"}}'
        assert after[series] == before[series] + more


def test_the_metrics_show_workers_queues_and_the_server_itself(server):
    found = metrics(server)
    assert found["convscope_torchserve_up"] == 1
    assert found["convscope_draining"] == 0
    assert found['convscope_workers{model="beta",state="ready",version="1.0"}'] == 2
    assert found['convscope_workers_wanted{model="alpha",version="1.0"}'] == 2
    assert found['convscope_queue_requests{model="beta",version="1.0"}'] == 0
    assert 0 < time.time() - found["convscope_server_start_time_seconds"] < 3600
    assert all(found[f'convscope_server_patch_active{{patch="{patch.name}"}}'] == 1 for patch in PATCHES)
    assert not [series for series in found if series.startswith("ts_")]


def test_waiting_is_counted_for_rest_alone(server, tmp_path):
    waited = 'convscope_queue_wait_seconds_total{model="alpha",version="2.0"}'
    growth = []
    for ask in (server.grpc, server.rest):
        before = metrics(server)[waited]
        threads = [threading.Thread(target=ask, args=("alpha", f"sleep:{tmp_path}/{n},1")) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        growth.append(metrics(server)[waited] - before)
    over_grpc, over_rest = growth
    assert over_grpc == 0
    assert over_rest > 1  # Two workers, four requests of a second each.


def test_torchserves_own_metrics_listen_on_loopback_alone(server):
    (written,) = server.work.glob("convscope-*/config.properties")
    (address,) = [line for line in written.read_text().splitlines() if line.startswith("metrics_address=")]
    assert address.startswith("metrics_address=http://127.0.0.1:")
    assert not address.endswith(f":{server.port('metrics')}")


def test_workers_write_their_metrics_into_the_private_directory_whatever_was_inherited(server):
    (private,) = server.work.glob("convscope-*/metrics")
    assert server.rest("beta", "environment:PROMETHEUS_MULTIPROC_DIR").decode() == repr(str(private))
    assert server.rest("beta", "environment:prometheus_multiproc_dir") == b"None"
    assert list(private.iterdir()) == [], "nobody wrote metrics yet, the exporter least of all"


def test_the_logs_grow_by_nothing_per_request(server):
    server.rest("beta")
    (logs,) = server.work.glob("convscope-*/logs")
    before = {path.name: path.stat().st_size for path in logs.iterdir()}
    for _ in range(20):
        server.rest("beta")
        server.grpc("beta")
    assert {path.name: path.stat().st_size for path in logs.iterdir()} == before
    assert server.err == ""


def test_nothing_but_the_public_ports_is_open_to_models_and_management(server):
    assert server.ask("GET", "/models")[0] in (404, 405)
    assert server.ask("POST", "/models?url=alpha-1.mar")[0] in (404, 405)
    (socket_file,) = server.work.glob("convscope-*/management.sock")
    assert socket_file.parent.stat().st_mode & 0o077 == 0


def test_a_request_over_the_limit_is_refused_and_a_reply_under_its_own_arrives(server):
    assert server.ask("POST", "/predictions/beta", "x" * 1_200_000)[0] == 413
    assert len(server.rest("beta", "bytes:2900000")) == 2_900_000


def test_a_worker_that_dies_is_told_in_plain_words_and_started_again(server):
    assert server.ask("POST", "/predictions/beta", "die:")[0] >= 500
    poll(lambda: "archive beta.mar: " in server.err and "TorchServe starts it again" in server.err)
    assert "Traceback" not in server.err
    poll(lambda: len(server.workers()) == 6)
    assert server.rest("beta") == b"beta 1.0"


def test_python_is_the_one_that_runs_the_server(server):
    worker = int(server.rest("alpha", "pid:"))
    assert worker in processes(server.python)
