"""The store: a folder of archives, where they are written, signed, compared with a fresh build, and refreshed."""

from __future__ import annotations

import base64
import logging
import subprocess
from pathlib import Path

from archiver import packing
from archiver.contents import Contents, from_files
from archiver.graph import with_engine
from archiver.packing import ArchiveError

logger = logging.getLogger(__name__)

STORE = packing.HANDLERS.parent / "model_store"
NAMESPACE = "convscope"  # Purpose of the signatures; the server accepts no other.


def build(contents: Contents, store: Path = STORE) -> Path:
    """Write the archive of a model.

    Args:
        contents: The model.
        store: Folder for `<model>.mar`.

    Returns:
        Path of the archive.

    Raises:
        ArchiveError: The contents fail a test, or cannot be written there.
    """
    files = contents.files()
    logger.info("packing")
    archive = packing.pack(files)
    path = store / f"{contents.card['model']}.mar"
    write(path, archive)
    return path


def write(path: Path, content: bytes) -> None:
    """Write an archive.

    Raises:
        ArchiveError: The archive cannot be written there.
    """
    try:
        packing.write(path, content)
    except OSError as err:
        raise ArchiveError(f"{path.name} cannot be written to {path.parent}: {err.strerror or err}") from err


def sign(path: Path, key: Path) -> Path:
    """Sign an archive, as `ssh-keygen -Y sign -n convscope -f KEY ARCHIVE` does; asks for the key's passphrase.

    Args:
        path: The archive.
        key: An OpenSSH Ed25519 key: the private key, or the public key of one that ssh-agent holds.

    Returns:
        Path of the signature, beside the archive.

    Raises:
        ArchiveError: OpenSSH is not installed, or cannot sign with the key.
    """
    command = ["ssh-keygen", "-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    try:
        with path.open("rb") as file:
            made = subprocess.run(command, stdin=file, capture_output=True, check=True).stdout
    except OSError as err:
        raise ArchiveError(f"{path.name} cannot be signed: {err}; ssh-keygen is part of OpenSSH's client") from err
    except subprocess.CalledProcessError as err:
        said = err.stderr.decode("utf-8", "replace").strip()
        raise ArchiveError(f"{path.name} cannot be signed with {key}: {said}") from err
    if b"ssh-ed25519" not in base64.b64decode(b"".join(made.splitlines()[1:-1])):
        raise ArchiveError(f"{key} is no Ed25519 key, and the server takes no other: ssh-keygen -t ed25519 makes one")
    beside = path.with_name(f"{path.name}.sig")
    write(beside, made)
    return beside


def refreshed(path: Path, engine: str | None = None) -> bytes:
    """Return the archive as a fresh build would make it from its own weights and card and today's handlers.

    Args:
        path: The archive.
        engine: One of `ENGINES`; None keeps the archive's graph, if any.

    Raises:
        ArchiveError: The archive is not convscope's, or its weights no longer fit.
    """
    contents = from_files(packing.unpack(path))
    return packing.pack((with_engine(contents, engine)[0] if engine else contents).files())


def differences(path: Path) -> list[str]:
    """Return the differences between an archive and a fresh build; empty if it is up to date.

    Raises:
        ArchiveError: The archive cannot be rebuilt.
    """
    packed = packing.unpack(path)
    fresh = from_files(packed).files()
    found = [f"{name} is missing" for name in sorted(fresh.keys() - packed.keys())]
    found += [f"{name} is no longer part of it" for name in sorted(packed.keys() - fresh.keys())]
    found += [f"{name} differs" for name in sorted(fresh.keys() & packed.keys()) if fresh[name] != packed[name]]
    if not found and path.read_bytes() != packing.pack(fresh):
        found.append("the files agree, but the zip around them was written by something else")
    return found


def check(store: Path = STORE) -> list[str]:
    """Return one line for each archive of a store that is out of date, or a line if the store has no archive."""
    archives = sorted(store.glob("*.mar"))
    lines = [] if archives else [f"{store} holds no archive to check; build one with --checkpoint"]
    for path in archives:
        try:
            lines += [f"{path.name}: {difference}" for difference in differences(path)]
        except ArchiveError as err:
            lines.append(f"{path.name}: cannot be rebuilt: {err}")
    return lines
