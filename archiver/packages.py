"""Packages: packs what a network imports of installed packages that the serving image lacks.

Only Python source can be packed: a package with compiled modules must be installed where the archive is served. An
installed package's own data files are not packed. Packages that the serving image installs (`SERVED`) are never packed:
there a network meets that image's versions.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import symtable
import sys
import sysconfig
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archiver.architecture import SERVED, Architecture, package_files
from archiver.packing import ArchiveError

logger = logging.getLogger(__name__)

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
_LICENCES = ("licen", "copying", "notice")  # Beginnings of licence files' names, in lower case and in either spelling.


def complete(
    architecture: Architecture, arguments: Mapping[str, object], picture: Tensor, named: Sequence[str] = ()
) -> Architecture:
    """Add what a network imports of installed packages that the serving image lacks, with their licences.

    Args:
        architecture: The network's constructor and the sources that the user named.
        arguments: The constructor's keyword arguments.
        picture: (1, C, H, W), the network's input.
        named: Packages and modules to pack too, as `find_named` returns them. If a package is not imported while the
            network is built and run, all its modules are packed; for a module, those that importing it imports.

    Returns:
        The architecture with those sources; unchanged if the network fails for another reason than a missing module.

    Raises:
        ArchiveError: The network needs a package that cannot be packed, or a named package cannot be imported.
    """
    if not architecture.sources:
        if named:
            raise ArchiveError(f"--package: {architecture.reference} is in the serving image with all that it imports")
        return architecture
    own = architecture.reference.split(":")[0].split(".")[0]
    tops = dict.fromkeys(name.split(".")[0] for name in ([own] if is_installed(own) else []) + list(named))
    if tops:
        logger.info("finding what it uses of %s", ", ".join(tops))
    sources = {} if own in tops else dict(architecture.sources)
    for top in tops:
        sources |= _source(top)
    architecture = replace(architecture, sources=sources)
    while True:
        try:
            whole = _Trial(architecture, arguments, picture, named)
        except ArchiveError as err:
            missing = err.__cause__.name if isinstance(err.__cause__, ModuleNotFoundError) else None
            top = (missing or "").split(".")[0]
            if not top or not is_installed(top) or {f"{top}/__init__.py", f"{top}.py"} & architecture.sources.keys():
                if isinstance(err, _NamedError):
                    raise
                return architecture
            logger.info("finding what it uses of %s", top)
            architecture = replace(architecture, sources={**architecture.sources, **_source(top)})
        else:
            return _trim(architecture, arguments, picture, whole, named)


def find_named(name: str) -> list[str]:
    """Return the modules that `--package NAME` means.

    Args:
        name: The name of a distribution (`efficientnet-lite-pytorch`), a package (`timm`) or a module
            (`timm.layers.attention`), which must be installed.

    Returns:
        Names to import; empty if the serving image installs the package anyway.

    Raises:
        ArchiveError: The package is not installed, or cannot be packed.
    """
    top = name.split(".")[0]
    distributions = _distributions(tuple(sys.path))
    tops = [one for one, names in distributions.items() if _normalise(name) in map(_normalise, names)]
    if top in SERVED or any(one in SERVED for one in tops):
        return []
    if is_installed(top):
        return [name]
    if not any(map(is_installed, tops)):
        near = difflib.get_close_matches(top, [one for one in distributions if is_installed(one)], 3, 0.6)
        raise ArchiveError(
            f"--package {name}: no such package is installed here" + (f"; there is {', '.join(near)}" if near else "")
        )
    return [one for one in tops if is_installed(one)]


def _trim(
    architecture: Architecture,
    arguments: Mapping[str, object],
    picture: Tensor,
    whole: _Trial,
    named: Sequence[str],
) -> Architecture:
    """Leave out the modules of installed packages that a network does not import.

    A package's `__init__` often imports all of it. So each `__init__` is first replaced by one that imports a name on
    first use, and put back if that fails. The remaining sources must build the same network: the same weights from the
    same seed, and the same output for a picture.
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
            found = _Trial(replace(architecture, sources=sources), arguments, picture, named)
        except ArchiveError as err:
            lacking = getattr(err.__cause__, "name", None) or getattr(
                getattr(err.__cause__, "obj", None), "__name__", ""
            )
            init = f"{str(lacking).replace('.', '/')}/__init__.py"
            if init in lazy:
                lazy.remove(init)
            elif lazy:  # The cause is unknown: restore every `__init__`.
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
        for top in installed.intersection(named) - found.used:  # Its imports are unknown.
            whole_package = {name: code for name, code in architecture.sources.items() if name.startswith(f"{top}/")}
            lazy -= whole_package.keys()
            kept |= whole_package
        kept |= {name: _write_lazily(name, architecture.sources, kept.keys()) for name in lazy & kept.keys()}
        return replace(architecture, sources=kept)


