"""The workloads: which network, what is requested, over which wire, by how many callers, in which kind of loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.load import Wire


@dataclass(frozen=True)
class Asked:
    """One kind of request.

    Attributes:
        want: `scores` alone, or with maps as `float32`, `float16`, `uint8`, or `pool` (an embedding, pool = 1).
        pictures: Number of pictures in one request.
        photograph: Size of the photographs, a key of `photographs.SIZES`; empty for the samples of 32×32.
    """

    want: str
    pictures: int = 1
    photograph: str = ""


@dataclass(frozen=True)
class Workload:
    """One measurement.

    Attributes:
        name: Name in tables and for `--only`.
        asked: The kind of request.
        callers: Connections, each with one request in flight; in an open loop, the most there may be.
        wire: REST or gRPC.
        share: Of the saturation rate, found just before at 32 callers, for an open loop; None for a closed loop.
    """

    name: str
    asked: Asked
    callers: int
    wire: Wire = "REST"
    share: float | None = None


@dataclass(frozen=True)
class Part:
    """Workloads of one network, for which all its servers are up at once.

    Attributes:
        name: Name in result files and for `--parts`.
        network: A key of `models.NETWORKS`.
        workloads: The workloads to measure.
        servers: Names with | between and * for anything.
        workers: Number of workers of every server; None for one a core.
    """

    name: str
    network: str
    workloads: tuple[Workload, ...]
    servers: str
    workers: int | None = None


def closed(want: str, callers: int, pictures: int = 1, photograph: str = "", wire: Wire = "REST") -> Workload:
    """Make a workload of one kind of request; the name says all of it."""
    size = f", {photograph}" if photograph else ""
    many = f", {pictures} pictures" if pictures > 1 else ""
    grpc = ", gRPC" if wire == "gRPC" else ""
    name = f"{want}{size}{many}{grpc}, c={callers}"
    return Workload(name, Asked(want, pictures, photograph), callers, wire)


def _open(want: str) -> Workload:
    return Workload(f"{want}, open loop at 70 %", Asked(want), 128, share=0.7)


def _alone(callers: Iterable[int], *sizes: str) -> tuple[Workload, ...]:
    return tuple(closed("scores", count, photograph=size) for size in sizes for count in callers)


DOCUMENTED = "TorchServe|FastAPI|LitServe|mosec|BentoML"
PHOTOGRAPHS = f"convscope|{DOCUMENTED}|uvicorn, tuned|mosec, tuned|floor, convscope"

SMALL = (
    *(closed("scores", callers) for callers in (1, 8, 32)),
    *(closed(want, 8) for want in ("float32", "uint8")),
    closed("float16", 4, pictures=32),
)

STANDARD = (
    Part(
        "resnet50",
        "resnet50",
        (*_alone([8], "0.3 MP", "3 MP", "12 MP"), closed("pool", 3, 32, "0.3 MP")),
        f"{PHOTOGRAPHS}|convscope, one worker|convscope, scaled decoding",
    ),
    Part(
        "mobilenet_v3_small",
        "mobilenet_v3_small",
        (*_alone([1, 8, 32], "0.3 MP"), *_alone([8], "3 MP", "12 MP"), closed("pool", 3, 32, "3 MP")),
        f"{PHOTOGRAPHS}|convscope, scaled decoding",
    ),
    Part(
        "efficientnet_b0",
        "efficientnet_b0",
        (*_alone([8], "0.3 MP"), closed("float16", 4, 8, "0.3 MP")),
        f"{PHOTOGRAPHS}|Ray Serve|KServe",  # Here alone: their own processes are never quite idle.
    ),
    Part(
        "cifar",
        "cifar",
        SMALL,
        "convscope|TorchServe|FastAPI|mosec|mosec, batching|uvicorn, tuned|mosec, tuned, batching|floor, convscope",
        workers=1,
    ),
)

_EVERY_PHOTOGRAPH = (
    *_alone([1, 8, 32], "0.3 MP", "3 MP", "12 MP"),
    *(
        closed(want, 8, count, size)
        for want in ("pool", "float16")
        for count, size in ((1, "0.3 MP"), (1, "3 MP"), (1, "12 MP"), (8, "3 MP"))
    ),
    *(closed(want, 3, 32, size) for want in ("scores", "pool", "float16") for size in ("0.3 MP", "3 MP")),
)

FULL = (
    *(
        Part(f"{network}{name}", network, _EVERY_PHOTOGRAPH, "*", workers)
        for network in ("resnet50", "mobilenet_v3_small", "efficientnet_b0")
        for name, workers in (("", None), ("-one-worker", 1))
    ),
    Part(
        "cifar",
        "cifar",
        (
            *(
                closed(want, callers)
                for want in ("scores", "float32", "float16", "uint8", "pool")
                for callers in (1, 8, 32)
            ),
            *(closed(want, callers, wire="gRPC") for want in ("scores", "float32", "uint8") for callers in (1, 8, 32)),
            *(closed("float16", 1, pictures=count) for count in (2, 4, 8, 16, 32, 64)),
            *(closed(want, 4, pictures=32) for want in ("scores", "float32", "float16", "uint8")),
            closed("float16", 4, pictures=32, wire="gRPC"),
            _open("scores"),
            _open("float32"),
        ),
        "*",
        workers=1,
    ),
)
