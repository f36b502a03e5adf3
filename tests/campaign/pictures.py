"""Measures what pictures cost that were made to be costly: time, memory and log lines, the worst of each.

    .venv/bin/python -m tests.campaign.pictures --seconds 600

Every file of `tests.hostile.HEAVY` is decoded once as large as the limits allow, in a process of its own, then files of
`tests.hostile.endless` until the time is over. A picture or one of the service's own errors must come out; anything
else ends the run.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from handlers.api.errors import RequestError
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from tests.hostile import HEAVY, endless

NETWORKS = (
    Preprocessing(3, 224, 224),
    Preprocessing(1, 28, 28),
    Preprocessing(3, None, None),
    Preprocessing(3, 224, 224, resize=(256,), interpolation="bicubic"),
)


class Cost(NamedTuple):
    """What a file cost.

    Attributes:
        name: Of the file.
        outcome: `picture`, or the error's code.
        file_bytes: Its size.
        cpu_s: Of this process.
        memory_bytes: Most that this process held, beyond what it held before.
        lines: Written to the log, as warnings or to standard error.
    """

    name: str
    outcome: str
    file_bytes: int
    cpu_s: float
    memory_bytes: int
    lines: int


class _Lines(logging.Handler):
    """Counts what libraries log, from the level on that Python writes by itself."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def measure(name: str, data: bytes, network: Preprocessing) -> Cost:
    """Decode one file."""
    lines = _Lines()
    logging.getLogger().addHandler(lines)
    before = _memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    with warnings.catch_warnings(record=True) as warned, tempfile.TemporaryFile() as errors:
        warnings.simplefilter("always")
        own = os.dup(2)
        os.dup2(errors.fileno(), 2)
        began = time.process_time()
        try:
            decode(data, network)
            outcome = "picture"
        except RequestError as error:
            outcome = error.code
        finally:
            cpu_s = time.process_time() - began
            os.dup2(own, 2)
            os.close(own)
            logging.getLogger().removeHandler(lines)
        errors.seek(0)
        count = lines.count + len(warned) + errors.read().count(b"\n")
    return Cost(name, outcome, len(data), cpu_s, max(_memory_bytes("VmHWM") - before, 0), count)


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def heavy(names: list[str]) -> Iterator[Cost]:
    """Decode each costly file at full size, in a new process."""
    context = multiprocessing.get_context("spawn")
    for name in names:
        with context.Pool(1) as pool:
            yield from pool.map(_measure_heavy, [name])


def _measure_heavy(name: str) -> Cost:
    measure("png", HEAVY["png: texts"](0.001), NETWORKS[0])  # Whose first use loads libraries.
    return measure(name, HEAVY[name](1.0), NETWORKS[0])


def light(seed: int, seconds: float) -> Iterator[Cost]:
    """Decode random files in this process."""
    end = time.monotonic() + seconds
    for number, (name, data) in enumerate(endless(seed)):
        if time.monotonic() > end:
            return
        try:
            yield measure(name, data, NETWORKS[number % len(NETWORKS)])
        except Exception:
            print(f"file {number} of seed {seed}, {name}, {len(data)} bytes: no answer", file=sys.stderr)
            raise


def report(costs: list[Cost], title: str) -> None:
    """Print the worst of a run."""
    outcomes = Counter(cost.outcome for cost in costs)
    print(f"\n{title}: n = {len(costs):,}, " + ", ".join(f"{what} {count:,}" for what, count in outcomes.most_common()))
    for field, unit, size in (("cpu_s", "s", 1), ("memory_bytes", "MiB", 2**20), ("lines", "lines", 1)):
        worst = sorted(costs, key=lambda cost: -getattr(cost, field))[:5]
        print("worst: " + "; ".join(f"{getattr(cost, field) / size:.3g} {unit} {cost.name}" for cost in worst))


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for random files; the costly ones take some minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="costly files whose names contain this, and no random ones")
    arguments = parser.parse_args()
    costly = []
    for cost in heavy([name for name in HEAVY if not arguments.only or arguments.only in name]):
        print(
            f"{cost.name:32} {cost.outcome:15} {cost.file_bytes / 2**20:6.2f} MiB {cost.cpu_s:6.2f} s"
            f" {cost.memory_bytes / 2**20:5.0f} MiB {cost.lines} lines",
            flush=True,
        )
        costly.append(cost)
    report(costly, "costly files at full size")
    if not arguments.only:
        report(list(light(arguments.seed, arguments.seconds)), f"random files of seed {arguments.seed}")


if __name__ == "__main__":
    main()
