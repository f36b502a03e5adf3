"""Parts die or are replaced under constant load; nothing a caller asked is lost. Writes its table to out/docker/."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from archiver import packing
from handlers.network.archive import CARD
from tests.docker.bytewise import connect, head, receive
from tests.docker.load import Tally, load
from tests.docker.stack import JAVA, ROOT, WORKER, Stack, wait_until

BEFORE_S, AFTER_S = 3.0, 3.0
TABLE = ROOT / "out/docker/scenarios.md"
HEAD = (
    "| scenario | sent | answered | failed | sent again by the gateway | longest gap s | slowest answer s "
    "| whole again after s |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


@pytest.fixture(scope="module", autouse=True)
def table() -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(HEAD)


def play(stack: Stack, name: str, event: Callable[[], object], whole: Callable[[], bool], timeout_s: float) -> Tally:
    """Run a scenario under load, write its row and check that nothing was lost."""
    retries = stack.statistic(r"cluster\.(rest|grpc)\.upstream_rq_retry")
    with load(stack) as tally:
        time.sleep(BEFORE_S)  # Load before, for there to be requests in flight.
        began = time.monotonic()
        event()
        wait_until(whole, timeout_s)
        recovered_s = time.monotonic() - began
        time.sleep(AFTER_S)
    retries = stack.statistic(r"cluster\.(rest|grpc)\.upstream_rq_retry") - retries
    row = (
        f"| {name} | {tally.sent} | {tally.answered} | {len(tally.failed)} | {retries} | {tally.gap_s:.2f} | "
        f"{tally.slowest_s:.2f} | {recovered_s:.1f} |"
    )
    with TABLE.open("a") as file:
        file.write(row + "\n")
    print(row)
    assert not tally.failed, tally.failed[:5]
    assert tally.sent == tally.answered > 20
    return tally


def restarts(stack: Stack, replica: str) -> int:
    return int(stack.docker("inspect", "-f", "{{.RestartCount}}", replica))


def test_a_replica_is_stopped(stack: Stack) -> None:
    replica = stack.replicas()[0]
    play(
        stack,
        "`docker stop` of one replica of three",
        lambda: stack.docker("stop", "-t", "45", replica),
        lambda: stack.balanced() == 2,
        60,
    )
    assert stack.docker("inspect", "-f", "{{.State.ExitCode}}", replica).strip() == "0"


def test_the_replica_comes_back(stack: Stack) -> None:
    play(stack, "the stopped replica starts again", lambda: stack.up(3), lambda: stack.balanced() == 3, 120)


def test_workers_are_killed(stack: Stack) -> None:
    workers = {replica: stack.processes(replica, WORKER) for replica in stack.replicas()}

    def renewed(replica: str) -> bool:
        now = stack.processes(replica, WORKER)
        return len(now) == len(workers[replica]) and not set(now) & set(workers[replica]) and stack.healthy(replica)

    def event() -> None:
        for replica in workers:
            stack.kill(replica, WORKER)
            wait_until(lambda replica=replica: renewed(replica) and stack.balanced() == 3, 60)  # type: ignore[misc]

    play(stack, "`kill -9` of all workers of each replica in turn", event, lambda: stack.balanced() == 3, 90)


def test_a_jvm_is_killed(stack: Stack) -> None:
    replica = stack.replicas()[0]
    before = restarts(stack, replica)
    play(
        stack,
        "`kill -9` of a JVM",
        lambda: stack.kill(replica, JAVA),
        lambda: restarts(stack, replica) > before and stack.balanced() == 3,
        120,
    )


def test_a_container_is_killed(stack: Stack) -> None:
    replica = stack.replicas()[0]

    def event() -> None:
        stack.docker("kill", replica)
        stack.up(3)

    play(stack, "`docker kill` of one replica, then `docker compose up`", event, lambda: stack.balanced() == 3, 120)


def test_the_gateway_reads_its_configuration_again(stack: Stack) -> None:
    def reloads() -> int:
        return stack.statistic(r"extension_config_discovery\.\S+\.config_reload")

    before = reloads()

    def event() -> None:
        stack.reconfigure("http.yaml", "max_tokens: 2000", "max_tokens: 3000")

    play(stack, "gateway configuration reload", event, lambda: reloads() > before, 20)
    stack.reconfigure("http.yaml", "max_tokens: 3000", "max_tokens: 2000")


def test_the_gateway_finishes_what_is_in_flight_before_it_stops(stack: Stack) -> None:
    picture = (ROOT / "samples/cat.png").read_bytes()
    request = head(stack, "POST /predictions/cifar", f"Content-Length: {len(picture)}")
    gateway = stack.inspect("gateway")["Id"]
    with connect(stack) as connection:
        connection.sendall(request + picture[:100])
        wait_until(lambda: stack.statistic("http.public.downstream_rq_active") == 1, 10)
        stopping = threading.Thread(target=stack.compose, args=("stop", "gateway"))
        stopping.start()
        wait_until(lambda: "connection: close" in ask(stack), 4)
        connection.sendall(picture[100:])
        said = receive(connection).decode()
    stopping.join(60)
    assert "200 OK" in said
    assert '"label": "cat"' in said
    assert stack.docker("inspect", "-f", "{{.State.ExitCode}}", gateway).strip() == "0"
    stack.up(3)


def ask(stack: Stack) -> str:
    """Ask for a card on a connection of its own."""
    with connect(stack) as connection:
        connection.sendall(head(stack, "GET /predictions/cifar"))
        return connection.recv(65536).decode("latin-1").lower()


def test_a_new_archive_is_rolled_out(stack: Stack) -> None:
    publish(stack.store / "cifar.mar", "1.1")

    def event() -> None:
        ended = stack.make("update")
        assert ended.returncode == 0, ended.stdout

    tally = play(stack, "rolling update to a new archive", event, lambda: stack.balanced() == 3, 300)
    assert tally.versions == ["1.0", "1.1"]
    with stack.client("rest") as client:
        assert {client.model_card("cifar").version for _ in range(12)} == {"1.1"}


def publish(archive: Path, version: str) -> None:
    """Replace an archive by the same one under another version."""
    files = packing.unpack(archive)
    card = json.loads(files[CARD])
    files[packing.MANIFEST] = packing.manifest(card["model"], version)
    files[CARD] = packing.to_json(card | {"version": version})
    packing.write(archive, packing.pack(files))
