"""The report: one HTML file of what a model sees in a picture, for a reader without service or network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from convscope_lens._page.assets import page_html
from convscope_lens._page.scene import look, one_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convscope._client import Client
    from convscope._pictures import Picture
    from convscope._request import Method

MAX_CELLS = 6 << 20  # Of all maps: a file of 8 MB at most, besides the picture.


def report(
    client: Client,
    picture: Picture,
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    method: Method | None = "grad_cam",
    target: int | None = None,
    title: str | None = None,
    request_id: str | None = None,
) -> str:
    """Ask what a model sees in a picture, and return it as one page of HTML.

    Args:
        client: Whom to ask: the model's card, scores and maps, and an explanation where the service has one.
        picture: One picture, as in `Client.predict`.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Layers to show: names, one name, or `"all"`. Of layers too large for a page the strongest channels are
            shown.
        method: How to explain the score, as in `Client.explain`; None for no heat map.
        target: Index of the class to explain; None for the most probable one. Where the service cannot explain, there
            is no heat map; who names a target, or a method other than grad_cam, gets the error instead.
        title: What the picture is called; None for its file's name.
        request_id: Of the request for scores and maps, as in `Client.predict`.

    Returns:
        The document. It loads nothing from anywhere, and needs no service.

    Raises:
        ConvscopeError: The service refused, or did not answer.
        OSError: A path cannot be read.
        TypeError: It is no picture.
        ValueError: An array or an option is out of range, or there are several pictures.
    """
    file = one_file(picture)
    if title is None:
        title = _shown(Path(picture).name) if isinstance(picture, str | os.PathLike) else "picture"
    scene = look(
        client,
        file,
        client.model_card(model, version),
        model=model,
        title=title,
        max_cells=MAX_CELLS,
        layers=layers if isinstance(layers, str) else list(layers),
        version=version,
        method=method,
        target=target,
        request_id=request_id,
    )
    return page_html(f"{title} seen by {scene['model']['name']}", scene)


def _shown(name: str) -> str:
    """Return a file's name as text; bytes in it that are none become �."""
    return os.fsencode(name).decode("utf-8", "replace")
