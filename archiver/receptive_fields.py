"""Receptive fields: which input pixels a cell depends on, and how each operation changes them.

Cell (i, j) of a map depends on the rectangle of input pixels that begins at `start + (i, j) · stride` and has `size`.
With dilation, or strides longer than a kernel, the rectangle has holes: it bounds what the cell depends on. Pixels
before 0 or beyond the picture are padding. Everything here is (y, x).

An operation's inputs are a `Field`, `CONSTANT` (weights, numbers: no pixel in it), or None (unknown, or all pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torchvision import ops
from torchvision.models.convnext import LayerNorm2d

from archiver.operations import CONVOLUTIONS, window_of

Pair = tuple[int, int]

MAP_AXES: Final = (2, 3)
"""Of (N, C, h, w)."""


class Constant:
    """A value that does not depend on the picture."""


CONSTANT: Final = Constant()


@dataclass(frozen=True)
class Field:
    """The receptive field of every cell of a map.

    Attributes:
        size: Input pixels, (height, width).
        stride: Input pixels from one cell to the next.
        start: The first input pixel of cell (0, 0); negative in the padding.
        axes: Which axes of the tensor are the map's rows and columns.
    """

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    start: Pair = (0, 0)
    axes: Pair = MAP_AXES

    def slide(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Field:
        """Return the field after a window slides over this map: a convolution or a pool."""
        size = [n + d * (k - 1) * step for n, k, d, step in zip(self.size, kernel, dilation, self.stride, strict=True)]
        start = [first - p * step for first, p, step in zip(self.start, padding, self.stride, strict=True)]
        steps = [step * s for step, s in zip(self.stride, stride, strict=True)]
        return Field((size[0], size[1]), (steps[0], steps[1]), (start[0], start[1]))

    def join(self, other: Field) -> Field | None:
        """Return the field of two maps combined cell by cell; None if their cells do not match."""
        if (self.stride, self.axes) != (other.stride, other.axes):
            return None
        start = [min(pair) for pair in zip(self.start, other.start, strict=True)]
        ends = [max(a + m, b + n) for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)]
        return Field((ends[0] - start[0], ends[1] - start[1]), self.stride, (start[0], start[1]), self.axes)

    def turn(self, order: Sequence[int]) -> Field:
        """Return the field after a permutation of the tensor's axes; `order` has each axis's former position."""
        places = [axis % len(order) for axis in order]
        return replace(self, axes=(places.index(self.axes[0]), places.index(self.axes[1])))


Extent = Field | Constant | None

_WINDOW_MODULES = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
_WINDOW_FUNCTIONS: Mapping[Any, Sequence[str]] = {
    **CONVOLUTIONS,
    functional.max_pool2d: ("input", "kernel_size", "stride", "padding", "dilation"),
    torch.max_pool2d: ("input", "kernel_size", "stride", "padding", "dilation"),
    functional.avg_pool2d: ("input", "kernel_size", "stride", "padding"),
}
_POINTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.BatchNorm2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold, nn.LocalResponseNorm),
    *(ops.FrozenBatchNorm2d, ops.StochasticDepth),
    LayerNorm2d,  # Over the channels of each cell.
)
# Functions, operators and tensor methods, by the name without underscores.
_POINTWISE_NAMES = """
    abs add batch_norm celu clamp clone contiguous detach div dropout dropout2d elu exp float gelu hardsigmoid hardswish
    hardtanh iadd imul isub itruediv leaky_relu log maximum minimum mish mul neg prelu relu relu6 selu sigmoid silu
    softplus sqrt stochastic_depth sub tanh to true_divide truediv
"""
_POINTWISE = frozenset(_POINTWISE_NAMES.split())


def follow(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], fields: Sequence[Extent]) -> Extent:
    """Return the field of an operation's result.

    Args:
        operation: A module, a function, or the name of a tensor's method.
        args: Its positional arguments, as values.
        kwargs: Its arguments by name, as values.
        fields: Field of each tensor among the inputs, in order.

    Returns:
        The field; CONSTANT where no input depends on a pixel; None where cells depend on all pixels, or where the
        operation is unknown.
    """
    moving = [field for field in fields if not isinstance(field, Constant)]
    if not moving:
        return CONSTANT
    if isinstance(operation, nn.Sequential):  # Tracing does not enter torchvision's own blocks.
        return _chain(operation, moving)
    if isinstance(moving[0], Field) and len(moving) == 1:
        turned = _turn(operation, moving[0], args, kwargs)
        if turned is not None:
            return turned
        if _is_of_last_axis(operation, args, kwargs) and 3 not in moving[0].axes:
            return moving[0]
    if any(isinstance(field, Field) and field.axes != MAP_AXES for field in moving) and not is_pointwise(operation):
        return None
    if isinstance(operation, _WINDOW_MODULES):
        return _slide(moving[0], vars(operation)) if len(moving) == 1 else None
    names = _WINDOW_FUNCTIONS.get(operation) if isinstance(operation, Callable) else None  # type: ignore[arg-type]
    if names is not None:
        return _slide(moving[0], _window(dict(zip(names, args, strict=False)) | dict(kwargs)))
    if operation is torch.cat and _dimension(args, kwargs) not in (1, -3):
        return None
    return _join(moving) if operation is torch.cat or is_pointwise(operation) else None


def _chain(parts: nn.Sequential, fields: Sequence[Extent]) -> Extent:
    field: Extent = _join(fields)
    for part in parts:
        field = follow(part, (), {}, [field])
    return field


def _turn(operation: Any, field: Field, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Field | None:
    """Return the field after a permutation of axes; None for any other operation."""
    if isinstance(operation, ops.Permute):
        return field.turn(operation.dims)
    if operation == "permute" or operation is torch.permute:
        order = kwargs.get("dims", args[1:])
        return field.turn(order[0] if len(order) == 1 else order)
    return None


def _is_of_last_axis(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation mixes the cells along the tensor's last axis and no others."""
    if operation is functional.layer_norm:
        return len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())) == 1
    if isinstance(operation, nn.LayerNorm):
        return len(operation.normalized_shape) == 1
    return isinstance(operation, nn.Linear) or operation is functional.linear


def is_pointwise(operation: Any) -> bool:
    """Return whether a cell depends on the same cell of each input alone: an activation, a norm, an addition."""
    if isinstance(operation, nn.Module):
        return isinstance(operation, _POINTWISE_MODULES)
    if isinstance(operation, str):
        return operation.strip("_") in _POINTWISE
    package = (getattr(operation, "__module__", None) or "torch").split(".")[0]  # Built-in functions may have none.
    known = package in ("torch", "torchvision", "operator", "_operator")
    return known and getattr(operation, "__name__", "").strip("_") in _POINTWISE


def _dimension(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("dim", args[1] if len(args) > 1 else 0)


def _window(named: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a functional convolution or pool under the names that modules use."""
    if "weight" not in named:
        return named
    return {**named, "kernel_size": tuple(named["weight"].shape[-2:]), "stride": named.get("stride", 1)}


def _slide(field: Extent, window: Mapping[str, Any]) -> Extent:
    return field.slide(*window_of(window, 2)) if isinstance(field, Field) else None


def _join(fields: Sequence[Extent]) -> Extent:
    joined = fields[0]
    for field in fields[1:]:
        if not isinstance(joined, Field) or not isinstance(field, Field):
            return None
        joined = joined.join(field)
    return joined
