"""The workloads: what is asked, over which wire, by how many callers, in a closed loop or an open one."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.load import Wire


@dataclass(frozen=True)
class Asked:
    """One kind of request.

    Attributes:
        want: `scores` alone, or with maps as `float32`, `float16`, `uint8`, `pool` (an embedding, pool = 1), or as
            `lists` (JSON).
        pictures: In one request.
        weight: How often, beside the others of a mixture.
    """

    want: str
    pictures: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Workload:
    """What one measurement does.

    Attributes:
        name: As in tables and for `--only`.
        asked: One kind of request, or a mixture.
        callers: Connections, each with one request in flight; in an open loop, the most there may be.
        wire: REST or gRPC.
        share: Of the saturation rate, found just before at 32 callers, for an open loop; None for a closed loop.
    """

    name: str
    asked: tuple[Asked, ...]
    callers: int
    wire: Wire = "REST"
    share: float | None = None


def _closed(want: str, callers: int, pictures: int = 1, wire: Wire = "REST") -> Workload:
    many = f", {pictures} pictures" if pictures > 1 else ""
    grpc = ", gRPC" if wire == "gRPC" else ""
    return Workload(f"{want}{many}{grpc}, c={callers}", (Asked(want, pictures),), callers, wire)


def _open(want: str) -> Workload:
    return Workload(f"{want}, open loop at 70 %", (Asked(want),), 128, share=0.7)


MIXED = (
    Asked("scores", weight=0.5),
    Asked("float32", weight=0.2),
    Asked("uint8", weight=0.2),
    Asked("pool", weight=0.1),
)

STANDARD = (
    *(_closed(want, callers) for want in ("scores", "float32", "uint8") for callers in (1, 8, 32)),
    _closed("float16", 32),
    _closed("pool", 8),
    _closed("lists", 8),
    _closed("float16", 1, pictures=32),
    _closed("float16", 4, pictures=32),
    _closed("float32", 8, wire="gRPC"),
    Workload("mixed, c=8", MIXED, 8),
    _open("float32"),
)

FULL = (
    *(_closed(want, callers) for want in ("scores", "float32", "float16", "uint8", "pool") for callers in (1, 8, 32)),
    *(_closed(want, callers, wire="gRPC") for want in ("scores", "float32", "uint8") for callers in (1, 8, 32)),
    _closed("lists", 8),
    *(_closed("float16", 1, pictures=count) for count in (2, 4, 8, 16, 32, 64)),
    *(_closed(want, 4, pictures=32) for want in ("scores", "float32", "float16", "uint8")),
    _closed("float16", 4, pictures=32, wire="gRPC"),
    Workload("mixed, c=8", MIXED, 8),
    _open("scores"),
    _open("float32"),
    Workload("mixed, open loop at 70 %", MIXED, 128, share=0.7),
)
