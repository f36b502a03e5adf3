"""Probes: how maps and scores of a served network change as its pictures change.

    from convscope import Client
    from convscope_lens import probes

    with Client("http://localhost:8080") as client:
        found = probes.shift(client, ["cat.png", "ship.png"], model="cifar")
        print(found.table())
        found.figure().savefig("shift.png")

Each probe sends many changed copies of each picture in few requests, and sums over all pictures.
"""

from __future__ import annotations

from convscope_lens.probes._detail import blur, shuffle
from convscope_lens.probes._position import border, rotate, scale, shift
from convscope_lens.probes._probe import Probe

__all__ = ["Probe", "blur", "border", "rotate", "scale", "shift", "shuffle"]

Probe.__module__ = __name__
