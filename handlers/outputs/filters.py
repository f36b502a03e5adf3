"""Filters: the kernels of the convolution that makes a published map, and their response.

They are the convolution's own weights: a batch normalisation after it is not folded in.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
from numpy.typing import NDArray

from handlers.api import media
from handlers.api.errors import BadRequest
from handlers.network.archive import Archive
from handlers.outputs.response import Identity, Response
from handlers.wire import convscope_pb2 as wire


def kernels(archive: Archive, layer: str) -> NDArray[np.float32]:
    """Return the kernels of the convolution that makes a map: the operation that the model card names.

    Args:
        archive: The archive that publishes the layer.
        layer: The layer's public name.

    Returns:
        (C_out, C_in, kernel height, kernel width), float32; C_in counts the channels of one group.

    Raises:
        BadRequest: The map is not made by a two-dimensional convolution.
    """
    name = archive.described.layers[layer].kernel
    if not name:
        raise BadRequest(f"the map of {layer} is not made by a two-dimensional convolution, so it has no filters")
    return archive.tensor(name)


def encode(
    filters: NDArray[np.float32], layer: str, identity: Identity, media_type: str, request_id: str = ""
) -> Response:
    """Encode filters; they are sent as JSON instead of PNG.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32.
        layer: The layer asked for; it names the array of an npz.
        identity: The server's identity.
        media_type: One of those in `media`.
        request_id: The request's id.
    """
    data = filters.astype("<f4").tobytes()
    if media_type == media.PROTOBUF:
        tensor = wire.Tensor(dtype=wire.FLOAT32, shape=filters.shape, data=data)
        message = wire.PredictReply(filters=tensor, request_id=request_id, **vars(identity))
        return Response([message.SerializeToString()], media_type)
    head = {**vars(identity), "request_id": request_id}
    if media_type == media.NPZ:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{layer: filters, "reply": np.array(json.dumps(head))})
        return Response([buffer.getvalue()], media_type)
    values = {"dtype": "float32", "shape": filters.shape, "data": base64.b64encode(data).decode("ascii")}
    return Response([json.dumps({**head, "filters": values}).encode()], media.JSON)
