"""Checks an archive: the list of digests inside it, and the signature beside it.

The list, `MAR-INF/SHA256SUMS`, reveals damage and added or missing members. It does not protect against an attacker,
who can write a new list. The signature, `<archive>.sig`, does: it is OpenSSH's, with an Ed25519 key, over every byte of
the file. Nothing of a file is parsed before its signature is checked, so it does not matter that TorchServe reads a zip
file by the headers before its members and Python by the directory at its end.

Signatures: https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.sshsig, with strings as in RFC 4251
(section 5), and keys and signatures as in RFC 8709.
"""

from __future__ import annotations

import base64
import hashlib
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from server.failures import Failure, UsageFailure

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

DIGESTS = "MAR-INF/SHA256SUMS"
NAMESPACE = b"convscope"  # Purpose of the signature: that of a Git commit, for example, is not accepted.
KIND = b"ssh-ed25519"

# An archive without a list may be compressed. Weights compress to nine tenths, code to a fifth.
MOST_BYTES, MOST_RATIO = 1 << 30, 100

_PREAMBLE = b"SSHSIG"
_ARMOUR = re.compile(rb"-----BEGIN SSH SIGNATURE-----\n(.*)\n-----END SSH SIGNATURE-----", re.DOTALL)
_LONGEST_SIGNATURE = 16384
# Restrictions of a key in a file of authorized_keys or allowed signers, in the place of the names.
_OPTIONS = re.compile(
    rb'(?i).*="|(.*,)?(cert-authority|restrict|verify-required|'
    rb"(no-)?(pty|user-rc|touch-required|(agent|port|x11)-forwarding))(,|$)"
)
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")

Keys = Mapping[bytes, "Ed25519PublicKey"]
"""Public keys, by their bytes as a signature holds them."""


