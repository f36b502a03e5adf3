"""Graphs: a network exported for ONNX Runtime, without its weights; what an archive has no graph for runs in torch.

Every published map is an output of the graph beside the scores. The weights stay in `weights.pt` and are handed to ONNX
Runtime by name when the archive is loaded, so that an archive grows by kilobytes. Of the exporter's optimisations only
the folding of small constants is used: ONNX Runtime does the rest itself, for the machine that it runs on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from archiver.contents import Contents
from archiver.packing import ArchiveError
from archiver.quiet import quiet_libraries
from handlers.images.preprocessing import noise

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
        weights: The entries of the state dict that it wants handed over.
        versions: Of what exported it.
    """

    content: bytes
    weights: tuple[str, ...]
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
        for part in network.modules():  # As the handler does: a map must not change after it was taken.
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]
        graph = export(
            network,
            contents.card["layers"],
            noise(contents.preprocessing),
            has_scores=bool(contents.card["classes"]),
            any_size=contents.preprocessing.size is None,
        )
    found = contents.with_graph(graph.content, {"weights": list(graph.weights), "versions": dict(graph.versions)})
    found.prove()
    return found


def missing_packages() -> list[str]:
    """Return what exporting and proving need and this environment lacks."""
    return [name for name in PACKAGES if find_spec(name) is None]


def export(
    network: nn.Module, layers: Mapping[str, str], picture: Tensor, *, has_scores: bool, any_size: bool
) -> Exported:
    """Export a network.

    Args:
        network: In evaluation mode, on the CPU, weights loaded; nothing in it works in place.
        layers: Public name → node.
        picture: (1, C, H, W), float32, normalised: what it is traced with.
        has_scores: Whether its output is logits.
        any_size: Whether H and W may change, as N always may.

    Returns:
        The same bytes for the same network and versions.

    Raises:
        ArchiveError: It cannot be exported; the text says what the exporter said.
    """
    import onnxscript.optimizer

    try:
        extractor, nodes = _extractor(network, layers, has_scores=has_scores)
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
                output_names=[f"/maps/{node}" for node in nodes],
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
        weights = _take_out(model.graph.initializer, network.state_dict())
    except Exception as err:  # Exporting runs the network's own code, and an exporter that raises what it likes.
        raise ArchiveError(f"the network cannot be exported: {_reason(err)}") from err
    _forget(model)
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return Exported(model.SerializeToString(deterministic=True), weights, versions)


def _reason(err: BaseException) -> str:
    """Return what lies behind an exporter's error, in one line: its own first line only says which step it was at."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in _ESCAPES.sub("", str(err)).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines[:2])[:300]}"  # The first may be but a heading.


def _extractor(network: nn.Module, layers: Mapping[str, str], *, has_scores: bool) -> tuple[nn.Module, list[str]]:
    """Return the network with a tuple of outputs, the scores first, and the nodes that these are."""
    scores = [str(get_graph_node_names(network)[1][-1])] if has_scores else []
    nodes = list(dict.fromkeys([*scores, *sorted(layers.values())]))
    extractor = create_feature_extractor(network, return_nodes=nodes).eval()
    (output,) = (node for node in extractor.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0][node] for node in nodes),)
    extractor.recompile()
    return extractor, nodes


def _take_out(initializers: MutableSequence[Any], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Replace the content of weights that the state dict has, value for value, by a reference; return their names."""
    from onnx import TensorProto, numpy_helper

    names = []
    for item in initializers:
        weight = state.get(item.name)
        if weight is None or not np.array_equal(numpy_helper.to_array(item), weight.numpy()):
            continue
        item.ClearField("raw_data")
        item.data_location = TensorProto.EXTERNAL
        item.external_data.add(key="location", value="weights.pt")
        names.append(item.name)
    return tuple(sorted(names))


def _forget(message: Any) -> None:
    """Remove what tells where and by what code a graph was made: paths of this machine, stack traces."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget(part)
