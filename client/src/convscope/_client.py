"""The blocking client: one picture or many in, predictions out, over whichever transport the URL names."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Unpack, overload

from convscope._blocking import Blocking, SharedThreads, drain, finish, open_threads
from convscope._explain_client import ExplainClient
from convscope._pictures import OnePicture, Picture
from convscope._request import Channels, MapDtype, Options, OwnOptions
from convscope._transport import open_transport

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from convscope._card import ModelCard
    from convscope._prediction import Prediction
    from convscope._stream import Crew
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest


class Client(ExplainClient):
    """Asks a convscope service. Safe to use from several threads; close it, or use it in a `with`.

    Nothing is connected before the first question. Proxies of the environment are used, except for this machine
    itself (`localhost`, `127.0.0.1`, ...).

    Args:
        url: `http://host:port`, `https://host`, `grpc://host:port` or `grpcs://host:port`.
        api_key: Sent with every request as `x-api-key`. Over `http` and `grpc` anybody on the way can read it.
        deadline_s: Seconds a question may take, unless it says otherwise itself.
        ca_file: PEM file of the certificates to trust instead of the usual ones, for `https` and `grpcs`.
        retries: How often a question is asked again, within its deadline, when no connection came about or it broke,
            the server takes no more work now, its worker died, or a gateway gave up waiting for it; 0 for never. All
            questions of a client share a budget, so that an outage is not met with several times the requests.
        metrics: Whether to keep Prometheus metrics of the predictions: True in prometheus_client's own registry, or a
            `CollectorRegistry`. Every reply is then asked for its timing.
        coalesce: Whether questions in flight together, that ask the same of other pictures, travel in one request:
            `"auto"`, where two requests are on their way already; `"on"`, always, after a few milliseconds; `"off"`.

    Raises:
        ImportError: `metrics` without prometheus_client; says how to get it.
        OSError: `ca_file` cannot be read.
        TypeError: `retries` is no whole number, or `metrics` no registry.
        ValueError: An argument cannot be used, or `coalesce` is none of the three.
    """

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    def predict(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[OwnOptions],
    ) -> Prediction: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    def predict(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[OwnOptions],
    ) -> Any: ...

    @overload
    def predict(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[OwnOptions],
    ) -> list[Prediction]: ...

    def predict(
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
        """Ask what a model sees in one picture or several.

        Args:
            pictures: A picture, or an iterable of them, which travel in one request. A picture is a path, the bytes
                of a PNG, JPEG, WebP or .npy file, a PIL image, or an array (H, W) or (H, W, C), uint8 0..255 or
                float32 0..1. An array (N, H, W, C) is N pictures.
            model: The model's name.
            version: Its version; None for the server's default.
            layers: Layers whose maps to return: names, one name, or `"all"`; none for scores only.
            top_k: Classes to return, most probable first; 0 for all.
            map_dtype: What the maps travel as: `"float32"`, `"float16"` (half the bytes) or `"uint8"` (a quarter,
                affine per channel). They arrive as float32 whichever it is.
            pool: Average each map down to pool x pool cells; 1 gives one number a channel.
            channels: A sequence of channel numbers, or an int n for the n strongest; None for all.
            deadline_s: Seconds this question may take; None for the client's own.
            timing: Whether to ask where the time goes: `Prediction.timing` then tells.
            request_id: The id of the request, from which the service's log can tell it: 1 to 64 letters, digits,
                `.`, `_` and `-`; None to make one. A retry has the same.

        Returns:
            A prediction for a picture, a list in the order given for several. In a list a picture that failed holds
            its error, raised when its result is read.

        Raises:
            ConvscopeError: The one picture failed, or the request as a whole did; see the tree in the README.
            OSError: A path cannot be read.
            TypeError: Something is no picture, or an option is of another type.
            ValueError: An array or an option is out of range.
        """
        return finish(
            self._predict(
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
        )

    def predict_many(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        concurrency: int = 8,
        batch: int = 1,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> Generator[Prediction, None, None]:
        """Ask about any number of pictures, several requests at a time.

        Nothing is read or sent before the first prediction is asked for. At most 2 x `concurrency` x `batch` pictures
        are read ahead of the predictions taken, so the iterable may be endless; while it is waited for, no prediction
        comes. Leaving the loop early (or closing the generator) waits for the requests on their way.

        Args:
            pictures: An iterable of pictures, as in `predict`; one that is several, an array (N, H, W, C), gives N
                predictions.
            model: The model's name.
            concurrency: Requests on their way at a time.
            batch: Items of the iterable that travel in one request.
            progress: Whether to draw a progress bar, with tqdm.
            **options: As in `predict`, but for `request_id`: each request has one of its own. `deadline_s` is for each
                request.

        Returns:
            A generator of predictions in the order of the pictures. One that failed holds its error, and so do all of
            a request that failed as a whole; the others come nevertheless. A picture that cannot be encoded, for which
            `predict` raises ValueError, holds a `BadImage`.

        Raises:
            ImportError: tqdm is not installed; says how to get it.
            OSError: A path cannot be read; ends the generator, at its place. So does whatever the iterable raises.
            TypeError: As in `predict`, and where `pictures` is a single one.
            ValueError: As in `predict`, but for pictures.
        """
        return drain(
            self._predict_many(pictures, model, concurrency=concurrency, batch=batch, progress=progress, **options)
        )

    def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Ask a model to describe itself; it runs one forward pass to do so.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds this question may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            The card.

        Raises:
            ConvscopeError: No card came; see the tree in the README.
        """
        return finish(self._model_card(model, version, deadline_s, request_id))

    def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Ask for the kernels of the convolution that makes a layer's map.

        Args:
            model: The model's name.
            layer: The layer's public name.
            version: The model's version; None for the server's default.
            deadline_s: Seconds this question may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            (C_out, C_in, kernel height, kernel width), float32, read-only: the weights as the network holds them; C_in
            is that of one group. They act on pictures after the card's normalisation; a batch normalisation after the
            convolution is not folded in.

        Raises:
            BadRequest: No two-dimensional convolution makes this layer's map.
            UnknownLayer: The model has no such layer.
            ConvscopeError: No filters came; see the tree in the README.
        """
        return finish(self._filters(model, layer, version, deadline_s, request_id))

    def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Say whether a model answers now: one real forward pass came back. Asks once.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds this question may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            True if it does. False where waiting may help: the server cannot be reached, does not answer in time, is
            full, starting or draining, or its worker fails.

        Raises:
            ModelNotFound: The server serves no such model.
            ProtocolError: What answers is no convscope service.
            RequestRejected: The service refused, the API key for example.
        """
        return finish(self._ready(model, version, deadline_s, request_id))

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._closed = True
        self._shared.close()
        self._transport.close()

    def _open(self, api_key: str | None, ca_file: str | None) -> None:
        self._transport = open_transport(self.url, api_key=api_key, ca_file=ca_file)
        self._shared = SharedThreads()

    def _hands(self) -> SharedThreads:
        return self._shared

    async def _carry(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        await Blocking()
        return self._transport.send(request, model=model, version=version, deadline_s=deadline_s)

    async def _pause(self, seconds: float) -> None:
        await Blocking()
        time.sleep(seconds)

    async def _encode(self, pictures: list[Picture]) -> list[list[bytes] | Exception]:
        if not all(isinstance(picture, bytes) for picture in pictures):
            await Blocking()  # A file may come from far away, and compressing an array takes its time.
        return await super()._encode(pictures)

    def _crew(self, concurrency: int) -> AbstractAsyncContextManager[Crew[list[Prediction]]]:
        return open_threads(concurrency)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
