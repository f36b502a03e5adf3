"""The strongest cells of a channel over many pictures, for both clients."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope._patches import Patch, cut_patch
from convscope._pictures import Picture, encode_pictures
from convscope._request import build_explain

if TYPE_CHECKING:
    from convscope._async_client import AsyncClient
    from convscope._card import Layer, ModelCard
    from convscope._client import Client
    from convscope._exceptions import ConvscopeError
    from convscope._explanation import Explanation


class _Search:
    """What has been found so far.

    Args:
        card: The model's card.
        layer: The layer's name.
        channel: The channel's number.
        n: How many cells to keep.
        per_picture: How many of them may be of one picture.
        rejected: Receives the errors of pictures by their place; None to raise them.

    Raises:
        ValueError: The model has no such layer.
    """

    def __init__(
        self,
        card: ModelCard,
        layer: str,
        channel: int,
        n: int,
        per_picture: int,
        rejected: dict[int, ConvscopeError] | None,
    ) -> None:
        found = next((item for item in card.layers if item.name == layer), None)
        if found is None:
            names = ", ".join(item.name for item in card.layers)
            raise ValueError(f"{card.model} has no layer {layer!r}; there are: {names}")
        self.batch = _pictures_per_request(card, found)
        self.options: dict[str, Any] = {"layers": [layer], "channels": [channel], "top_k": 1}
        self.explain = build_explain(method="picture")
        self._layer, self._channel = found, channel
        self._n, self._per_picture, self._rejected = n, per_picture, rejected
        self._best: list[tuple[float, int, int, Patch]] = []

    def add(self, start: int, explanations: list[Explanation]) -> None:
        """Add the pictures of a request, of which the first is the picture number `start`."""
        for number, explanation in enumerate(explanations, start):
            if self._rejected is not None and explanation.error is not None:
                self._rejected[number] = explanation.error
                continue
            cells = explanation.prediction.maps[self._layer.name]
            if cells.ndim != 3:
                raise ValueError(f"layer {self._layer.name!r} has no map of rows and columns")
            for place in np.argsort(-cells[0], axis=None, kind="stable")[: self._per_picture].tolist():
                row, column = divmod(place, cells.shape[2])
                value = float(cells[0, row, column])
                if len(self._best) < self._n or value > self._best[0][0]:
                    patch = cut_patch(
                        explanation.picture,
                        self._layer,
                        (row, column),
                        channel=self._channel,
                        value=value,
                        number=number,
                    )
                    entry = (value, -number, -place, patch)  # Of equal values the earlier one stays.
                    (heapq.heappush if len(self._best) < self._n else heapq.heapreplace)(self._best, entry)

    def patches(self) -> list[Patch]:
        """Return what was found, the strongest first."""
        return [patch for *_, patch in sorted(self._best, key=lambda entry: entry[:3], reverse=True)]


def strongest_cells(
    client: Client,
    pictures: Iterable[Picture],
    model: str,
    *,
    layer: str,
    channel: int,
    n: int,
    per_picture: int,
    version: str | None,
    deadline_s: float | None,
    rejected: dict[int, ConvscopeError] | None = None,
) -> list[Patch]:
    """Find the strongest cells; see `Client.strongest`, and `_Search` for `rejected`."""
    _check(n, per_picture)
    files = encode_pictures(pictures).files
    card = client.model_card(model, version, deadline_s=deadline_s)
    search = _Search(card, layer, channel, n, per_picture, rejected)
    options = client._options(**search.options)
    for start in range(0, len(files), search.batch):
        batch, call = files[start : start + search.batch], client._call(model, version, deadline_s)
        search.add(start, client._explain(batch, options, search.explain, call))
    return search.patches()


async def strongest_cells_async(
    client: AsyncClient,
    pictures: Iterable[Picture],
    model: str,
    *,
    layer: str,
    channel: int,
    n: int,
    per_picture: int,
    version: str | None,
    deadline_s: float | None,
) -> list[Patch]:
    """Find the strongest cells; see `Client.strongest`."""
    _check(n, per_picture)
    files = encode_pictures(pictures).files
    card = await client.model_card(model, version, deadline_s=deadline_s)
    search = _Search(card, layer, channel, n, per_picture, None)
    options = client._options(**search.options)
    for start in range(0, len(files), search.batch):
        batch, call = files[start : start + search.batch], client._call(model, version, deadline_s)
        search.add(start, await client._explain(batch, options, search.explain, call))
    return search.patches()


def _check(n: int, per_picture: int) -> None:
    if n < 1 or per_picture < 1:
        raise ValueError("n and per_picture must be at least 1")


def _pictures_per_request(card: ModelCard, layer: Layer) -> int:
    """Return how many pictures fit into a request whose reply holds one channel's map and the picture of each."""
    if card.input.height is None or card.input.width is None:
        return 1
    values = card.input.height * card.input.width * card.input.channels + math.prod(layer.shape[1:])
    return max(1, min(card.limits.max_images, card.limits.max_reply_bytes // 2 // (4 * values)))
