"""A job: one request while it is worked on, from TorchServe's parameters to the response.

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
from handlers.api.options import Options
from handlers.images.decoding import Encoded
from handlers.images.preprocessing import Picture
from handlers.outputs.response import Response, Result, Timing

STAGES: tuple[str, ...] = ("read", "decode", "preprocess", "forward", "encode")
TRANSPORTS: tuple[str, ...] = ("rest", "grpc")
OK = "ok"  # The code of a request that succeeded.

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Parameters = Mapping[str, Any]
"""A request's parameters as TorchServe passes them: bytes by name, or a list of them for a repeated form field. A JSON
body takes their place once it is parsed."""


class Job:
    """One request in work.

    Args:
        parameters: TorchServe's.
        headers: HTTP headers, names in lower case; empty on gRPC.
        given_id: TorchServe's id of the request, used where neither a header nor a field brings one.

    Attributes:
        transport: `rest` or `grpc`.
        request_id: 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'.
        media_type: What the response will be encoded as.
        files: Pictures as sent, still encoded.
        encoded: Each file with its header read, or its error.
        options: What was asked for.
        layers: Published layers asked for, in order.
        pictures: Each picture decoded, resized and cropped, or its error.
        sizes: (H, W) of each as it was sent, upright; (0, 0) of one that has an error.
        results: Each picture's result or error, in order; None before the forward pass.
        error: Why the request as a whole failed; None if at least one picture has a result.
        engine: What computed the results, where that is not what predicts; empty otherwise.
        response: What goes out; None while the job is in work.
        wants_timing: The response is to have a `Timing`.
        predicts_nothing: The model card or a layer's filters were asked for.
        seconds: Stage → time it took, of the stages that this request got through.
    """

    def __init__(self, parameters: Parameters, headers: Mapping[str, str], given_id: str | None = None) -> None:
        self.parameters = parameters
        self.headers = headers
        self.transport = TRANSPORTS[0] if headers else TRANSPORTS[1]
        self.media_type = REST_DEFAULT if headers else GRPC_DEFAULT
        self.files: tuple[bytes | bytearray, ...] = ()
        self.encoded: list[Encoded | RequestError] = []
        self.options = Options()
        self.layers: tuple[str, ...] = ()
        self.pictures: list[Picture | RequestError] = []
        self.sizes: list[tuple[int, int]] = []
        self.results: list[Result | RequestError | None] = []
        self.error: RequestError | None = None
        self.engine = ""
        self.response: Response | None = None
        self.wants_timing = False
        self.predicts_nothing = False
        self.seconds: dict[str, float] = {}
        named = _valid(headers.get("x-request-id"))
        self._is_named = named is not None
        self.request_id = named or _valid(given_id) or uuid.uuid4().hex
        self.resume()

    @property
    def code(self) -> str:
        """`ok`, or the code of the response's error."""
        return OK if self.error is None else self.error.code

    def identify(self, value: Any) -> None:
        """Take the id in the request's own field, unless a header gave one; an invalid id is ignored."""
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
        """Add to the time of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def timing(self, handler_s: float, batch_requests: int) -> Timing:
        """Return the time of each stage.

        Args:
            handler_s: Time of the whole batch.
            batch_requests: Requests in it.
        """
        stages = {f"{stage}_s": self.seconds.get(stage, 0.0) for stage in STAGES}
        return Timing(**stages, handler_s=handler_s, batch_requests=batch_requests)


def _valid(value: Any) -> str | None:
    """Return a request id as text, or None if it is not a valid one."""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("ascii", "replace")
    return value if isinstance(value, str) and _REQUEST_ID.fullmatch(value) else None
