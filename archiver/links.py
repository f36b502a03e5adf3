"""Links: a graph's initializers refer to the archive's weights file, as ONNX's external data.

A safetensors file is 8 bytes with the length of its header (little endian), the header (JSON: dtype, shape and place of
each tensor, counted from the header's end), and the tensors' values, without gaps
(https://huggingface.co/docs/safetensors). An initializer names the file, the first byte and the number of bytes, which
is the format that ONNX expects (https://onnx.ai/onnx/repo-docs/ExternalData.html): any ONNX reader reads the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from handlers.network.archive import WEIGHTS

_DTYPES = {
    **{"F64": "DOUBLE", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "BOOL": "BOOL"},
    **{f"I{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
}
"""ONNX's name of each dtype of safetensors; a weight of another one stays in the graph."""


def link(model: Any, weights: bytes, names: Collection[str]) -> None:
    """Replace the values of initializers by their place in the weights file.

    A weight that is stored in another dtype than the network computes in, such as float16, is cast by the graph:
    runtimes do that once, when they load the graph.

    Args:
        model: An `onnx.ModelProto`, which is changed.
        weights: The content of weights.safetensors.
        names: Names of the initializers. The file holds a tensor of each name and value, perhaps in another dtype.
    """
    from onnx import TensorProto, helper

    start = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:start])
    casts = []
    for item in model.graph.initializer:
        stored = header[item.name] if item.name in names else {}
        if stored.get("dtype") not in _DTYPES or 0 in stored["shape"]:
            continue
        first, end = stored["data_offsets"]
        name, computed, kept = item.name, item.data_type, TensorProto.DataType.Value(_DTYPES[stored["dtype"]])
        item.Clear()
        item.name, item.data_type, item.data_location = name, kept, TensorProto.EXTERNAL
        item.dims.extend(stored["shape"])
        for key, value in (("location", WEIGHTS), ("offset", start + first), ("length", end - first)):
            item.external_data.add(key=key, value=str(value))
        if kept != computed:
            item.name = f"/weights/{name}"
            casts.append(helper.make_node("Cast", [item.name], [name], to=computed))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
