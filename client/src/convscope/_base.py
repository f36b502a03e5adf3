"""What both clients share: their settings, and the checks and decisions that do no input or output."""

from __future__ import annotations

import time
import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from convscope._exceptions import BadImage, ConnectError, ConvscopeError
from convscope._explanation import Explanation
from convscope._pictures import Picture, encode_pictures
from convscope._prediction import Prediction
from convscope._request import build_options, check_model, choose_request_id
from convscope._retries import Attempts, RetryBudget

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from convscope._metrics import Metrics
    from convscope._reply import Response
    from convscope._wire.convscope_pb2 import PredictRequest

MAX_DEADLINE_S = 86_400  # A day. Sockets and gRPC cannot hold more than some hundreds of days.

Result = TypeVar("Result", Prediction, Explanation)


class Call(NamedTuple):
    """Where one call goes, once its arguments have been checked.

    Attributes:
        model: The model's name.
        version: Its version; None for the server's default.
        deadline_s: Seconds the call may take.
        request_id: The id of its request.
    """

    model: str
    version: str | None
    deadline_s: float
    request_id: str


class BaseClient:
    """Settings and checks of a client."""

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float,
        retries: int,
        metrics: bool | CollectorRegistry,
        coalesce: str | None,
    ) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise TypeError(f"retries must be a whole number, not {retries!r}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, not {retries}")
        if coalesce is not None:
            warnings.warn(
                "coalesce has no effect any more; send many pictures with predict_many(batch=...)",
                DeprecationWarning,
                stacklevel=3,
            )
        self.url = url
        self.deadline_s = _checked_deadline_s(deadline_s)
        self.retries = retries
        self._budget = RetryBudget()
        self._closed = False
        self._metrics = None if metrics is False else _open_metrics(metrics, url)

    @property
    def retries_made(self) -> int:
        """How many requests this client has sent again so far."""
        return self._budget.retries

    def _call(
        self, model: str, version: str | None, deadline_s: float | None = None, request_id: str | None = None
    ) -> Call:
        """Check the arguments that every call has; raise RuntimeError if the client is closed."""
        self._check_open()
        check_model(model, version)
        deadline_s = self.deadline_s if deadline_s is None else _checked_deadline_s(deadline_s)
        return Call(model, version, deadline_s, choose_request_id(request_id))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")

    def _options(self, *, timing: bool = False, **options: Any) -> PredictRequest:
        """Build the options of a request; metrics need its timing, whether or not the caller does."""
        request = build_options(timing=timing, **options)
        if self._metrics is not None:
            request.timing = True
        return request

    def _wait_s(self, error: ConvscopeError, attempts: Attempts) -> float:
        """Return the seconds to wait before the next attempt; raise the error if there is to be none."""
        if self._closed and isinstance(error, ConnectError):
            raise ConnectError(f"no connection to {self.url}: the client was closed") from error
        wait_s = None if self._closed else attempts.wait_s(error)
        if wait_s is None:
            raise error
        return wait_s

    def _count_retry(self, model: str) -> None:
        """Count a request that is about to be sent again."""
        self._check_open()
        self._budget.count_retry()
        if self._metrics is not None:
            self._metrics.count_retry(model)

    def _observe(self, model: str, started: float, outcome: Response | BaseException) -> None:
        """Count a call that ended, if metrics are kept."""
        if self._metrics is not None:
            self._metrics.observe(model, time.perf_counter() - started, outcome)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        kind = type(self).__name__
        raise TypeError(
            f"{kind} cannot be pickled or copied: it holds open connections, and a pickle would hold the API key in "
            f"clear text. Create one {kind} in each process"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def one_of(results: list[Result]) -> Result:
    """Return the result of a single picture.

    Args:
        results: A list of that one result.

    Returns:
        The result.

    Raises:
        ConvscopeError: The picture's own error.
    """
    [result] = results
    if result.error is not None:
        raise result.error
    return result


def failed_predictions(count: int, call: Call, error: ConvscopeError) -> list[Prediction]:
    """Return a prediction that holds the error for each picture of a request that failed."""
    return [
        Prediction(
            model=call.model,
            version=call.version or "",
            engine="",
            device="",
            request_id=error.request_id or "",
            error=error,
        )
        for _ in range(count)
    ]


def encode_each(pictures: list[Picture]) -> list[list[bytes] | Exception]:
    """Return the files of each picture of a stream, or the exception that encoding it raised."""
    encoded: list[list[bytes] | Exception] = []
    for picture in pictures:
        try:
            encoded.append(encode_pictures([picture]).files)
        except Exception as error:
            encoded.append(error)
    return encoded


def merge_predictions(
    encoded: list[list[bytes] | Exception], predictions: list[Prediction], call: Call
) -> list[Prediction | Exception]:
    """Return the results of a batch of a stream in the order of its pictures.

    Args:
        encoded: From `encode_each`.
        predictions: One for each file.
        call: The batch's.

    Returns:
        Predictions. A picture that has no pixels to send holds `BadImage`; any other exception stands at its place, to
        be raised there.
    """
    answered = iter(predictions)
    results: list[Prediction | Exception] = []
    for item in encoded:
        if isinstance(item, list):
            results += [next(answered) for _ in item]
        elif isinstance(item, ValueError):
            rejected = BadImage(str(item))
            rejected.__cause__ = item
            results += failed_predictions(1, call, rejected)
        else:
            results.append(item)
    return results


def _open_metrics(metrics: bool | CollectorRegistry, url: str) -> Metrics:
    try:
        from convscope._metrics import Metrics
    except ImportError as error:
        raise ImportError(
            "metrics are kept by prometheus_client, which cannot be imported: pip install 'convscope[metrics]'"
        ) from error
    return Metrics(metrics, "grpc" if urlsplit(url).scheme.startswith("grpc") else "rest")


def _checked_deadline_s(deadline_s: float) -> float:
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, Real):
        raise TypeError(f"deadline_s must be a number of seconds, not {deadline_s!r}")
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        raise ValueError(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S} seconds, not {deadline_s!r}")
    return float(deadline_s)
