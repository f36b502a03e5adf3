"""The modules of a network, whoever wrote it: watched while they run, and kept from writing over a map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def watchable(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a network that can have hooks, by path: scripted ones cannot."""
    named = network.named_modules()
    return {name: module for name, module in named if name and not isinstance(module, torch.jit.ScriptModule)}


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Watch modules for as long as the context lasts; their hooks are gone afterwards, also after a failure.

    Args:
        modules: By name.
        see: Is given the name, the positional arguments and the output of each that has run. What it returns, unless it
            is None, takes the place of that output.
    """

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, inputs, output: see(name, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stop_working_in_place(network: nn.Module) -> None:
    """Let in-place activations write to new memory from now on: a map must not change after it was taken."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
