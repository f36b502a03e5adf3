"""The blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
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
from convscope._many import check_stream, map_batches, open_progress
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
from convscope._transport import Transport, open_transport

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


class Client(BaseClient):
    """Calls a convscope service. Safe to use from several threads; close it, or use it in a `with`.

    Nothing is connected before the first call. The environment's proxies are used, except for this machine itself
    (`localhost`, `127.0.0.1`, ...). In a forked child, the client makes connections of its own.

    Args:
        url: `http://host:port`, `https://host`, `grpc://host:port` or `grpcs://host:port`.
        api_key: Sent with every request as `x-api-key`. Over `http` and `grpc` anybody on the way can read it.
        deadline_s: Seconds a call may take, unless the call has a deadline of its own.
        ca_file: PEM file of the certificates to trust instead of the usual ones, for `https` and `grpcs`.
        retries: How often a request is sent again, within its deadline, after no connection came about or it broke,
            the server took no more work, its worker died, or a gateway gave up waiting for it; 0 for never. All calls
            of a client share a budget of retries, so that an outage is not met with several times the requests.
        metrics: Whether to keep Prometheus metrics of the predictions: True in prometheus_client's own registry, or a
            `CollectorRegistry`. Every request then asks for its timing.
        coalesce: Deprecated and ignored; see `predict_many` for a way to send many pictures in a request.
        transport: Takes the place of the connection to the service: a `convscope.testing.FakeTransport`.

    Raises:
        ImportError: `metrics` without prometheus_client; says how to get it.
        OSError: `ca_file` cannot be read.
        TypeError: `retries` is no whole number, or `metrics` no registry.
        ValueError: An argument cannot be used.
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
        transport: Transport | None = None,
    ) -> None:
        super().__init__(url, deadline_s=deadline_s, retries=retries, metrics=metrics, coalesce=coalesce)
        path = None if ca_file is None else os.fspath(ca_file)
        self._open: Callable[[], Transport] = lambda: (
            open_transport(url, api_key=api_key, ca_file=path) if transport is None else transport
        )
        self._transport = self._open()
        self._process = os.getpid()
        self._inherited: list[Transport] = []

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    def predict(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[PredictOptions],
    ) -> Prediction: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    def predict(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[PredictOptions],
    ) -> Any: ...

    @overload
    def predict(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[PredictOptions],
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
        """Return what a model sees in one picture or several.

        Args:
            pictures: A picture, or an iterable of pictures, which are sent in one request. A picture is a path, the
                bytes of a PNG, JPEG, WebP or .npy file, a PIL image, or an array (H, W) or (H, W, C), uint8 0..255 or
                float32 0..1. An array (N, H, W, C) is N pictures.
            model: The model's name.
            version: Its version; None for the server's default.
            layers: Layers whose maps to return: names, one name, or `"all"`; none for scores only.
            top_k: Classes to return, most probable first; 0 for all.
            map_dtype: The dtype in which maps are sent: `"float32"`, `"float16"` (half the bytes) or `"uint8"` (a
                quarter, affine per channel). They always arrive as float32.
            pool: Average each map down to pool x pool cells; 1 gives one number per channel.
            channels: A sequence of channel numbers, or an int n for the n strongest; None for all.
            deadline_s: Seconds the call may take; None for the client's own.
            timing: Whether to ask for the timing of the request, which is then in `Prediction.timing`.
            request_id: The id of the request in the service's log: 1 to 64 letters, digits, `.`, `_` and `-`; None to
                make one. A retry has the same id.

        Returns:
            A prediction for a picture; for several pictures a list in their order. In a list, a picture that failed
            holds its error, which is raised when its result is read.

        Raises:
            ConvscopeError: The one picture failed, or the whole request did; see the tree in the README.
            OSError: A path cannot be read.
            TypeError: Something is no picture, or an option has the wrong type.
            ValueError: An array or an option is out of range.
        """
        files, many = encode_pictures(pictures)
        options = self._options(
            layers=layers, top_k=top_k, map_dtype=map_dtype, pool=pool, channels=channels, timing=timing
        )
        call = self._call(model, version, deadline_s, request_id)
        predictions = self._predict(files, options, call, timing=timing)
        return predictions if many else one_of(predictions)

    def predict_many(
        self,
        pictures: Iterable[Picture],
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
    ) -> Generator[Prediction, None, None]:
        """Return what a model sees in any number of pictures, with several requests at a time.

        Nothing is read or sent before the first prediction is taken. At most 2 x `concurrency` x `batch` items are read
        ahead of the predictions taken, so the iterable may be endless. No prediction is returned while the iterable is
        waited for. Leaving the loop early (or closing the generator) waits for the requests under way.

        Args:
            pictures: An iterable of pictures, as in `predict`. An array (N, H, W, C) in it gives N predictions.
            model: The model's name.
            concurrency: Requests under way at a time.
            batch: Items of the iterable in one request.
            progress: Whether to draw a progress bar, with tqdm.
            version: As in `predict`, like all below.
            layers: Layers whose maps to return.
            top_k: Classes to return.
            map_dtype: The dtype in which maps are sent.
            pool: Average each map down to pool x pool cells.
            channels: Which channels to return.
            deadline_s: Seconds each request may take.
            timing: Whether to ask for the timing of each request.

        Returns:
            A generator of predictions in the order of the pictures. A picture that failed holds its error, and so does
            every picture of a request that failed; the others are not affected.

        Raises:
            ImportError: tqdm is not installed; says how to get it.
            OSError: A path cannot be read. It ends the generator after the predictions of the pictures before, and so
                does any exception that the iterable raises.
            TypeError: As in `predict`, or `pictures` is a single picture.
            ValueError: As in `predict`.
        """
        check_stream(pictures, concurrency=concurrency, batch=batch)
        self._call(model, version, deadline_s)
        options = self._options(
            layers=layers, top_k=top_k, map_dtype=map_dtype, pool=pool, channels=channels, timing=timing
        )

        def predict(group: list[Picture]) -> list[Prediction | Exception]:
            encoded = encode_each(group)
            files = [file for item in encoded if isinstance(item, list) for file in item]
            call = self._call(model, version, deadline_s)
            predictions: list[Prediction] = []
            if files:
                try:
                    predictions = self._predict(files, options, call, timing=timing)
                except ConvscopeError as error:
                    predictions = failed_predictions(len(files), call, error)
            return merge_predictions(encoded, predictions, call)

        bar = open_progress(pictures, progress)
        return map_batches(pictures, predict, concurrency=concurrency, batch=batch, bar=bar)

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    def explain(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> Explanation: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    def explain(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> Any: ...

    @overload
    def explain(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        **options: Unpack[ExplainOptions],
    ) -> list[Explanation]: ...

    def explain(
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
        """Return which part of a picture a class's score rests on.

        Args:
            pictures: As in `predict`.
            model: The model's name.
            version: Its version; None for the server's default.
            method: `"grad_cam"`, `"cam"` (for networks that end in an average and one linear layer), `"occlusion"`,
                `"input_gradient"`, `"integrated_gradients"`; or `"picture"`, which explains nothing and returns the
                picture as the network saw it.
            layer: grad_cam, cam: layer whose map is used; None for the last one with more than one row and column.
            target: Index of the class to explain; None for each picture's most probable one.
            window: occlusion: height and width of the covered square, in pixels; None for a quarter of the picture.
            step: occlusion: pixels from one square to the next; None for half a square.
            steps: integrated_gradients: points between the baseline and the picture; None for 32.
            picture: Whether to return the picture as the network saw it; `overlay` needs it.
            top_k: Classes to return, as in `predict`.
            map_dtype: The dtype in which the heat is sent, as for maps in `predict`.
            deadline_s: Seconds the call may take; None for the client's own.
            timing: As in `predict`; the work of explaining counts as `forward_s`.
            request_id: As in `predict`.

        Returns:
            An explanation for a picture; for several pictures a list in their order. In a list, a picture that failed
            holds its error, which is raised when its result is read.

        Raises:
            ConvscopeError: The one picture failed, or the whole request did: `BadRequest` if the method does not suit
                the network, or the work is more than the service does for one request.
            OSError: A path cannot be read.
            TypeError: Something is no picture, or an option has the wrong type.
            ValueError: An array or an option is out of range.
        """
        files, many = encode_pictures(pictures)
        explain = build_explain(
            method=method, layer=layer, target=target, window=window, step=step, steps=steps, picture=picture
        )
        options = self._options(top_k=top_k, map_dtype=map_dtype, timing=timing)
        call = self._call(model, version, deadline_s, request_id)
        explanations = self._explain(files, options, explain, call, timing=timing)
        return explanations if many else one_of(explanations)

    def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Return a model's description of itself; the model runs one forward pass for it.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds the call may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            The card.

        Raises:
            ConvscopeError: No card was returned; see the tree in the README.
        """
        call = self._call(model, version, deadline_s, request_id)
        with request_context(call.request_id):
            response = self._send(build_card_request(call.request_id), call)
            return read_card(response.reply, request_id=call.request_id)

    def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the kernels of the convolution that makes a layer's map.

        Args:
            model: The model's name.
            layer: The layer's public name.
            version: The model's version; None for the server's default.
            deadline_s: Seconds the call may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            (C_out, C_in, kernel height, kernel width), float32, read-only: the weights as the network holds them; C_in
            is that of one group. They act on pictures after the card's normalisation; a batch normalisation after the
            convolution is not folded in.

        Raises:
            BadRequest: No two-dimensional convolution makes this layer's map.
            UnknownLayer: The model has no such layer.
            ConvscopeError: No filters were returned; see the tree in the README.
        """
        call = self._call(model, version, deadline_s, request_id)
        with request_context(call.request_id):
            response = self._send(build_filters_request(layer, call.request_id), call)
            return read_filters(response.reply, request_id=call.request_id)

    def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Return whether a model answers now: whether one real forward pass came back. There are no retries.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds the call may take; None for the client's own.
            request_id: The id of the request, as in `predict`.

        Returns:
            True if it does. False if waiting may help: the server cannot be reached, does not answer in time, is full,
            starting or draining, or its worker fails.

        Raises:
            ModelNotFound: The server serves no such model.
            ProtocolError: Something else than a convscope service answered.
            RequestRejected: The service rejected the request, for its API key for example.
        """
        call = self._call(model, version, deadline_s, request_id)
        try:
            with request_context(call.request_id):
                response = self._send(build_card_request(call.request_id), call, retries=0)
                read_card(response.reply, request_id=call.request_id)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. Calls of other threads get a ConnectError."""
        self._closed = True
        self._transport.close()

    def _predict(self, files: list[bytes], options: PredictRequest, call: Call, *, timing: bool) -> list[Prediction]:
        """Predict for picture files in one request."""
        with request_context(call.request_id):
            request = add_pictures(options, files, call.request_id)
            if not files:
                return []
            response = self._send_and_observe(request, call)
            total_s = response.total_s if timing else None
            return read_predictions(response.reply, len(files), request_id=call.request_id, total_s=total_s)

    def _explain(
        self, files: list[bytes], options: PredictRequest, explain: Explain, call: Call, *, timing: bool = False
    ) -> list[Explanation]:
        """Explain picture files in one request."""
        with request_context(call.request_id):
            request = add_pictures(options, files, call.request_id)
            request.explain.CopyFrom(explain)
            if not files:
                return []
            response = self._send_and_observe(request, call)
            total_s = response.total_s if timing else None
            return read_explanations(response.reply, len(files), request_id=call.request_id, total_s=total_s)

    def _send_and_observe(self, request: PredictRequest, call: Call) -> Response:
        """Send a request as `_send` does, and count it in the metrics."""
        started = time.perf_counter()
        try:
            response = self._send(request, call)
        except BaseException as error:
            self._observe(call.model, started, error)
            raise
        self._observe(call.model, started, response)
        return response

    def _send(self, request: PredictRequest, call: Call, *, retries: int | None = None) -> Response:
        """Send a request until a reply comes or the error is final."""
        if self._process != os.getpid():
            self._begin_in_child()
        attempts = Attempts(
            self.retries if retries is None else retries, deadline_s=call.deadline_s, budget=self._budget
        )
        while True:
            started = time.perf_counter()
            try:
                reply = self._transport.send(
                    request, model=call.model, version=call.version, deadline_s=attempts.left_s()
                )
                check_open(reply)
            except ConvscopeError as error:
                wait_s = self._wait_s(error, attempts)
            else:
                self._budget.record_success()
                return Response(reply, time.perf_counter() - started)
            time.sleep(wait_s)
            self._count_retry(call.model)

    def _begin_in_child(self) -> None:
        """Make connections of its own in a forked child. The parent's are kept, as closing them may wait for ever."""
        self._budget.replace_lock()
        self._inherited.append(self._transport)
        self._transport = self._open()
        self._process = os.getpid()  # Last: another thread that comes before this makes connections too, no harm done.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
