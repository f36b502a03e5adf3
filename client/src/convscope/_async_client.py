"""The client for asyncio: the methods of `Client`, awaited."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Unpack, overload

from convscope._base import BaseClient, Call, encode_each, failed_predictions, merge_predictions, one_of
from convscope._exceptions import (
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    Overloaded,
    ServerError,
    request_context,
)
from convscope._many import check_stream, map_batches_async, open_progress
from convscope._pictures import OnePicture, Picture, encode_pictures
from convscope._reply import Response, check_open, read_card, read_explanations, read_filters, read_predictions
from convscope._request import (
    Channels,
    ExplainOptions,
    MapDtype,
    Method,
    PredictOptions,
    add_pictures,
    build_card_request,
    build_explain,
    build_filters_request,
)
from convscope._retries import Attempts
from convscope._transport import AsyncTransport, Backend, open_async_transport

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

    from convscope._card import ModelCard
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction
    from convscope._wire.convscope_pb2 import Explain, PredictRequest


class AsyncClient(BaseClient):
    """Calls a convscope service from asyncio; close it, or use it in an `async with`.

    Arguments, methods, results and exceptions are those of `Client`. It belongs to the event loop in which it is first
    used. Files are read, and PIL images and arrays encoded, in that loop: pass bytes where that takes too long.

    Args:
        backend: What speaks HTTP below httpx, for `http` and `https`: httpx's own, or `"aiohttp"`, which costs half the
            processor time and needs the extra `convscope[aiohttp]`.
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

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    async def predict(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[PredictOptions],
    ) -> Prediction: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    async def predict(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[PredictOptions],
    ) -> Any: ...

    @overload
    async def predict(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[PredictOptions],
    ) -> list[Prediction]: ...

    async def predict(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        model: str,
        version: str | None = None,
        layers: str | Iterable[str] = (),
        top_k: int = 5,
        map_dtype: MapDtype = "float32",
        pool: int | None = None,
        channels: Channels | None = None,
        deadline_s: float | None = None,
        timing: bool = False,
        request_id: str | None = None,
    ) -> Prediction | list[Prediction]:
        """Return what a model sees in one picture or several; see `Client.predict`."""
        files, many = encode_pictures(pictures)
        options = self._options(
            layers=layers, top_k=top_k, map_dtype=map_dtype, pool=pool, channels=channels, timing=timing
        )
        call = self._call(model, version, deadline_s, request_id)
        predictions = await self._predict(files, options, call, timing=timing)
        return predictions if many else one_of(predictions)

    def predict_many(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        *,
        model: str,
        concurrency: int = 8,
        batch: int = 1,
        progress: bool = False,
        version: str | None = None,
        layers: str | Iterable[str] = (),
        top_k: int = 5,
        map_dtype: MapDtype = "float32",
        pool: int | None = None,
        channels: Channels | None = None,
        deadline_s: float | None = None,
        timing: bool = False,
    ) -> AsyncGenerator[Prediction, None]:
        """Return what a model sees in any number of pictures; see `Client.predict_many`.

        The iterable may be an asynchronous one. A single task reads it, and predictions are returned while it is waited
        for. Leaving the loop early cancels that task and the requests under way: at once under `contextlib.aclosing`,
        else when the event loop finds the generator abandoned.
        """
        check_stream(pictures, concurrency=concurrency, batch=batch)
        self._call(model, version, deadline_s)
        options = self._options(
            layers=layers, top_k=top_k, map_dtype=map_dtype, pool=pool, channels=channels, timing=timing
        )

        async def predict(group: list[Picture]) -> list[Prediction | Exception]:
            encoded = encode_each(group)
            files = [file for item in encoded if isinstance(item, list) for file in item]
            call = self._call(model, version, deadline_s)
            predictions: list[Prediction] = []
            if files:
                try:
                    predictions = await self._predict(files, options, call, timing=timing)
                except ConvscopeError as error:
                    predictions = failed_predictions(len(files), call, error)
            return merge_predictions(encoded, predictions, call)

        bar = open_progress(pictures, progress)
        return map_batches_async(pictures, predict, concurrency=concurrency, batch=batch, bar=bar)

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    async def explain(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> Explanation: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    async def explain(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> Any: ...

    @overload
    async def explain(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> list[Explanation]: ...

    async def explain(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        model: str,
        version: str | None = None,
        method: Method = "grad_cam",
        layer: str | None = None,
        target: int | None = None,
        window: int | None = None,
        step: int | None = None,
        steps: int | None = None,
        picture: bool = True,
        top_k: int = 5,
        map_dtype: MapDtype = "float32",
        deadline_s: float | None = None,
        timing: bool = False,
        request_id: str | None = None,
    ) -> Explanation | list[Explanation]:
        """Return which part of a picture a class's score rests on; see `Client.explain`."""
        files, many = encode_pictures(pictures)
        explain = build_explain(
            method=method, layer=layer, target=target, window=window, step=step, steps=steps, picture=picture
        )
        options = self._options(top_k=top_k, map_dtype=map_dtype, timing=timing)
        call = self._call(model, version, deadline_s, request_id)
        explanations = await self._explain(files, options, explain, call, timing=timing)
        return explanations if many else one_of(explanations)

    async def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Return a model's description of itself; see `Client.model_card`."""
        call = self._call(model, version, deadline_s, request_id)
        with request_context(call.request_id):
            response = await self._send(build_card_request(call.request_id), call)
            return read_card(response.reply, request_id=call.request_id)

    async def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the kernels of the convolution that makes a layer's map; see `Client.filters`."""
        call = self._call(model, version, deadline_s, request_id)
        with request_context(call.request_id):
            response = await self._send(build_filters_request(layer, call.request_id), call)
            return read_filters(response.reply, request_id=call.request_id)

    async def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Return whether a model answers now; see `Client.ready`."""
        call = self._call(model, version, deadline_s, request_id)
        try:
            with request_context(call.request_id):
                response = await self._send(build_card_request(call.request_id), call, retries=0)
                read_card(response.reply, request_id=call.request_id)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. Calls of other tasks get a ConnectError."""
        self._check_loop()
        self._closed = True
        await self._transport.aclose()

    async def _predict(
        self, files: list[bytes], options: PredictRequest, call: Call, *, timing: bool
    ) -> list[Prediction]:
        """Predict for picture files in one request."""
        with request_context(call.request_id):
            request = add_pictures(options, files, call.request_id)
            if not files:
                return []
            response = await self._send_and_observe(request, call)
            total_s = response.total_s if timing else None
            return read_predictions(response.reply, len(files), request_id=call.request_id, total_s=total_s)

    async def _explain(
        self, files: list[bytes], options: PredictRequest, explain: Explain, call: Call, *, timing: bool = False
    ) -> list[Explanation]:
        """Explain picture files in one request."""
        with request_context(call.request_id):
            request = add_pictures(options, files, call.request_id)
            request.explain.CopyFrom(explain)
            if not files:
                return []
            response = await self._send_and_observe(request, call)
            total_s = response.total_s if timing else None
            return read_explanations(response.reply, len(files), request_id=call.request_id, total_s=total_s)

    async def _send_and_observe(self, request: PredictRequest, call: Call) -> Response:
        """Send a request as `_send` does, and count it in the metrics."""
        started = time.perf_counter()
        try:
            response = await self._send(request, call)
        except BaseException as error:
            self._observe(call.model, started, error)
            raise
        self._observe(call.model, started, response)
        return response

    async def _send(self, request: PredictRequest, call: Call, *, retries: int | None = None) -> Response:
        """Send a request until a reply comes or the error is final."""
        attempts = Attempts(
            self.retries if retries is None else retries, deadline_s=call.deadline_s, budget=self._budget
        )
        while True:
            started = time.perf_counter()
            try:
                reply = await self._transport.asend(
                    request, model=call.model, version=call.version, deadline_s=attempts.left_s()
                )
                check_open(reply)
            except ConvscopeError as error:
                wait_s = self._wait_s(error, attempts)
            else:
                self._budget.record_success()
                return Response(reply, time.perf_counter() - started)
            await asyncio.sleep(wait_s)
            self._count_retry(call.model)

    def _check_open(self) -> None:
        self._check_loop()
        super()._check_open()

    def _check_loop(self) -> None:
        """Raise RuntimeError in another event loop than the first one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # `predict_many` may be called before a loop runs.
            return
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError(
                "this AsyncClient belongs to another event loop, the one it was first used in: make one for each"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
