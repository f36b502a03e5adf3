"""mosec: raw bytes in and out, with its dynamic batching or without, on the plain network or the tuned one.

python -m benchmarks.rivals.mosec --port PORT      # BENCH_NETWORK=plain|tuned, BENCH_BATCH=1|32
"""

from __future__ import annotations

import os
from typing import Any

from mosec import Runtime, Server, Worker

from benchmarks.rivals.network import WORKERS, Plain, Tuned, encode, run_batch, unpack

Asked = tuple[str, list[Any]]
BATCH = int(os.environ.get("BENCH_BATCH", "1"))


class Binary(Worker):
    """Answers raw bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Tuned() if os.environ.get("BENCH_NETWORK") == "tuned" else Plain()

    def deserialize(self, data: bytes) -> Asked:
        """Decode the pictures of one request."""
        want, files = unpack(data)
        return want, [self.network.decode(file) for file in files]

    def forward(self, data: Any) -> Any:
        """Run one request, or a batch of requests of one picture, each kind of reply together."""
        if BATCH == 1:
            want, images = data
            return self.network.forward(images, want)
        return run_batch(self.network, [(want, images[0]) for want, images in data])

    def serialize(self, data: Any) -> bytes:
        """Write one reply."""
        return encode(data)


if __name__ == "__main__":
    server = Server()
    wait_ms = 2 if BATCH > 1 else 0
    server.register_runtime({"/predict": [Runtime(Binary, num=WORKERS, max_batch_size=BATCH, max_wait_time=wait_ms)]})
    server.run()
