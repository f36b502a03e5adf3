"""What both clients are: questions, retries and streams, written once, as coroutines.

`AsyncClient` awaits them. `Client` runs them without a loop, which works because what it puts in the few places left
open - sending, pausing, working side by side - blocks instead of suspending.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import AbstractAsyncContextManager
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from convscope._card_reply import read_card
from convscope._coalescing import Coalesce, check_coalesce
from convscope._exceptions import (
    BadImage,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    Overloaded,
    ServerError,
    belonging_to,
)
from convscope._explaining import Explaining
from convscope._memory import keep_freed_memory
from convscope._pictures import Picture, encode_pictures
from convscope._prediction import Prediction
from convscope._reply import Answer, check_open, read_filters, read_predictions
from convscope._request import (
    build_card_request,
    build_filters_request,
    build_options,
    check_files,
    check_model,
    choose_request_id,
    fill_request,
)
from convscope._retries import Attempts, RetryBudget
from convscope._sharing import Hands, Sharing
from convscope._stream import Crew, check_stream, open_progress, stream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

    from convscope._card import ModelCard
    from convscope._metrics import Metrics
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

LONGEST_DEADLINE_S = 86_400  # A day; what is beyond some hundreds of them, clocks of sockets and of gRPC cannot hold.


class BaseClient(Explaining):
    """The parts of a client that do not depend on how it waits. Its constructor is both clients'."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30.0,
        ca_file: str | os.PathLike[str] | None = None,
        retries: int = 3,
        metrics: bool | CollectorRegistry = False,
        coalesce: Coalesce = "auto",
    ) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise TypeError(f"retries must be a whole number, not {retries!r}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, not {retries}")
        self.url = url
        self.deadline_s = _checked_deadline_s(deadline_s)
        self.retries = retries
        check_coalesce(coalesce)
        keep_freed_memory()
        self._budget = RetryBudget()
        self._closed = False
        self._metrics = None if metrics is False else _open_metrics(metrics, url)
        self._open(api_key, None if ca_file is None else os.fspath(ca_file))
        self._sharing = None if coalesce == "off" else Sharing(coalesce, self._send, self._hands())

    @property
    def retries_made(self) -> int:
        """How many requests this client has sent again so far."""
        return self._budget.retries

    @abstractmethod
    def _open(self, api_key: str | None, ca_file: str | None) -> None:
        """Make the transport for the url."""

    @abstractmethod
    def _hands(self) -> Hands:
        """Return what works on shared requests."""

    @abstractmethod
    async def _carry(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request once; see `Transport.send`."""

    @abstractmethod
    async def _pause(self, seconds: float) -> None:
        """Wait before a retry."""

    async def _encode(self, pictures: list[Picture]) -> list[list[bytes] | Exception]:
        """Turn each picture of a stream into files, or into what is wrong with it."""
        encoded: list[list[bytes] | Exception] = []
        for picture in pictures:
            try:
                encoded.append(encode_pictures([picture]).files)
            except Exception as error:
                encoded.append(error)
        return encoded

    @abstractmethod
    def _crew(self, concurrency: int) -> AbstractAsyncContextManager[Crew[list[Prediction]]]:
        """Open what works on several requests side by side."""

    async def _send(
        self,
        request: PredictRequest,
        model: str,
        version: str | None,
        deadline_s: float | None,
        *,
        retries: int | None = None,
        shared: bool = False,
    ) -> Answer:
        """Send a request until it is answered or the failure is final; a worker's is, to a request that is shared."""
        deadline_s = self._check(model, version, deadline_s)
        attempts = Attempts(self.retries if retries is None else retries, deadline_s=deadline_s, budget=self._budget)
        while True:
            began = time.perf_counter()
            try:
                reply = await self._carry(request, model=model, version=version, deadline_s=attempts.left_s())
                check_open(reply)  # Over HTTP the headers were heard, too.
            except ConvscopeError as error:
                if self._closed and isinstance(error, ConnectError):
                    raise ConnectError(f"no connection to {self.url}: the client was closed") from error
                final = self._closed or (shared and isinstance(error, ServerError))
                wait_s = None if final else attempts.wait_s(error)
                if wait_s is None:
                    raise
            else:
                self._budget.put()
                return Answer(reply, time.perf_counter() - began, request.request_id, len(request.pictures))
            await self._pause(wait_s)
            self._check(model, version, deadline_s)
            self._budget.count()
            if self._metrics is not None:
                self._metrics.count_retry(model)

    async def _ask(
        self,
        files: list[bytes],
        asked: bytes,
        model: str,
        version: str | None,
        deadline_s: float | None,
        *,
        request_id: str | None = None,
        timing: bool = False,
    ) -> list[Prediction]:
        """Ask about the picture files of one question."""
        sharing = self._sharing if request_id is None else None  # Who names a request looks for it in the logs.
        request_id = choose_request_id(request_id)
        with belonging_to(request_id):
            check_files(files)
            deadline_s = self._check(model, version, deadline_s)
            if not files:
                return []
            if sharing is None:
                asking = self._send(fill_request(asked, files, request_id), model, version, deadline_s)
            else:
                asking = sharing.ask(files, asked, model, version, deadline_s, request_id)
            answer = await (asking if self._metrics is None else self._metrics.watch(asking, model))
            reply, total_s, request_id, sent, own = answer
            return read_predictions(reply, sent, request_id=request_id, total_s=total_s if timing else None, own=own)

    async def _predict(
        self,
        pictures: Picture | Iterable[Picture],
        model: str,
        *,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Prediction | list[Prediction]:
        files, many = encode_pictures(pictures)
        asked = build_options(timing=timing or self._metrics is not None, **options)
        predictions = await self._ask(files, asked, model, version, deadline_s, request_id=request_id, timing=timing)
        if many:
            return predictions
        [prediction] = predictions
        if prediction.error is not None:
            raise prediction.error
        return prediction

    def _predict_many(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        model: str,
        *,
        concurrency: int,
        batch: int,
        progress: bool,
        version: str | None = None,
        deadline_s: float | None = None,
        timing: bool = False,
        **options: Any,
    ) -> AsyncGenerator[Prediction, None]:
        check_stream(pictures, concurrency=concurrency, batch=batch)
        if "request_id" in options:
            raise TypeError("predict_many gives each request an id of its own; request_id is for a single one")
        self._check(model, version, deadline_s)
        # Once for all; what is wrong with them is said before anything is read.
        asked = build_options(timing=timing or self._metrics is not None, **options)

        def failed(error: ConvscopeError) -> Prediction:
            said, asked_of = error.request_id or "", version or ""
            return Prediction(model=model, version=asked_of, engine="", device="", request_id=said, error=error)

        async def ask(group: list[Picture]) -> list[Prediction | Exception]:
            encoded = await self._encode(group)
            files = [file for item in encoded if isinstance(item, list) for file in item]
            try:
                predictions = await self._ask(files, asked, model, version, deadline_s, timing=timing)
            except ConvscopeError as error:  # Each picture holds it.
                predictions = [failed(error) for _ in files]
            results: list[Prediction | Exception] = []
            for item in encoded:
                if isinstance(item, list):
                    results += predictions[: len(item)]
                    del predictions[: len(item)]
                elif isinstance(item, ValueError):
                    rejected = BadImage(str(item))
                    rejected.__cause__ = item
                    results.append(failed(rejected))
                else:
                    results.append(item)
            return results

        return stream(
            pictures, ask, crew=self._crew, concurrency=concurrency, batch=batch, bar=open_progress(pictures, progress)
        )

    async def _model_card(
        self,
        model: str,
        version: str | None,
        deadline_s: float | None,
        request_id: str | None,
        *,
        retries: int | None = None,
    ) -> ModelCard:
        request_id = choose_request_id(request_id)
        with belonging_to(request_id):
            request = build_card_request(request_id)
            answer = await self._send(request, model, version, deadline_s, retries=retries)
            return read_card(answer.reply, request_id=request_id)

    async def _filters(
        self, model: str, layer: str, version: str | None, deadline_s: float | None, request_id: str | None
    ) -> NDArray[np.float32]:
        request_id = choose_request_id(request_id)
        with belonging_to(request_id):
            answer = await self._send(build_filters_request(layer, request_id), model, version, deadline_s)
            return read_filters(answer.reply, request_id=request_id)

    async def _ready(self, model: str, version: str | None, deadline_s: float | None, request_id: str | None) -> bool:
        try:
            await self._model_card(model, version, deadline_s, request_id, retries=0)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    def _check(self, model: str, version: str | None, deadline_s: float | None) -> float:
        """Return a question's deadline, once it can be asked."""
        if self._closed:
            raise RuntimeError("this client is closed")
        check_model(model, version)
        return self.deadline_s if deadline_s is None else _checked_deadline_s(deadline_s)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        kind = type(self).__name__
        raise TypeError(
            f"{kind} cannot be pickled or copied: it holds open connections and threads or tasks, and a pickle would "
            f"hold the API key in clear text. Create one {kind} in each process"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def _open_metrics(metrics: bool | CollectorRegistry, url: str) -> Metrics:
    """Open what counts a client's requests."""
    try:
        from convscope._metrics import Metrics
    except ImportError as error:
        raise ImportError(
            "metrics are kept by prometheus_client, which cannot be imported: pip install 'convscope[metrics]'"
        ) from error
    return Metrics(metrics, "grpc" if urlsplit(url).scheme.startswith("grpc") else "rest")


def _checked_deadline_s(deadline_s: float) -> float:
    """Return a deadline, once it is one."""
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, Real):
        raise TypeError(f"deadline_s must be a number of seconds, not {deadline_s!r}")
    if not 0 < deadline_s <= LONGEST_DEADLINE_S:
        raise ValueError(f"deadline_s must be above 0 and at most {LONGEST_DEADLINE_S} seconds, not {deadline_s!r}")
    return float(deadline_s)
