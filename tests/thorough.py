"""How many cases a test generates: few by default, all with `make thorough`."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("CONVSCOPE_THOROUGH") == "1"


def tries(few: int, many: int) -> int:
    """Return `many` where CONVSCOPE_THOROUGH is 1, else `few`."""
    return many if THOROUGH else few
