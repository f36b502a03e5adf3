"""Runs one incident and checks its results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.docker.stack import ROOT
from tests.drill.incidents import BUDGET, Incident, nothing
from tests.drill.site import Site
from tests.runbook import read_sections

OPERATIONS = ROOT / "docs/operations.md"
LOAD_S = 5.0  # Load before the incident, so that requests are under way.
GRACE_S = 30.0  # How long a late alert is waited for, so that the table says how late.


@dataclass
class Outcome:
    """What came of an incident. Times are in seconds from its beginning unless said otherwise.

    Attributes:
        incident: What was played.
        rang: When each alert was first seen firing in Prometheus.
        notified: When its notification came to the webhook.
        severities: Of the alerts that rang.
        actions: The first actions that were tried, with their exit status.
        sent: Requests that callers sent until everything was whole.
        lost: Those without the right answer.
        wait_s: Longest until an answer or an error.
        whole_s: From the remedy, or the beginning where there is none, until everything was whole; None for never.
        resolved_s: From the remedy until the expected alerts were resolved; None for not, or for nothing to resolve.
        faults: What was not as it must be.
    """

    incident: Incident
    rang: dict[str, float] = field(default_factory=dict)
    notified: dict[str, float] = field(default_factory=dict)
    severities: dict[str, str] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    lost: int = 0
    wait_s: float = 0.0
    whole_s: float | None = None
    resolved_s: float | None = None
    faults: list[str] = field(default_factory=list)


def play(site: Site, incident: Incident) -> Outcome:
    """Cause an incident, try the runbook, end it, and return what came of it."""
    outcome = Outcome(incident)
    site.calm()
    try:
        incident.prepare(site)
        time.sleep(LOAD_S)
        began = time.time()
        incident.cause(site)
        _await(lambda: _all_rang(site, incident, began), began + max(incident.rings.values(), default=0) + GRACE_S)
        _await(lambda: False, began + incident.lasts_s)
        _try_first_actions(site, outcome)
    except BaseException:
        with suppress(AssertionError):
            incident.remedy(site)  # For the incidents after this one.
        raise
    remedied = time.time()
    _judge_ringing(site, outcome, began)
    incident.remedy(site)
    whole_since = began if incident.remedy is nothing else remedied
    if _await(lambda: site.whole(remedied), whole_since + incident.whole_s + GRACE_S):
        outcome.whole_s = time.time() - whole_since
    ended = time.time()
    if incident.rings:
        if _await(lambda: not _ringing(site, incident, began), ended + incident.resolve_s):
            outcome.resolved_s = time.time() - remedied
        else:
            still = ", ".join(sorted(_ringing(site, incident, began)))
            outcome.faults.append(f"not resolved {incident.resolve_s:.0f} s after it ended: {still}")
    _await(lambda: site.tally.complete(ended), time.time() + 60)
    tally = site.tally.between(began, ended)
    outcome.sent, outcome.lost, outcome.wait_s = tally.sent, len(tally.failed), tally.slowest_s
    _judge_callers(outcome, sorted(set(tally.failed)))
    _note_bells(site, outcome, began)
    try:
        incident.check(site)
    except AssertionError as error:
        outcome.faults.append(str(error))
    return outcome


def _await(condition: Callable[[], bool], until: float) -> bool:
    """Wait until a condition holds or a unix time has passed; tell whether it holds."""
    while not (holds := condition()) and time.time() < until:
        time.sleep(0.5)
    return holds


def _all_rang(site: Site, incident: Incident, began: float) -> bool:
    notified = _notified(site, began)
    return all(set(names.split("|")) & notified.keys() for names in incident.rings)


def _notified(site: Site, began: float) -> dict[str, float]:
    """Return when the first notification of each alert came."""
    found: dict[str, float] = {}
    for note in site.receiver.notifications:
        if note.status == "firing" and note.time_s >= began:
            for labels in note.alerts:
                found.setdefault(labels["alertname"], note.time_s)
    return found


def _ringing(site: Site, incident: Incident, began: float) -> set[str]:
    """Return which of the expected alerts ring still, in Prometheus or by the last notification of them.

    An alert that another one silenced while it ended is never called resolved, so of names joined by `|` one is enough.
    """
    notes = [note for note in site.receiver.notifications if note.time_s >= began]
    last = {labels["alertname"]: note.status for note in notes for labels in note.alerts}
    ringing = site.bells.firing() & incident.expected.keys()
    for names in incident.rings:
        said = {name: last[name] for name in names.split("|") if name in last}
        if said and "resolved" not in said.values():
            ringing |= said.keys()
    return ringing - BUDGET


def _note_bells(site: Site, outcome: Outcome, began: float) -> None:
    notified = _notified(site, began)
    for bell in site.bells.rung.copy().values():
        if bell.name != "Watchdog" and bell.last_at >= began:
            outcome.rang[bell.name] = max(bell.rang_at - began, 0.0)
            outcome.severities[bell.name] = bell.severity
            if bell.name in notified:
                outcome.notified[bell.name] = notified[bell.name] - began
    allowed = outcome.incident.expected.keys() | outcome.incident.may_ring | outcome.incident.stays
    for name, severity in outcome.severities.items():
        if severity == "page" and name not in allowed:
            outcome.faults.append(f"{name} paged")


def _judge_ringing(site: Site, outcome: Outcome, began: float) -> None:
    notified = _notified(site, began)
    for names, limit_s in outcome.incident.rings.items():
        after_s = min((notified[name] - began for name in names.split("|") if name in notified), default=None)
        if after_s is None:
            outcome.faults.append(f"{names} did not ring")
        elif after_s > limit_s:
            outcome.faults.append(f"{names} rang after {after_s:.0f} s, later than {limit_s:.0f}")
    for name in outcome.incident.stays - site.bells.firing():
        outcome.faults.append(f"{name} stopped")


def _try_first_actions(site: Site, outcome: Outcome) -> None:
    """Run the first actions as they are written."""
    incident, said = outcome.incident, ""
    rung = tuple(name for name in incident.expected if name in site.bells.firing())
    for alert in rung if incident.first is None else incident.first:
        [first] = [section.first for section in read_sections(OPERATIONS) if section.alert == alert] or [()]
        if not first:
            outcome.faults.append(f"the first action of {alert} is no command")
        elif (command := first[0]) not in outcome.actions:
            result = site.shell(site.fill_in(command))
            outcome.actions[command] = result.returncode
            said += result.stdout + result.stderr
            shown = incident.shows and re.search(incident.shows, said)
            if result.returncode and not shown:
                outcome.faults.append(f"`{command}` ended with {result.returncode}: {result.stderr[-300:]}")
    if incident.shows and not re.search(incident.shows, said):
        outcome.faults.append(f"no first action shows {incident.shows!r}")


def _judge_callers(outcome: Outcome, errors: list[str]) -> None:
    incident = outcome.incident
    if incident.lost is not None:
        if outcome.lost > incident.lost:
            outcome.faults.append(f"{outcome.lost} requests lost: {errors[:3]}")
        if outcome.wait_s > incident.wait_s:
            outcome.faults.append(f"a request took {outcome.wait_s:.1f} s, longer than {incident.wait_s:.0f}")
    if outcome.whole_s is None or outcome.whole_s > incident.whole_s:
        outcome.faults.append(f"not whole within {incident.whole_s:.0f} s")
