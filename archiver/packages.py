"""Packages: what a network uses of installed packages that the serving image lacks travels in its archive.

Only Python source can travel: a package with compiled modules must be installed where the archive is served.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archiver.architecture import SERVED, Architecture, package_files
from archiver.packing import ArchiveError

_LAZY = """# Written by convscope's archiver in place of the package's own, which imports all of it.
import importlib

_PLACES = {places}
_STARS = {stars}


def __getattr__(name):
    if name in _PLACES:
        place, attribute = _PLACES[name]
        module = importlib.import_module(place, __name__)
        globals()[name] = getattr(module, attribute) if attribute else module
        return globals()[name]
    for place in () if name.startswith("__") else _STARS:
        module = importlib.import_module(place, __name__)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}", name=name)


{eager}"""
_COMPILED = (".so", ".pyd", ".dylib")
_LICENCES = ("licen", "copying", "notice")  # How such a file begins, in lower case and in either spelling.


def complete(architecture: Architecture, arguments: Mapping[str, object], picture: Tensor) -> Architecture:
    """Add what a network imports of installed packages that the serving image lacks, with their licences.

    Args:
        architecture: The network's constructor and the sources that the user named.
        arguments: The constructor's keyword arguments.
        picture: (1, C, H, W), what the network takes.

    Returns:
        The architecture with those sources; as it was where the network fails for another reason than a missing module.

    Raises:
        ArchiveError: It needs a package that cannot travel.
    """
    if not architecture.sources:
        return architecture
    own = architecture.reference.split(":")[0].split(".")[0]
    if is_installed(own):
        architecture = replace(architecture, sources=_source(own))
    while True:
        try:
            whole = _Trial(architecture, arguments, picture)
        except ArchiveError as err:
            missing = err.__cause__.name if isinstance(err.__cause__, ModuleNotFoundError) else None
            top = (missing or "").split(".")[0]
            if not top or not is_installed(top) or f"{top}/__init__.py" in architecture.sources:
                return architecture
            architecture = replace(architecture, sources={**architecture.sources, **_source(top)})
        else:
            return _trim(architecture, arguments, picture, whole)


def _trim(architecture: Architecture, arguments: Mapping[str, object], picture: Tensor, whole: _Trial) -> Architecture:
    """Leave out the modules of installed packages that a network does not import.

    A package's `__init__` often imports all of it. So each is replaced at first by one that imports a name when it is
    asked for, and put back where that does not do. What is left must build the same network: the same weights from the
    same seed, and the same answer to a picture.
    """
    tops = {name.split("/")[0] for name in architecture.sources if name.endswith("/__init__.py")}
    installed = {top for top in tops if is_installed(top)}
    if not installed:
        return architecture
    lazy = {name for name in architecture.sources if name.endswith("/__init__.py") and name.split("/")[0] in installed}
    while True:
        sources = {
            name: _write_lazily(name, architecture.sources) if name in lazy else code
            for name, code in architecture.sources.items()
        }
        try:
            found = _Trial(replace(architecture, sources=sources), arguments, picture)
        except ArchiveError as err:
            lacking = getattr(err.__cause__, "name", None) or getattr(
                getattr(err.__cause__, "obj", None), "__name__", ""
            )
            init = f"{str(lacking).replace('.', '/')}/__init__.py"
            if init in lazy:
                lazy.remove(init)
            elif lazy:  # Nobody says which: none is.
                lazy.clear()
            else:
                raise
            continue
        if not found.equals(whole):
            if not lazy:
                return architecture
            lazy.clear()
            continue
        left_out = {
            name
            for name in sources
            if name.endswith(".py") and name.split("/")[0] in installed and name not in found.files
        }
        kept = {name: code for name, code in sources.items() if name not in left_out}
        kept |= {name: _write_lazily(name, architecture.sources, kept.keys()) for name in lazy & kept.keys()}
        return replace(architecture, sources=kept)


def _write_lazily(init: str, sources: Mapping[str, bytes], kept: Set[str] | None = None) -> bytes:
    """Return an `__init__` with the names that a package's own imports from the package, each imported when it is used.

    A name that a submodule has too (`from .drop import drop`) is imported at once, or importing the submodule would put
    it in the name's place.

    Args:
        init: Its name inside the archive.
        sources: The package's files.
        kept: Those that will be there: names from others are left out. None for all.
    """
    places: dict[str, tuple[str, str]] = {}
    stars, eager = [], []
    folder = init.removesuffix("__init__.py")

    for statement in ast.parse(sources[init]).body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1:
            for alias in statement.names:
                name = alias.asname or alias.name
                module = f".{statement.module}" if statement.module else f".{alias.name}"
                path = folder + module[1:].replace(".", "/")
                if kept is not None and not {f"{path}.py", f"{path}/__init__.py"} & kept:
                    continue
                if alias.name != "*" and statement.module == name:
                    eager.append(f"from {module} import {alias.name} as {name}\n")
                elif alias.name != "*":
                    places[name] = (module, alias.name if statement.module else "")
                elif f"{path}.py" in sources:
                    places |= {one: (module, one) for one in _defined(sources[f"{path}.py"])}
                else:  # A package, which imports its names itself.
                    stars.append(module)
    return _LAZY.format(places=repr(places), stars=repr(stars), eager="".join(eager)).encode()


def _defined(source: bytes) -> list[str]:
    """Return the public names that a module's own code gives to something."""
    names = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def describe(architecture: Architecture) -> list[str]:
    """Return a line for each installed package in an architecture: its version, how much of it, and its licences."""
    lines = []
    for top in sorted({name.split("/")[0] for name in architecture.sources if "/" in name}):
        own = {name: code for name, code in architecture.sources.items() if name.startswith(f"{top}/")}
        if is_installed(top) and f"{top}/__init__.py" in own:
            found = _distribution(top)
            what = f"{found.metadata['Name']} {found.version}" if found else top
            licences = [Path(name).name for name in own if not name.endswith(".py")]
            lines.append(
                f"packed: {what}, {sum(name.endswith('.py') for name in own)} files of "
                f"{sum(map(len, own.values())):,} bytes; {', '.join(licences) or 'it brings no licence file'}"
            )
    return lines


