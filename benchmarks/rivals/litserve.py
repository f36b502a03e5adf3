"""LitServe: base64 in JSON as its image examples have it, raw bytes out.

python -m benchmarks.rivals.litserve PORT BATCH
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
from fastapi import Response

from benchmarks.rivals.network import WORKERS, Plain, encode, run_batch


class Classifier(litserve.LitAPI):
    """Decodes, runs, and answers what each request asks for."""

    def setup(self, device: str) -> None:
        """Load the network."""
        self.network = Plain()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe takes an annotation for FastAPI's.
        """Decode one picture."""
        return request["want"], self.network.decode(base64.b64decode(request["image_data"]))

    def predict(self, x: Any) -> Any:
        """Run one picture, or a batch."""
        asked = x if isinstance(x, list) else [x]
        answers = [encode(arrays) for arrays in run_batch(self.network, asked)]
        return answers if isinstance(x, list) else answers[0]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Keep a batch as it is."""
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Likewise."""
        return output

    def encode_response(self, output: bytes) -> Any:
        """Answer bytes as they are."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    port, batch = map(int, sys.argv[1:])
    api = Classifier(max_batch_size=batch, batch_timeout=0.002 if batch > 1 else 0.0)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS).run(
        host="127.0.0.1", port=port, log_level="error", generate_client_file=False
    )
