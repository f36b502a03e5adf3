"""The blocking client's questions about why: explanations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Unpack, overload

from convscope._base import BaseClient
from convscope._blocking import finish
from convscope._pictures import OnePicture, Picture
from convscope._request import ExplainOptions, MapDtype, Method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convscope._explanation import Explanation


class ExplainClient(BaseClient):
    """What `Client` inherits."""

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
        """Ask which part of a picture a class's score rests on.

        Args:
            pictures: As in `predict`.
            model: The model's name.
            version: Its version; None for the server's default.
            method: `"grad_cam"`, `"cam"` (for networks that end in an average and one linear layer), `"occlusion"`,
                `"input_gradient"`, `"integrated_gradients"`; or `"picture"`, which explains nothing, for the sake of
                the picture as the network saw it.
            layer: grad_cam, cam: whose map to look at; None for the last one of more than one row and column.
            target: Index of the class to explain; None for each picture's most probable one.
            window: occlusion: pixels of the square that is covered, each way; None for a quarter of the picture.
            step: occlusion: pixels from one square to the next; None for half a square.
            steps: integrated_gradients: points between the baseline and the picture; None for 32.
            picture: Whether the picture comes along, as the network saw it; `overlay` needs it.
            top_k: Classes to return, as in `predict`.
            map_dtype: What the heat travels as, as maps do in `predict`.
            deadline_s: Seconds this question may take; None for the client's own.
            timing: As in `predict`; the work of explaining counts as `forward_s`.
            request_id: As in `predict`.

        Returns:
            An explanation for a picture, a list in the order given for several. In a list a picture that failed holds
            its error, raised when its result is read.

        Raises:
            ConvscopeError: The one picture failed, or the request as a whole did: `BadRequest` where the method does
                not suit the network, or the work is more than the service does for a request.
            OSError: A path cannot be read.
            TypeError: Something is no picture, or an option is of another type.
            ValueError: An array or an option is out of range.
        """
        return finish(
            self._explain(
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
        )
