"""Outputs: the tensors in what a network returns, by name, and the scores among them.

A network may return one tensor, or dictionaries, lists, tuples and dataclasses of them, one inside the other. A tensor
is named by the keys, indexes or fields that lead to it, with dots between: `out`, `0`, `heads.1`. Axes: `N` batch, `K`
classes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

OUTPUT = "output:"
"""Prefix of such a name where a layer is bound to a returned tensor and not to a node; no node's name has a colon."""


def tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Return the tensors in what a network returned, each with its name; the name of a lone tensor is empty."""
    if isinstance(value, Tensor):
        yield name, value
    for key, part in _parts(value).items():
        yield from tensors(part, f"{name}.{key}" if name else key)


def select(value: object, name: str) -> Any:
    """Return the value of this name from what a network returned, or from the argument of a graph's output node.

    Raises:
        KeyError: No value has this name.
    """
    if not name:
        return value
    parts = _parts(value)
    if name.partition(".")[0] not in parts and isinstance(value, tuple | fx.Node):
        parts = {str(index): part for index, part in enumerate(parts.values())}  # A named tuple's, by index.
    if name in parts:
        return parts[name]
    for key, part in parts.items():
        if name.startswith(f"{key}."):  # A key may hold dots of its own.
            try:
                return select(part, name[len(key) + 1 :])
            except KeyError:
                continue
    raise KeyError(name)


def node_of(graph: fx.GraphModule, names: Mapping[str, str], name: str) -> str:
    """Return the node that computes the returned tensor of this name.

    Args:
        graph: The network's graph.
        names: The published name of each of the graph's nodes.
        name: The tensor's name.

    Raises:
        KeyError: No node computes a tensor of this name.
    """
    (returned,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
    found = select(returned, name)
    if not isinstance(found, fx.Node) or found.name not in names:
        raise KeyError(name)
    return names[found.name]


def as_scores(values: Tensor) -> Tensor:
    """Return scores as (N, K): of (N,) and (N, 1) one a picture, of (N, K, 1, 1) without the places."""
    if values.dim() == 1:
        return values.unsqueeze(1)
    if values.dim() > 2 and all(size == 1 for size in values.shape[2:]):
        return values.flatten(1)
    return values


def _parts(value: object) -> dict[str, Any]:
    if isinstance(value, fx.Node):  # What a class of these made while the network was traced is a call of that class.
        made = value.target if value.op == "call_function" and inspect.isclass(value.target) else None
        positional = dict(zip(getattr(made, "_fields", ()), value.args, strict=False))
        return positional | dict(value.kwargs) if positional or dataclasses.is_dataclass(made) else {}
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, list | tuple):
        return dict(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}
