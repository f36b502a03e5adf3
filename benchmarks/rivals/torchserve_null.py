"""TorchServe without a network: a handler whose response has as many bytes as the request's first digits say."""

from __future__ import annotations

from typing import Any


class Null:
    """Answers at once."""

    def initialize(self, context: Any) -> None:
        """Keep replies by their size."""
        self.replies: dict[bytes, bytes] = {}

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request; a readiness probe, which has no digits, gets an empty object."""
        return [self._answer(row.get("request") or row.get("body") or b"") for row in data]

    def _answer(self, body: Any) -> bytes:
        digits = bytes(body[:12]) if isinstance(body, (bytes, bytearray)) else b""
        if digits not in self.replies:
            self.replies[digits] = bytes(int(digits)) if digits.isdigit() else b"{}"
        return self.replies[digits]
