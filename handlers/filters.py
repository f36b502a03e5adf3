"""Filters: the kernels of the convolution that makes a published map, found in the network's graph, and their reply.

They are the convolution's own weights: a batch normalisation after it, which scales each of them, is not folded in.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from handlers import media
from handlers.errors import BadRequest
from handlers.formats import Encoded
from handlers.reply import Identity
from handlers.vision import create_feature_extractor
from handlers.wire import convscope_pb2 as wire

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding)
_CONVOLUTIONS = (functional.conv2d, torch.conv2d)
_FUNCTIONS = (*_CONVOLUTIONS, functional.linear, torch.matmul)  # Whose weights may be an argument.


def kernels(network: nn.Module, node: str, layer: str) -> NDArray[np.float32]:
    """Return the kernels of the convolution that makes a map.

    From the map's node the graph is followed backwards, through activations, normalisations, pools and, where branches
    were added, the first of them, to the first operation with weights of its own.

    Args:
        network: The network, in evaluation mode.
        node: The map's node, as `torchvision.models.feature_extraction` names it, or its module path in a network that
            cannot be traced.
        layer: The layer's public name, for the message.

    Returns:
        (C_out, C_in, kernel height, kernel width), float32; C_in is that of one group.

    Raises:
        BadRequest: What makes the map is no two-dimensional convolution, or is not to be found.
    """
    weight = _weight_behind(network, node)
    if weight is None:
        raise BadRequest(f"the map of {layer} is not made by a two-dimensional convolution, so it has no filters")
    return np.ascontiguousarray(weight.detach().float().cpu().numpy())


def encode(
    filters: NDArray[np.float32], layer: str, identity: Identity, media_type: str, request_id: str = ""
) -> Encoded:
    """Encode filters; PNG has no form for them and goes out as JSON.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32.
        layer: The layer asked for, which names the array of an npz.
        identity: Who answers.
        media_type: One of `media`'s.
        request_id: Of the request.
    """
    data = filters.astype("<f4").tobytes()
    if media_type == media.PROTOBUF:
        tensor = wire.Tensor(dtype=wire.FLOAT32, shape=filters.shape, data=data)
        reply = wire.PredictReply(filters=tensor, request_id=request_id, **vars(identity))
        return Encoded(reply.SerializeToString(), media_type)
    head = {**vars(identity), "request_id": request_id}
    if media_type == media.NPZ:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{layer: filters, "reply": np.array(json.dumps(head))})
        return Encoded(buffer.getvalue(), media_type)
    values = {"dtype": "float32", "shape": filters.shape, "data": base64.b64encode(data).decode("ascii")}
    return Encoded(json.dumps({**head, "filters": values}).encode(), media.JSON)


def _weight_behind(network: nn.Module, name: str) -> Tensor | None:
    """Return the weight of the convolution behind a node."""
    try:
        graph = create_feature_extractor(network, {name: "map"})
    except Exception:  # Tracing runs the network's own Python, which may raise anything.
        return _last_convolution(dict(network.named_modules()).get(name))
    sources = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
    while sources:
        node = sources[0]
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if any(isinstance(part, _WEIGHTED) for part in module.modules()):
                return _last_convolution(module)
        if node.op == "call_function" and node.target in _FUNCTIONS:
            weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
            return _attribute(graph, weight) if node.target in _CONVOLUTIONS else None
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return None


def _last_convolution(module: nn.Module | None) -> Tensor | None:
    """Return the weight of the last weighted operation of a module, if that is a convolution."""
    weighted = [part for part in module.modules() if isinstance(part, _WEIGHTED)] if module is not None else []
    return weighted[-1].weight if weighted and isinstance(weighted[-1], nn.Conv2d) else None


def _attribute(network: nn.Module, node: Any) -> Tensor | None:
    """Return the tensor that a node reads from the network."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(network.get_submodule(owner), name)
    return value if isinstance(value, Tensor) else None
