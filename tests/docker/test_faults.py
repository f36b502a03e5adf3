"""What a replica does about a fault that its processes survive, and what its log says of one that they do not."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.docker.stack import JAVA, WORKER, Stack, wait_until

READY = """
import urllib.error, urllib.request
try:
    print(urllib.request.urlopen("http://127.0.0.1:8083/ready").read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""
FILL = """
import os
free = os.statvfs("/tmp")
with open("/tmp/ballast", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
"""
RENAME = """
import pathlib, sys
found = list(pathlib.Path("/tmp").rglob(sys.argv[1]))
assert found
for file in found:
    file.rename(file.with_name(sys.argv[2]))
"""
OUT_S = 5.0  # Two health checks of the gateway, and time for `docker exec`.


def ask_ready(stack: Stack, replica: str) -> dict[str, Any]:
    """Return what a replica says of itself."""
    return dict(json.loads(stack.docker("exec", replica, "python", "-c", READY)))


def send(stack: Stack, replica: str, kind: str, signal: str) -> None:
    """Send the processes of a kind a signal."""
    pids = ",".join(stack.processes(replica, kind))
    stack.docker(
        "exec", replica, "python", "-c", f"import os, signal; [os.kill(pid, signal.{signal}) for pid in ({pids},)]"
    )


def read_log(stack: Stack, replica: str, since: float) -> list[dict[str, Any]]:
    """Return the entries of a replica's log since a time."""
    return [json.loads(line) for line in stack.log(replica, since).splitlines() if line.startswith("{")]


def test_stopped_workers_take_a_replica_out_at_once_and_the_launcher_replaces_them(stack: Stack) -> None:
    replica, since = stack.replicas()[0], time.time()
    before = stack.balanced()
    send(stack, replica, WORKER, "SIGSTOP")
    wait_until(lambda: ask_ready(stack, replica).get("why") == "dead", OUT_S)
    wait_until(lambda: stack.balanced() == before - 1, OUT_S)
    wait_until(lambda: stack.balanced() == before, 120)
    said = [entry["message"] for entry in read_log(stack, replica, since)]
    assert any("restarting all its workers" in message for message in said)
    assert not any("Worker died" in message for message in said), "the launcher ended them"


def test_a_stopped_java_takes_a_replica_out_at_once_and_the_replica_starts_again(stack: Stack) -> None:
    replica, since = stack.replicas()[0], time.time()
    before = stack.balanced()
    send(stack, replica, JAVA, "SIGSTOP")
    wait_until(lambda: stack.balanced() == before - 1, OUT_S)
    wait_until(lambda: stack.balanced() == before, 180)
    assert any("Java's process is stopped" in entry["message"] for entry in read_log(stack, replica, since))


def test_with_a_full_disk_a_worker_that_was_killed_comes_back(stack: Stack) -> None:
    replica, since = stack.replicas()[0], time.time()
    before = stack.balanced()
    stack.docker("exec", replica, "python", "-c", FILL)
    try:
        stack.kill(replica, WORKER)
        wait_until(lambda: stack.balanced() == before - 1, OUT_S)
        wait_until(lambda: stack.balanced() == before, 60)
    finally:
        stack.docker("exec", replica, "rm", "/tmp/ballast")
    said = [entry["message"] for entry in read_log(stack, replica, since)]
    assert any("free in /tmp" in message and " 0 of " in message for message in said)


def test_a_replica_is_back_within_half_a_minute_after_what_kept_its_workers_from_starting(stack: Stack) -> None:
    replica = stack.replicas()[0]
    before = stack.balanced()
    stack.docker("exec", replica, "python", "-c", RENAME, "card.json", "card.away")
    stack.kill(replica, WORKER)
    wait_until(lambda: stack.balanced() == before - 1, OUT_S)
    time.sleep(60)  # TorchServe's pauses between attempts to start a worker have grown to the longest.
    assert not stack.healthy(replica)
    stack.docker("exec", replica, "python", "-c", RENAME, "card.away", "card.json")
    took_s = wait_until(lambda: stack.healthy(replica), 60)
    assert took_s < 40, took_s
    wait_until(lambda: stack.balanced() == before, 30)


def test_the_log_of_a_java_that_was_killed_says_what_is_known_and_has_the_last_lines_of_the_logs(stack: Stack) -> None:
    replica, since = stack.replicas()[0], time.time()
    before = stack.balanced()
    stack.kill(replica, WORKER)  # So that the workers' log has something.
    stack.kill(replica, JAVA)
    ended = "TorchServe ended by itself (killed by SIGKILL): it says nothing; the kernel has counted no out-of-memory"

    def entries() -> list[dict[str, Any]]:
        return [entry for entry in read_log(stack, replica, since) if entry["message"].startswith(ended)]

    wait_until(lambda: bool(entries()), 30)
    [entry] = entries()
    assert "full logs are in" not in entry["message"], "they are gone with the container's /tmp"
    assert any("Torch worker started." in line for line in entry["logs"]["models.log"])
    wait_until(lambda: stack.balanced() == before, 120)


def test_a_replica_that_restarts_with_one_damaged_archive_serves_the_others(stack: Stack) -> None:
    replica, since = stack.replicas()[0], time.time()
    before, archive = stack.balanced(), stack.store / "digits.mar"
    good = archive.read_bytes()
    archive.write_bytes(good[: len(good) // 2])
    try:
        stack.docker("restart", "-t", "45", replica)
        wait_until(lambda: stack.balanced() == before, 180)
        said = ask_ready(stack, replica)
        assert (said["ready"], list(said["models"]), list(said["rejected"])) == (True, ["cifar/1.0"], ["digits"])
        assert any(entry["message"].startswith("Archive rejected: ") for entry in read_log(stack, replica, since))
    finally:
        archive.write_bytes(good)
        stack.docker("restart", "-t", "45", replica)
    wait_until(lambda: stack.balanced() == before and ask_ready(stack, replica)["rejected"] == {}, 180)
