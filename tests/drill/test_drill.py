"""In each incident the alerts fire in time and resolve, its first action works, and no more requests fail than may."""

from __future__ import annotations

import time

import pytest

from tests.docker.stack import wait_until
from tests.drill import table
from tests.drill.incidents import INCIDENTS, Incident, stop_gateway, up
from tests.drill.play import play
from tests.drill.site import Site
from tests.watching.promql import panel_queries

ANSWERED = "oncall: Answered, last hour"
POINT = 0.01
# A request counts in the panel's hour only after its five minutes have passed, and in a window of a few minutes one
# probe more or less is a point.
AFTER_S = 900.0
SILENT_S = 300.0


@pytest.mark.parametrize(
    "incident",
    [pytest.param(one, id=one.name, marks=[pytest.mark.long] if one.long else []) for one in INCIDENTS],
)
def test_incident(site: Site, incident: Incident) -> None:
    outcome = play(site, incident)
    print(table.add(outcome))
    assert not outcome.faults


@pytest.mark.long
def test_the_panel_of_the_objective_says_what_callers_measured(site: Site) -> None:
    site.calm(with_past=False)
    began = time.time()
    time.sleep(60)
    stop_gateway(site)
    time.sleep(45)
    up(site)
    wait_until(lambda: site.whole(time.time() - 10), 90)
    time.sleep(AFTER_S)
    [query] = [query for query in panel_queries() if str(query).startswith(ANSWERED)]
    said = site.prometheus.value(query.text)
    measured = 1.0
    for transport in ("rest", "grpc"):
        calls = [call for call in site.tally.between(began, time.time()).calls if call.transport == transport]
        measured = min(measured, sum(call.error is None for call in calls) / len(calls))
    print(f"the panel says {said:.4f}, callers measured {measured:.4f}")
    assert measured < 0.97
    assert abs(said - measured) <= POINT


@pytest.mark.long
def test_the_dead_mans_switch_falls_silent_with_prometheus(site: Site) -> None:
    site.calm()
    wait_until(lambda: site.receiver.first("Watchdog", "firing", 0.0) is not None, 90)
    stopped = time.time()
    site.compose("stop", "prometheus")
    time.sleep(SILENT_S)
    signs = [note.time_s for note in site.receiver.notifications if note.path == "/watchdog"]
    site.compose("up", "-d", "--no-deps", "prometheus")
    print(f"the last sign of life came {max(signs) - stopped:.0f} s after Prometheus had stopped")
    assert max(signs) - stopped < SILENT_S / 2
