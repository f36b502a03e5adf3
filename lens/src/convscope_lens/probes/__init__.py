"""Probes: how maps and scores of a served network change when its pictures change.

    from convscope import Client
    from convscope_lens import probes

    with Client("http://localhost:8080") as client:
        result = probes.shift(client, ["cat.png", "ship.png"], model="cifar")
        print(result.format_table())
        result.figure().savefig("shift.png")

Each probe sends transformed copies of each picture, in the largest batches the model allows, and aggregates over all
pictures. Beside a figure stand its 95 % interval over the pictures and its baseline: chance, or another picture.
`result.minus(other)` is the paired difference between two models, such as a network and its untrained twin.
"""

from __future__ import annotations

from convscope_lens.probes._detail import blur, shuffle
from convscope_lens.probes._position import border, pool, rotate, scale, shift
from convscope_lens.probes._result import ProbeResult

__all__ = ["ProbeResult", "blur", "border", "pool", "rotate", "scale", "shift", "shuffle"]

ProbeResult.__module__ = __name__
