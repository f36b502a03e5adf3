"""Questions about what a score rests on: for both clients, as coroutines.

Such a question is always a request of its own: unlike predictions, explanations are worked out one picture at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from convscope._exceptions import belonging_to
from convscope._pictures import Picture, encode_pictures
from convscope._reply import read_explanations
from convscope._request import build_explain, build_request, choose_request_id

if TYPE_CHECKING:
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
