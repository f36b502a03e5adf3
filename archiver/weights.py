"""Weights: from a file to the tensors of a network, without running any code that the file may hold."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from archiver.packing import ArchiveError

_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # Of DataParallel, and of torch.compile; one may wrap the other.
_WRITE_ONE = "write one with torch.save(model.state_dict(), path)"
_NO_STATE = f"not a state dict; {_WRITE_ONE}"
_OPTIONAL = ".num_batches_tracked"  # Of a batch norm; torch does without it.
_NAMED = 3  # Of many names in a message.


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
    """Return the state dict in what was loaded: it may lie beside an optimizer's, and come from a wrapped network.

    Raises:
        ArchiveError: There is none, or there are several and none has a usual name.
    """
    if not isinstance(content, Mapping):
        raise ArchiveError(f"the file holds a {type(content).__name__}, {_NO_STATE}")
    if not _is_state(content):
        states = [key for key, value in content.items() if value and _is_state(value)]
        usual = [key for key in _NESTED if key in states]
        if not states:
            raise ArchiveError(f"the file holds {_several(list(content))}, {_NO_STATE}")
        if len(states) > 1 and not usual:
            raise ArchiveError(f"the file holds several state dicts, {_several(states)}; {_WRITE_ONE}")
        content = content[(usual or states)[0]]
    while prefix := next((prefix for prefix in _WRAPPERS if _all_start(content, prefix)), ""):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _is_state(content: object) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())


def _all_start(state: Mapping[Any, Tensor], prefix: str) -> bool:
    return bool(state) and all(isinstance(name, str) and name.startswith(prefix) for name in state)


def _several(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def load_strictly(network: nn.Module, state: Any) -> None:
    """Load weights, none missing and none left over.

    Args:
        network: Takes the weights.
        state: Tensors by name.

    Raises:
        ArchiveError: `state` is something else, or does not fit.
    """
    if not _is_state(state):
        raise ArchiveError(f"the weights are {_NO_STATE}")
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as err:
        reason = _misfit(network.state_dict(), state) or " ".join(str(err).split())
        raise ArchiveError(f"the weights do not fit the network (or --arguments are wrong): {reason}") from err


def _misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return which weights are missing, left over or of another shape, the first few of each."""
    both = [name for name in wanted if name in given and not is_lazy(wanted[name])]
    shapes = {name: (tuple(given[name].shape), tuple(wanted[name].shape)) for name in both}
    found = {
        "missing": [name for name in wanted if name not in given and not name.endswith(_OPTIONAL)],
        "not of the network": [name for name in given if name not in wanted],
        "of another shape": [f"{name} {one} for {other}" for name, (one, other) in shapes.items() if one != other],
    }
    return "; ".join(f"{len(names):,} {what}: {_several(names)}" for what, names in found.items() if names)


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
