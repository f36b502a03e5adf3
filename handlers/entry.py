"""TorchServe's way in: the one class it calls. In an archive this file is `convscope_entry.py`, beside `handlers/`."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from handlers.loading import load
from handlers.ops import log
from handlers.settings import Settings
from handlers.torchserve import patches

_SEND_BUFFER_BYTES = 4 * 2**20  # The kernel grants at most net.core.wmem_max of it.


class ConvscopeHandler:
    """Responds with class scores and feature maps.

    TorchServe makes one per worker, calls `initialize` once, then `handle` for every batch of requests.
    """

    _connection: Any = None  # The connection whose send buffer is already widened.

    def initialize(self, context: Any) -> None:
        """Load the archive that TorchServe unpacked.

        Args:
            context: TorchServe's `ts.context.Context`.

        Raises:
            Exception: Whatever keeps the network from running; TorchServe reports it and tries again.
        """
        version = str(context.manifest["model"]["modelVersion"])
        log.set_up(context.model_name, version)
        settings = Settings.from_environment()
        unread = getattr(context, "metrics", None) if settings.is_quiet else None
        active = patches.apply(is_wanted=settings.patches, metrics=unread)
        if settings.is_quiet:
            log.quiet_torchserve()
        # TorchServe's setting decode_input_request: bodies come as they were sent, and are parsed in one place, here.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        properties = context.system_properties
        config = context.model_yaml_config or {}
        gpu = properties.get("gpu_id") if config.get("deviceType") != "cpu" else None
        self._pipeline = load(
            Path(properties["model_dir"]),
            model=context.model_name,
            version=version,
            config=config,
            batch_size=int(properties.get("batch_size") or 1),
            gpu=None if gpu is None else int(gpu),
            settings=settings,
        )
        self._pipeline.telemetry.patched(active)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Respond to one batch.

        Args:
            data: One dict of parameters per request.
            context: TorchServe's `ts.context.Context` of this batch.

        Returns:
            One body per request, in order. Media type and status are set in the context.
        """
        self._widen(getattr(context, "cl_socket", None))
        properties = [context.get_all_request_header(index) for index in range(len(data))]
        ids = [context.get_request_id(index) for index in range(len(data))]
        responses = self._pipeline.respond(data, properties, ids)
        for index, response in enumerate(responses):
            context.set_response_content_type(index, response.media_type)
            context.set_response_status(response.status, HTTPStatus(response.status).phrase, index)
            # TorchServe's gRPC method StreamPredictions reads this header of every response; without it, an exception
            # ends the worker. TorchServe withholds a REST response that has it. A request over gRPC has no headers; one
            # over REST has at least content-length or transfer-encoding.
            if not any(isinstance(value, str) for value in properties[index].values()):
                context.set_response_header(index, "ts_stream_next", "false")
        return [response.body for response in responses]

    def _widen(self, connection: Any) -> None:
        """Widen the send buffer of the connection: Java parses a batch again at each piece that it receives."""
        if connection is not self._connection and isinstance(connection, socket.socket):
            self._connection = connection
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