def _write_lazily(init: str, sources: Mapping[str, bytes], kept: Set[str] | None = None) -> bytes:
    """Return an `__init__` with the names that a package's own `__init__` imports from it, each imported on first use.

    A name that is also a submodule's (`from .drop import drop`) is imported at once; otherwise importing the submodule
    would replace it.

    Args:
        init: Name of the `__init__` inside the archive.
        sources: The package's files.
        kept: Files that will be packed: names from others are left out. None for all.
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
                else:  # A package imports its names itself.
                    stars.append(module)
    return _LAZY.format(places=repr(places), stars=repr(stars), eager="".join(eager)).encode()


def _defined(source: bytes) -> list[str]:
    """Return the public names that a module's own code assigns."""
    # A third of the time of `ast.parse`.
    symbols = symtable.symtable(importlib.util.decode_source(source), "module", "exec").get_symbols()
    own = [one.get_name() for one in symbols if one.is_assigned() and not one.is_imported()]
    return [name for name in own if not name.startswith("_")]


def describe(architecture: Architecture) -> list[str]:
    """Return a line for each installed package in an architecture: its version, size and licences."""
    lines = []
    for top in sorted({name.split("/")[0].removesuffix(".py") for name in architecture.sources}):
        own = {name: code for name, code in architecture.sources.items() if re.split(r"/|\.py$", name)[0] == top}
        if is_installed(top) and any(name.endswith(".py") for name in own):
            found = _distribution(top)
            what = f"{found.metadata['Name']} {found.version}" if found else top
            licences = [Path(name).name for name in own if not name.endswith(".py")]
            lines.append(
                f"packed: {what}, {sum(name.endswith('.py') for name in own)} files of "
                f"{sum(map(len, own.values())):,} bytes; {', '.join(licences) or 'it brings no licence file'}"
            )
    return lines


def is_installed(top: str) -> bool:
    """Return whether a package or module lies where packages are installed and is not in the serving image."""
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return False
    if spec is None or top in SERVED or top in sys.stdlib_module_names:
        return False
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    return any(Path(place).is_relative_to(folder) for place in places for folder in installation_folders())


def installation_folders() -> list[Path]:
    """Return the folders where packages are installed."""
    named = [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return [*named, *(Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))]


def _source(top: str) -> dict[str, bytes]:
    """Return an installed package's Python files and licences, by name inside the archive.

    Raises:
        ArchiveError: It has compiled modules.
    """
    spec = importlib.util.find_spec(top)
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    found = [path for place in places for path in place.rglob("*")] or [Path((spec and spec.origin) or "")]
    compiled = next((path for path in found if path.suffix in _COMPILED), None)
    if compiled is not None:
        raise ArchiveError(
            f"the network needs the package {top!r}, which a stock TorchServe does not have; it has compiled modules "
            f"({compiled.name}), so it cannot travel in an archive"
        )
    files = package_files(top, top)
    distribution = _distribution(top)
    if distribution:  # A package may ask for its own version.
        title, version = distribution.metadata["Name"], distribution.version
        metadata = f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n"
        for field in ("License-Expression", "License", "Classifier"):
            said = map(str, distribution.metadata.get_all(field, ()))
            # Some packages write the whole licence there; its file is packed.
            short = [
                text for text in said if "\n" not in text and (field != "Classifier" or text.startswith("License"))
            ]
            metadata += "".join(f"{field}: {text}\n" for text in short)
        files[f"{_normalise(title)}-{version}.dist-info/METADATA"] = metadata.encode()
    for path in (distribution.files if distribution else None) or []:
        if path.name.lower().startswith(_LICENCES) and path.suffix not in (".py", ".pyc"):
            name = path.name if f"{top}/{path.name}" not in files else "-".join(path.parts[1:])
            files[f"{top}/{name}"] = Path(str(path.locate())).read_bytes()
    return files


def _normalise(distribution: str) -> str:
    return re.sub(r"[-_.]+", "_", distribution).lower()


@cache  # Reading the records of hundreds of distributions takes a quarter of a second.
def _distributions(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return the names of the distributions on an import path by the packages that they install."""
    return importlib.metadata.packages_distributions()


def _distribution(top: str) -> importlib.metadata.Distribution | None:
    names = _distributions(tuple(sys.path)).get(top, [])
    return importlib.metadata.distribution(names[0]) if names else None


class _NamedError(ArchiveError):
    """The package or module of `--package` cannot be imported."""


class _Trial:
    """One attempt to build and run a network.

    Args:
        architecture: The constructor and the sources that can be imported.
        arguments: The constructor's keyword arguments.
        picture: (1, C, H, W), the network's input.
        named: Packages and modules to import too.

    Attributes:
        used: Top-level names of the modules that the network imported.
        files: The sources that were imported, including those of `named`.

    Raises:
        ArchiveError: The attempt failed; the error's cause is the original exception.
    """

    def __init__(
        self, architecture: Architecture, arguments: Mapping[str, object], picture: Tensor, named: Sequence[str]
    ) -> None:
        with architecture.importable(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            network = architecture.build(arguments).eval()
            try:
                self._output = network(picture)
            except Exception as err:  # The forward pass is the network's own code, which may raise anything.
                raise ArchiveError(f"the network fails: {type(err).__name__}: {err}") from err
            self._state = network.state_dict()
            self.used = {name.split(".")[0] for name in sys.modules}
            for name in named:
                try:
                    importlib.import_module(name)
                except Exception as err:
                    raise _NamedError(f"--package {name}: importing it failed: {type(err).__name__}: {err}") from err
            paths = [name.replace(".", "/") for name in sys.modules]
            self.files = {file for path in paths for file in (f"{path}.py", f"{path}/__init__.py")}

    def equals(self, other: _Trial) -> bool:
        """Return whether both have the same weights and output."""
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
