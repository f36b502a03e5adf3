"""Traces: what is known of one request besides its pictures: its id, its transport, its clock, what became of it.

Metrics, logs and the `timing` of a reply all read these values, so they cannot differ. It knows nothing of how a
request is read or answered. All times are seconds by the monotonic clock.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from handlers.errors import RequestError
from handlers.reply import Result, Timing

STAGES: tuple[str, ...] = ("read", "decode", "preprocess", "forward", "encode")
TRANSPORTS: tuple[str, ...] = ("rest", "grpc")
OK = "ok"  # The code of a request that was answered.

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Trace:
    """One request on its way; its clock starts here.

    Args:
        headers: HTTP headers, lower-case; empty on gRPC.
        given: The id that TorchServe gave it, used where neither header nor field brings one.

    Attributes:
        transport: `rest` or `grpc`.
        request_id: 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'.
        is_card: The model card, or a layer's filters, was asked for: nothing was predicted.
        wants_timing: The reply is to have a `Timing`.
        layers: Published layers asked for.
        seconds: Stage → what it took, of the stages that this request got through.
        pictures: How many it held, once they are decoded.
        results: One a picture, in a reply that has any.
        error: Why no picture was answered; None if one was.
        media_type: Of the reply.
        reply_bytes: Its length.
    """

    def __init__(self, headers: Mapping[str, str], given: str | None = None) -> None:
        self.transport = TRANSPORTS[0] if headers else TRANSPORTS[1]
        self.is_card = False
        self.wants_timing = False
        self.layers: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}
        self.pictures = 0
        self.results: tuple[Result | RequestError, ...] = ()
        self.error: RequestError | None = None
        self.media_type = ""
        self.reply_bytes = 0
        named = _valid(headers.get("x-request-id"))
        self._is_named = named is not None
        self.request_id = named or _valid(given) or uuid.uuid4().hex
        self.resume()

    @property
    def code(self) -> str:
        """`ok`, or the code of the reply's error."""
        return OK if self.error is None else self.error.code

    def identify(self, value: Any) -> None:
        """Take the id that the request's field names, unless a header did; what is no id is ignored."""
        named = None if self._is_named else _valid(value)
        if named is not None:
            self.request_id = named

    def resume(self) -> None:
        """Start the clock of the next stage now."""
        self._mark = perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage now, and start the next."""
        now = perf_counter()
        self.add(stage, now - self._mark)
        self._mark = now

    def add(self, stage: str, seconds: float) -> None:
        """Add to what a stage took."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def timing(self, handler_s: float, batch_requests: int) -> Timing:
        """Return the breakdown.

        Args:
            handler_s: What the whole batch took.
            batch_requests: Requests in it.
        """
        stages = {f"{stage}_s": self.seconds.get(stage, 0.0) for stage in STAGES}
        return Timing(**stages, handler_s=handler_s, batch_requests=batch_requests)


def _valid(value: Any) -> str | None:
    """Return a request id as text, or None for what is none."""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("ascii", "replace")
    return value if isinstance(value, str) and _REQUEST_ID.fullmatch(value) else None
