"""Days of calm for a Prometheus that is new, as OpenMetrics text for `promtool tsdb create-blocks-from`."""

from __future__ import annotations

import time
from pathlib import Path

DAYS = 3.0  # The longest window of the burn rates.
GAP_S = 20.0  # Between the history's end and now.


def backfill(path: Path, samples: list[tuple[str, float]], step_s: float) -> None:
    """Write series that had one value all the time.

    Args:
        path: File to write.
        samples: Series, as `name{labels}`, and their values.
        step_s: Seconds between two samples.
    """
    end = time.time() - GAP_S
    count = int(DAYS * 86400 / step_s)
    with path.open("w") as file:
        for series, value in samples:
            file.writelines(f"{series} {value} {end - step_s * number:.3f}\n" for number in range(count, -1, -1))
        file.write("# EOF\n")
