"""Building: from what an archive says to a network of torch."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

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
