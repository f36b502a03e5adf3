"""The archives of a model store: what is in it, and which of it to serve.

A damaged archive is rejected and the others are served: a replica that restarts must not lose all models to one bad
file. Archives are read through, so that damage anywhere in the file shows here; what the handler inside does is
TorchServe's business.
"""

from __future__ import annotations

import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from server.failures import Failure, UsageFailure

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_LIST = 4000  # Characters: gRPC clients take headers of 8 KiB, all together.
TIMEOUT_S = 120  # What TorchServe gives a worker where the archive does not say.


@dataclass(frozen=True)
class Archive:
    """One archive, as its manifest describes it.

    Attributes:
        path: The `.mar` file.
        name: The model's name, as in `/predictions/<name>`.
        version: The model's version.
        workers: Workers the archive asks for; None if it does not say.
        modules: Top-level Python modules and packages inside the archive.
        response_timeout_s: Seconds a worker may take for a batch until TorchServe ends it.
        startup_timeout_s: Seconds it may take to load.
    """

    path: Path
    name: str
    version: str
    workers: int | None
    modules: frozenset[str]
    response_timeout_s: int = TIMEOUT_S
    startup_timeout_s: int = TIMEOUT_S

    @property
    def label(self) -> str:
        """TorchServe's name for this version, as it appears in the names of its worker threads."""
        return f"{self.name}_{self.version}"

    @property
    def full_name(self) -> str:
        """`name/version`, as options, metrics and messages write it."""
        return f"{self.name}/{self.version}"

    @property
    def predictions_path(self) -> str:
        """The path of this version's predictions and of its model card."""
        return f"/predictions/{self.full_name}"


class Found(NamedTuple):
    """The archives of a model store.

    Attributes:
        archives: Those to serve, the newest version of a model first.
        rejected: Why others cannot be served, by the file's name without `.mar`.
    """

    archives: list[Archive]
    rejected: dict[str, str]


def find_archives(store: Path, wanted: Sequence[str] = ()) -> Found:
    """Find the archives to serve.

    Args:
        store: Folder with `.mar` files.
        wanted: Names (`name`, every version, or `name/version`); empty for all.

    Raises:
        UsageFailure: No such folder, no archives in it, or no archive of that name.
        Failure: No archive is left to serve.
    """
    if not store.is_dir():
        raise UsageFailure(f"there is no model store {store}: name a folder of .mar archives with --model-store")
    files = sorted(path for path in store.iterdir() if path.suffix == ".mar" and path.is_file())
    if not files:
        raise UsageFailure(f"the model store {store} holds no .mar archives: build one with `python -m archiver`")
    archives: list[Archive] = []
    broken: dict[str, str] = {}
    for path in files:
        try:
            archives.append(read_archive(path))
        except Failure as failure:
            broken[path.stem] = str(failure)
    known = {name for archive in archives for name in (archive.name, archive.full_name)}
    unknown = [name for name in wanted if name not in known]
    if unknown and not broken:
        there = ", ".join(sorted({archive.name for archive in archives}))
        raise UsageFailure(f"no model {', '.join(unknown)} in {store}; there are: {there}")
    # A broken archive might be the one that was asked for; where all that were named are good, it does not matter.
    rejected = broken if unknown or not wanted else {}
    missing = {name.partition("/")[0]: f"no archive of {name} in {store} can be read" for name in unknown}
    chosen = [archive for archive in archives if not wanted or {archive.name, archive.full_name} & set(wanted)]
    rejected = missing | rejected | _find_twins(chosen)
    chosen = [archive for archive in chosen if archive.path.stem not in rejected]
    if not chosen:
        raise Failure("\n".join(dict.fromkeys(rejected.values())))
    chosen.sort(key=lambda archive: _version_key(archive.version), reverse=True)
    return Found(sorted(chosen, key=lambda archive: archive.name), rejected)


def describe_models(archives: Sequence[Archive]) -> str:
    """Return what "Model not found" says of the models there are: ` (models: cifar/1.0, digits/1.0)`.

    Empty where it would be too long for a gRPC status, whose message is a header.
    """
    text = f" (models: {', '.join(archive.full_name for archive in archives)})"
    return text if len(text) <= LONGEST_LIST and text.isascii() else ""


def read_archive(path: Path) -> Archive:
    """Read what an archive says about itself.

    Raises:
        Failure: The file is no archive, or its manifest lacks a name or a version that can be served.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            members = archive.namelist()
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
            model = manifest["model"]
            name, version = str(model["modelName"]), str(model.get("modelVersion", "1.0"))
            handler = str(model.get("handler", "")).split(":")[0]
            config = _read_config(archive.read(model["configFile"])) if model.get("configFile") else {}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise Failure(f"archive {path.name}: it is damaged or no archive at all ({error})") from error
    except RuntimeError as error:  # Encrypted, or compressed in a way that is not known here.
        raise Failure(f"archive {path.name}: it cannot be read ({error}): an archive is a plain zip file") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise Failure(f"archive {path.name}: it is not a TorchServe archive ({error})") from error
    except ValueError as error:
        raise Failure(f"archive {path.name}: its manifest cannot be read ({error})") from error
    except OSError as error:
        raise Failure(f"archive {path.name}: it cannot be opened ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        raise Failure(f"archive {path.name}: its {model['configFile']} is not YAML") from error
    for what, text in (("file name", path.name), ("model name", name), ("version", version)):
        if not SAFE_NAME.fullmatch(text):
            raise Failure(f"archive {path.name}: its {what} {text!r} may hold only letters, digits, '.', '_' and '-'")
    if handler.endswith(".py") and handler not in members:
        raise Failure(f"archive {path.name}: its manifest names the handler {handler}, which is not in the archive")
    modules = frozenset(member.split("/")[0].removesuffix(".py") for member in members if member.endswith(".py"))
    return Archive(
        path,
        name,
        version,
        config.get("minWorkers"),
        modules,
        config.get("responseTimeout", TIMEOUT_S),
        config.get("startupTimeout", TIMEOUT_S),
    )


def _read_config(document: bytes) -> dict[str, int]:
    """Return the numbers of a model-config.yaml that TorchServe would heed."""
    config = yaml.safe_load(document)
    entries = config.items() if isinstance(config, dict) else ()
    return {key: value for key, value in entries if isinstance(value, int) and value > 0}


def _find_twins(archives: Sequence[Archive]) -> dict[str, str]:
    """Return why archives that hold the same version of the same model are rejected: nobody can tell which is meant."""
    seen: dict[str, Archive] = {}
    twins = {}
    for archive in archives:
        twin = seen.setdefault(archive.full_name, archive)
        if twin is not archive:
            twins[twin.path.stem] = twins[archive.path.stem] = (
                f"{twin.path.name} and {archive.path.name} both hold version {archive.version} of {archive.name}: "
                "keep one, or build the other with a version of its own"
            )
    return twins


def _version_key(version: str) -> list[tuple[int, int | str]]:
    """Return a key that puts 1.10 after 1.9."""
    parts = re.findall(r"\d+|[^\d.]+", version)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]
