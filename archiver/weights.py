"""Weights: from a file as a training loop left it to the tensors of a network.

Nothing that the file holds is run: what is no tensor becomes an inert object. Which of the tensors are the network's
is found by its own names, so any prefix and any place in a checkpoint will do, as long as they are all there.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from archiver.packing import ArchiveError
from handlers.network.modules import load_weights

INDEX = ".safetensors.index.json"
"""How the file ends that says which of several safetensors files holds which tensor."""

_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_COMPILED = "_orig_mod."  # torch.compile puts it before the names of whatever it wraps, at any depth.
_AVERAGED = re.compile(r"(?:^|[._])(?:n_averaged|averaged?|ema|swa|shadow)(?:[._]|$)")
_DEEPEST = 3  # Mappings in mappings that are looked through.
_MOST_TYPES = 200  # That one file may name.
_WRITE_ONE = "write one with torch.save(model.state_dict(), path)"
_NO_STATE = f"not a state dict; {_WRITE_ONE}"
_OPTIONAL = ".num_batches_tracked"  # Of a batch norm; torch does without it.
_NAMED = 3  # Of many names in a message.


class Foreign:
    """Stands for an object of a type that is not tensors, numbers, texts, lists or dicts, and holds nothing of it."""

    type_name = ""

    def __new__(cls, *arguments: object, **options: object) -> Foreign:
        """Make one, whatever it would have been made of."""
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Candidate:
    """Tensors in a file that have all names of the network.

    Attributes:
        place: The keys that lead to them.
        prefix: What stands before the network's own names.
        tensors: By the name in the file.
        others: What stands beside them and is no tensor, by name.
        metadata: What `state_dict` wrote of the modules' versions, by the module's name in the file; None without.
    """

    place: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    others: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def is_averaged(self) -> bool:
        """Whether they are a moving average of weights, by what they are called or by what stands beside them."""
        return any(_AVERAGED.search(word) for word in (*self.place, self.prefix)) or (
            bool(self.prefix) and self.prefix.startswith("module.") and "n_averaged" in self.tensors
        )

    def __str__(self) -> str:
        where = ".".join(self.place) or "the file"
        return f"{where}, names with {self.prefix!r}" if self.prefix else where


def load_file(path: Path) -> Any:
    """Read a safetensors file, the index of several, a folder with such an index, or what `torch.save` wrote.

    Returns:
        What it holds: tensors, numbers, texts, lists and dicts; `Foreign` in place of anything else.

    Raises:
        ArchiveError: It is missing, damaged, of another format, or a pickled model.
    """
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        if len(indices) != 1:
            raise ArchiveError(f"the folder {path} must hold one *{INDEX}, and has {len(indices)}; or name a file")
        path = indices[0]
    if path.name.endswith(INDEX):
        return _load_shards(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        if known := _name_format(path):
            raise ArchiveError(f"{path} is {known}")
        content = _load_pickle(path)
    except OSError as err:
        raise ArchiveError(f"{path} cannot be read: {err.strerror}") from err
    if isinstance(content, Foreign):
        raise ArchiveError(
            f"{path} is a pickled object of the type {content.type_name}, and unpickling it would run code. If you "
            "trust it, write its tensors alone: model = torch.load(path, weights_only=False); "
            "torch.save(model.state_dict(), path)"
        )
    return content


def load(network: nn.Module, path: Path, *, ema: bool = False) -> str:
    """Load a file's weights into a network, none missing.

    Args:
        network: Takes them.
        path: As `load_file` takes it.
        ema: Take a moving average of the weights where the file holds one beside the plain ones.

    Returns:
        What was taken and what was left out, in one line; empty if the file holds just these weights.

    Raises:
        ArchiveError: It cannot be read, its weights do not fit the network, or there are several and none is named as
            the ones to take.
    """
    content = load_file(path)
    if not isinstance(content, Mapping):
        raise ArchiveError(f"the file holds a {type(content).__name__}, {_NO_STATE}")
    found = list(_candidates(content, network))
    if not found:
        _refuse(content, network)
    plain = [one for one in found if not one.is_averaged]
    averaged = [one for one in found if one.is_averaged]
    if ema and not averaged:
        raise ArchiveError(f"--ema: {path} holds no moving average of the weights, only {_spell(plain)}")
    taken = _choose(averaged if ema or not plain else plain)
    elsewhere = tuple(one.prefix for one in found if one.place == taken.place and one.prefix.removeprefix(taken.prefix))
    names = [name for name in taken.tensors if name.startswith(taken.prefix)]
    names = [name for name in names if taken.prefix or not name.startswith(elsewhere)]
    load_strictly(network, _strip(taken, names, network))
    left = [*(name for name in taken.tensors if name not in names), *taken.others]
    return _describe(taken, left, averaged if taken in plain else plain)


def _strip(taken: Candidate, names: Sequence[str], network: nn.Module) -> OrderedDict[str, Tensor]:
    """Return tensors by the network's own names, with the versions of its modules where the file states them."""
    state = OrderedDict((name.removeprefix(taken.prefix), taken.tensors[name]) for name in names)
    if taken.metadata is None:  # Nothing says that counts of batches may be missing.
        state |= {
            name: one for name, one in network.state_dict().items() if name.endswith(_OPTIONAL) and name not in state
        }
    else:
        state._metadata = {  # type: ignore[attr-defined]
            f"{name}.".removeprefix(taken.prefix).removesuffix("."): value
            for name, value in taken.metadata.items()
            if f"{name}.".startswith(taken.prefix)
        }
    return state


