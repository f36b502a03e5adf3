"""Days of calm for a Prometheus that is new, as OpenMetrics text for `promtool tsdb create-blocks-from`."""

from __future__ import annotations

import time
from pathlib import Path

DAYS = 3.0  # The longest window of the burn rates.
GAP_S = 20.0  # Between the history's end and now.


def backfill(path: Path, samples: list[tuple[str, float]], evaluation_s: float, scrape_s: float) -> None:
    """Write series that had one value all the time.

    Args:
        path: File to write.
        samples: Series, as `name{labels}`, and their values.
        evaluation_s: Seconds between the samples of a recorded series, whose name has a colon.
        scrape_s: Seconds between the samples of the others.
    """
    end = time.time() - GAP_S
    with path.open("w") as file:
        for series, value in samples:
            step = evaluation_s if ":" in series.partition("{")[0] else scrape_s
            count = int(DAYS * 86400 / step)
            file.writelines(f"{series} {value} {end - step * number:.3f}\n" for number in range(count, -1, -1))
        file.write("# EOF\n")
