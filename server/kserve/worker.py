"""A worker: one process that runs one archive, as TorchServe's worker does.

    python -P server/kserve/worker.py --port SLOT --socket FD --archive DIR [--gpu N]

Its import path has only the archive's folder and the installed packages, so each archive runs with its own handlers
and modules. The worker calls the class that TorchServe would call; `Context` takes the place of TorchServe's. It
exchanges frames with the host over a socket: a length, JSON, and the bytes that the JSON refers to. Nothing is pickled.
The worker ends when the host does.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

LENGTH = struct.Struct("<I")

Head = dict[str, Any]


def pack(head: Head, blobs: Sequence[bytes] = ()) -> list[bytes]:
    """Return the pieces of a frame: JSON values and bytes."""
    text = json.dumps([head, [len(blob) for blob in blobs]]).encode()
    return [LENGTH.pack(len(text)), text, *blobs]


def receive(stream: BinaryIO) -> tuple[Head, list[bytes]]:
    """Read a frame.

    Raises:
        EOFError: The host has closed the connection.
    """
    (length,) = LENGTH.unpack(_read(stream, LENGTH.size))
    head, sizes = json.loads(_read(stream, length))
    return head, [_read(stream, size) for size in sizes]


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Context:
    """The part of `ts.context.Context` that an archive's class uses.

    Args:
        manifest: Content of the archive's manifest.
        config: Content of its model-config.yaml.
        properties: `model_dir`, `gpu_id`, `batch_size`.
    """

    def __init__(self, manifest: dict[str, Any], config: dict[str, Any], properties: dict[str, Any]) -> None:
        self.manifest, self.model_yaml_config, self.system_properties = manifest, config, properties
        self.model_name = manifest["model"]["modelName"]
        self.requests: list[Head] = []
        self.replies: list[Head] = []

    def begin(self, requests: list[Head]) -> None:
        """Set the `headers` and `id` of each request of a batch."""
        self.requests = requests
        self.replies = [{"status": 200, "media_type": "application/json"} for _ in requests]

    def get_all_request_header(self, index: int) -> dict[str, str]:
        """Return the HTTP headers of a request; none over gRPC."""
        headers: dict[str, str] = self.requests[index]["headers"]
        return headers

    def get_request_id(self, index: int) -> str | None:
        """Return the host's id of a request."""
        given: str | None = self.requests[index]["id"]
        return given

    def set_response_content_type(self, index: int, value: str) -> None:
        """Set the media type of a response."""
        self.replies[index]["media_type"] = value

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        """Set the HTTP status of a response, which this host uses over gRPC too, unlike TorchServe."""
        self.replies[index]["status"] = code

    def set_response_header(self, index: int, key: str, value: str) -> None:
        """Ignore a header: handlers set only one, for TorchServe's gRPC."""


def load(directory: Path, gpu: int | None) -> tuple[Any, Context, int]:
    """Load an unpacked archive; return its handler, the context, and how many requests a batch may have."""
    import yaml

    manifest = json.loads((directory / "MAR-INF/MANIFEST.json").read_text(encoding="utf-8"))
    name = manifest["model"].get("configFile")
    config = yaml.safe_load((directory / name).read_text(encoding="utf-8")) if name else {}
    batch_size = max(1, int(config.get("batchSize") or 1))
    properties = {"model_dir": str(directory), "gpu_id": gpu, "batch_size": batch_size}
    context = Context(manifest, config, properties)
    module = importlib.import_module(manifest["model"]["handler"].removesuffix(".py"))
    # As TorchServe does, take the only class that the module defines.
    (kind,) = (item for _, item in inspect.getmembers(module, inspect.isclass) if item.__module__ == module.__name__)
    handler: Any = kind()
    handler.initialize(context)
    return handler, context, batch_size


def main() -> None:
    """Load the archive, report that, and respond to batches until the host closes the connection."""
    parser = argparse.ArgumentParser(description="Started by python -m server.kserve.")
    parser.add_argument("--port", type=int, help="number of this worker, for its metrics files")
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of the connection to the host")
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--gpu", type=int)
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group; the host ends its workers.
        signal.signal(number, signal.SIG_IGN)
    stream: Any = socket.socket(fileno=given.socket).makefile("rwb", buffering=2**20)
    try:
        handler, context, batch_size = load(given.archive, given.gpu)
    except Exception as error:
        stream.writelines(pack({"failure": f"{type(error).__name__}: {error}"}))
        stream.flush()
        raise
    stream.writelines(pack({"batch_size": batch_size}))
    stream.flush()
    while True:
        try:
            head, blobs = receive(stream)
        except EOFError:
            return
        context.begin(head["requests"])
        bodies = handler.handle(_parameters(head["requests"], blobs), context)
        stream.writelines(pack({"replies": context.replies}, bodies))
        stream.flush()


def _parameters(requests: list[Head], blobs: list[bytes]) -> list[dict[str, Any]]:
    """Return the parameters of each request; `names` has for each name None, or the number of blobs of a list."""
    left = iter(blobs)
    return [
        {
            name: next(left) if count is None else [next(left) for _ in range(count)]
            for name, count in request["names"].items()
        }
        for request in requests
    ]


if __name__ == "__main__":
    main()
