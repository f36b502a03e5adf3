"""A job: one request in progress, from TorchServe's parameters to the response.

Metrics, logs and the `timing` of a response all read a job's values, so they cannot differ. Times are seconds of the
monotonic clock.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from handlers.api.errors import RequestError
from handlers.api.media import GRPC_DEFAULT, REST_DEFAULT
from handlers.api.options import DEFAULT
from handlers.images.decoding import Notes, OpenedFile
from handlers.images.preprocessing import Picture
from handlers.outputs.response import Response, Result, Timing

STAGES: tuple[str, ...] = ("read", "decode", "preprocess", "forward", "encode")
TRANSPORTS: tuple[str, ...] = ("rest", "grpc")
OK = "ok"  # The code of a request that succeeded.

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# W3C Trace Context, section 3.2: ids are not zero, the version is not ff, and versions after 00 may append fields.
_IDS = r"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00{_IDS}|(?!ff|00)[0-9a-f]{{2}}{_IDS}(-.*)?")

Parameters = Mapping[str, Any]
"""A request's parameters as TorchServe passes them: bytes by name, or a list of them for a repeated form field. A JSON
body takes their place once it is parsed."""


class Job:
    """One request in progress.

    Args:
        parameters: TorchServe's parameters.
        headers: HTTP headers, names in lower case; empty on gRPC.
        given_id: TorchServe's id of the request, used if neither a header nor a field has an id.
        is_traced: Whether the job records spans.

    Attributes:
        transport: `rest` or `grpc`.
        request_id: 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'.
        media_type: The response's media type.
        files: Pictures as sent, still encoded.
        opened: Each file with its header read, or its error.
        options: The request's options.
        layers: Published layers asked for, in order.
        pictures: Each picture decoded, resized and cropped, or its error.
        sizes: (H, W) of each picture as it was sent, upright; (0, 0) for an error.
        notes: Changes to each picture that affect what is seen.
        results: Each picture's result or error, in order; None before the forward pass.
        error: Why the request as a whole failed; None if at least one picture has a result.
        engine: The engine that computed the results, if not the predicting engine; empty otherwise.
        response: The response; None while the job is in progress.
        wants_timing: Whether the response has a `Timing`.
        predicts_nothing: Whether the request is for the model card or a layer's filters.
        seconds: Stage → time it took, for the stages that this request completed.
        began: Start time of the job.
        intervals: Name, beginning and end of each piece of work, if traced; otherwise None.
        traceparent: W3C Trace Context of the caller's span, in the format of version 00; empty if absent.
        tracestate: The context's tracestate, unchecked.
        trace_id: Id of the trace, for the log: 32 hexadecimal digits, or empty.
    """

    def __init__(
        self,
        parameters: Parameters,
        headers: Mapping[str, str],
        given_id: str | None = None,
        *,
        is_traced: bool = False,
    ) -> None:
        self.parameters = parameters
        self.headers = headers
        self.transport = TRANSPORTS[0] if headers else TRANSPORTS[1]
        self.media_type = REST_DEFAULT if headers else GRPC_DEFAULT
        self.files: tuple[bytes | bytearray, ...] = ()
        self.opened: list[OpenedFile | RequestError] = []
        self.options = DEFAULT
        self.layers: tuple[str, ...] = ()
        self.pictures: list[Picture | RequestError] = []
        self.sizes: list[tuple[int, int]] = []
        self.notes: list[Notes] = []
        self.results: list[Result | RequestError | None] = []
        self.error: RequestError | None = None
        self.engine = ""
        self.response: Response | None = None
        self.wants_timing = False
        self.predicts_nothing = False
        self.seconds: dict[str, float] = {}
        self.intervals: list[tuple[str, float, float]] | None = [] if is_traced else None
        named = _valid(headers.get("x-request-id"))
        self._is_named = named is not None
        self.request_id = named or _valid(given_id) or uuid.uuid4().hex
        self.traceparent = self.tracestate = self.trace_id = ""
        for given in (headers, parameters):
            self._trace(given.get("traceparent"), given.get("tracestate"))
        self.resume()
        self.began = self._mark

    @property
    def code(self) -> str:
        """`ok`, or the code of the response's error."""
        return OK if self.error is None else self.error.code

    def identify(self, request_id: Any, traceparent: Any, tracestate: Any) -> None:
        """Take ids from the request's fields, unless a header has them; invalid ids are ignored."""
        named = None if self._is_named else _valid(request_id)
        if named is not None:
            self.request_id = named
        self._trace(traceparent, tracestate)

    def _trace(self, traceparent: Any, tracestate: Any) -> None:
        """Take a trace context, unless the job has one or it is malformed."""
        if self.traceparent or not traceparent:
            return
        parent = _text(traceparent)
        if parent is not None and _TRACEPARENT.fullmatch(parent):
            self.traceparent, self.trace_id = f"00{parent[2:55]}", parent[3:35]  # A later version begins as 00 does.
            self.tracestate = _text(tracestate) or ""

    def resume(self) -> None:
        """Start the clock of the next stage now."""
        self._mark = perf_counter()

    def lap(self, stage: str, name: str = "") -> None:
        """End a stage now, and start the next; `name` is the span's name, if not the stage's."""
        now = perf_counter()
        self.add(stage, now - self._mark, now, name)
        self._mark = now

    def add(self, stage: str, seconds: float, ended: float, name: str = "") -> None:
        """Add to the time of a stage.

        Args:
            stage: One of `STAGES`.
            seconds: Seconds to add.
            ended: End of that time.
            name: The span's name, if not the stage's.
        """
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self.intervals is not None:
            self.intervals.append((name or stage, ended - seconds, ended))

    def timing(self, handler_s: float, batch_requests: int) -> Timing:
        """Return the time of each stage.

        Args:
            handler_s: Time of the whole batch.
            batch_requests: Number of requests in the batch.
        """
        stages = {f"{stage}_s": self.seconds.get(stage, 0.0) for stage in STAGES}
        return {**stages, "handler_s": handler_s, "batch_requests": batch_requests}


def _valid(value: Any) -> str | None:
    """Return a request id as text, or None if it is invalid."""
    text = _text(value)
    return text if text is not None and _REQUEST_ID.fullmatch(text) else None


def _text(value: Any) -> str | None:
    """Return a header or a field as text, or None if it is neither text nor bytes."""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("ascii", "replace")
    return value if isinstance(value, str) else None
