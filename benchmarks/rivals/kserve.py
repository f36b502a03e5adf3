"""KServe's model server: a custom model with a worker a core, the picture as the request's body, raw bytes out.

python -m benchmarks.rivals.kserve --http_port=PORT --workers=N --enable_grpc=false
"""

from __future__ import annotations

from typing import Any

import kserve

from benchmarks.rivals.network import Plain, encode, unpack


class Classifier(kserve.Model):  # type: ignore[misc]
    """Answers pictures."""

    def load(self) -> bool:
        """Load the network."""
        self.network = Plain()
        self.ready = True
        return self.ready

    def predict(self, payload: bytes, headers: Any = None, response_headers: Any = None) -> bytes:
        """Answer raw bytes."""
        want, files = unpack(payload)
        return encode(self.network.answer(files, want))


if __name__ == "__main__":
    model = Classifier("network")
    model.load()
    kserve.ModelServer().start([model])
