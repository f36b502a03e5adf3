"""Graphs: a network exported to ONNX without its weights; a network without a graph is served by torch.

Every published map is an output of the graph, besides the scores. The weights stay in `weights.safetensors`, to which
the graph refers as external data, so an archive grows by kilobytes. Of the exporter's optimisations only the folding
of small constants is used: ONNX Runtime does the rest itself, for the machine that it runs on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from archiver.contents import Contents
from archiver.geometry import resolve
from archiver.links import link
from archiver.packing import ArchiveError
from archiver.quiet import quiet_libraries
from archiver.trial import noise
from handlers.network.archive import eager_arguments
from handlers.network.engines.onnx import output_name
from handlers.network.engines.torch_engine import trace
from handlers.network.layouts import CHANNELS_FIRST, to_maps
from handlers.network.modules import stop_working_in_place
from handlers.network.outputs import OUTPUT, as_scores, node_of

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "onnx")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_IMAGES = "images"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # Terminal colours.
_MAX_FOLDED = 4096  # Cells: the vectors of a normalisation are folded and stored, kernels never are.


@dataclass(frozen=True)
class Exported:
    """A graph for an archive.

    Attributes:
        content: The content of graph.onnx. Outputs are `/maps/<node>`; the scores, if any, are first.
        versions: Versions of the packages that exported it.
    """

    content: bytes
    versions: Mapping[str, str]


def with_engine(contents: Contents, engine: str) -> tuple[Contents, str]:
    """Add a graph to the contents, or leave it out.

    Args:
        contents: The model.
        engine: One of `ENGINES`: `torch` for no graph; `onnx` for a graph; `auto` for a graph if it can be made here.

    Returns:
        The contents, and a text on which engines can serve them.

    Raises:
        ArchiveError: `onnx` is not possible.
    """
    contents = contents.with_graph(None)
    if engine == "torch":
        return contents, "torch"
    try:
        found = _exported(contents)
    except ArchiveError as err:
        if engine == "onnx":
            raise
        return contents, f"torch alone: {err}"
    return found, f"ONNX Runtime where it is installed (a graph of {len(found.graph or b''):,} bytes), else torch"


def _exported(contents: Contents) -> Contents:
    missing = missing_packages()
    if missing:
        raise ArchiveError(f"a graph for ONNX Runtime needs {', '.join(missing)}, not installed here")
    contents.prove()  # Report faults of the model itself before the exporter reports them in its own way.
    logger.info("exporting the graph")
    with contents.network() as network:
        stop_working_in_place(network)  # As the handler does.
        graph = export(
            network,
            picture=noise(contents.preprocessing),
            weights=contents.weights,
            **eager_arguments(contents.card),
            any_size=contents.preprocessing.size is None,
        )
    found = contents.with_graph(graph.content, {"versions": dict(graph.versions)})
    found.prove()
    return found


def missing_packages() -> list[str]:
    """Return the packages that exporting and testing need and this environment lacks."""
    return [name for name in PACKAGES if find_spec(name) is None]


def export(
    network: nn.Module,
    layers: Mapping[str, str],
    picture: Tensor,
    *,
    weights: bytes,
    has_scores: bool,
    any_size: bool,
    layouts: Mapping[str, str] | None = None,
    output: str = "",
) -> Exported:
    """Export a network.

    Args:
        network: The network in evaluation mode, on the CPU, weights loaded; nothing in it works in place.
        layers: Public name → node, or `output:` and the name of a tensor that the network returns.
        picture: (1, C, H, W), float32, normalised; used for tracing.
        weights: The content of weights.safetensors that the network was loaded from.
        has_scores: Whether the network returns scores.
        any_size: Whether H and W may vary; N always may.
        layouts: Public name → layout, for layers that are not (N, C, h, w) in the network.
        output: Which of the returned tensors is the scores.

    Returns:
        The graph; the same bytes for the same network and versions.

    Raises:
        ArchiveError: The network cannot be exported; the message has the exporter's reason.
    """
    import onnxscript.optimizer

    try:
        extractor, names = _extractor(network, layers, layouts or {}, output if has_scores else None)
        dimensions = {0: torch.export.Dim("N")}
        if any_size:
            dimensions |= {2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
        with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):  # What matters becomes an ArchiveError.
            program = torch.onnx.export(
                extractor,
                (torch.cat([picture, picture]),),  # The exporter would take a batch of 1 for a constant.
                dynamo=True,
                optimize=False,
                dynamic_shapes=(dimensions,),
                input_names=[_IMAGES],
                output_names=names,
                verbose=False,
            )
            if program is None:
                raise ValueError("the exporter gave nothing")
            onnxscript.optimizer.inline(program.model)
            onnxscript.optimizer.fold_constants(
                program.model,
                input_size_limit=_MAX_FOLDED,
                output_size_limit=_MAX_FOLDED,
                # The exporter would fold these at any size, and a transposed weight is not in the state dict.
                should_fold=lambda node: False if node.op_type == "Transpose" else None,
            )
            onnxscript.optimizer.remove_unused_nodes(program.model)
        model = program.model_proto
        link(model, weights, _kept(model.graph.initializer, network.state_dict()))
    except Exception as err:  # The network's own code and the exporter may raise anything.
        raise ArchiveError(f"the network cannot be exported: {_reason(err)}") from err
    _forget(model)
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return Exported(model.SerializeToString(deterministic=True), versions)


def _reason(err: BaseException) -> str:
    """Return the cause of an exporter's error, in one line: the error's own first line only names the step."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in _ESCAPES.sub("", str(err)).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines[:2])[:300]}"  # The first line may be only a heading.


