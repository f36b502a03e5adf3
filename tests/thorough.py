"""How many cases a test tries: few by default, all with `make thorough`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
THOROUGH = os.environ.get("CONVSCOPE_THOROUGH") == "1"


def tries(few: int, many: int) -> int:
    """Return `many` where CONVSCOPE_THOROUGH is 1, else `few`."""
    return many if THOROUGH else few


def variants(main: Iterable[T], more: Iterable[T]) -> list[T]:
    """Return all cases where CONVSCOPE_THOROUGH is 1, else the main ones."""
    return [*main, *more] if THOROUGH else [*main]
