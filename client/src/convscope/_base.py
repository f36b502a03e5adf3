"""Base class of `Client` and `AsyncClient`: settings, argument checks, retry decisions; no I/O."""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncIterable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import urlsplit

from convscope._exceptions import BadImage, ConnectError, ConvscopeError, ModelNotFound, ProtocolError
from convscope._explanation import Explanation
from convscope._options import MAX_DEADLINE_S, ServedModel
from convscope._pictures import ConvertedFile, Picture, encode_pictures, is_one_picture
from convscope._prediction import Prediction
from convscope._request import (
    NO_MODEL,
    build_explain_options,
    build_options,
    check_model,
    set_trace_context,
    validate_or_create_request_id,
)
from convscope._retries import Attempts, RetryBudget
from convscope._server_errors import closed_error

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from convscope._metrics import Metrics
    from convscope._reply import TimedReply
    from convscope._wire.convscope_pb2 import PredictRequest

_EXPLAIN_OPTIONS = ("method", "layer", "target", "window", "step", "steps", "picture")

Result = TypeVar("Result", Prediction, Explanation)


class CallContext(NamedTuple):
    """The checked arguments that every call has.

    Attributes:
        model: Name of the model.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of the call, in seconds from its start.
        request_id: Id of its request.
        timing: Whether the caller requested the timing.
    """

    model: str
    version: str | None
    deadline_s: float
    request_id: str
    timing: bool = False


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
            raise TypeError(f"retries must be an int, not {retries!r}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, not {retries}")
        if coalesce is not None:
            warnings.warn(
                "coalesce is ignored; send many pictures with predict_many(batch=...)",
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
        """Number of retries so far."""
        return self._budget.retries_made

    def _new_call(
        self,
        model: str | None,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
        *,
        timing: bool = False,
    ) -> CallContext:
        """Check the arguments that every call has; raise RuntimeError if the client is closed.

        Without a model the call is for `NO_MODEL`.
        """
        self._raise_if_closed()
        if model is None:
            model = NO_MODEL
        else:
            check_model(model, version)
        deadline_s = self.deadline_s if deadline_s is None else _checked_deadline_s(deadline_s)
        return CallContext(model, version, deadline_s, validate_or_create_request_id(request_id), timing)

    def _new_request(
        self, model: str, options: Mapping[str, Any], *, many: bool = False
    ) -> tuple[CallContext, PredictRequest]:
        """Check the options of `predict` or `predict_many`, and build a request without pictures, in the trace.

        With metrics enabled the request always asks for its timing.
        """
        rest = dict(options)
        named = {name: rest.pop(name) for name in ("version", "deadline_s", "request_id") if name in rest}
        trace = [rest.pop(name, None) for name in ("traceparent", "tracestate")]
        template = set_trace_context(build_options(**rest), *trace)
        if many and any(edit.HasField("picture") or edit.operation == "patch" for edit in template.edits):
            raise ValueError("predict_many() groups the pictures itself, so edits cannot name one: use predict()")
        call = self._new_call(model, **named, timing=template.timing)
        template.timing = template.timing or self._metrics is not None
        return call, template

    def _new_explain_request(self, model: str, options: Mapping[str, Any]) -> tuple[CallContext, PredictRequest]:
        """Check the options of `explain`, and build a request without pictures; see `_new_request`."""
        explain_options = build_explain_options(**{name: options[name] for name in _EXPLAIN_OPTIONS if name in options})
        rest = {name: value for name, value in options.items() if name not in _EXPLAIN_OPTIONS}
        if unknown := {"layers", "pool", "channels", "edits", "compare"} & rest.keys():
            raise TypeError(f"explain() got an unexpected keyword argument {min(unknown)!r}")
        call, template = self._new_request(model, rest)
        template.explain.CopyFrom(explain_options)
        return call, template

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")

    def _wait_or_raise(self, error: ConvscopeError, attempts: Attempts) -> float:
        """Return the seconds to wait before the next attempt; raise the error if there is none."""
        if self._closed and isinstance(error, ConnectError):
            raise closed_error(self.url) from error
        wait_s = None if self._closed else attempts.next_wait_s(error)
        if wait_s is None:
            raise error
        return wait_s

    def _count_retry(self, model: str) -> None:
        """Count a request that is about to be sent again."""
        self._raise_if_closed()
        self._budget.count_retry()
        if self._metrics is not None:
            self._metrics.count_retry(model)

    def _observe(self, model: str, started: float, result: TimedReply | BaseException) -> None:
        """Record a finished request, if metrics are enabled."""
        if self._metrics is not None:
            self._metrics.observe(model, time.perf_counter() - started, result)

    def __reduce__(self) -> NoReturn:
        """Reject pickling and copying."""
        class_name = type(self).__name__
        raise TypeError(
            f"{class_name} cannot be pickled or copied: it holds open connections, and a pickle would contain the API"
            f" key in clear text. Create one {class_name} in each process"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def listed_models(error: ModelNotFound | None) -> list[ServedModel]:
    """Return the models that the answer to a call for `NO_MODEL` lists; raise ProtocolError if it lists none."""
    if error is None or error.models is None:
        raise ProtocolError("the server does not list its models: it is older than this client, or has too many")
    return list(error.models)


def only_result(results: list[Result]) -> Result:
    """Return the result of a single picture; raise its own error."""
    [result] = results
    if result.error is not None:
        raise result.error
    return result


def add_notes(results: list[Result], files: Iterable[bytes]) -> list[Result]:
    """Add what the client did to each picture to the notes of its result, in place; return the results."""
    for result, file in zip(results, files, strict=True):
        prediction = result.prediction if isinstance(result, Explanation) else result
        if isinstance(file, ConvertedFile) and prediction.error is None:
            prediction.notes = file.merge_notes(prediction.notes)
    return results


def check_predict_many(pictures: object, options: Mapping[str, Any], *, concurrency: int, batch: int) -> None:
    """Check the arguments of `predict_many`. Each request has its own id, so `request_id` is not one of the options.

    Raises:
        TypeError: `pictures` is a single picture or not an iterable, a number is not an int, or there is a request id.
        ValueError: A number is below 1.
    """
    if is_one_picture(pictures) or not isinstance(pictures, Iterable | AsyncIterable):
        raise TypeError("predict_many() takes an iterable; use predict() for one picture")
    if "request_id" in options:
        raise TypeError("predict_many() got an unexpected keyword argument 'request_id'")
    for name, number in (("concurrency", concurrency), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an int, not {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")


def progress_bar(pictures: object, enabled: bool) -> AbstractContextManager[Any]:
    """Return a tqdm bar, whose total is the number of pictures if that is known; or a null context.

    Raises:
        ImportError: tqdm is not installed.
    """
    if not enabled:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True requires tqdm: pip install 'convscope[progress]'") from error
    bar = tqdm(total=length_hint(pictures) or None, unit="picture")
    return cast("AbstractContextManager[Any]", bar)


def encode_batch(pictures: list[Picture]) -> list[list[bytes] | Exception]:
    """Return the files of each picture of a batch of `predict_many`, or the exception that encoding it raised."""
    encoded: list[list[bytes] | Exception] = []
    for picture in pictures:
        try:
            encoded.append(encode_pictures([picture]).files)
        except Exception as error:
            encoded.append(error)
    return encoded


def failed_predictions(count: int, call: CallContext, error: ConvscopeError) -> list[Prediction]:
    """Return a prediction with the error for each picture of a failed request."""
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


def merge_predictions(
    encoded: list[list[bytes] | Exception], predictions: list[Prediction], call: CallContext
) -> list[Prediction | Exception]:
    """Return the results of a batch of `predict_many` in the order of its pictures; `predictions` has one per file.

    A picture that cannot be read or encoded holds `BadImage`; any other exception takes the place of the prediction, to
    be raised there.
    """
    remaining = iter(predictions)
    results: list[Prediction | Exception] = []
    for item in encoded:
        if isinstance(item, list):
            results += [next(remaining) for _ in item]
        elif isinstance(item, OSError | ValueError):
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
        raise ImportError("metrics requires prometheus_client: pip install 'convscope[metrics]'") from error
    return Metrics(metrics, "grpc" if urlsplit(url).scheme.startswith("grpc") else "rest")


def _checked_deadline_s(deadline_s: float) -> float:
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, Real):
        raise TypeError(f"deadline_s must be a number of seconds, not {deadline_s!r}")
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        raise ValueError(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S} seconds, not {deadline_s!r}")
    return float(deadline_s)
