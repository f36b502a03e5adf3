"""The client for asyncio: the surface of `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Unpack, overload

from convscope._base import BaseClient
from convscope._pictures import OnePicture, Picture
from convscope._request import Channels, ExplainOptions, MapDtype, Method, Options, OwnOptions
from convscope._stream import Crew
from convscope._tasks import SharedTasks, Tasks
from convscope._transport import open_async_transport

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from convscope._card import ModelCard
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest


class AsyncClient(BaseClient):
    """Asks a convscope service from asyncio; close it, or use it in an `async with`.

    Arguments, methods, results and exceptions are those of `Client`. It belongs to the event loop that it is first used
    in. Paths are read, and PIL images and arrays encoded, in that loop: hand over bytes where that takes too long.
    """

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    async def predict(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[OwnOptions],
    ) -> Prediction: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    async def predict(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[OwnOptions],
    ) -> Any: ...

    @overload
    async def predict(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[OwnOptions],
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
        """Ask what a model sees in one picture or several; see `Client.predict`."""
        return await self._predict(
            pictures,
            model,
            version=version,
            layers=layers,
            top_k=top_k,
            map_dtype=map_dtype,
            pool=pool,
            channels=channels,
            deadline_s=deadline_s,
            timing=timing,
            request_id=request_id,
        )

    def predict_many(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        *,
        model: str,
        concurrency: int = 8,
        batch: int = 1,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Prediction, None]:
        """Ask about any number of pictures, several requests at a time; see `Client.predict_many`.

        The iterable may be an asynchronous one: a single task reads it, and no prediction waits for it. Leaving the
        loop early cancels that, and the requests on their way: at once under `contextlib.aclosing`, else when the event
        loop finds the generator forsaken.
        """
        return self._predict_many(pictures, model, concurrency=concurrency, batch=batch, progress=progress, **options)

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
        """Ask which part of a picture a class's score rests on; see `Client.explain`."""
        return await self._explain(
            pictures,
            model,
            version=version,
            method=method,
            layer=layer,
            target=target,
            window=window,
            step=step,
            steps=steps,
            picture=picture,
            top_k=top_k,
            map_dtype=map_dtype,
            deadline_s=deadline_s,
            timing=timing,
            request_id=request_id,
        )

    async def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Ask a model to describe itself; see `Client.model_card`."""
        return await self._model_card(model, version, deadline_s, request_id)

    async def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Ask for the kernels of the convolution that makes a layer's map; see `Client.filters`."""
        return await self._filters(model, layer, version, deadline_s, request_id)

    async def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Say whether a model answers now; see `Client.ready`."""
        return await self._ready(model, version, deadline_s, request_id)

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._check_loop()
        self._closed = True
        await self._transport.close()
        await self._shared.end()

    def _open(self, api_key: str | None, ca_file: str | None) -> None:
        self._transport = open_async_transport(self.url, api_key=api_key, ca_file=ca_file)
        self._shared = SharedTasks()
        self._loop: asyncio.AbstractEventLoop | None = None

    def _check(self, model: str, version: str | None, deadline_s: float | None) -> float:
        self._check_loop()
        return super()._check(model, version, deadline_s)

    def _check_loop(self) -> None:
        """Refuse another event loop than the first one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # `predict_many` is called before anything is awaited.
            return
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError(
                "this AsyncClient belongs to another event loop, the one it was first used in: make one for each"
            )

    def _hands(self) -> SharedTasks:
        return self._shared

    async def _carry(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        return await self._transport.send(request, model=model, version=version, deadline_s=deadline_s)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @asynccontextmanager
    async def _crew(self, concurrency: int) -> AsyncGenerator[Crew[list[Prediction]], None]:
        tasks = Tasks(concurrency)
        try:
            yield tasks
        finally:
            await tasks.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
