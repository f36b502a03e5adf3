"""The gateway's health check of a replica: ready when every model is, whatever their names."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import ROOT, Stack, wait_until

ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
DRAIN = "import glob, pathlib; pathlib.Path(glob.glob('/tmp/convscope-*')[0], 'draining').{}()"
# Asks until a replica that starts is ready; prints what it said while the file was there that says that it warms up.
WATCH = """
import glob, time, urllib.error, urllib.request
statuses, end = set(), time.monotonic() + 200
while time.monotonic() < end:
    starting = bool(glob.glob("/tmp/convscope-*/starting"))
    try:
        status = urllib.request.urlopen("http://127.0.0.1:8083/ready").status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError:
        continue
    if starting and glob.glob("/tmp/convscope-*/starting"):
        statuses.add(status)
    elif status == 200:
        print(sorted(statuses))
        break
    time.sleep(0.05)
"""


@pytest.fixture
def other(stack: Stack) -> Iterator[Stack]:
    """A stack of its own beside the other, whose image it takes; it serves `digits` alone."""
    work = Path(tempfile.mkdtemp(prefix="convscope-docker-"))
    work.chmod(0o755)
    running = Stack(work, ("digits",))
    try:
        running.up(1)
        yield running
    finally:
        running.down()
        shutil.rmtree(work)


def test_a_replica_knows_every_model_of_its_store(stack: Stack) -> None:
    said = stack.docker("exec", stack.replicas()[0], "python", "-c", ASK, "http://127.0.0.1:8083/ready")
    assert json.loads(said) == {"ready": True, "models": {"cifar/1.0": "ready", "digits/1.0": "ready"}, "rejected": {}}


def test_a_replica_that_drains_is_not_asked_any_more(stack: Stack) -> None:
    replica = stack.replicas()[0]
    assert stack.balanced() == 3
    stack.docker("exec", replica, "python", "-c", DRAIN.format("touch"))
    try:
        wait_until(lambda: stack.balanced() == 2, 30)
        assert not stack.healthy(replica)
    finally:
        stack.docker("exec", replica, "python", "-c", DRAIN.format("unlink"))
    wait_until(lambda: stack.balanced() == 3, 30)
    assert stack.healthy(replica)


def test_a_replica_is_not_ready_while_it_warms_up(stack: Stack) -> None:
    replica = stack.replicas()[0]
    stack.docker("restart", "-t", "45", replica)
    statuses = json.loads(stack.docker("exec", replica, "python", "-c", WATCH))
    assert 503 in statuses
    assert 200 not in statuses
    wait_until(lambda: stack.balanced() == 3, 60)


def test_a_store_of_other_models_is_served_without_a_change(other: Stack) -> None:
    picture = (ROOT / "samples/digit-3.png").read_bytes()
    with other.client("grpc") as grpc, other.client("rest") as rest:
        assert [client.predict(picture, model="digits").top[0].label for client in (grpc, rest)] == ["3", "3"]
