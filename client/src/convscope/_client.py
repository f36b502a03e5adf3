"""The synchronous client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
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
from convscope._batching import map_batches
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
from convscope._transport import Transport, open_transport

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

    from convscope._card import ModelCard
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction
    from convscope._wire.convscope_pb2 import PredictRequest


class Client(BaseClient):
    """Synchronous client for a convscope server. Thread-safe. Use it as a context manager, or call `close()`.

    The first call connects. Proxies from the environment are used, except for loopback addresses. In a forked child,
    the client opens new connections.

    Args:
        url: `http://host:port`, `https://host`, `grpc://host:port` or `grpcs://host:port`.
        api_key: Sent with every request as `x-api-key`. Use https or grpcs: without TLS anyone on the network path can
            read it.
        deadline_s: Default deadline of a call, in seconds.
        ca_file: PEM file of CA certificates, for `https` and `grpcs`; None for the default ones.
        retries: Maximum retries per call; 0 for none. See Retries in the README.
        metrics: Whether to keep Prometheus metrics: True for the default registry of prometheus_client, or a
            `CollectorRegistry`. Requests then ask for their timing.
        coalesce: Deprecated and ignored; use `predict_many(batch=...)`.
        transport: Custom transport, for example `convscope.testing.FakeTransport` in tests.

    Raises:
        ImportError: prometheus_client is not installed.
        OSError: `ca_file` cannot be read.
        TypeError: An argument has the wrong type.
        ValueError: The URL, key, deadline or `retries` is invalid.
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
        self._make_transport: Callable[[], Transport] = lambda: (
            open_transport(url, api_key=api_key, ca_file=path) if transport is None else transport
        )
        self._transport = self._make_transport()
        self._process = os.getpid()
        self._parent_transports: list[Transport] = []

    @overload  # str is also Iterable[str]; this overload must come first.
    def predict(  # type: ignore[overload-overlap]
        self, pictures: EncodablePicture, *, model: str, **options: Unpack[PredictOptions]
    ) -> Prediction: ...

    @overload  # One picture or several, depending on ndim, which types cannot express.
    def predict(self, pictures: NDArray[Any] | Tensor, *, model: str, **options: Unpack[PredictOptions]) -> Any: ...

    @overload
    def predict(
        self, pictures: Iterable[Picture], *, model: str, **options: Unpack[PredictOptions]
    ) -> list[Prediction]: ...

    def predict(
        self, pictures: Picture | Iterable[Picture], *, model: str, **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction]:
        """Return the class scores, and the requested maps, of one picture or several.

        Args:
            pictures: A picture, or an iterable of pictures, which are sent in one request. A picture is a path, the
                bytes of a file (PNG, JPEG, WebP, .npy; with Pillow also GIF, BMP, TIFF), an open binary file, a PIL
                image, an array (H, W) or (H, W, C), uint8 0..255 or float32 0..1, or such a torch tensor, (H, W) or
                (C, H, W). An array (N, H, W, C) or a tensor (N, C, H, W) is N pictures.
            model: Name of the model.
            **options: See below.

        Keyword Args:
            version (str | None): Version of the model; None, the default, for the server's default.
            layers (str | Iterable[str]): Layers whose maps to return: names, one name, or `"all"`; by default none.
            top_k (int): Number of classes to return, most probable first; 0 for all, 5 by default.
            map_dtype (MapDtype): Dtype of the maps on the wire: `"float32"`, the default, `"float16"` (half the bytes)
                or `"uint8"` (a quarter, affine per channel). Maps are always returned as float32.
            pool (int | None): Average each map down to pool x pool cells; 1 gives one number per channel. None by
                default: whole maps.
            channels (int | Sequence[int] | None): Channel indexes, or an int n for the n channels with the largest mean
                activation; None, the default, for all.
            deadline_s (float | None): Deadline of the call, in seconds; None, the default, for the client's.
            timing (bool): Whether to measure where the time goes, see `Prediction.timing`; False by default.
            edits (Iterable[Edit | Mapping]): Operations on the maps of layers while the network runs, as `Edit` or as
                a dict of its fields; at most 16 per picture, done in order. Scores and maps are those after them. In
                `predict_many` without `picture` and `"patch"`. By default none.
            compare (bool): Whether to return what the edits changed, see `Prediction.change`; False by default.
            request_id (str | None): Id of the request in the logs of the gateway and the server: 1 to 64 letters,
                digits, `.`, `_` and `-`; None, the default, to create one. Retries keep it.
            traceparent (str | None): W3C Trace Context to send the request in, such as that of a request that the
                caller is answering; a malformed one is ignored. None, the default, for that of the current span if
                the program uses OpenTelemetry, else for none.
            tracestate (str | None): What goes with `traceparent`.

        Returns:
            A prediction for one picture; a list in the same order for several. In a list, a failed picture holds its
            error, which is raised when its result is read.

        Raises:
            ConvscopeError: The only picture, or the whole request, failed; see the tree in the README.
            OSError: A path cannot be read.
            TypeError: An argument is not a picture, or an option has the wrong type.
            ValueError: An array or an option is out of range, or a file cannot be converted.
        """
        files, is_list = encode_pictures(pictures)
        call, template = self._new_request(model, options)
        predictions = self._request_results(read_predictions, files, template, call)
        return predictions if is_list else only_result(predictions)

    def predict_many(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        concurrency: int = 8,
        batch: int = 1,
        progress: bool = False,
        **options: Unpack[PredictManyOptions],
    ) -> Generator[Prediction, None, None]:
        """Predict for any number of pictures, several requests at a time.

        Nothing is read or sent before the first prediction is requested. At most 2 x `concurrency` x `batch` items are
        read ahead of the predictions taken, so the iterable may be endless. The generator blocks while the iterable
        does. Leaving the loop early (or closing the generator) waits for the requests in progress.

        Args:
            pictures: An iterable of pictures, as in `predict`. An array (N, H, W, C) in it gives N predictions.
            model: Name of the model.
            concurrency: Number of concurrent requests.
            batch: Items of the iterable per request.
            progress: Whether to show a progress bar, with tqdm.
            **options: Options of `predict`, except `request_id`; `deadline_s` is for each request.

        Returns:
            A generator of predictions in the order of the pictures. A failed picture, such as a file that cannot be
            read, and every picture of a failed request holds the error; the others are not affected.

        Raises:
            ImportError: tqdm is not installed.
            TypeError: As in `predict`, or `pictures` is a single picture. This ends the generator after the predictions
                that precede it, and so does any exception from the iterable.
            ValueError: As in `predict`.
        """
        check_predict_many(pictures, options, concurrency=concurrency, batch=batch)
        checked, template = self._new_request(model, options, many=True)

        def predict_batch(group: list[Picture]) -> list[Prediction | Exception]:
            encoded = encode_batch(group)
            files = [file for item in encoded if isinstance(item, list) for file in item]
            call = self._new_call(model, checked.version, checked.deadline_s, timing=checked.timing)
            predictions: list[Prediction] = []
            if files:
                try:
                    predictions = self._request_results(read_predictions, files, template, call)
                except ConvscopeError as error:
                    predictions = failed_predictions(len(files), call, error)
            return merge_predictions(encoded, predictions, call)

        bar = progress_bar(pictures, progress)
        return map_batches(pictures, predict_batch, concurrency=concurrency, batch=batch, bar=bar)

    @overload  # str is also Iterable[str]; this overload must come first.
    def explain(  # type: ignore[overload-overlap]
        self, pictures: EncodablePicture, *, model: str, **options: Unpack[ExplainOptions]
    ) -> Explanation: ...

    @overload  # One picture or several, depending on ndim, which types cannot express.
    def explain(self, pictures: NDArray[Any] | Tensor, *, model: str, **options: Unpack[ExplainOptions]) -> Any: ...

    @overload
    def explain(
        self, pictures: Iterable[Picture], *, model: str, **options: Unpack[ExplainOptions]
    ) -> list[Explanation]: ...

    def explain(
        self, pictures: Picture | Iterable[Picture], *, model: str, **options: Unpack[ExplainOptions]
    ) -> Explanation | list[Explanation]:
        """Explain a class score: return a heat map of what contributes to it.

        Args:
            pictures: As in `predict`.
            model: Name of the model.
            **options: See below; `version`, `top_k`, `deadline_s`, `timing`, `request_id`, `traceparent` and
                `tracestate` as in `predict`.

        Keyword Args:
            method (Method): `"grad_cam"`, the default, `"cam"` (for networks that end in an average and one linear
                layer), `"occlusion"`, `"input_gradient"`, `"integrated_gradients"`; or `"picture"`, which returns only
                the network's input.
            layer (str | None): grad_cam, cam: layer to use; None, the default, for the last layer with more than one
                row and column.
            target (int | None): Index of the class; None, the default, for each picture's most probable one.
            window (int | None): occlusion: height and width of the covered square, in pixels; None, the default, for a
                quarter of the picture.
            step (int | None): occlusion: distance from one square to the next, in pixels; None, the default, for half a
                square.
            steps (int | None): integrated_gradients: number of points between the baseline and the picture; None, the
                default, for 32.
            picture (bool): Whether to return the network's input, which `overlay` needs; True by default.
            map_dtype (MapDtype): Dtype of the heat on the wire, as for maps in `predict`.

        Returns:
            An explanation for one picture; a list in the same order for several. In a list, a failed picture holds its
            error, which is raised when its result is read. In `timing`, the explanation counts as `forward_s`.

        Raises:
            ConvscopeError: The only picture, or the whole request, failed: `BadRequest` if the method does not suit the
                network, or the explanation would exceed the service's limit on forward passes.
            OSError: A path cannot be read.
            TypeError: An argument is not a picture, or an option has the wrong type.
            ValueError: An array or an option is out of range.
        """
        files, is_list = encode_pictures(pictures)
        call, template = self._new_explain_request(model, options)
        explanations = self._request_results(read_explanations, files, template, call)
        return explanations if is_list else only_result(explanations)

    def model_card(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> ModelCard:
        """Return the model card. The server runs one forward pass for it.

        Args:
            model: Name of the model.
            version: Version of the model; None for the server's default.
            deadline_s: Deadline of the call, in seconds; None for the client's.
            request_id: Id of the request, as in `predict`.

        Returns:
            The model card.

        Raises:
            ConvscopeError: No card was returned; see the tree in the README.
        """
        call = self._new_call(model, version, deadline_s, request_id)
        with attach_request_id(call.request_id):
            result = self._send(build_card_request(call.request_id), call)
            return read_card(result.reply, request_id=call.request_id)

    def models(self, *, deadline_s: float | None = None, request_id: str | None = None) -> list[ServedModel]:
        """Return the models of the server, also those that are not ready.

        Args:
            deadline_s: Deadline of the call, in seconds; None for the client's.
            request_id: Id of the request, as in `predict`.

        Returns:
            Names and versions, sorted by name; of several versions of a model the default comes first.

        Raises:
            ProtocolError: The server does not list its models; see proto/README.md.
            ConvscopeError: There was no answer; see the tree in the README.
        """
        call = self._new_call(None, None, deadline_s, request_id)
        error = None
        with attach_request_id(call.request_id):
            try:
                self._send(build_card_request(call.request_id), call)
            except ModelNotFound as answer:
                error = answer
            return listed_models(error)

    def filters(
        self,
        model: str,
        layer: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the filters of the convolution behind a layer.

        Args:
            model: Name of the model.
            layer: Public name of the layer.
            version: Version of the model; None for the server's default.
            deadline_s: Deadline of the call, in seconds; None for the client's.
            request_id: Id of the request, as in `predict`.

        Returns:
            (C_out, C_in, kernel height, kernel width), float32, any range, read-only: the unmodified weights; C_in is
            that of one group. They apply to normalised input, and batch norm is not folded in.

        Raises:
            BadRequest: The layer's map is not computed by a two-dimensional convolution.
            UnknownLayer: The model has no such layer.
            ConvscopeError: No filters were returned; see the tree in the README.
        """
        call = self._new_call(model, version, deadline_s, request_id)
        with attach_request_id(call.request_id):
            result = self._send(build_filters_request(layer, call.request_id), call)
            return read_filters(result.reply, request_id=call.request_id)

    def ready(
        self,
        model: str,
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Return whether the model is ready: one real forward pass succeeded. Does not retry.

        Args:
            model: Name of the model.
            version: Version of the model; None for the server's default.
            deadline_s: Deadline of the call, in seconds; None for the client's.
            request_id: Id of the request, as in `predict`.

        Returns:
            True if it is. False for temporary failures: the server is unreachable, too slow, overloaded, starting or
            draining, or its worker fails.

        Raises:
            ModelNotFound: The server has no such model.
            ProtocolError: The response is not from a convscope service.
            RequestRejected: The request was rejected, for its API key for example.
        """
        call = self._new_call(model, version, deadline_s, request_id)
        try:
            with attach_request_id(call.request_id):
                result = self._send(build_card_request(call.request_id), call, max_retries=0)
                read_card(result.reply, request_id=call.request_id)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. Calls in other threads raise ConnectError."""
        self._closed = True
        self._transport.close()

    def _request_results(
        self, read: Callable[..., list[Result]], files: list[bytes], template: PredictRequest, call: CallContext
    ) -> list[Result]:
        """Send picture files in one request, record it in the metrics, and convert the reply with `read`."""
        with attach_request_id(call.request_id):
            request = request_with_pictures(template, files, call.request_id)
            if not files:
                return []
            started = time.perf_counter()
            try:
                result = self._send(request, call)
            except BaseException as error:
                self._observe(call.model, started, error)
                raise
            self._observe(call.model, started, result)
            check_edits(result.reply, len(template.edits))
            total_s = result.total_s if call.timing else None
            results = read(result.reply, len(files), request_id=call.request_id, total_s=total_s)
            return add_notes(results, files)

    def _send(self, request: PredictRequest, call: CallContext, *, max_retries: int | None = None) -> TimedReply:
        """Send a request until there is a reply or the error is final."""
        if self._process != os.getpid():
            self._reset_after_fork()
        max_retries = self.retries if max_retries is None else max_retries
        attempts = Attempts(max_retries, deadline_s=call.deadline_s, budget=self._budget)
        while True:
            started = time.perf_counter()
            try:
                reply = self._transport.send(
                    request, model=call.model, version=call.version, deadline_s=attempts.remaining_s()
                )
            except ConvscopeError as error:
                wait_s = self._wait_or_raise(error, attempts)
            else:
                self._budget.record_success()
                return TimedReply(reply, time.perf_counter() - started)
            time.sleep(wait_s)
            self._count_retry(call.model)

    def _reset_after_fork(self) -> None:
        """Open new connections in a forked child. The parent's are kept, as closing them may block forever."""
        self._budget.replace_lock()
        self._parent_transports.append(self._transport)
        self._transport = self._make_transport()
        self._process = os.getpid()  # Set last: a second thread may open connections too, which is harmless.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
