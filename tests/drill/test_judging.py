"""The drill fails for what it must fail for: shown on a stand-in of the stack, with incidents of tenths of a second."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.docker.load import Call, Tally
from tests.docker.receiver import Notification
from tests.drill import play as playing
from tests.drill.incidents import Incident
from tests.drill.play import Outcome, play
from tests.drill.site import Bell

RUNBOOK = """
## Alerts

### Outage
Page. Nobody is served. **First:** `docker compose ps`.

### Silent
Page. **First:** `Requests waiting`.
"""


@dataclass
class Bells:
    rung: dict[str, Bell] = field(default_factory=dict)

    def firing(self) -> set[str]:
        return {bell.name for bell in self.rung.values() if not bell.silent}


@dataclass
class Receiver:
    notifications: list[Notification] = field(default_factory=list)


@dataclass
class StandIn:
    """What `play` asks of a site."""

    bells: Bells = field(default_factory=Bells)
    receiver: Receiver = field(default_factory=Receiver)
    tally: Tally = field(default_factory=Tally)
    status: int = 0
    well: bool = True

    def calm(self) -> None:
        pass

    def whole(self, _: float) -> bool:
        return self.well

    def fill_in(self, command: str) -> str:
        return command

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, self.status, "tls.key cannot be read", "")

    def ring(self, alert: str, severity: str = "page") -> None:
        now = time.time()
        self.bells.rung[alert] = Bell(alert, severity, now, now)
        self._notify(alert, "firing")

    def resolve(self, alert: str) -> None:
        self.bells.rung[alert].silent = True
        self._notify(alert, "resolved")

    def _notify(self, alert: str, status: str) -> None:
        self.receiver.notifications.append(Notification(time.time(), "/", status, ({"alertname": alert},)))

    def ask(self, seconds: float = 0.1, error: str | None = None) -> None:
        self.tally.calls.append(Call("rest", time.time(), seconds, error))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("LOAD_S", "GRACE_S"):
        monkeypatch.setattr(playing, name, 0.0)
    monkeypatch.setattr(playing, "OPERATIONS", tmp_path / "operations.md")
    playing.OPERATIONS.write_text(RUNBOOK)


def judged(site: StandIn | None = None, **changes: Any) -> Outcome:
    settings = {
        "cause": lambda site: site.ring("Outage"),
        "remedy": lambda site: site.resolve("Outage"),
        "rings": {"Outage": 1.0},
        "whole_s": 0.2,
        "resolve_s": 0.2,
    } | changes
    return play(site or StandIn(), Incident("one", "one", **settings))  # type: ignore[arg-type]


def test_an_incident_that_rings_in_time_and_resolves_is_as_it_must_be() -> None:
    outcome = judged(shows="tls.key")
    assert outcome.faults == []
    assert outcome.actions == {"docker compose ps": 0}


def test_one_of_several_alerts_is_enough() -> None:
    assert judged(rings={"Outage|Silent": 1.0}).faults == []


def ring_late(site: StandIn) -> None:
    time.sleep(0.05)
    site.ring("Outage")


def ring_wrong(site: StandIn) -> None:
    site.ring("Outage")
    site.ring("OfAnother")


def ring_ticket(site: StandIn) -> None:
    site.ring("Outage")
    site.ring("OfAnother", "ticket")


def lose(site: StandIn) -> None:
    site.ring("Outage")
    site.ask(error="Overloaded: no")


def wait_long(site: StandIn) -> None:
    site.ring("Outage")
    site.ask(seconds=6.0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        pytest.param({"cause": lambda _: None, "remedy": lambda _: None}, "did not ring", id="silent"),
        pytest.param({"cause": ring_late, "rings": {"Outage": 0.01}}, "later than", id="late"),
        pytest.param({"cause": ring_wrong}, "OfAnother paged", id="wrong"),
        pytest.param({"remedy": lambda _: None}, "not resolved", id="unresolved"),
        pytest.param({"stays": frozenset({"Fast"})}, "Fast stopped", id="stopped"),
        pytest.param({"cause": lose}, "1 requests lost", id="lost"),
        pytest.param({"cause": wait_long}, "took 6.0 s", id="slow"),
        pytest.param({"shows": "nothing like it"}, "no first action shows", id="shows"),
        pytest.param({"site": StandIn(status=1)}, "ended with 1", id="action"),
        pytest.param({"site": StandIn(well=False)}, "not whole", id="ill"),
        pytest.param(
            {
                "cause": lambda site: site.ring("Silent"),
                "rings": {"Silent": 1.0},
                "remedy": lambda site: site.resolve("Silent"),
            },
            "is no command",
            id="no-command",
        ),
    ],
)
def test_a_fault_is_told(changes: dict[str, Any], fault: str) -> None:
    [told] = judged(**changes).faults
    assert fault in told


def test_what_may_be_lost_and_may_ring_is_no_fault() -> None:
    assert judged(cause=lose, lost=None).faults == []
    assert judged(cause=ring_wrong, may_ring=frozenset({"OfAnother"})).faults == []
    assert judged(cause=ring_ticket).faults == []
