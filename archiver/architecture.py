"""Architectures: from `module:Callable` to a network, and the source files that must travel with it.

The networks of `handlers` and of torchvision are available wherever an archive is served. A user's own module or
package is packed, and imported here from a copy of exactly what is packed, with the imports that the serving image has:
what works here works there.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import shutil
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archiver.packing import ArchiveError, is_ours

SERVED = ("torch", "torchvision", "numpy", "PIL", "yaml", "google", "safetensors")
"""What may be imported from beside the standard library: a stock TorchServe with its public packages has no more."""

UNPACKED = "convscope-"
"""How the name of a folder begins that packed sources are imported from."""


@dataclass(frozen=True)
class Architecture:
    """A network's constructor, and the files it comes from.

    Attributes:
        reference: `package.module:Name`, importable if `sources` are on the import path.
        sources: Python files by name at the archive's root; empty for a network that the serving image has anyway.
    """

    reference: str
    sources: Mapping[str, bytes] = field(default_factory=dict)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Import the packed sources, and no other module of the user's, inside the context.

        Build and run the network inside: it may import more when it is called. Afterwards the import path and
        `sys.modules` are what they were.
        """
        if not self.sources:
            yield
            return
        folder = self._unpacked
        packed = {name.split("/")[0].removesuffix(".py") for name in self.sources}
        hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packed}
        for name in hidden:
            del sys.modules[name]
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            with _imports_of_the_serving_image(packed):
                yield
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.split(".")[0] in packed]:
                del sys.modules[name]
            sys.modules.update(hidden)

    @cached_property
    def _unpacked(self) -> str:
        """Folder of the unpacked sources; kept while this object lives, since Python caches their bytecode there."""
        folder = tempfile.mkdtemp(prefix=UNPACKED)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, content in self.sources.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def build(self, arguments: Mapping[str, Any]) -> nn.Module:
        """Call the constructor; use it inside `importable`.

        Args:
            arguments: The constructor's keyword arguments.

        Raises:
            ArchiveError: The constructor cannot be imported, rejects these arguments, or returns no `nn.Module`.
        """
        module_name, _, name = self.reference.partition(":")
        try:
            constructor = attrgetter(name)(importlib.import_module(module_name))
        except ModuleNotFoundError as err:
            raise ArchiveError(
                f"{self.reference} needs the module {err.name!r}, which the archive will not have beside it: it holds "
                f"{', '.join(sorted(self.sources)) or 'our handlers'}, and the serving image installs "
                f"{', '.join(SERVED)}. Put several files of your own in a package and give package.module:Name"
            ) from err
        except AttributeError as err:
            raise ArchiveError(f"{module_name} has no {name!r}") from err
        except Exception as err:  # Importing runs the user's code, which may raise anything.
            raise ArchiveError(f"importing {module_name} failed: {type(err).__name__}: {err}") from err
        try:
            network = constructor(**arguments)
        except Exception as err:  # The user's constructor may raise anything too.
            raise ArchiveError(
                f"{self.reference}({_spelt(arguments)}) failed: {type(err).__name__}: {err}; "
                "--arguments takes the constructor's keyword arguments as JSON"
            ) from err
        if not isinstance(network, nn.Module):
            raise ArchiveError(f"{self.reference} makes a {type(network).__name__}, not a torch.nn.Module")
        if isinstance(network, torch.jit.ScriptModule):
            raise ArchiveError(
                f"{self.reference} makes a TorchScript program, which shows none of its layers; give the class that "
                "was scripted or traced"
            )
        return network


def find(text: str) -> Architecture:
    """Find an architecture and collect its sources.

    Args:
        text: `path/to/net.py:Name`, `package.module:Name`, or a builder such as `torchvision.models:resnet18` or
            `package.module:Class.method`.

    Raises:
        ArchiveError: The file or module does not exist, or its name would hide another module inside the server.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not all(part.isidentifier() for part in name.split(".")):
        raise ArchiveError(f"{text!r} is no architecture; give path/to/net.py:Name or package.module:Name")
    if place.endswith(".py"):
        return _find_file(Path(place), name)
    top = place.split(".")[0]
    if top in (*SERVED, "handlers"):
        return Architecture(f"{place}:{name}")
    return Architecture(f"{place}:{name}", package_files(top, place))


def _find_file(path: Path, name: str) -> Architecture:
    if not path.is_file():
        raise ArchiveError(f"{path} does not exist")
    stem = path.stem
    if not stem.isidentifier():
        raise ArchiveError(f"{path.name} cannot be imported by that name; rename it to letters, digits and underscores")
    try:
        spec = importlib.util.find_spec(stem)
    except ValueError:  # The module was loaded by other means, and has no spec.
        spec = None
    installed = [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    origin = Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None
    hides = origin is not None and any(origin.is_relative_to(folder) for folder in installed)
    if hides or stem in (*sys.stdlib_module_names, *SERVED, "ts", "handlers", "convscope_entry", "__main__"):
        raise ArchiveError(f"inside the server {path.name} would hide the module {stem!r} of that name; rename it")
    return Architecture(f"{stem}:{name}", {f"{stem}.py": path.read_bytes()})


def package_files(top: str, place: str) -> dict[str, bytes]:
    """Return the Python files of the top-level module or package that holds `place`, by name inside the archive.

    Raises:
        ArchiveError: The module does not exist, or is not the user's.
    """
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ArchiveError(f"there is no module {place!r} on the import path; run from the folder that holds {top}")
    if top in sys.stdlib_module_names or is_ours(f"{top}.py"):
        raise ArchiveError(f"{place} is not a network's module")
    if spec.submodule_search_locations is None:
        return {f"{top}.py": Path(spec.origin or "").read_bytes()}
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    return {f"{top}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in found}


@contextmanager
def _imports_of_the_serving_image(packed: set[str]) -> Iterator[None]:
    """Reject imports by the packed modules that the serving image lacks; all other code imports as before."""
    allowed = {*SERVED, *packed, "handlers", *sys.stdlib_module_names}
    ordinary, by_name = builtins.__import__, importlib.import_module

    def refuse(importer: str, name: str) -> None:
        top = name.split(".")[0]
        if importer.split(".")[0] in packed and top and top not in allowed:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

    def guarded(
        name: str,
        scope: Mapping[str, object] | None = None,
        local: Mapping[str, object] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        if level == 0:
            refuse(str((scope or {}).get("__name__", "")), name)
        return ordinary(name, scope, local, fromlist, level)

    def guarded_by_name(name: str, package: str | None = None) -> Any:
        refuse(str(sys._getframe(1).f_globals.get("__name__", "")), name)
        return by_name(name, package)

    builtins.__import__ = guarded  # type: ignore[assignment]
    importlib.import_module = guarded_by_name
    try:
        yield
    finally:
        builtins.__import__, importlib.import_module = ordinary, by_name


def _spelt(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
