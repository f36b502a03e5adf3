"""Batches, workers that die or hang, metrics, and the end of the server."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.wire import inference_pb2
from tests.kserve.conftest import ROOT, Host, serving, web
from tests.server.harness import poll

Send = Callable[[Host, bytes], httpx.Response]


def send(host: Host, body: bytes, path: str = "obedient") -> httpx.Response:
    return web.post(f"http://{host.http}/predictions/{path}", content=body, timeout=30)


def hold(host: Host, pool: ThreadPoolExecutor, gate: Path) -> Future[httpx.Response]:
    """Keep the worker busy until the gate is there."""
    held = pool.submit(send, host, f"wait:{gate}".encode())
    poll(Path(f"{gate}.begun").exists)
    return held


def value(host: Host, name: str) -> float:
    text = web.get(f"http://{host.http}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


def test_requests_that_wait_are_handed_over_together(host: Host, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        held = hold(host, pool, tmp_path / "gate")
        waiting = [pool.submit(send, host, b"") for _ in range(6)]
        poll(lambda: value(host, 'convscope_queue_requests{model="obedient",version="1.10"}') == 6)
        (tmp_path / "gate").touch()
        assert held.result().text.split()[0] == "1"
        sizes = sorted(item.result().text.split()[0] for item in waiting)
    assert sizes == ["2", "2", "4", "4", "4", "4"]  # batchSize is 4.


def test_a_worker_that_dies_or_hangs_costs_its_batch_and_is_started_again(host: Host, tmp_path: Path) -> None:
    process = send(host, b"").text.split()[1]
    response = send(host, b"die")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    after = send(host, b"").text.split()
    assert after[1] != process
    assert after[2] == "1.10"
    response = send(host, f"wait:{tmp_path / 'never'}".encode())  # Its archive gives it 5 s.
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert send(host, b"").text.split()[1] != after[1]
    for cause in ("error", "late"):
        assert value(host, f'convscope_worker_deaths_total{{cause="{cause}",model="obedient",version="1.10"}}') == 1
    assert send(host, b"", "obedient/1.9").text.split()[2] == "1.9"


def test_the_workers_metrics_are_those_of_the_other_host(host: Host) -> None:
    name = 'convscope_requests_total{code="bad_image",format="json",model="digits",transport="rest",version="1.0"}'
    before = value(host, name)
    send(host, b"no picture", "digits")
    assert value(host, name) == before + 1
    assert value(host, "convscope_ready") == 1
    assert value(host, 'convscope_archive_rejected{model="broken"}') == 1
    assert value(host, 'convscope_archive_rejected{model="digits"}') == 0
    assert value(host, 'convscope_workers{model="digits",state="ready",version="1.0"}') == 1
    assert "archive broken.mar: ModuleNotFoundError" in host.log.read_text()


def test_a_request_has_its_time_and_draining_loses_none(store: Path, tmp_path: Path) -> None:
    slow, last = ([tmp_path / f"{name}{number}" for number in range(2)] for name in ("slow", "last"))
    options = ("--models", "obedient/1.9", "--workers", "2", "--unready-s", "4", "--drain-s", "20", "--timeout-s", "10")
    with (
        serving(store, tmp_path, *options) as host,
        ThreadPoolExecutor(4) as pool,
        grpc.insecure_channel(host.grpc) as channel,
    ):
        held = [hold(host, pool, gate) for gate in slow]
        late = send(host, b"")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert [request.result().status_code for request in held] == [504, 504]
        for gate in slow:
            gate.touch()
        in_work = [hold(host, pool, gate) for gate in last]
        predict = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        message = inference_pb2.PredictionsRequest(model_name="obedient", input={"body": b""})
        waiting = predict.future(message.SerializeToString(), timeout=30)
        poll(lambda: value(host, "convscope_queue_requests") == 1)
        host.process.send_signal(signal.SIGTERM)
        health = health_pb2_grpc.HealthStub(channel)
        poll(lambda: health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert web.get(f"http://{host.http}/v2/health/ready").json()["code"] == "draining"
        poll(lambda: not is_listening(host))
        for gate in last:
            gate.touch()
        assert [request.result().status_code for request in in_work] == [200, 200]
        assert inference_pb2.PredictionResponse.FromString(waiting.result()).prediction.endswith(b" 1.9")
        assert host.process.wait(30) == 0
    assert not list(tmp_path.glob("convscope-*"))


def is_listening(host: Host) -> bool:
    try:
        socket.create_connection(host.http.split(":")).close()
    except OSError:
        return False
    return True


def test_a_server_that_cannot_start_says_why(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.kserve", "--model-store", str(store), "--work-dir", str(tmp_path)]
    ended = subprocess.run([*command, "--models", "none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, "no model none" in ended.stderr) == (2, True)
    ended = subprocess.run([*command, "--models", "broken"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, "no archive can be served" in ended.stderr) == (1, True)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen (OpenSSH's client)")
def test_signed_archives_alone_are_served(host: Host) -> None:
    assert send(host, b"", "obedient/1.9").text.endswith(" 1.9")
    assert send(host, b"", "unsigned").status_code == 404
    assert "Archive rejected: archive unsigned.mar: it is not signed" in host.log.read_text()


WITHOUT = """
import sys
import zipfile
from pathlib import Path

sys.modules |= {"ts": None, "torch": None}  # Importing either fails.
from server.kserve.worker import load

directory = Path(sys.argv[1])
sys.path.insert(0, str(directory))
handler, context, _ = load(directory, None)
context.begin([{"headers": {}, "id": None}])
print(b"onnxruntime" in handler.handle([{"describe": b"true"}], context)[0])
"""


def test_a_worker_needs_neither_torchserve_nor_torch(store: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(store / "digits.mar") as file:
        file.extractall(tmp_path)
    shutil.rmtree(tmp_path / "handlers")  # Those of this checkout, so that an archive of before will do.
    shutil.copytree(ROOT / "handlers", tmp_path / "handlers")
    shutil.copy(ROOT / "handlers/entry.py", tmp_path / "convscope_entry.py")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    said = subprocess.run(
        command, cwd=ROOT, env={"CONVSCOPE_PATCHES": "0"}, capture_output=True, text=True, check=False
    )
    assert said.stdout.endswith("True\n"), said.stderr
