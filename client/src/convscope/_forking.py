"""What does not outlive a fork: in the child threads are gone, locks may be held for ever, sockets are the parent's.

Whoever has such things says so, and is told in the child, before anything else runs there, to begin anew.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """What can begin anew."""

    def renew(self) -> None:
        """Begin anew, in a child process: without waiting for a lock, and without a word to the parent's peers."""


_ALIVE: WeakSet[Renewable] = WeakSet()


def renew_after_fork(thing: Renewable) -> None:
    """Have something renewed in every child that this process forks.

    Args:
        thing: It; not kept alive by this.
    """
    _ALIVE.add(thing)


def _renew_all() -> None:
    for thing in list(_ALIVE):
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
