"""Probes: what a served network does as its pictures move, turn, grow, meet their border, or lose detail or order.

    from convscope import Client, probes

    with Client("http://localhost:8080") as client:
        found = probes.shift(client, ["cat.png", "ship.png"], model="cifar")
        print(found.table())
        found.figure().savefig("shift.png")

Each probe asks about many changed copies of each picture, in few requests, and sums what came back over all pictures.
Only numpy is needed, Pillow to read picture files other than .npy, and matplotlib for figures:
`pip install 'convscope[figure]'` brings both.
"""

from __future__ import annotations

from convscope_lens.probes._blur import blur
from convscope_lens.probes._border import border
from convscope_lens.probes._probe import Probe
from convscope_lens.probes._shift import shift
from convscope_lens.probes._shuffle import shuffle
from convscope_lens.probes._turn import rotate, scale

__all__ = ["Probe", "blur", "border", "rotate", "scale", "shift", "shuffle"]

Probe.__module__ = __name__
