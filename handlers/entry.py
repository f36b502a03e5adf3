"""TorchServe's way in: the one class it calls. In an archive this file is `convscope_entry.py`, beside `handlers/`."""

from __future__ import annotations

import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

from handlers import journal, messages
from handlers.assembly import Piece
from handlers.connection import Improved
from handlers.service import Service


class ConvscopeHandler:
    """Answer class scores and feature maps.

    TorchServe makes one per worker, calls `initialize` once, then `handle` for every batch of requests.
    """

    def initialize(self, context: Any) -> None:
        """Load the archive that TorchServe unpacked.

        Args:
            context: TorchServe's `ts.context.Context`.

        Raises:
            Exception: Whatever keeps the network from answering; TorchServe reports it and tries again.
        """
        messages.install()
        version = str(context.manifest["model"]["modelVersion"])
        journal.write_to_standard_output(context.model_name, version)
        if os.environ.get("CONVSCOPE_HUSH"):
            journal.hush_torchserve(getattr(context, "metrics", None))
        properties = context.system_properties
        config = context.model_yaml_config or {}
        gpu = properties.get("gpu_id") if config.get("deviceType") != "cpu" else None
        self._service = Service.load(
            Path(properties["model_dir"]),
            model=context.model_name,
            version=version,
            config=config,
            batch_size=int(properties.get("batch_size") or 1),
            gpu=None if gpu is None else int(gpu),
        )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes] | list[list[Piece]]:
        """Answer one batch.

        Args:
            data: One dict of parameters a request.
            context: TorchServe's `ts.context.Context` of this batch.

        Returns:
            One body a request, in order, in pieces where the connection takes pieces. Media type and status are set in
            the context.
        """
        properties = [context.get_all_request_header(index) for index in range(len(data))]
        answers = self._service.answer(data, properties, [context.get_request_id(index) for index in range(len(data))])
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.media_type)
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, index)
            # TorchServe's gRPC method StreamPredictions reads this header of every reply; where it is missing, an
            # exception ends the worker. TorchServe withholds a REST reply that has it. A request over gRPC has no
            # headers; one over REST has at least content-length or transfer-encoding.
            if not any(isinstance(value, str) for value in properties[index].values()):
                context.set_response_header(index, "ts_stream_next", "false")
        if isinstance(getattr(context, "cl_socket", None), Improved):
            return [answer.pieces for answer in answers]
        return [answer.body for answer in answers]
