"""Weights: from a file to the tensors of a network, without running any code that the file may hold."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.packing import ArchiveError

_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # Of DataParallel, and of torch.compile.


def load_tensors(path: Path) -> Any:
    """Read a safetensors file, or what `torch.save` wrote.

    Raises:
        ArchiveError: It is missing, damaged, or holds code.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of an unusual pickle protocol: either it can be read, or we say so.
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as err:
        raise ArchiveError(f"{path} cannot be read: {err.strerror}") from err
    except (pickle.UnpicklingError, RuntimeError, EOFError) as err:
        asked = re.search(r"GLOBAL ([\w.]+)", str(err))
        raise ArchiveError(
            f"{path} is not a file of tensors: it is damaged, or it holds code (a whole model, TorchScript), which is "
            f"never run here{f'; it asks for {asked[1]}' if asked else ''}. Write the tensors alone: "
            "torch.save(model.state_dict(), path)"
        ) from err


def find_state(content: Any) -> Any:
    """Return the state dict in what was loaded: it may lie beside an optimizer's, and come from a wrapped network."""
    if not isinstance(content, Mapping):
        return content
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    for prefix in _WRAPPERS:
        if content and all(isinstance(name, str) and name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def load_strictly(network: nn.Module, state: Any) -> None:
    """Load weights, none missing and none left over.

    Args:
        network: Takes the weights.
        state: Tensors by name.

    Raises:
        ArchiveError: `state` is something else, or does not fit.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArchiveError("the file holds no state dict; write one with torch.save(model.state_dict(), path)")
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as err:
        raise ArchiveError(f"the weights do not fit the network (or --arguments are wrong): {err}") from err


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as err:
        raise ArchiveError(f"reading {path.name} needs the package safetensors, which `make install` installs") from err
    try:
        found: Mapping[str, Tensor] = load_file(path)
    except OSError as err:
        raise ArchiveError(f"{path} cannot be read: {err.strerror or err}") from err
    except SafetensorError as err:
        raise ArchiveError(f"{path} is not a safetensors file: {err}") from err
    return found