def _extractor(
    network: nn.Module, layers: Mapping[str, str], layouts: Mapping[str, str], scores: str | None
) -> tuple[nn.Module, list[str]]:
    """Return the network with a tuple of outputs, the scores first, then the maps as (N, C, h, w), and their names.

    Args:
        network: The network to export.
        layers: Public name → node, or `output:` and the name of a returned tensor.
        layouts: Public name → layout.
        scores: Which of the returned tensors is the scores; None for no scores.
    """
    wanted = sorted({(node, layouts.get(name, CHANNELS_FIRST)) for name, node in layers.items()})
    made = {node: node for node, _ in wanted}
    last = str(get_graph_node_names(network)[1][-1])
    if scores or any(node.startswith(OUTPUT) for node in made):
        graph, names = trace(network)
        made = {node: resolve(node, graph, names) for node in made}
        last = node_of(graph, names, scores) if scores else last
    extractor = create_feature_extractor(
        network, return_nodes=list(dict.fromkeys([*([] if scores is None else [last]), *made.values()]))
    ).eval()
    (end,) = (node for node in extractor.graph.nodes if node.op == "output")
    found = dict(end.args[0])
    outputs = {}
    with extractor.graph.inserting_before(end):
        if scores is not None:
            outputs[output_name(last)] = extractor.graph.call_function(as_scores, (found[last],))
        for node, layout in wanted:
            name = output_name(node, layout)
            if layout:
                outputs[name] = extractor.graph.call_function(to_maps, (found[made[node]], layout))
            else:
                outputs.setdefault(name, found[made[node]])
    end.args = (tuple(outputs.values()),)
    extractor.recompile()
    return extractor, list(outputs)


def _kept(initializers: Sequence[Any], state: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the initializers that are also in the state dict, with equal values."""
    from onnx import numpy_helper

    return {
        item.name
        for item in initializers
        if item.name in state and np.array_equal(numpy_helper.to_array(item), state[item.name].numpy())
    }


def _forget(message: Any) -> None:
    """Remove traces of where and by what code a graph was made: paths of this machine, stack traces."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget(part)
