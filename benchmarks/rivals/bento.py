"""BentoML: one service with a worker a core, the picture as a root input, raw bytes out.

bentoml serve benchmarks.rivals.bento:Classifier
"""

from __future__ import annotations

from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.rivals.network import WORKERS, Plain, encode, unpack

Raw = Annotated[bytes, ContentType("application/octet-stream")]


@bentoml.service(workers=WORKERS)
class Classifier:
    """Answers pictures."""

    def __init__(self) -> None:
        self.network = Plain()

    @bentoml.api
    def predict(self, body: Raw, /) -> Raw:
        """Answer raw bytes."""
        want, files = unpack(body)
        return encode(self.network.answer(files, want))
