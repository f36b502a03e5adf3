"""Networks in torch: building them, hooking their modules, and keeping them from overwriting a map."""

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
    """Load weights; every one must be present and used.

    A module may read older weights in another way, by the version of its class that the state dict names. Weights
    without versions belong to the current classes: an archive's were written by the classes that read them.

    Raises:
        RuntimeError: The weights do not fit.
    """
    given = OrderedDict(state)
    own = getattr(state, "_metadata", None) or getattr(module.state_dict(), "_metadata", {})
    given._metadata = own  # type: ignore[attr-defined]
    module.load_state_dict(given, strict=True)


def watchable(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a network that can have hooks, by path: scripted modules cannot."""
    named = network.named_modules()
    return {name: module for name, module in named if name and not isinstance(module, torch.jit.ScriptModule)}


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Hook modules while the context lasts; the hooks are removed afterwards, also after a failure.

    Args:
        modules: The modules, by name.
        see: Called with the name, the positional arguments and the output of each module that has run. Its result,
            unless None, replaces the output.
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
    """Let in-place activations write to new memory from now on, so that a map does not change after it is taken."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