def read_keys(path: Path) -> Keys:
    """Read the public keys that may sign archives.

    Args:
        path: File with a key per line, as in `~/.ssh/id_ed25519.pub`, or with names before it, as in a file of allowed
            signers for `ssh-keygen -Y verify`.

    Raises:
        UsageFailure: The file cannot be read, has no key, or has a line that is not a key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageFailure(f"--require-signature: {path} cannot be read ({error.strerror or error})") from error
    keys = dict[bytes, Ed25519PublicKey]()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            _, text = words[words[:2].index(KIND) :][:2]
            if _OPTIONS.match(words[0]):
                raise ValueError("it has options")
            key = load_ssh_public_key(KIND + b" " + text)
            assert isinstance(key, Ed25519PublicKey)  # noqa: S101  # By its kind.
            keys[base64.b64decode(text)] = key
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageFailure(
                f"--require-signature: line {number} of {path} is no public key as `ssh-keygen -t ed25519` writes it, "
                "in a file whose name ends in .pub; options before the key are not supported"
            ) from error
    if not keys:
        raise UsageFailure(f"--require-signature: {path} holds no public key")
    return keys


def check_signature(path: Path, keys: Keys) -> None:
    """Check that an archive is signed by one of the keys.

    Raises:
        Failure: It is not.
    """
    from cryptography.exceptions import InvalidSignature

    beside = path.with_name(f"{path.name}.sig")
    try:
        with beside.open("rb") as file:
            signature = _Signature.parse(file.read(_LONGEST_SIGNATURE))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, signature.algorithm.decode()).digest()
    except FileNotFoundError as error:
        raise Failure(
            f"archive {path.name}: it is not signed: --require-signature asks for its signature in {beside.name}"
        ) from error
    except OSError as error:
        raise Failure(
            f"archive {path.name}: it or {beside.name} cannot be opened ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise Failure(
            f"archive {path.name}: {beside.name} is no signature of an archive ({error}); an Ed25519 key makes one: "
            f"ssh-keygen -Y sign -n {NAMESPACE.decode()} -f KEY {path.name}"
        ) from error
    if signature.key not in keys:
        fingerprint = base64.b64encode(hashlib.sha256(signature.key).digest()).decode().rstrip("=")
        raise Failure(
            f"archive {path.name}: it is signed by the key SHA256:{fingerprint}, which is not among those of "
            "--require-signature"
        )
    signed = _PREAMBLE + b"".join(map(_string, (NAMESPACE, b"", signature.algorithm, digest)))
    try:
        keys[signature.key].verify(signature.made, signed)
    except InvalidSignature as error:
        raise Failure(
            f"archive {path.name}: it is not what was signed: it was changed afterwards, or {beside.name} is of "
            "another archive"
        ) from error


class _Signature(NamedTuple):
    """A parsed signature: the key, the hash algorithm, and the signature itself."""

    key: bytes
    algorithm: bytes
    made: bytes

    @classmethod
    def parse(cls, text: bytes) -> _Signature:
        """Parse the content of a `.sig` file; raises ValueError if it is not such a signature."""
        found = _ARMOUR.fullmatch(text.replace(b"\r\n", b"\n").strip())
        blob = base64.b64decode(found[1].replace(b"\n", b""), validate=True) if found else b""
        head = _PREAMBLE + (1).to_bytes(4)
        if not blob.startswith(head):
            raise ValueError("it is not in OpenSSH's format, version 1")
        key, namespace, _, algorithm, signature = _strings(blob.removeprefix(head))
        if namespace != NAMESPACE:
            raise ValueError(f"its namespace is {namespace.decode('ascii', 'replace')[:40]!r}")
        if algorithm not in (b"sha256", b"sha512"):
            raise ValueError("its hash is neither sha256 nor sha512")
        kind, made = _strings(signature)
        if kind != KIND:
            raise ValueError("its key is of another kind")
        return cls(key, algorithm, made)


def _strings(blob: bytes) -> list[bytes]:
    found = []
    while blob:
        end = 4 + int.from_bytes(blob[:4])
        if len(blob) < end:
            raise ValueError("it is cut short")
        found.append(blob[4:end])
        blob = blob[end:]
    return found


def _string(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def check_members(archive: zipfile.ZipFile, name: str) -> bool:
    """Read every member of an archive, and compare it with the list of digests if there is one.

    Args:
        archive: Open for reading.
        name: Name of the archive's file, for messages.

    Returns:
        Whether there is a list.

    Raises:
        Failure: A member differs from the list, is missing in it, is missing in the archive, occurs twice, has a name
            that leads out of the archive or is not a plain file, or the members unpack to far more than the archive.
        BadZipFile: A member is damaged.
    """

    def refuse(what: str) -> Failure:
        return Failure(f"archive {name}: {what}")

    entries, digests = archive.infolist(), dict[str, str]()
    packed = sum(entry.compress_size for entry in entries)
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(MOST_BYTES, MOST_RATIO * packed):
        raise refuse(f"it would unpack to {unpacked:,} bytes, more than {MOST_RATIO} times its size")
    for entry in entries:
        member = entry.filename
        if not _is_plain(entry):
            raise refuse(f"its member {member!r} is no plain file with a name inside the archive")
        if member in digests:
            raise refuse(f"it holds {member!r} twice")
        with archive.open(entry) as file:
            digests[member] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # It has `readinto`.
    if digests.pop(DIGESTS, None) is None:
        return False
    lines = archive.read(DIGESTS).decode("utf-8", "replace").removesuffix("\n").split("\n")
    found = [_LINE.fullmatch(line) for line in lines]
    listed = {line[2]: line[1] for line in found if line}
    if len(listed) < len(found):
        raise refuse(f"its {DIGESTS} is not as sha256sum writes it, with every name once")
    for member in sorted(digests.keys() | listed.keys()):
        if member not in listed:
            raise refuse(f"its member {member!r} is not in its {DIGESTS}")
        if member not in digests:
            raise refuse(f"its {DIGESTS} lists {member!r}, which is missing")
        if digests[member] != listed[member]:
            raise refuse(f"its member {member!r} has another SHA-256 digest than its {DIGESTS} says")
    return True


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    """Return whether a member is a file or folder, with a relative path that does not leave the archive."""
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the zip file was not written on Unix.
    parts = entry.filename.removesuffix("/").split("/")
    return kind in (0, stat.S_IFREG, stat.S_IFDIR) and not {"", ".", ".."} & set(parts) and "\\" not in entry.filename
