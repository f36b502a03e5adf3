"""Ray Serve: a deployment with a replica a core, the picture as the request's body, raw bytes out.

python -m benchmarks.rivals.ray_serve PORT FOLDER
"""

from __future__ import annotations

import sys
import time

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.rivals.network import WORKERS, Plain, encode, unpack


@serve.deployment(num_replicas=WORKERS, ray_actor_options={"num_cpus": 1})
class Classifier:
    """Answers pictures."""

    def __init__(self) -> None:
        self.network = Plain()

    async def __call__(self, request: Request) -> Response:
        """Answer raw bytes."""
        want, files = unpack(await request.body())
        return Response(encode(self.network.answer(files, want)), media_type="application/octet-stream")


if __name__ == "__main__":
    port, folder = sys.argv[1:]
    ray.init(include_dashboard=False, configure_logging=False, _temp_dir=folder)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(Classifier.bind())
    while True:
        time.sleep(3600)