def is_installed(top: str) -> bool:
    """Tell whether a package lies where packages are installed and is not in the serving image."""
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return False
    if spec is None or top in SERVED or not spec.submodule_search_locations:
        return False
    folders = installation_folders()
    return any(Path(place).is_relative_to(folder) for place in spec.submodule_search_locations for folder in folders)


def installation_folders() -> list[Path]:
    """Return where packages are installed."""
    named = [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return [*named, *(Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))]


def _source(top: str) -> dict[str, bytes]:
    """Return an installed package's Python files and licences, by name inside the archive.

    Raises:
        ArchiveError: It has compiled modules.
    """
    spec = importlib.util.find_spec(top)
    (folder, *_) = (spec.submodule_search_locations if spec else None) or [""]
    compiled = next((path for path in Path(folder).rglob("*") if path.suffix in _COMPILED), None)
    if compiled is not None:
        raise ArchiveError(
            f"the network needs the package {top!r}, which a stock TorchServe does not have; it has compiled modules "
            f"({compiled.name}), so it cannot travel in an archive"
        )
    files = package_files(top, top)
    distribution = _distribution(top)
    for path in (distribution.files if distribution else None) or []:
        if path.name.lower().startswith(_LICENCES) and path.suffix not in (".py", ".pyc"):
            files[f"{top}/{path.name}"] = Path(str(path.locate())).read_bytes()
    return files


def _distribution(top: str) -> importlib.metadata.Distribution | None:
    names = importlib.metadata.packages_distributions().get(top, [])
    return importlib.metadata.distribution(names[0]) if names else None


class _Trial:
    """What one attempt to build and run a network showed.

    Args:
        architecture: The constructor and the sources that are there to import.
        arguments: The constructor's keyword arguments.
        picture: (1, C, H, W), what the network takes.

    Attributes:
        files: The sources that were imported.

    Raises:
        ArchiveError: It failed; its cause is what was raised.
    """

    def __init__(self, architecture: Architecture, arguments: Mapping[str, object], picture: Tensor) -> None:
        with architecture.importable(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            network = architecture.build(arguments).eval()
            try:
                self._output = network(picture)
            except Exception as err:  # The forward pass is the network's own code, which may raise anything.
                raise ArchiveError(f"the network fails: {type(err).__name__}: {err}") from err
            self._state = network.state_dict()
            paths = [name.replace(".", "/") for name in sys.modules]
            self.files = {file for path in paths for file in (f"{path}.py", f"{path}/__init__.py")}

    def equals(self, other: _Trial) -> bool:
        """Whether both have the same weights and gave the same answer."""
        one, another = self._state, other._state
        same = one.keys() == another.keys() and all(torch.equal(value, another[name]) for name, value in one.items())
        return same and _alike(self._output, other._output)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other)
