"""The archives of a model store, and which of them to serve.

A damaged archive is rejected and the others are served: one bad file must not take all models from a replica that
restarts. Archives are read completely, so that damage anywhere in a file is found before a host imports its content.
`trust` checks digests and signatures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from server import trust
from server.failures import Failure, UsageFailure

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_LIST = 4000  # Characters: gRPC clients take headers of 8 KiB, all together.
TIMEOUT_S = 120  # TorchServe's default for a worker.


Files = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Archive:
    """One archive, as its manifest describes it.

    Attributes:
        path: The `.mar` file.
        name: The model's name, as in `/predictions/<name>`.
        version: The model's version.
        workers: Number of workers that the archive sets; None if it does not.
        modules: Top-level Python modules and packages inside the archive.
        response_timeout_s: Seconds that a worker may take for a batch before TorchServe ends it.
        startup_timeout_s: Seconds that it may take to load.
        fingerprint: A digest of its members' names, sizes and checksums, which differs for other contents.
        unpacked_bytes: Size of all members.
        has_digests: Whether it holds a list of its members' digests, which were checked.
    """

    path: Path
    name: str
    version: str
    workers: int | None
    modules: frozenset[str]
    response_timeout_s: int = TIMEOUT_S
    startup_timeout_s: int = TIMEOUT_S
    fingerprint: str = ""
    unpacked_bytes: int = 0
    has_digests: bool = False

    @property
    def label(self) -> str:
        """TorchServe's name for this version, part of the names of its worker threads."""
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
        archives: The archives to serve, the newest version of a model first.
        rejected: Why others cannot be served, by the file's name without `.mar`.
        files: Result of `look` just before.
    """

    archives: list[Archive]
    rejected: dict[str, str]
    files: Files


def find_archives(store: Path, wanted: Sequence[str] = (), signers: Path | None = None, *, least: int = 1) -> Found:
    """Find the archives to serve.

    Args:
        store: Folder with `.mar` files.
        wanted: Names (`name`, every version, or `name/version`); empty for all.
        signers: File of keys, one of which must have signed an archive; None to accept unsigned ones too.
        least: 0 if it is not an error to find none.

    Raises:
        UsageFailure: No such folder, no archives in it, no archive of that name, or a file of keys that holds none.
        Failure: No archive is left to serve.
    """
    if not store.is_dir():
        raise UsageFailure(f"there is no model store {store}: name a folder of .mar archives with --model-store")
    seen = look(store)
    files = sorted(path for path in store.iterdir() if path.suffix == ".mar" and path.is_file())
    if least and not files:
        raise UsageFailure(f"the model store {store} holds no .mar archives: build one with `python -m archiver`")
    keys = None if signers is None else trust.read_keys(signers)
    archives: list[Archive] = []
    broken: dict[str, str] = {}
    for path in files:
        try:
            archives.append(read_archive(path, keys))
        except Failure as failure:
            broken[path.stem] = str(failure)
    known = {name for archive in archives for name in (archive.name, archive.full_name)}
    unknown = [name for name in wanted if name not in known]
    if least and unknown and not broken:
        there = ", ".join(sorted({archive.name for archive in archives}))
        raise UsageFailure(f"no model {', '.join(unknown)} in {store}; there are: {there}")
    # A broken archive might be the one that was asked for. Where all that were named are there, it might be a version.
    models = {name.partition("/")[0] for name in wanted}
    rejected = {
        stem: why
        for stem, why in broken.items()
        if unknown or not wanted or any(is_named_after(stem, model) for model in models)
    }
    missing = {name.partition("/")[0]: f"no archive of {name} in {store} can be read" for name in unknown}
    chosen = [archive for archive in archives if not wanted or {archive.name, archive.full_name} & set(wanted)]
    rejected = missing | rejected | _find_twins(chosen)
    chosen = [archive for archive in chosen if archive.path.stem not in rejected]
    if least and not chosen:
        raise Failure("\n".join(dict.fromkeys(rejected.values())))
    chosen.sort(key=lambda archive: _version_key(archive.version), reverse=True)
    return Found(sorted(chosen, key=lambda archive: archive.name), rejected, seen)


def is_named_after(stem: str, model: str) -> bool:
    """Return whether a file is named after a model, as `cifar-1.1` is after `cifar`, and `cifar10` is not."""
    return stem.startswith(model) and not stem[len(model) :][:1].isalnum()


def look(store: Path) -> Files:
    """Return time, size and inode of the archives of a store by name, which change when an archive does.

    Signatures are included: an archive may be loaded once its signature is there.
    """
    seen = {}
    for path in (*store.glob("*.mar"), *store.glob("*.mar.sig")):
        with contextlib.suppress(OSError):  # It was removed meanwhile.
            status = path.stat()
            seen[path.name] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return seen


def describe_models(archives: Sequence[Archive]) -> str:
    """Return the list of models for the message "Model not found": ` (models: cifar/1.0, digits/1.0)`.

    Models are sorted by name; the versions of a model keep their order. Empty if the text would be too long for a gRPC
    status, whose message is sent as a header.
    """
    names = [archive.full_name for archive in sorted(archives, key=lambda archive: archive.name)]
    text = f" (models: {', '.join(names)})"
    return text if len(text) <= LONGEST_LIST and text.isascii() else ""


def read_archive(path: Path, keys: trust.Keys | None = None) -> Archive:
    """Read the manifest of an archive, after checking its signature and its members.

    Args:
        path: The `.mar` file.
        keys: Keys, one of which must have signed it; None to accept an unsigned one too.

    Raises:
        Failure: The file is not an archive, is not what was signed or listed, or its manifest has no name or version
            that can be served.
    """
    if keys is not None:
        trust.check_signature(path, keys)
    try:
        with zipfile.ZipFile(path) as archive:
            has_digests = trust.check_members(archive, path.name)
            members = archive.namelist()
            fingerprint = take_fingerprint(archive)
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
            model = manifest["model"]
            name, version = str(model["modelName"]), str(model.get("modelVersion", "1.0"))
            handler = str(model.get("handler", "")).split(":")[0]
            config = _read_config(archive.read(model["configFile"])) if model.get("configFile") else {}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise Failure(f"archive {path.name}: it is damaged or no archive at all ({error})") from error
    except RuntimeError as error:  # It is encrypted, or compressed with an unsupported method.
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
        fingerprint,
        unpacked_bytes,
        has_digests,
    )


def copy_checked(archives: Sequence[Archive], folder: Path, signers: Path | None) -> list[Archive]:
    """Return the archives that a host opens: if signatures are required, copies that only this user can change.

    The copies are checked, so the content that is used is the content that was checked, even if the store changes.

    Args:
        archives: Archives of the model store.
        folder: Folder for the copies, created in a place that only this user can write to.
        signers: File of keys, one of which must have signed an archive; None to open those of the model store.

    Raises:
        Failure: An archive cannot be copied, or is no longer what was signed.
    """
    if signers is None:
        return list(archives)
    keys, taken = trust.read_keys(signers), list[Archive]()
    folder.mkdir(exist_ok=True)
    for archive in archives:
        copy, beside = folder / archive.path.name, f"{archive.path.name}.sig"
        try:
            shutil.copyfile(archive.path, copy)
            shutil.copyfile(archive.path.with_name(beside), folder / beside)
        except OSError as error:
            raise Failure(f"archive {copy.name}: it cannot be copied to {folder}: {error.strerror or error}") from error
        taken.append(read_archive(copy, keys))
    return taken


def describe_trust(archives: Sequence[Archive], signers: Path | None) -> list[str]:
    """Return sentences for the log about signatures and digests of the archives."""
    said = [] if signers is None else [f"archives are served only if a key of {signers} signed them"]
    if older := [archive.path.name for archive in archives if not archive.has_digests]:
        said.append(
            f"no list of digests is in {', '.join(older)}, made by an older archiver or by something else: "
            "`python -m archiver --refresh` adds one to ours"
        )
    return said


def take_fingerprint(archive: zipfile.ZipFile) -> str:
    """Return a digest of an archive's contents that does not depend on the order and the times of its members."""
    contents = sorted((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist())
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def _read_config(document: bytes) -> dict[str, int]:
    """Return the positive whole numbers of a model-config.yaml."""
    config = yaml.safe_load(document)
    entries = config.items() if isinstance(config, dict) else ()
    return {key: value for key, value in entries if isinstance(value, int) and value > 0}


def _find_twins(archives: Sequence[Archive]) -> dict[str, str]:
    """Return, for archives of the same version of the same model, why they are rejected."""
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
    """Return a sort key by which 1.10 follows 1.9."""
    parts = re.findall(r"\d+|[^\d.]+", version)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]


