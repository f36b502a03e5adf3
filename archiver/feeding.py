"""Finds which published layers feed each layer and the scores, as a graph.

A layer's sources are the published layers, or the picture, from which its map is computed with no other published
layer in between. Several paths may lead there from one source: in a residual block one passes convolutions and one
passes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from archiver.geometry import NUMBERS, resolve
from archiver.operations import of_function, watched
from handlers.network.engines.torch_engine import trace
from handlers.network.outputs import OUTPUT

PICTURE = ""
"""In the place of a layer's name."""

Sources = dict[str, tuple[int, int]]
"""Public name → the fewest and the most operations with weights on the paths from there, its own included."""


def find_sources(
    model: nn.Module, layers: Mapping[str, str], images: Tensor, output: str = ""
) -> tuple[dict[str, Sources], Sources]:
    """Return the sources of each layer, and those of the scores.

    Args:
        model: The network, in evaluation mode.
        layers: Public name → node, as in `archiver.geometry.layer_geometry`.
        images: (1, C, H, W), any picture.
        output: Which of the returned tensors is the scores; empty if the network returns only the scores.

    Returns:
        Sources by public name, and those of the scores; both empty if the network cannot be traced.
    """
    try:
        graph, names = trace(model)
        ends = {name: resolve(node, graph, names) for name, node in {**layers, PICTURE: f"{OUTPUT}{output}"}.items()}
    except Exception:  # Tracing runs the network's own Python, which may raise anything.
        return {}, {}
    nodes = {path: node for node, path in names.items()}
    scores = ends.pop(PICTURE)
    published = {nodes[path]: name for name, path in ends.items() if path in nodes}
    with torch.no_grad(), watched(model) as operations:
        walk = _Walk(graph, operations, published)
        walk.run(images)
    found = {name: walk.sources.get(nodes.get(path, ""), {}) for name, path in ends.items()}
    return found, walk.passed_on(nodes.get(scores, ""))


class _Walk(fx.Interpreter):
    """Runs a traced network and keeps the sources of every node, by name."""

    def __init__(self, module: fx.GraphModule, operations: list[Any], published: Mapping[str, str]) -> None:
        super().__init__(module)
        self._operations = operations  # Operations of modules, as they run.
        self._published = published
        self._pictures: set[str] = set()
        self.sources: dict[str, Sources] = {}

    def run_node(self, node: fx.Node) -> Any:
        before = len(self._operations)
        result = super().run_node(node)
        ran = len(self._operations) - before
        if node.op == "placeholder":
            self._pictures.add(node.name)
        elif node.op != "output" and not isinstance(result, NUMBERS):
            if node.op == "call_function" and isinstance(result, Tensor):
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                ran += of_function(node.target, args, kwargs, result, 0) is not None
            found: Sources = {}
            for source in node.all_input_nodes:
                for name, (fewest, most) in self.passed_on(source.name).items():
                    known = found.get(name, (fewest + ran, most + ran))
                    found[name] = min(fewest + ran, known[0]), max(most + ran, known[1])
            self.sources[node.name] = found
        return result

    def passed_on(self, node: str) -> Sources:
        """Return the sources of a node that uses this node's result."""
        if node in self._pictures:
            return {PICTURE: (0, 0)}
        return {self._published[node]: (0, 0)} if node in self._published else self.sources.get(node, {})
