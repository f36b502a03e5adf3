"""The client: one picture or many in, predictions out, over whichever transport the URL names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

from convscope._exceptions import ConnectError, DeadlineExceeded, Overloaded, ServerError
from convscope._pictures import OnePicture, Picture, encode_pictures
from convscope._reply import read_card, read_predictions
from convscope._request import Channels, MapDtype, build_card_request, build_request
from convscope._transport import open_transport

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from convscope._card import ModelCard
    from convscope._prediction import Prediction
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest


class Client:
    """Asks a convscope service. Safe to use from several threads; close it, or use it in a `with`.

    Nothing is connected before the first question. Proxies of the environment are used, except for this machine
    itself (`localhost`, `127.0.0.1`, ...). Nothing is retried.

    Args:
        url: `http://host:port`, `https://host`, `grpc://host:port` or `grpcs://host:port`.
        api_key: Sent with every request as `x-api-key`. Over `http` and `grpc` anybody on the way can read it.
        deadline_s: Seconds a question may take, unless it says otherwise itself.
        ca_file: PEM file of the certificates to trust instead of the usual ones, for `https` and `grpcs`.

    Raises:
        OSError: `ca_file` cannot be read.
        ValueError: An argument cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30.0,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.url = url
        self.deadline_s = _checked_deadline_s(deadline_s)
        self._transport = open_transport(url, api_key=api_key, ca_file=None if ca_file is None else os.fspath(ca_file))
        self._closed = False

    @overload  # A str is an iterable of str too, but as a path it is caught here.
    def predict(  # type: ignore[overload-overlap]
        self,
        pictures: OnePicture,
        *,
        model: str,
        version: str | None = ...,
        layers: str | Iterable[str] = ...,
        top_k: int = ...,
        map_dtype: MapDtype = ...,
        pool: int | None = ...,
        channels: Channels | None = ...,
        deadline_s: float | None = ...,
    ) -> Prediction: ...

    @overload  # The number of an array's axes says which it is; types cannot.
    def predict(
        self,
        pictures: NDArray[Any],
        *,
        model: str,
        version: str | None = ...,
        layers: str | Iterable[str] = ...,
        top_k: int = ...,
        map_dtype: MapDtype = ...,
        pool: int | None = ...,
        channels: Channels | None = ...,
        deadline_s: float | None = ...,
    ) -> Any: ...

    @overload
    def predict(
        self,
        pictures: Iterable[Picture],
        *,
        model: str,
        version: str | None = ...,
        layers: str | Iterable[str] = ...,
        top_k: int = ...,
        map_dtype: MapDtype = ...,
        pool: int | None = ...,
        channels: Channels | None = ...,
        deadline_s: float | None = ...,
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

        Returns:
            A prediction for a picture, a list in the order given for several. In a list a picture that failed holds
            its error, raised when its result is read.

        Raises:
            ConvscopeError: The one picture failed, or the request as a whole did; see the tree in the README.
            OSError: A path cannot be read.
            TypeError: Something is no picture, or an option is of another type.
            ValueError: An array or an option is out of range.
        """
        files, many = encode_pictures(pictures)
        request = build_request(files, layers=layers, top_k=top_k, map_dtype=map_dtype, pool=pool, channels=channels)
        if not files:
            return []
        predictions = read_predictions(self._send(request, model, version, deadline_s), len(files))
        if many:
            return predictions
        [prediction] = predictions
        if prediction.error is not None:
            raise prediction.error
        return prediction

    def model_card(self, model: str, version: str | None = None, *, deadline_s: float | None = None) -> ModelCard:
        """Ask a model to describe itself; it runs one forward pass to do so.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds this question may take; None for the client's own.

        Returns:
            The card.

        Raises:
            ConvscopeError: No card came; see the tree in the README.
        """
        return read_card(self._send(build_card_request(), model, version, deadline_s))

    def ready(self, model: str, version: str | None = None, *, deadline_s: float | None = None) -> bool:
        """Say whether a model answers now: one real forward pass came back.

        Args:
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds this question may take; None for the client's own.

        Returns:
            True if it does. False where waiting may help: the server cannot be reached, does not answer in time, is
            full, starting or draining, or its worker fails.

        Raises:
            ModelNotFound: The server serves no such model.
            ProtocolError: What answers is no convscope service.
            RequestRejected: The service refused, the API key for example.
        """
        try:
            self.model_card(model, version, deadline_s=deadline_s)
        except (ConnectError, DeadlineExceeded, Overloaded, ServerError):
            return False
        return True

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._closed = True
        self._transport.close()

    def _send(self, request: PredictRequest, model: str, version: str | None, deadline_s: float | None) -> PredictReply:
        if self._closed:
            raise RuntimeError("this client is closed")
        if not model or version == "":
            raise ValueError("model and version must not be empty")
        deadline_s = self.deadline_s if deadline_s is None else _checked_deadline_s(deadline_s)
        return self._transport.send(request, model=model, version=version, deadline_s=deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"


def _checked_deadline_s(deadline_s: float) -> float:
    """Return a deadline, once it is one."""
    if not 0 < deadline_s < float("inf"):
        raise ValueError(f"deadline_s must be a positive number of seconds, not {deadline_s!r}")
    return deadline_s