class Change(NamedTuple):
    """The steps that make the served versions of a model match the store.

    `new` and `gone` are empty if only the default changes.

    Attributes:
        name: The model's name.
        new: Versions to load.
        gone: Versions to remove once the new ones are served.
        served: Versions served afterwards, the newest (the default) first.
    """

    name: str
    new: list[Archive]
    gone: list[Archive]
    served: list[Archive]


def find_changes(served: Sequence[Archive], found: Found) -> tuple[list[Change], dict[str, str]]:
    """Compare the served archives with the store.

    A model without archives in the store stays as it is, and so does a version whose file cannot be read.

    Args:
        served: Archives served now; of several versions of a model, the default first.
        found: Archives of the store.

    Returns:
        The changes, and the reasons why other files are ignored, by file name without `.mar`.
    """
    changes, conflicts = [], {}
    for name in dict.fromkeys(archive.name for archive in found.archives):
        there = [archive for archive in found.archives if archive.name == name]
        before = {archive.version: archive for archive in served if archive.name == name}
        other = [
            archive
            for archive in there
            if archive.version in before and archive.fingerprint != before[archive.version].fingerprint
        ]
        for archive in other:
            conflicts[archive.path.stem] = (
                f"archive {archive.path.name}: version {archive.version} of {name} is served already, with other "
                "contents: build the archive with a version of its own"
            )
        versions = {archive.version for archive in there}
        new = [archive for archive in there if archive.version not in before]
        gone = [
            archive
            for archive in before.values()
            if archive.version not in versions and archive.path.stem not in found.rejected
        ]
        kept = [archive for archive in before.values() if archive not in gone]
        then = sorted([*kept, *new], key=lambda archive: _version_key(archive.version), reverse=True)
        if (gone or then != kept) and not other:
            changes.append(Change(name, new, gone, then))
    return changes, conflicts
