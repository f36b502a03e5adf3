"""The past that the drill gives a new Prometheus has no incident, however slow the machine is now."""

from __future__ import annotations

from typing import Any, cast

from tests.drill import history
from tests.watching.promql import RULES
from tests.watching.tools import Prometheus, Sample


class Slow:
    """A Prometheus that has just started, on a machine where one answer in seven comes late."""

    def query(self, text: str) -> list[Sample]:
        """Answer for a recorded series."""
        values = {"owed": 0.14, "timed": 0.08, "slow": 0.012, "failed": 0.001, "unseen": 0.1}
        found = [value for word, value in values.items() if f"_{word}:" in text]
        return [({"__name__": text, "transport": "rest"}, found[0] if found else 0.5)]


def test_the_past_has_the_traffic_of_the_callers_and_no_faults() -> None:
    pasts = history.recorded(cast("Prometheus", cast("Any", Slow())), RULES, 15.0, 1.6)
    values = {past.series.partition("{")[0]: past.value for past in pasts}
    assert values.pop("transport:convscope_owed:rate5m") == values.pop("transport:convscope_timed:rate5m") == 1.6
    faults = [name for name in values if name.startswith("transport:")]
    assert len(faults) == 3
    assert not any(values.pop(name) for name in faults)
    assert set(values.values()) == {0.5}
    assert all(past.length_s == 3 * 86400.0 for past in pasts)
