"""The first lesson: a 3×3 kernel on a 5×5 picture, through the service, and one cell of it by hand."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.experiment import Figures, Result, Setting, grid, markdown
from experiments.learning import SAMPLES, pixels

CELL = (0, 2)


def by_hand(picture: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a 3×3 kernel makes of a picture (H, W), with zeros beyond the edge: multiply, sum, slide."""
    padded = np.pad(picture, 1)
    made = np.zeros_like(picture)
    for row in range(picture.shape[0]):
        for column in range(picture.shape[1]):
            made[row, column] = (padded[row : row + 3, column : column + 3] * kernel).sum()
    return made


def run(setting: Setting) -> Result:
    """Ask the service for the map of the square, of the square turned, and of a picture of one grey."""
    square = pixels(SAMPLES / "square.png")[:, :, 0]
    asked = {"square": square, "turned": np.rot90(square).copy(), "flat": np.full((5, 5), 255, np.uint8)}
    asked["stripe"] = np.zeros((5, 5), np.uint8)
    asked["stripe"][:, 2] = 255  # Vertical: brightness changes along rows, which this kernel does not compare.
    with setting.client("edges") as client:
        kernel = client.filters("edges", "conv1")[0, 0].astype(np.float64)
        maps = {
            name: client.predict(one, model="edges", layers="conv1").maps["conv1"][0] for name, one in asked.items()
        }
    row, column = CELL
    window = np.pad(square / 255, 1)[row : row + 3, column : column + 3]
    figures: Figures = {
        "picture": (square / 255).astype(int).tolist(),
        "kernel": kernel.astype(int).tolist(),
        "maps": {name: np.rint(one).astype(int).tolist() for name, one in maps.items()},
        "by_hand": {
            name: bool(np.allclose(one, by_hand(asked[name] / 255, kernel), atol=1e-6)) for name, one in maps.items()
        },
        "cell": list(CELL),
        "window": window.astype(int).tolist(),
        "products": (window * kernel).astype(int).tolist(),
        "sum": int((window * kernel).sum()),
    }
    return Result(figures, _drawn(square, kernel, maps["square"]))


def table(figures: Figures) -> str:
    """Return the table."""
    columns = {"picture": figures["picture"], "map": figures["maps"]["square"]}
    columns |= {name: figures["maps"][name] for name in ("stripe", "flat")}
    titles = ("picture", "its map", "map of a vertical stripe", "map of one white everywhere")
    rows = [[" ".join(f"{cell}" for cell in one[row]) for one in columns.values()] for row in range(5)]
    return markdown(titles, rows)


def _drawn(square: NDArray[np.uint8], kernel: NDArray[np.float64], made: NDArray[np.float32]) -> Figure:
    picture, tiles = grid(1, 3, width=1.9, height=2.1)
    shown = ((square / 255, "picture", "gray", 1), (kernel, "kernel", "RdBu_r", 1), (made, "map", "RdBu_r", 3))
    for tile, (cells, title, colours, largest) in zip(tiles[0], shown, strict=True):
        tile.imshow(cells, cmap=colours, vmin=0 if colours == "gray" else -largest, vmax=largest)
        tile.set_title(title, fontsize=9)
        for (row, column), value in np.ndenumerate(cells):
            is_dark = value < 0.5 if colours == "gray" else abs(value) > largest / 2
            ink = "white" if is_dark else "black"
            tile.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=9)
    return picture