def load_strictly(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights, none missing and none left over.

    Args:
        network: Takes the weights.
        state: Tensors by name.

    Raises:
        ArchiveError: `state` is something else, or does not fit.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArchiveError(f"the weights are {_NO_STATE}")
    try:
        load_weights(network, state)
    except (RuntimeError, AssertionError) as err:
        reason = _misfit(network.state_dict(), state) or " ".join(str(err).split()) or type(err).__name__
        raise ArchiveError(f"the weights do not fit the network (or --arguments are wrong): {reason}") from err


def _load_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote; every type that is not torch's own becomes `Foreign`, a dict or a list.

    torch's restricted unpickler calls only what it is given; here that is never what the file names.
    """
    stand_ins: dict[str, type] = {}
    while True:
        try:
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals([(one, of) for of, one in stand_ins.items()]),
            ):
                warnings.simplefilter("ignore")  # Of an unusual pickle protocol: either it can be read, or we say so.
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as err:
            asked = re.search(r"(?<!unsupported )GLOBAL ([\w.]+)", str(err))
            filled = re.search(
                r"Can only (SETITEM|APPEND)S? .*but got <class '(?:[\w.]*\.)?stand_in:([\w.]+)'>", str(err)
            )
            if asked and asked[1] not in stand_ins and len(stand_ins) < _MOST_TYPES:
                stand_ins[asked[1]] = type(f"stand_in:{asked[1]}", (Foreign,), {"type_name": asked[1]})
            elif filled and issubclass(stand_ins.get(filled[2], dict), Foreign):
                stand_ins[filled[2]] = OrderedDict if filled[1] == "SETITEM" else list
            else:
                blocked = re.search(r"unsupported GLOBAL ([\w.]+)", str(err))
                raise ArchiveError(
                    f"{path} is not a file of tensors: it is damaged, or holds code, which is never run here"
                    f"{f'; it asks for {blocked[1]}' if blocked else ''}. Write the tensors alone: "
                    "torch.save(model.state_dict(), path)"
                ) from err


def _name_format(path: Path) -> str:
    """Return what a file is that holds no state dict, and the way out; empty for what `torch.save` may have written."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "the pointer of a file in Git LFS, not the file; fetch it with: git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not weights; the download went to another address"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes; only PyTorch's weights can be read"
    if path.suffix == ".onnx":
        return "an ONNX graph for another runtime; give the weights of the PyTorch network that it was exported from"
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "MAR-INF/MANIFEST.json" in names:
        return "an archive for TorchServe; give the weights that it was made from"
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        return (
            "a TorchScript program, and nothing of a file is run here. Write its tensors alone: "
            "torch.save(torch.jit.load(path).state_dict(), path)"
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return (
            "a program of torch.export (.pt2), and nothing of a file is run here. Write its tensors alone: "
            "torch.save(torch.export.load(path).state_dict, path)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz of numpy arrays; turn them into tensors: torch.save({name: torch.from_numpy(...)}, path)"
    return ""


def _candidates(content: Mapping[Any, Any], network: nn.Module) -> Iterator[Candidate]:
    """Find the places and prefixes under which all of a network's weights are."""
    wanted = [name for name in network.state_dict() if not name.endswith(_OPTIONAL)]
    for place, tensors, others, metadata in _states(content):
        if not wanted:
            yield Candidate(place, "", tensors, others, metadata)
            continue
        longest = max(wanted, key=len)
        for prefix in [name.removesuffix(longest) for name in tensors if name.endswith(longest)]:
            if (not prefix or prefix.endswith(".")) and all(prefix + name in tensors for name in wanted):
                yield Candidate(place, prefix, tensors, others, metadata)


def _states(
    content: Mapping[Any, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor], tuple[str, ...], Mapping[str, Any] | None]]:
    """Go through a checkpoint's mappings that hold tensors by name, outer ones first."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    inner = [(name, value) for name, value in content.items() if isinstance(name, str) and isinstance(value, Mapping)]
    if tensors:
        metadata = getattr(content, "_metadata", None)
        nested = [name for name, _ in inner]
        others = tuple(str(name) for name in content if name not in tensors and name not in nested)
        if any(_COMPILED in name for name in tensors):
            tensors = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
            metadata = {
                f"{name}.".replace(_COMPILED, "").removesuffix("."): value for name, value in (metadata or {}).items()
            } or None
        yield place, tensors, others, metadata
    if len(place) < _DEEPEST:
        for name, value in inner:
            yield from _states(value, (*place, name))


def _choose(found: Sequence[Candidate]) -> Candidate:
    """Return the only one, or the one at the usual place.

    Raises:
        ArchiveError: There are several, and none is at a usual place.
    """
    for usual in ((), *((name,) for name in _USUAL)):
        here = [one for one in found if one.place == usual]
        bare = [one for one in here if not one.prefix]
        if len(here) == 1 or bare:
            return (bare or here)[0]
    if len(found) > 1:
        raise ArchiveError(f"the file holds several sets of weights that fit: {_spell(found)}; {_WRITE_ONE}")
    return found[0]


def _refuse(content: Mapping[Any, Any], network: nn.Module) -> None:
    """Say why nothing in a file fits: there are no weights, or others.

    Raises:
        ArchiveError: Always.
    """
    states = list(_states(content))
    if not states:
        raise ArchiveError(f"the file holds {_several(list(content))}, {_NO_STATE}")
    wanted = network.state_dict()
    place, tensors, _, _ = max(states, key=lambda state: (len(wanted.keys() & state[1].keys()), len(state[1])))
    prefix = next((prefix for prefix in ("module.", "model.") if all(name.startswith(prefix) for name in tensors)), "")
    load_strictly(network, {name.removeprefix(prefix): value for name, value in tensors.items()})
    raise ArchiveError(f"the weights at {'.'.join(place)} do not fit the network")


def _describe(taken: Candidate, left: Sequence[str], others: Sequence[Candidate]) -> str:
    """Return what is worth saying of the choice."""
    parts = []
    if taken.place or taken.prefix:
        parts.append(f"weights: {taken}, without it" if taken.prefix else f"weights: {taken}")
    elif left or others:
        parts.append("weights: the file's own")
    if taken.is_averaged:
        parts.append("a moving average")
    if others:
        which = "--ema takes them" if not taken.is_averaged else "without --ema they are taken"
        parts.append(f"it also holds {_spell(others)}: {which}")
    if left:
        parts.append(f"left out: {_several(left)}")
    return "; ".join(parts)


def _spell(found: Sequence[Candidate]) -> str:
    return " and ".join(str(one) for one in found)


def _several(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


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


def _load_shards(index: Path) -> Mapping[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except OSError as err:
        raise ArchiveError(f"{index} cannot be read: {err.strerror}") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArchiveError(f"{index} is not an index of safetensors files: it has no weight_map") from err
    found: dict[str, Tensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArchiveError(f"{index} names files outside its folder: {name!r}")
        found.update(_load_safetensors(index.parent / name))
    return found


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_tensors
    except ModuleNotFoundError as err:
        raise ArchiveError(f"reading {path.name} needs the package safetensors, which `make install` installs") from err
    try:
        found: Mapping[str, Tensor] = load_tensors(path)
    except OSError as err:
        raise ArchiveError(f"{path} cannot be read: {err.strerror or err}") from err
    except SafetensorError as err:
        raise ArchiveError(f"{path} is not a safetensors file: {err}") from err
    return found
