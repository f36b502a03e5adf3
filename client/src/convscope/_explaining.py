"""Questions about what a score rests on, and about what a channel answers to: for both clients, as coroutines.

Such a question is always a request of its own: unlike predictions, explanations are worked out one picture at a time.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope._exceptions import belonging_to
from convscope._patches import Patch, cut_patch
from convscope._pictures import Picture, encode_pictures
from convscope._reply import read_explanations
from convscope._request import build_explain, build_request, choose_request_id

if TYPE_CHECKING:
    from convscope._card import Layer, ModelCard
    from convscope._exceptions import ConvscopeError
    from convscope._explanation import Explanation
    from convscope._metrics import Metrics
    from convscope._reply import Answer
    from convscope._wire.convscope_pb2 import Explain, PredictRequest


class Explaining(ABC):
    """The part of a client that asks for explanations."""

    _metrics: Metrics | None

    @abstractmethod
    async def _send(self, request: PredictRequest, model: str, version: str | None, deadline_s: float | None) -> Answer:
        """Send a request until it is answered or the failure is final."""

    @abstractmethod
    async def _model_card(
        self, model: str, version: str | None, deadline_s: float | None, request_id: str | None
    ) -> ModelCard:
        """Ask a model to describe itself."""

    async def _explain(
        self,
        pictures: Picture | Iterable[Picture],
        model: str,
        *,
        version: str | None,
        deadline_s: float | None,
        request_id: str | None,
        timing: bool,
        top_k: int,
        map_dtype: Any,
        **asked: Any,
    ) -> Explanation | list[Explanation]:
        files, many = encode_pictures(pictures)
        explanations = await self._ask_to_explain(
            files,
            model,
            version,
            deadline_s,
            build_explain(**asked),
            request_id=request_id,
            timing=timing,
            top_k=top_k,
            map_dtype=map_dtype,
        )
        if many:
            return explanations
        [explanation] = explanations
        if explanation.error is not None:
            raise explanation.error
        return explanation

    async def _ask_to_explain(
        self,
        files: list[bytes],
        model: str,
        version: str | None,
        deadline_s: float | None,
        explain: Explain,
        *,
        request_id: str | None = None,
        timing: bool = False,
        **options: Any,
    ) -> list[Explanation]:
        """Ask about the picture files of one request."""
        request_id = choose_request_id(request_id)
        with belonging_to(request_id):
            request = build_request(files, request_id=request_id, timing=timing, **options)
            request.explain.CopyFrom(explain)
            if not files:
                return []
            asking = self._send(request, model, version, deadline_s)
            if self._metrics is not None:
                request.timing = True
                asking = self._metrics.watch(asking, model)
            answer = await asking
            total_s = answer.total_s if timing else None
            return read_explanations(answer.reply, len(files), request_id=request_id, total_s=total_s)

    async def _strongest(
        self,
        pictures: Iterable[Picture],
        model: str,
        *,
        layer: str,
        channel: int,
        n: int,
        per_picture: int,
        version: str | None,
        deadline_s: float | None,
        refused: dict[int, ConvscopeError] | None = None,
    ) -> list[Patch]:
        """Look for the strongest cells; given `refused`, put the errors of pictures there instead of raising them."""
        if n < 1 or per_picture < 1:
            raise ValueError("n and per_picture must be at least 1")
        files = encode_pictures(pictures).files
        card = await self._model_card(model, version, deadline_s, None)
        where = next((item for item in card.layers if item.name == layer), None)
        if where is None:
            names = ", ".join(item.name for item in card.layers)
            raise ValueError(f"{model} has no layer {layer!r}; there are: {names}")
        explain = build_explain(method="picture")
        batch = _pictures_a_request(card, where)
        best: list[tuple[float, int, int, Patch]] = []
        for start in range(0, len(files), batch):
            found = await self._ask_to_explain(
                files[start : start + batch],
                model,
                version,
                deadline_s,
                explain,
                layers=[layer],
                channels=[channel],
                top_k=1,
            )
            for number, explanation in enumerate(found, start):
                if refused is not None and explanation.error is not None:
                    refused[number] = explanation.error
                    continue
                cells = explanation.prediction.maps[layer]
                if cells.ndim != 3:
                    raise ValueError(f"layer {layer!r} has no map of rows and columns")
                for place in np.argsort(-cells[0], axis=None, kind="stable")[:per_picture].tolist():
                    row, column = divmod(place, cells.shape[2])
                    value = float(cells[0, row, column])
                    if len(best) < n or value > best[0][0]:
                        patch = cut_patch(
                            explanation.picture, where, (row, column), channel=channel, value=value, number=number
                        )
                        entry = (value, -number, -place, patch)  # Of equal values the earlier one stays.
                        (heapq.heappush if len(best) < n else heapq.heapreplace)(best, entry)
        return [patch for *_, patch in sorted(best, key=lambda entry: entry[:3], reverse=True)]


def _pictures_a_request(card: ModelCard, layer: Layer) -> int:
    """Return how many pictures may go into a request, so that one channel's map and the picture of each come back."""
    if card.input.height is None or card.input.width is None:
        return 1
    values = card.input.height * card.input.width * card.input.channels + math.prod(layer.shape[1:])
    return max(1, min(card.limits.max_images, card.limits.max_reply_bytes // 2 // (4 * values)))
