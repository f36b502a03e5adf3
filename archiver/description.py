"""Description: facts about a network for the model card, found by running it in torch.

With these facts a worker needs no torch to return the model card, filters or class activation maps, or to check that
its engine computes what torch does. Axes: `C` channels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from archiver.feeding import Sources, find_sources
from archiver.geometry import LayerGeometry, blank, layer_geometry
from archiver.operations import count_multiply_adds
from archiver.trial import noise
from handlers.api.options import CAM, GRAD_CAM, METHODS, OF_GRADIENTS, PICTURE
from handlers.images.preprocessing import ANY_SIZE, Preprocessing
from handlers.network.engines.reference import PICTURES, take
from handlers.network.engines.torch_engine import TorchEngine
from handlers.network.layouts import CHANNELS_LAST, parse

_SAME = 1e-4  # Largest difference between a head and the linear one, as a share of the largest logit.
_READABLE = (torch.float16, torch.float32, torch.float64)  # Dtypes of stored tensors; numpy has no other floats.

Values = dict[str, NDArray[Any]]


def describe(
    eager: TorchEngine,
    preprocessing: Preprocessing,
    classes: int,
    *,
    stored: Mapping[str, Tensor] | None = None,
    has_gradients: bool = True,
) -> tuple[dict[str, Any], Values]:
    """Describe a network.

    Args:
        eager: The network in torch, on the CPU.
        preprocessing: Preprocessing of the network's input.
        classes: Number of classes.
        stored: The weights as the archive stores them; None if they are stored as the network has them.
        has_gradients: Whether its scores have gradients.

    Returns:
        The description in card.json, see `handlers.network.archive.Described`; and the tensors of
        reference.safetensors: the network's results for noise, and kernels and heads that are not in the state dict.
    """
    network, shape = eager.module, (preprocessing.channels, *(preprocessing.size or ANY_SIZE))
    geometry = layer_geometry(network, eager.layers, shape, eager.layouts)
    values: Values = take(eager, noise(preprocessing, PICTURES))
    names = _Names(network, stored or network.state_dict(), values)
    sources, score_sources = find_sources(network, eager.layers, blank(network, shape), eager.output)
    layers = [_layer(name, layer, names, sources.get(name, {})) for name, layer in geometry.items()]
    shapes = {name: layer.shape for name, layer in geometry.items() if len(layer.shape) == 3}
    heads: dict[str, str] = {}
    default = ""
    if classes:
        heads = _heads(eager, preprocessing, classes, shapes, names)
        default = _default_layer(eager, preprocessing, shapes, has_gradients)
    unfit = {*(() if has_gradients else OF_GRADIENTS), *(() if shapes else (GRAD_CAM,))}
    if default not in heads:
        unfit.add(CAM)
    described = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "multiply_adds": count_multiply_adds(network, blank(network, shape)),
        "layers": layers,
        "explanations": [method for method in METHODS if method not in unfit] if classes else [PICTURE],
        "default_layer": default,
        "heads": heads,
        "sources": _sources(score_sources) if classes else [],
    }
    return described, values


class _Names:
    """Names of the tensors that the network computes with: in the state dict, or as added to the values.

    Args:
        network: The network, weights loaded.
        stored: The network's weights as they are stored.
        values: Tensors by name; tensors that are not in the state dict are added.
    """

    def __init__(self, network: nn.Module, stored: Mapping[str, Tensor], values: Values) -> None:
        self._values = values
        self._known = {
            self._memory(value): name
            for name, value in network.state_dict().items()
            if name in stored and stored[name].dtype in _READABLE
        }

    @staticmethod
    def _memory(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

    def of(self, tensor: Tensor, otherwise: str) -> str:
        """Return the name of a tensor; a tensor that is not in the state dict is added under `otherwise`."""
        name = self._known.get(self._memory(tensor))
        if name is None:
            name = f"/{otherwise}"
            self._values[name] = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        return name


def _sources(sources: Sources) -> list[dict[str, Any]]:
    """Return sources by the field names of `convscope.v1.Source`."""
    return [{"layer": name, "fewest": fewest, "most": most} for name, (fewest, most) in sources.items()]


def _layer(name: str, layer: LayerGeometry, names: _Names, sources: Sources) -> dict[str, Any]:
    """Return a layer by the field names of `convscope.v1.Layer`, and the name of its kernel."""
    kind = parse(layer.layout).kind
    found = {
        "name": name,
        "shape": list(layer.shape),
        "stride": list(layer.stride or ()),
        "receptive_field": list(layer.receptive_field or ()),
        "receptive_field_start": list(layer.receptive_field_start or ()),
        "parameters": layer.parameters,
        **_operation(layer, kind),
        **({"layout": kind} if kind else {}),
        **({"sources": _sources(sources)} if sources else {}),
    }
    operation = layer.operation
    if operation is not None and operation.kind == "Conv2d" and operation.weight is not None:
        found["kernel_tensor"] = names.of(operation.weight, f"kernel/{name}")
    return found


def _operation(layer: LayerGeometry, kind: str) -> dict[str, Any]:
    """Return the fields of the operation that makes a map; empty if no operation with weights makes it."""
    operation = layer.operation
    if operation is None:
        return {}
    taken = operation.input_shape
    if kind == CHANNELS_LAST and operation.kind == "Linear" and len(taken) == 3:
        taken = (taken[2], taken[0], taken[1])
    return {
        "input_shape": list(taken),
        "operation": operation.kind,
        "kernel": list(operation.kernel),
        "step": list(operation.step),
        "padding": list(operation.padding),
        "dilation": list(operation.dilation),
        "groups": operation.groups,
        "multiply_adds": layer.multiply_adds,
        "dense_parameters": operation.dense_parameters,
    }


def _heads(
    eager: TorchEngine, preprocessing: Preprocessing, classes: int, shapes: Mapping[str, tuple[int, ...]], names: _Names
) -> dict[str, str]:
    """Return, by layer, the weight (K, C) that maps the mean over the layer's cells to the logits, if any.

    A linear layer of that shape is tested on noise, so the result does not depend on how the network is written.
    """
    found = {}
    linear = [part for part in eager.module.modules() if isinstance(part, nn.Linear) and len(part.weight) == classes]
    fitting = {
        layer: [part for part in linear if part.weight.shape[1] == channels] for layer, (channels, *_) in shapes.items()
    }
    if not any(fitting.values()):
        return {}
    logits, maps = eager.forward(noise(preprocessing, PICTURES), frozenset(eager.layers))
    assert logits is not None  # noqa: S101  # For the type checker: the network has classes.
    for layer, parts in fitting.items():
        means = maps[layer].mean(dim=(2, 3))
        for part in parts:
            with torch.no_grad():
                off = (part(means) - logits).abs().max()
            if off <= _SAME * logits.abs().max():
                found[layer] = names.of(part.weight, f"head/{layer}")
    return found


def _default_layer(
    eager: TorchEngine, preprocessing: Preprocessing, shapes: Mapping[str, tuple[int, ...]], has_gradients: bool
) -> str:
    """Return the last layer with more than one cell on which the scores depend; empty if there is no map."""
    wide = [name for name in shapes if min(shapes[name][1:]) > 1]
    for name in reversed(wide):
        if name not in eager.layouts or not has_gradients or _scores_depend_on(eager, preprocessing, name):
            return name
    return next(reversed(wide or [*shapes]), "")


def _scores_depend_on(eager: TorchEngine, preprocessing: Preprocessing, layer: str) -> bool:
    """Return whether the scores depend on a layer's map: a transformer's need not depend on its last patches."""
    with torch.inference_mode(False), torch.enable_grad():
        logits, made = eager.forward_with_gradients(noise(preprocessing), frozenset([layer]))
        if not (logits.requires_grad and made[layer].requires_grad):
            return False
        [gradient] = torch.autograd.grad(logits[0, 0], made[layer], allow_unused=True)
        return gradient is not None and bool(eager.to_maps(layer, gradient).any() or not gradient.any())
