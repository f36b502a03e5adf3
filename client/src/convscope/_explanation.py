"""Which part of a picture a class's score rests on.

`figures` and `_export`, which draw and save, are imported when they are used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from convscope._prediction import manifest_fields
from convscope.pixels import paint_heat

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from convscope._exceptions import ConvscopeError
    from convscope._prediction import ClassScore, Prediction


class Explanation:
    """The explanation of one picture.

    If the picture failed, reading `top`, `heat` or `picture` raises its error, and `error` holds it.

    Attributes:
        prediction: The scores, with model, version, engine, device, request_id and timing.
        method: Name of the method.
        layer: The layer whose map was used; empty if none was.
        target: Index of the explained class; None if the method explains nothing.
        label: Name of that class.
        delta: integrated_gradients: by how much the sum of `heat` exceeds the change of the logit; else None.
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
    ) -> None:
        self.prediction = prediction
        self.method = method
        self.layer = layer
        self.target = target
        self.label = label
        self.delta = delta
        self._heat = heat
        self._picture = picture

    @property
    def error(self) -> ConvscopeError | None:
        """Why this picture has no explanation; None if it has one."""
        return self.prediction.error

    @property
    def top(self) -> list[ClassScore]:
        """The classes, most probable first.

        Raises:
            ConvscopeError: The picture's own error.
        """
        return self.prediction.top

    @property
    def heat(self) -> NDArray[np.float32]:
        """How much each place contributes to the class's score: float32, read-only.

        (1, h, w) cells of the layer for grad_cam and cam, (1, H, W) pixels for occlusion, (C, H, W) values for
        input_gradient and integrated_gradients.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: Nothing was explained: the method is `picture`.
        """
        self.prediction.top  # noqa: B018  # Raises the picture's own error.
        if self._heat is None:
            raise ValueError("the method picture explains nothing")
        return self._heat

    @property
    def picture(self) -> NDArray[np.float32]:
        """The picture as the network saw it, before normalisation: (C, H, W), float32, 0..1, read-only.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: It was not asked for.
        """
        self.prediction.top  # noqa: B018  # Raises the picture's own error.
        if self._picture is None:
            raise ValueError("the picture was not asked for; ask with picture=True")
        return self._picture

    def overlay(self) -> NDArray[np.uint8]:
        """Paint the heat over the picture: red speaks for the class, blue against it.

        Returns:
            (H', W', 3), uint8: enlarged by a whole factor where the longer side is below 256. Of several channels the
            sum is shown.

        Raises:
            ConvscopeError: The picture's own error.
            ValueError: There is no heat, or no picture.
        """
        return paint_heat(self.heat.sum(axis=0), self._size(), self.picture)

    def heatmap(self) -> NDArray[np.uint8]:
        """Paint the heat alone, on white; see `overlay`."""
        return paint_heat(self.heat.sum(axis=0), self._size(), None)

    def figure(self) -> Figure:
        """Draw picture, heat with its scale, and overlay beside each other.

        Returns:
            A matplotlib figure, not registered with pyplot.

        Raises:
            ConvscopeError: The picture's own error.
            ImportError: matplotlib is not installed; says how to get it.
            ValueError: There is no heat, or no picture.
        """
        picture, heat, overlay = self.picture, self.heat.sum(axis=0), self.overlay()
        try:
            from convscope.figures import draw_explanation
        except ImportError as error:
            raise ImportError(
                "figure() draws with matplotlib, which cannot be imported: pip install 'convscope[figure]'"
            ) from error
        what = f" at {self.layer}" if self.layer else ""
        return draw_explanation(picture, heat, overlay, title=f"{self.label}: {self.method}{what}")

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the explanation into a new directory: manifest.json, explanation.npz, heat.png and overlay.png.

        Args:
            directory: A path that does not exist yet. It is removed again if writing fails.

        Returns:
            The directory.

        Raises:
            ConvscopeError: The picture's own error.
            FileExistsError: The directory exists.
            OSError: It cannot be written.
            ValueError: There is no heat, or no picture.
        """
        from convscope._export import write_directory

        manifest = {
            **manifest_fields(self.prediction),
            "method": self.method,
            "layer": self.layer or None,
            "target": self.target,
            "label": self.label,
            "delta": self.delta,
            "arrays": "explanation.npz",
            "heat": "heat.png",
            "overlay": "overlay.png",
        }
        arrays = {"heat": self.heat, "picture": self.picture}
        pictures = {"heat.png": self.heatmap(), "overlay.png": self.overlay()}
        return write_directory(directory, manifest, {"explanation.npz": arrays}, pictures)

    def _size(self) -> tuple[int, int]:
        """Return (H, W) that the heat belongs to."""
        shape = self.heat.shape if self._picture is None else self._picture.shape
        return shape[1], shape[2]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return (
            self.prediction == other.prediction
            and (self.method, self.layer, self.target, self.label, self.delta)
            == (other.method, other.layer, other.target, other.label, other.delta)
            and _equal(self._heat, other._heat)
            and _equal(self._picture, other._picture)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Explanation(model={self.prediction.model!r}, error={self.error!r})"
        shape = None if self._heat is None else self._heat.shape
        model = self.prediction.model
        return f"Explanation(model={model!r}, method={self.method!r}, label={self.label!r}, heat={shape})"


def _equal(one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other, equal_nan=True)
