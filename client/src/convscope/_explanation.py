"""The explanation of one picture: a heat map for a class score.

`figures` and `_export` are imported on first use.
"""

from __future__ import annotations

import os
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope._prediction import manifest_fields
from convscope.pixels import html_image, render_heat

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from convscope._exceptions import ConvscopeError
    from convscope._prediction import ClassScore, Prediction, Timing


class Explanation:
    """The explanation of one picture.

    If the picture failed, `error` is set, and reading `top`, `heat` or `picture` raises it.

    Attributes:
        prediction: The scores, with model, version, engine, device, request id and timing.
        method: Name of the method.
        layer: Layer whose map was used; empty if the method uses none.
        target: Index of the explained class; None if there is no heat map.
        label: Name of the explained class.
        delta: integrated_gradients: completeness error (sum of `heat` minus change of the logit); else None.
        original_size: (H, W) of the picture that was sent, rotated according to EXIF; None if the service is too old to
            report it.
        region: (top, left, bottom, right) of what the network saw, in pixels of the picture that was sent; it extends
            past the picture where that was padded. None if the service is too old to report it.
    """

    def __init__(
        self,
        prediction: Prediction,
        *,
        method: str = "",
        layer: str = "",
        target: int | None = None,
        label: str = "",
        heat: NDArray[np.float32] | None = None,
        delta: float | None = None,
        picture: NDArray[np.float32] | None = None,
        original_size: tuple[int, int] | None = None,
        region: tuple[float, float, float, float] | None = None,
    ) -> None:
        self.prediction = prediction
        self.method = method
        self.layer = layer
        self.target = target
        self.label = label
        self.delta = delta
        self.original_size = original_size
        self.region = region
        self._heat = heat
        self._picture = picture

    @property
    def error(self) -> ConvscopeError | None:
        """The picture's error; None if it has an explanation."""
        return self.prediction.error

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.prediction.model

    @property
    def version(self) -> str:
        """Version of the model."""
        return self.prediction.version

    @property
    def request_id(self) -> str:
        """Id of the request in the service's log."""
        return self.prediction.request_id

    @property
    def timing(self) -> Timing | None:
        """Timing of the request; None if it was not requested, or if the service is too old to report it."""
        return self.prediction.timing

    @property
    def notes(self) -> tuple[str, ...]:
        """How the picture was converted where that changes what is seen; see `Prediction.notes`."""
        return self.prediction.notes

    @property
    def top(self) -> list[ClassScore]:
        """The classes, most probable first.

        Raises:
            ConvscopeError: The picture's own error.
        """
        return self.prediction.top

    @property
    def has_heat(self) -> bool:
        """Whether there is a heat map: the method is not `picture`, and the picture did not fail."""
        return self._heat is not None

    @property
    def heat(self) -> NDArray[np.float32]:
        """Contribution of each position to the class's score: float32, any range, read-only.

        (1, h, w) cells of the layer for grad_cam and cam, (1, H, W) pixels for occlusion, (C, H, W) values for
        input_gradient and integrated_gradients.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: There is no heat: the method is `picture`.
        """
        self.prediction._raise_error()
        if self._heat is None:
            raise ValueError("no heat: method 'picture' returns only the network input")
        return self._heat

    @property
    def has_picture(self) -> bool:
        """Whether the network's input was returned."""
        return self._picture is not None

    @property
    def picture(self) -> NDArray[np.float32]:
        """The network's input before normalisation: (C, H, W), float32, 0..1, read-only.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: It was not requested.
        """
        self.prediction._raise_error()
        if self._picture is None:
            raise ValueError("the network input was not requested; pass picture=True")
        return self._picture

    def overlay(self, original: NDArray[Any] | None = None) -> NDArray[np.uint8]:
        """Draw the heat over the picture: red raises the class's score, blue lowers it.

        Args:
            original: The picture that was sent, (H, W) or (H, W, C), uint8 0..255 or floating point 0..1, rotated
                according to EXIF; the heat is drawn where the network saw it. None for the network's input.

        Returns:
            (H', W', 3), uint8, RGB 0..255; H and W are enlarged by an integer factor if the longer side is below 256.
            The channels of the heat are summed.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: There is no heat, or no picture; or `original` does not have the size of the picture that was
                sent, or the service is too old to report it.
        """
        heat = self.heat.sum(axis=0)
        if original is None:
            return render_heat(heat, self._input_size(), self.picture)
        if self.original_size is None or self.region is None:
            raise ValueError("the service does not report where the network's input lies (older than this client?)")
        if original.shape[:2] != self.original_size or original.ndim not in (2, 3):
            raise ValueError(f"the picture that was sent has size {self.original_size}, not {original.shape[:2]}")
        scale = 255 if original.dtype == np.uint8 else 1
        planes = original.reshape(*self.original_size, -1).transpose(2, 0, 1).astype(np.float32) / np.float32(scale)
        return render_heat(heat, self.original_size, planes, self.region)

    def heatmap(self) -> NDArray[np.uint8]:
        """Draw the heat on white; (H', W', 3), uint8, RGB 0..255, see `overlay`."""
        return render_heat(self.heat.sum(axis=0), self._input_size(), None)

    def figure(self) -> Figure:
        """Draw picture, heat with its scale, and overlay side by side.

        Returns:
            A matplotlib figure, not registered with pyplot.

        Raises:
            ConvscopeError: The picture's own error.
            ImportError: matplotlib is not installed.
            ValueError: There is no heat, or no picture.
        """
        picture, heat, overlay = self.picture, self.heat.sum(axis=0), self.overlay()
        from convscope.figures import draw_explanation

        return draw_explanation(picture, heat, overlay, title=self._title())

    def save(self, directory: str | os.PathLike[str], *, source: str | None = None, overwrite: bool = False) -> Path:
        """Write the explanation to a new directory: manifest.json, explanation.npz, heat.png and overlay.png.

        Args:
            directory: A path that does not exist yet, unless `overwrite`. It appears when it is complete.
            source: What the picture was, such as its path, for the manifest.
            overwrite: Whether to replace an existing directory with a manifest.

        Returns:
            The directory.

        Raises:
            ConvscopeError: The picture's own error.
            FileExistsError: The directory exists, and has no manifest or is not to be replaced.
            OSError: It cannot be written.
            ValueError: There is no heat, or no picture.
        """
        from convscope._export import write_directory

        manifest = {
            **manifest_fields(self.prediction, source),
            "method": self.method,
            "layer": self.layer or None,
            "target": self.target,
            "label": self.label,
            "delta": self.delta,
            "original_size": self.original_size,
            "region": self.region,
            "arrays": "explanation.npz",
            "heat": "heat.png",
            "overlay": "overlay.png",
        }
        arrays = {"heat": self.heat, "picture": self.picture}
        pictures = {"heat.png": self.heatmap(), "overlay.png": self.overlay()}
        return write_directory(directory, manifest, {"explanation.npz": arrays}, pictures, overwrite=overwrite)

    def _input_size(self) -> tuple[int, int]:
        """Return (H, W) of the network's input; of the heat if the input was not returned."""
        shape = self.heat.shape if self._picture is None else self._picture.shape
        return shape[1], shape[2]

    def _title(self) -> str:
        at_layer = f" at {self.layer}" if self.layer else ""
        return f"{self.label}: {self.method}{at_layer}"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the scores, and the heat over the picture."""
        if not self.has_heat:
            return self.prediction._repr_html_()
        pixels = self.overlay() if self.has_picture else self.heatmap()
        image = html_image(pixels, self._title())
        return f"{self.prediction._repr_html_()}\n<div><p>{escape(self._title())}</p>\n{image}</div>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return (
            self.prediction == other.prediction
            and (self.method, self.layer, self.target, self.label, self.delta)
            == (other.method, other.layer, other.target, other.label, other.delta)
            and (self.original_size, self.region) == (other.original_size, other.region)
            and _arrays_equal(self._heat, other._heat)
            and _arrays_equal(self._picture, other._picture)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Explanation(model={self.model!r}, error={self.error!r})"
        shape = None if self._heat is None else self._heat.shape
        return f"Explanation(model={self.model!r}, method={self.method!r}, label={self.label!r}, heat={shape})"


def _arrays_equal(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second, equal_nan=True)
