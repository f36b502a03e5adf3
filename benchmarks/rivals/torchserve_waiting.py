"""A network on a device of its own, simulated: each batch takes a known time, and no CPU."""

from __future__ import annotations

import time
from typing import Any

BATCH_S, REQUEST_S = 0.1, 0.01


class Waiting:
    """Answers each batch after `BATCH_S`, and `REQUEST_S` more for each request."""

    def initialize(self, context: Any) -> None:
        """Prepare nothing."""

    def handle(self, data: list[Any], context: Any) -> list[bytes]:
        """Wait, then answer an empty object each."""
        time.sleep(BATCH_S + REQUEST_S * len(data))
        return [b"{}"] * len(data)
