"""Blur: what maps and scores lose with a picture's fine detail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from convscope_lens.probes import _warp
from convscope_lens.probes._asking import Session, Verdicts, cells
from convscope_lens.probes._probe import Probe

if TYPE_CHECKING:
    from convscope._client import Client

    from convscope_lens.probes._sources import Image, Source
    from convscope_lens.probes._warp import Values


def blur(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    radii: Sequence[float] = (0, 0.5, 1, 1.5, 2, 3, 4),
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure what is left of maps and scores as pictures are blurred.

    The measure `energy` of a layer is Σ (cell - mean)² of the blurred pictures' maps, the mean being of each channel of
    each picture, as a share of the same sum of the pictures as they are: 1 is all of the pattern, 0 is none. It is not
    defined for a layer of one cell a channel. The row `picture` is the same of the pictures themselves.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        radii: Standard deviations of the Gaussian in pixels, at least 0.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice.

    Returns:
        Layers: `energy`. Scores: of the blurred pictures.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    if not radii or min(radii) < 0:
        raise ValueError("radii are at least 0 pixels")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    energies = {name: np.zeros(1 + len(radii)) for name in ("picture", *(layer.name for layer in session.layers))}
    verdicts = Verdicts(len(radii))

    def copies(picture: Image) -> list[Image]:
        return [picture, *(_warp.blurred(picture, radius) for radius in radii)]

    for picture, answers in session.ask(copies):
        for number, (copy, answer) in enumerate(zip(copies(picture), answers, strict=True)):
            energies["picture"][number] += _energy(copy)
            for layer in session.layers:
                energies[layer.name][number] += _energy(cells(answer, layer.name))
            if number:
                verdicts.add(number - 1, answers[0], answer)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {name: energy[1:] / energy[0] for name, energy in energies.items()}
    return Probe(
        "blur",
        session.model,
        session.card.version,
        session.count,
        "radius (px)",
        np.array(radii, float),
        verdicts.curves(),
        {"energy": shares},
    )


def _energy(values: Values) -> float:
    """Return Σ (cell - mean of its channel)² of values (h, w, C)."""
    whole = values.astype(np.float64)
    return float(np.square(whole - whole.mean(axis=(0, 1))).sum())
