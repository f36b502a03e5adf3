"""From an incident to the notification and to its end: Prometheus, Alertmanager and a webhook, in the running stack."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.docker.receiver import RECEIVER_URL, Receiver
from tests.docker.stack import ROOT, Stack, replace, wait_until

OUT = ROOT / "out/docker/alerting.md"
PATIENCE_S = 180.0  # What a busy machine is given; how long it took is written down.


@pytest.fixture(scope="module")
def receiver(stack: Stack) -> Iterator[Receiver]:
    with Receiver(stack.environment["COMPOSE_PROJECT_NAME"]) as running:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text("| outage | page | out after s | resolved after s |\n|---|---|---|---|\n")
        yield running


def awaited(receiver: Receiver, alert: str, status: str, since_s: float) -> float:
    """Wait for a notification; return how long after a moment it came."""
    wait_until(lambda: receiver.first(alert, status, since_s) is not None, PATIENCE_S)
    found = receiver.first(alert, status, since_s)
    assert found
    return found.time_s - since_s


def note(outage: str, page: str, out_s: float, resolved_s: float) -> None:
    with OUT.open("a") as file:
        file.write(f"| {outage} | {page} | {out_s:.0f} | {resolved_s:.0f} |\n")


def test_the_dead_mans_switch_is_fed(receiver: Receiver) -> None:
    awaited(receiver, "Watchdog", "firing", 0.0)
    assert all(note.path == "/watchdog" for note in receiver.notifications if "Watchdog" in note.names("none"))


def test_a_stopped_gateway_is_a_page_and_ends(stack: Stack, receiver: Receiver) -> None:
    started = time.time()
    stack.compose("kill", "gateway")
    try:
        out_s = awaited(receiver, "GatewayDown", "firing", started)
    finally:
        mended = time.time()
        stack.compose("up", "-d", "--no-deps", "gateway")
    resolved_s = awaited(receiver, "GatewayDown", "resolved", mended)
    note("the gateway is killed", "GatewayDown", out_s, resolved_s)
    wait_until(lambda: "ok" in stack.compose("logs", "--tail", "2", "probe"), PATIENCE_S)


def test_keys_that_no_longer_hold_are_a_page_though_every_container_is_well(stack: Stack, receiver: Receiver) -> None:
    keys = stack.secrets / "api-keys/keys.yaml"
    good = keys.read_text()
    started = time.time()
    replace(keys, good.replace("key: ", "key: 0"))
    try:
        out_s = awaited(receiver, "ProbeFailing", "firing", started)
        assert stack.inspect("gateway")["State"]["Health"]["Status"] == "healthy"
        assert '"unauthorized"' in stack.compose("logs", "--tail", "5", "probe")
    finally:
        mended = time.time()
        replace(keys, good)
    resolved_s = awaited(receiver, "ProbeFailing", "resolved", mended)
    note("no key holds any longer", "ProbeFailing", out_s, resolved_s)


def test_an_address_is_nowhere_in_a_log(stack: Stack, receiver: Receiver) -> None:
    assert receiver.notifications
    assert RECEIVER_URL.rstrip("/") not in stack.compose("logs", "alertmanager")


def test_a_cause_silences_what_follows(stack: Stack, receiver: Receiver) -> None:
    """GatewayDown was notified; what it silences was not, from then on."""
    assert stack
    down = next(note for note in receiver.notifications if "GatewayDown" in note.names() and note.status == "firing")
    over = receiver.first("GatewayDown", "resolved", down.time_s)
    assert over
    between = [note for note in receiver.notifications if down.time_s < note.time_s < over.time_s]
    rung = {name for note in between if note.status == "firing" for name in note.names()}
    assert not rung & {"NoReadyReplica", "AvailabilityBurnsFast", "LatencyBurnsFast", "RulesMissing"}
