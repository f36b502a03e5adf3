"""Each incident rings in time and resolves, its first action works, and callers lose no more than they must."""

from __future__ import annotations

import pytest

from tests.drill import table
from tests.drill.incidents import INCIDENTS, Incident
from tests.drill.play import play
from tests.drill.site import Site


@pytest.mark.parametrize(
    "incident",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in INCIDENTS],
)
def test_incident(site: Site, incident: Incident) -> None:
    outcome = play(site, incident)
    print(table.add(outcome))
    assert not outcome.faults
