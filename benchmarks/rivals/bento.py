"""BentoML: one service with one worker, the picture as a root input, raw bytes or lists out.

bentoml serve benchmarks.rivals.bento:Classifier
"""

from __future__ import annotations

from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from benchmarks.rivals.network import Plain, encode, unpack

Raw = Annotated[bytes, ContentType("application/octet-stream")]


@bentoml.service(workers=1)
class Classifier:
    """Answers one picture."""

    def __init__(self) -> None:
        self.network = Plain()

    @bentoml.api
    def predict(self, body: Raw, /) -> Raw:
        """Answer raw bytes."""
        want, files = unpack(body)
        return encode(self.network.answer(files, want))

    @bentoml.api
    def lists(self, body: Raw, /) -> dict[str, Any]:
        """Answer nested lists."""
        return self.network.lists([self.network.decode(unpack(body)[1][0])])[0]
