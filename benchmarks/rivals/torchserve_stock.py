"""A custom handler as TorchServe's documentation has it, but for the bytes that it answers."""

from __future__ import annotations

from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from benchmarks.rivals.network import Plain, encode, unpack


class Classifier(BaseHandler):  # type: ignore[misc]
    """Pictures in, probabilities and maps out."""

    def initialize(self, context: Any) -> None:
        """Load the network."""
        self.context = context
        self.network = Plain()
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> list[Any]:
        """Decode the pictures."""
        bodies = [unpack(row.get("data") or row.get("body") or b"") for row in data]
        return [(want, self.network.decode(files[0])) for want, files in bodies]

    def inference(self, data: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run the pictures; batchSize is 1, TorchServe's default."""
        want, image = data[0]
        return [self.network.forward([image], want)]

    def postprocess(self, data: list[Any]) -> list[Any]:
        """Return one object a request."""
        return [encode(arrays) for arrays in data]
