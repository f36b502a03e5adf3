"""Operations with weights: what a convolution or a linear layer does, and what it costs for one picture.

Multiply-adds count one multiplication and the addition that goes with it as one; biases, normalisations, activations
and pools are not counted.

    convolution              output cells · (input channels / groups) · kernel cells
    transposed convolution   input cells · (output channels / groups) · kernel cells
    linear                   output cells · input features

Axes: `C` channels, `h, w` map cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from handlers.network.modules import watching

Numbers = tuple[int, ...]
_Convolution = nn.modules.conv._ConvNd

CONVOLUTIONS: Mapping[Any, Sequence[str]] = {
    functional.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}
"""Convolutions that are functions, with the names of their arguments in order."""


class Window(NamedTuple):
    """Window of a convolution or a pool, one number an axis; see `Operation`."""

    kernel: Numbers
    step: Numbers
    padding: Numbers
    dilation: Numbers


def window_of(settings: Mapping[str, Any], axes: int) -> Window:
    """Return the window from the settings of a module or a function, in any form that torch takes.

    Args:
        settings: `kernel_size`, and optionally `stride` (default: the kernel's size), `padding` and `dilation`.
        axes: Number of axes along which the window moves.
    """

    def each(value: Any) -> Numbers:
        numbers = (value,) if isinstance(value, int) else tuple(int(number) for number in value)
        return numbers * axes if len(numbers) == 1 else numbers

    kernel, dilation = each(settings["kernel_size"]), each(settings.get("dilation", 1))
    padding = settings.get("padding", 0)
    if padding == "same":  # For an even kernel, torch adds one more cell after the last one.
        padding = tuple(step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True))
    return Window(kernel, each(settings.get("stride") or kernel), each(0 if padding == "valid" else padding), dilation)


@dataclass(frozen=True)
class Operation:
    """One operation with weights, as run on one picture.

    Attributes:
        kind: `Conv2d`, `Linear`, ...: the name of torch's module for it.
        input_shape: Shape of its input, without the batch: (C, h, w).
        output_shape: Shape of its output, likewise.
        parameters: Number of its weights and biases.
        kernel: Cells of its window, (height, width); empty where there is no window (as are the three below).
        step: Input cells from one window to the next, (y, x): its own stride.
        padding: Cells added before the first one, (y, x).
        dilation: Input cells from one cell of the window to the next, (y, x).
        groups: Number of groups of channels that do not mix; 0 where there is no window.
        weight: Its weight, the network's own memory: (C_out, C_in / groups, kernel height, kernel width) of a
            two-dimensional convolution.
    """

    kind: str
    input_shape: Numbers
    output_shape: Numbers
    parameters: int
    kernel: Numbers = ()
    step: Numbers = ()
    padding: Numbers = ()
    dilation: Numbers = ()
    groups: int = 0
    weight: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one picture, counted as this module's docstring defines."""
        if not self.groups:
            return math.prod(self.output_shape) * self.input_shape[-1]
        cells, channels = self.output_shape, self.input_shape[0]
        if self.kind.startswith("ConvTranspose"):
            cells, channels = self.input_shape, self.output_shape[0]
        return math.prod(cells) * (channels // self.groups) * math.prod(self.kernel)

    @property
    def dense_parameters(self) -> int:
        """Size of a fully connected layer between the same shapes: one weight a pair of cells, one bias an output."""
        cells = math.prod(self.output_shape)
        return math.prod(self.input_shape) * cells + cells


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Operation]]:
    """Record every convolution and linear layer that runs as a module, in the order of running."""
    found: list[Operation] = []

    weighted = {name: module for name, module in model.named_modules() if isinstance(module, _Convolution | nn.Linear)}

    def note(name: str, inputs: Any, output: Any) -> None:
        found.append(_of_module(weighted[name], inputs[0], output))

    with watching(weighted, note):
        yield found


def of_function(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor, parameters: int
) -> Operation | None:
    """Return the operation of a functional convolution or linear layer; None for any other function.

    Args:
        function: The function called.
        args: Its positional arguments, as values.
        kwargs: Its arguments by name, as values.
        output: (1, ...), the function's output.
        parameters: Number of learned cells in its weights.
    """
    if function is functional.linear:
        images = kwargs.get("input", args[0] if args else None)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        return Operation("Linear", _shape(images), _shape(output), parameters, weight=weight)
    if function not in CONVOLUTIONS:
        return None
    named = dict(zip(CONVOLUTIONS[function], args, strict=False)) | dict(kwargs)
    settings = {"stride": 1, **named, "kernel_size": tuple(named["weight"].shape[2:])}
    return _convolution("Conv2d", named["input"], output, parameters, settings)


def count_multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of the whole network: those above and all other matrix products, as torch counts.

    Args:
        model: The network, in evaluation mode.
        images: (1, C, H, W), the network's input.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // 2  # Torch counts a multiplication and an addition as two.


def _of_module(module: nn.Module, images: Tensor, output: Tensor) -> Operation:
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if isinstance(module, nn.Linear):
        return Operation("Linear", _shape(images), _shape(output), parameters, weight=module.weight)
    bases = (kind.__name__ for kind in type(module).__mro__ if kind.__module__ == nn.modules.conv.__name__)
    return _convolution(next(bases), images, output, parameters, vars(module) | {"weight": module.weight})


def _convolution(kind: str, images: Tensor, output: Tensor, parameters: int, settings: Mapping[str, Any]) -> Operation:
    return Operation(
        kind,
        _shape(images),
        _shape(output),
        parameters,
        *window_of(settings, len(settings["kernel_size"])),
        settings.get("groups", 1),
        weight=settings["weight"],
    )


def _shape(value: Tensor | None) -> Numbers:
    return () if value is None else tuple(value.shape[1:])
