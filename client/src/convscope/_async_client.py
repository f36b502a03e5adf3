"""The asyncio client: the methods of `Client`, awaited."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Unpack, overload

from convscope._base import (
    BaseClient,
    CallContext,
    Result,
    add_notes,
    check_predict_many,
    encode_batch,
    failed_predictions,
    listed_models,
    merge_predictions,
    only_result,
    progress_bar,
)
from convscope._batching import map_batches_async
from convscope._exceptions import (
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    ServerError,
    attach_request_id,
)
from convscope._options import ExplainOptions, PredictManyOptions, PredictOptions, ServedModel
from convscope._pictures import EncodablePicture, Picture, Tensor, encode_pictures
from convscope._reply import TimedReply, check_edits, read_card, read_explanations, read_filters, read_predictions
from convscope._request import build_card_request, build_filters_request, request_with_pictures
from convscope._retries import Attempts
from convscope._transport import AsyncTransport, Backend, open_async_transport

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

    from convscope._card import ModelCard
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction
    from convscope._wire.convscope_pb2 import PredictRequest


class AsyncClient(BaseClient):
    """Asyncio client for a convscope server. Use it in an `async with`, or await `close()`.

    Arguments, methods, results and exceptions are those of `Client`. It belongs to the event loop in which it is first
    used. Files are read and images encoded on the event loop; pass bytes if that blocks too long.

    Args:
        backend: HTTP library for `http` and `https`: `"httpx"`, or `"aiohttp"` (through httpx-aiohttp, extra
            `convscope[aiohttp]`), which uses less CPU time per call; see docs/decisions/0010-client-on-httpx.md.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30.0,
        ca_file: str | os.PathLike[str] | None = None,
        retries: int = 3,
        metrics: bool | CollectorRegistry = False,
        coalesce: str | None = None,
        transport: AsyncTransport | None = None,
        backend: Backend = "httpx",
    ) -> None:
        super().__init__(url, deadline_s=deadline_s, retries=retries, metrics=metrics, coalesce=coalesce)
        path = None if ca_file is None else os.fspath(ca_file)
        self._transport = (
            open_async_transport(url, api_key=api_key, ca_file=path, backend=backend)
            if transport is None
            else transport
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    @overload  # str is also Iterable[str]; this overload must come first.
    async def predict(  # type: ignore[overload-overlap]
        self, pictures: EncodablePicture, *, model: str, **options: Unpack[PredictOptions]
    ) -> Prediction: ...

    @overload  # One picture or several, depending on ndim, which types cannot express.
    async def predict(
        self, pictures: NDArray[Any] | Tensor, *, model: str, **options: Unpack[PredictOptions]
    ) -> Any: ...

    @overload
    async def predict(
        self, pictures: Iterable[Picture], *, model: str, **options: Unpack[PredictOptions]
    ) -> list[Prediction]: ...

    async def predict(
        self, pictures: Picture | Iterable[Picture], *, model: str, **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction]:
        """Return the class scores, and the requested maps, of one picture or several; see `Client.predict`."""
        files, is_list = encode_pictures(pictures)
        call, template = self._new_request(model, options)
        predictions = await self._request_results(read_predictions, files, template, call)
        return predictions if is_list else only_result(predictions)

    def predict_many(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        *,
        model: str,
        concurrency: int = 8,
        batch: int = 1,
        progress: bool = False,
        **options: Unpack[PredictManyOptions],
    ) -> AsyncGenerator[Prediction, None]:
        """Predict for any number of pictures, several requests at a time; see `Client.predict_many`.

        The iterable may be asynchronous. One task reads it, and predictions are yielded meanwhile. Leaving the loop
        early cancels that task and the requests in progress: at once under `contextlib.aclosing`, otherwise when the
        generator is garbage-collected.
        """
        check_predict_many(pictures, options, concurrency=concurrency, batch=batch)
        checked, template = self._new_request(model, options, many=True)

        async def predict_batch(group: list[Picture]) -> list[Prediction | Exception]:
            encoded = encode_batch(group)
            files = [file for item in encoded if isinstance(item, list) for file in item]
            call = self._new_call(model, checked.version, checked.deadline_s, timing=checked.timing)
            predictions: list[Prediction] = []
            if files:
                try:
                    predictions = await self._request_results(read_predictions, files, template, call)
                except ConvscopeError as error:
                    predictions = failed_predictions(len(files), call, error)
            return merge_predictions(encoded, predictions, call)

        bar = progress_bar(pictures, progress)
        return map_batches_async(pictures, predict_batch, concurrency=concurrency, batch=batch, bar=bar)

    @overload  # str is also Iterable[str]; this overload must come first.
    async def explain(  # type: ignore[overload-overlap]
        self, pictures: EncodablePicture, *, model: str, **options: Unpack[ExplainOptions]
    ) -> Explanation: ...

    @overload  # One picture or several, depending on ndim, which types cannot express.
    async def explain(
        self, pictures: NDArray[Any] | Tensor, *, model: str, **options: Unpack[ExplainOptions]
    ) -> Any: ...

    @overload
    async def explain(
        self, pictures: Iterable[Picture], *, model: str, **options: Unpack[ExplainOptions]
    ) -> list[Explanation]: ...

    async def explain(
        self, pictures: Picture | Iterable[Picture], *, model: str, **options: Unpack[ExplainOptions]
    ) -> Explanation | list[Explanation]:
        """Explain a class score: return a heat map of what contributes to it; see `Client.explain`."""
        files, is_list = encode_pictures(pictures)
        call, template = self._new_explain_request(model, options)
        explanations = await self._request_results(read_explanations, files, template, call)
        return explanations if is_list else only_result(explanations)

    async def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Return the model card; see `Client.model_card`."""
        call = self._new_call(model, version, deadline_s, request_id)
        with attach_request_id(call.request_id):
            result = await self._send(build_card_request(call.request_id), call)
            return read_card(result.reply, request_id=call.request_id)

    async def models(self, *, deadline_s: float | None = None, request_id: str | None = None) -> list[ServedModel]:
        """Return the models of the server; see `Client.models`."""
        call = self._new_call(None, None, deadline_s, request_id)
        error = None
        with attach_request_id(call.request_id):
            try:
                await self._send(build_card_request(call.request_id), call)
            except ModelNotFound as answer:
                error = answer
            return listed_models(error)

    async def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the filters of the convolution behind a layer; see `Client.filters`."""
        call = self._new_call(model, version, deadline_s, request_id)
        with attach_request_id(call.request_id):
            result = await self._send(build_filters_request(layer, call.request_id), call)
            return read_filters(result.reply, request_id=call.request_id)

    async def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Return whether the model is ready; see `Client.ready`."""
        call = self._new_call(model, version, deadline_s, request_id)
        try:
            with attach_request_id(call.request_id):
                result = await self._send(build_card_request(call.request_id), call, max_retries=0)
                read_card(result.reply, request_id=call.request_id)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. Calls in other tasks raise ConnectError."""
        self._check_loop()
        self._closed = True
        await self._transport.aclose()

    async def _request_results(
        self, read: Callable[..., list[Result]], files: list[bytes], template: PredictRequest, call: CallContext
    ) -> list[Result]:
        """Send picture files in one request, record it in the metrics, and convert the reply with `read`."""
        with attach_request_id(call.request_id):
            request = request_with_pictures(template, files, call.request_id)
            if not files:
                return []
            started = time.perf_counter()
            try:
                result = await self._send(request, call)
            except BaseException as error:
                self._observe(call.model, started, error)
                raise
            self._observe(call.model, started, result)
            check_edits(result.reply, len(template.edits))
            total_s = result.total_s if call.timing else None
            results = read(result.reply, len(files), request_id=call.request_id, total_s=total_s)
            return add_notes(results, files)

    async def _send(self, request: PredictRequest, call: CallContext, *, max_retries: int | None = None) -> TimedReply:
        """Send a request until there is a reply or the error is final."""
        max_retries = self.retries if max_retries is None else max_retries
        attempts = Attempts(max_retries, deadline_s=call.deadline_s, budget=self._budget)
        while True:
            started = time.perf_counter()
            try:
                reply = await self._transport.asend(
                    request, model=call.model, version=call.version, deadline_s=attempts.remaining_s()
                )
            except ConvscopeError as error:
                wait_s = self._wait_or_raise(error, attempts)
            else:
                self._budget.record_success()
                return TimedReply(reply, time.perf_counter() - started)
            await asyncio.sleep(wait_s)
            self._count_retry(call.model)

    def _raise_if_closed(self) -> None:
        self._check_loop()
        super()._raise_if_closed()

    def _check_loop(self) -> None:
        """Raise RuntimeError in another event loop than the first one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # `predict_many` may be called before a loop runs.
            return
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("this AsyncClient was first used in another event loop; create one client per loop")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
