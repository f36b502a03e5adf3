"""A past without incidents for a new Prometheus, as OpenMetrics text for `promtool tsdb create-blocks-from`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from tests.watching.tools import Prometheus

GAP_S = 20.0  # Between the past's end and now.
PROBE_S = 5.0  # Between two probes of a transport, and between two scrapes.
TRAFFIC = re.compile(r"transport:convscope_(owed|timed):rate5m")
FAULTS = re.compile(r"transport:convscope_(failed|slow):rate5m|transport:convscope_unseen:ratio5m")


@dataclass(frozen=True)
class Past:
    """A series as it would have been.

    Attributes:
        series: `name{labels}`.
        value: Now.
        per_s: By how much it rose each second.
        length_s: How far it goes back.
        step_s: Time between two samples.
    """

    series: str
    value: float
    per_s: float
    length_s: float
    step_s: float

    def lines(self, now: float) -> list[str]:
        """Return its samples, the oldest first."""
        count = int(self.length_s / self.step_s)
        ages = (GAP_S + self.step_s * number for number in range(count, -1, -1))
        return [f"{self.series} {self.value - self.per_s * age:.6g} {now - age:.3f}\n" for age in ages]


def recorded(prometheus: Prometheus, rules: Path, step_s: float, per_s: float) -> list[Past]:
    """Return three days of the recorded series that the rules look back on (`x_over_time(series[1h])`).

    Args:
        prometheus: It sees calm load now, and has for some scrapes: too few for rates over five minutes.
        rules: Folder of the rules.
        step_s: Time between two evaluations of them.
        per_s: Requests a second on each transport, all of them answered in time.
    """
    text = "".join(path.read_text() for path in rules.glob("*.yml"))
    names = sorted(set(re.findall(r"_over_time\((?:[\d.]+, *)?(\w+:[\w:]+)", text)))
    calm = [
        (series, 0.0 if FAULTS.match(series) else per_s if TRAFFIC.match(series) else value)
        for name in names
        for series, value in _samples(prometheus, name)
    ]
    return [Past(*sample, 0.0, 3 * 86400.0, step_s) for sample in calm]


def probed(prometheus: Prometheus) -> list[Past]:
    """Return two hours of the probe's counters, without failures: their rates are taken over an hour."""
    rates = {"convscope_probes_total": 1 / PROBE_S, "convscope_probe_failures_total": 0.0}
    found = [(sample, per_s) for name, per_s in rates.items() for sample in _samples(prometheus, name)]
    return [Past(*sample, per_s, 2 * 3600.0, PROBE_S) for sample, per_s in found]


def write(path: Path, pasts: list[Past]) -> None:
    """Write series for promtool."""
    now = time.time()
    with path.open("w") as file:
        for past in pasts:
            file.writelines(past.lines(now))
        file.write("# EOF\n")
    path.chmod(0o644)


def _samples(prometheus: Prometheus, name: str) -> list[tuple[str, float]]:
    found = []
    for labels, value in prometheus.query(name):
        pairs = ",".join(f'{key}="{label}"' for key, label in labels.items() if key != "__name__")
        if value == value:  # Not NaN.
            found.append((f"{name}{{{pairs}}}", value))
    return found
