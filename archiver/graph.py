"""Graphs: a network exported to ONNX, without its weights; what an archive has no graph for runs in torch.

Every published map is an output of the graph beside the scores. The weights stay in `weights.safetensors`, to which the
graph refers as external data, so that an archive grows by kilobytes. Of the exporter's optimisations only
the folding of small constants is used: ONNX Runtime does the rest itself, for the machine that it runs on.
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
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # Colours of a terminal.
_MAX_FOLDED = 4096  # Cells: the vectors of a normalisation are folded and stored, kernels never are.


@dataclass(frozen=True)
class Exported:
    """A graph for an archive.

    Attributes:
        content: Of graph.onnx. Outputs are `/maps/<node>`; where there are scores, they are the first.
        versions: Of what exported it.
    """

    content: bytes
    versions: Mapping[str, str]


def with_engine(contents: Contents, engine: str) -> tuple[Contents, str]:
    """Add the graph, or leave it out.

    Args:
        contents: The model.
        engine: One of `ENGINES`: `torch` for no graph; `onnx` for one; `auto` for one if that can be done here.

    Returns:
        The contents, and for people what they can be served by.

    Raises:
        ArchiveError: `onnx` cannot be had.
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
    contents.prove()  # What is wrong with the model itself is said before the exporter says it in its own way.
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
    """Return what exporting and proving need and this environment lacks."""
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
        network: In evaluation mode, on the CPU, weights loaded; nothing in it works in place.
        layers: Public name → node, or `output:` and the name of a tensor that the network returns.
        picture: (1, C, H, W), float32, normalised: what it is traced with.
        weights: The content of weights.safetensors, which the network was loaded from.
        has_scores: Whether its output is scores.
        any_size: Whether H and W may change, as N always may.
        layouts: Public name → layout, of the layers that are not (N, C, h, w) in the network.
        output: Which of the tensors that the network returns is the scores.

    Returns:
        The same bytes for the same network and versions.

    Raises:
        ArchiveError: It cannot be exported; the text says what the exporter said.
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
                (torch.cat([picture, picture]),),  # A single picture would be taken for a constant.
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
                # However large they are, it would fold these, and a turned weight is no entry of the state dict.
                should_fold=lambda node: False if node.op_type == "Transpose" else None,
            )
            onnxscript.optimizer.remove_unused_nodes(program.model)
        model = program.model_proto
        link(model, weights, _kept(model.graph.initializer, network.state_dict()))
    except Exception as err:  # Exporting runs the network's own code, and an exporter that raises what it likes.
        raise ArchiveError(f"the network cannot be exported: {_reason(err)}") from err
    _forget(model)
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return Exported(model.SerializeToString(deterministic=True), versions)


def _reason(err: BaseException) -> str:
    """Return what lies behind an exporter's error, in one line: its own first line only says which step it was at."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in _ESCAPES.sub("", str(err)).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines[:2])[:300]}"  # The first may be but a heading.


def _extractor(
    network: nn.Module, layers: Mapping[str, str], layouts: Mapping[str, str], scores: str | None
) -> tuple[nn.Module, list[str]]:
    """Return the network with a tuple of outputs, the scores first, turned to maps, and the names of these.

    Args:
        network: To be exported.
        layers: Public name → node, or what the network returns.
        layouts: Public name → layout.
        scores: Which of the returned tensors is the scores; None for none.
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
    """Return the names of the initializers that the state dict has too, value for value."""
    from onnx import numpy_helper

    return {
        item.name
        for item in initializers
        if item.name in state and np.array_equal(numpy_helper.to_array(item), state[item.name].numpy())
    }


def _forget(message: Any) -> None:
    """Remove what tells where and by what code a graph was made: paths of this machine, stack traces."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget(part)
