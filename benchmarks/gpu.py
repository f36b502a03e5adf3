"""Measures a GPU: the limits of its bus and its arithmetic, then every way to run a network on it.

    python -m benchmarks.gpu --networks cifar,resnet18 --rounds 20

A way is timed from pictures of bytes in the CPU's memory to scores and every map there, by the clock, all ways in turn
in every round; given are the least and the median of the rounds, in microseconds a picture. The floor of a batch is the
larger of two times, neither of which can be beaten by a better program of this kind: its bytes at the rate that one
large copy of pinned memory was measured to have in each direction, and its multiply-adds at the rate of one large
product of matrices in the same precision. Decoding is not in it.
It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from archiver.geometry import blank
from archiver.operations import count_multiply_adds
from benchmarks import summaries
from benchmarks.engines import NETWORKS
from handlers.api.options import Options
from handlers.images.preprocessing import Picture, Preprocessing, to_input_on
from handlers.network.engines import Engine
from handlers.network.engines.cuda_graphs import CudaGraphEngine, Record, record_on_gpu
from handlers.network.engines.torch_engine import TorchEngine
from handlers.outputs.maps import prepare

BATCHES = (1, 8, 32)
COPY_BYTES = 2**28
MATRIX = 4096
BYTES_A_CELL = {"float32": 4, "float16": 2, "uint8": 1}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Rates:
    """What a device was measured to reach.

    Attributes:
        to_device: Bytes a second of pinned memory to the device.
        to_host: Bytes a second back.
        multiply_adds: By precision, multiply-adds a second of a product of matrices.
    """

    to_device: float
    to_host: float
    multiply_adds: Mapping[str, float]

    def floor_us(self, bytes_in: int, bytes_out: int, multiply_adds: int, precision: str) -> tuple[float, float]:
        """Return the microseconds that the copies take and those that the arithmetic takes."""
        copies = bytes_in / self.to_device + bytes_out / self.to_host
        return copies * 1e6, multiply_adds / self.multiply_adds[precision] * 1e6


@dataclass(frozen=True)
class Timing:
    """One way, network, batch and dtype of maps; times in microseconds a picture."""

    network: str
    way: str
    batch: int
    map_dtype: str
    copies_us: float
    arithmetic_us: float
    least_us: float
    median_us: float


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the least of several runs, each waited for."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def wait(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, size: int = COPY_BYTES, matrix: int = MATRIX, repeats: int = 10) -> Rates:
    """Measure one large copy each way and one large product of matrices in each precision."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    found = {}
    for name, dtype in DTYPES.items():
        left = torch.rand(matrix, matrix, device=device, dtype=dtype)
        found[name] = matrix**3 / seconds(partial(torch.mm, left, left), device, repeats)
    return Rates(
        size / seconds(partial(there.copy_, host), device, repeats),
        size / seconds(partial(host.copy_, there), device, repeats),
        found,
    )


def ways(network: str, device: torch.device, record: Record = record_on_gpu) -> dict[str, tuple[Engine, str]]:
    """Return every way to run a network, by name, and the precision of its arithmetic."""
    make, layers, shape = NETWORKS[network]
    torch.manual_seed(0)
    module = make().eval()
    has = {"layers": layers, "has_scores": True, "device": device}

    def eager(**more: object) -> TorchEngine:
        return TorchEngine(copy.deepcopy(module), **has, **more)  # type: ignore[arg-type]

    last = {"memory_format": torch.channels_last}
    half = {"dtype": torch.float16 if device.type == "cuda" else torch.bfloat16}
    plain = {
        "eager": (eager(), "float32"),
        "channels-last": (eager(**last), "float32"),
        "16 bits": (eager(**half), "float16"),
        "16 bits, channels-last": (eager(**half, **last), "float16"),
    }
    found: dict[str, tuple[Engine, str]] = {}
    for name, (engine, precision) in plain.items():
        found[name] = (engine, precision)
        found[f"{name}, graphs"] = (CudaGraphEngine(engine, shape, record=record), precision)
    return found


def once(
    engine: Engine, device: torch.device, pictures: list[Picture], layers: frozenset[str], options: Options
) -> int:
    """Run a network to maps that are ready to travel; return the bytes of its scores and maps."""
    height, width, channels = pictures[0].shape
    scores, maps = engine.run(to_input_on(str(device), pictures, Preprocessing(channels, height, width)), layers)
    ready = [item for name in layers for item in prepare(name, maps[name], options)]
    cells = sum(item.cells.nbytes for item in ready if not isinstance(item, Exception))
    return cells + (0 if scores is None else scores.nbytes)


def measure(
    network: str, device: torch.device, found: Rates, rounds: int, batches: tuple[int, ...], record: Record
) -> list[Timing]:
    """Measure one network by every way, for every batch and dtype of maps."""
    _, layers, shape = NETWORKS[network]
    running = ways(network, device, record)
    module = NETWORKS[network][0]().eval()
    multiply_adds = count_multiply_adds(module, blank(module, shape))
    records = []
    for batch in batches:
        pictures = list(np.random.default_rng(0).integers(0, 256, (batch, *shape[1:], shape[0]), np.uint8))
        bytes_in = sum(picture.nbytes for picture in pictures)
        for dtype in BYTES_A_CELL:
            asked = Options(map_dtype=dtype)
            runs = {
                name: partial(once, engine, device, pictures, frozenset(layers), asked)
                for name, (engine, _) in running.items()
            }
            bytes_out = max(run() for run in runs.values())  # Recorded and warm from here on.
            times: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(rounds):
                for name, run in list(runs.items())[:: 1 if number % 2 else -1]:
                    times[name].append(seconds(run, device, 3) * 1e6 / batch)
            for name, (_, precision) in running.items():
                copies, arithmetic = found.floor_us(bytes_in, bytes_out, multiply_adds * batch, precision)
                least, median = min(times[name]), statistics.median(times[name])
                records.append(Timing(network, name, batch, dtype, copies / batch, arithmetic / batch, least, median))
    return records


def table(records: list[Timing]) -> str:
    """Lay records out, one a line."""
    head = ("network", "batch", "maps", "way", "floor: copies", "floor: arithmetic", "least", "median", "of the floor")
    rows = []
    for one in records:
        figures = (one.copies_us, one.arithmetic_us, one.least_us, one.median_us)
        share = max(one.copies_us, one.arithmetic_us) / one.median_us
        names = (one.network, str(one.batch), one.map_dtype, one.way)
        rows.append([*names, *(f"{value:,.2f}" for value in figures), f"{share:.0%}"])
    return "\n".join(summaries.table(head, rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the floor's rates and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu measures a CUDA GPU, and torch sees none here.")
    device = torch.device("cuda:0")
    torch.backends.cudnn.allow_tf32 = False  # As the service has it.
    found = rates(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"to the device {found.to_device / 1e9:.1f} GB/s, back {found.to_host / 1e9:.1f} GB/s")
    for precision, rate in found.multiply_adds.items():
        print(f"{precision}: {rate / 1e12:.1f} T multiply-adds a second")
    records = []
    for network in options.networks.split(","):
        records += measure(network, device, found, options.rounds, BATCHES, record_on_gpu)
    print(table(records))


if __name__ == "__main__":
    main()
