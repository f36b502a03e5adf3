"""Networks in torch, whoever wrote them: built, watched while they run, and kept from writing over a map."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the network's constructor.

    Args:
        architecture: `package.module:Name`, e.g. `handlers.networks.cifar:Cifar`, or `package.module:Class.method`.
        arguments: Its keyword arguments.

    Raises:
        ImportError: The module cannot be imported.
        TypeError: The call does not return an `nn.Module`.
    """
    module_name, _, name = architecture.partition(":")
    module = attrgetter(name)(importlib.import_module(module_name))(**arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{architecture} makes a {type(module).__name__}, not an nn.Module")
    return module


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights, none missing and none left over.

    A module may read older weights in another way, by the version of its class that the state dict names. Weights that
    name none are those of today's classes: an archive's were written by the classes that read them.

    Raises:
        RuntimeError: They do not fit.
    """
    given = OrderedDict(state)
    own = getattr(state, "_metadata", None) or getattr(module.state_dict(), "_metadata", {})
    given._metadata = own  # type: ignore[attr-defined]
    module.load_state_dict(given, strict=True)


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
