"""Certificates and their keys: checked, and put in place."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from deploy.commands.common import Refused, now, replace, run, stamp

PEM = re.compile(r"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----.*?-----END (?:X509 |TRUSTED )?CERTIFICATE-----", re.S)
DAYS = 90  # Validity of a test certificate.


@dataclass(frozen=True)
class Certificate:
    """One certificate of a file.

    Attributes:
        pem: The certificate, in PEM.
        subject: Its subject, as openssl writes it.
        issuer: Its issuer, as openssl writes it.
        begins: Start of its validity.
        ends: End of its validity.
        fingerprint: The SHA-256 of its DER form, in hexadecimal.
        names: Its subjectAltName, as openssl writes it; empty if it has none.
        public_key: Its public key, in PEM.
    """

    pem: str
    subject: str
    issuer: str
    begins: datetime
    ends: datetime
    fingerprint: str
    names: str
    public_key: str

    def describe(self) -> str:
        """Describe the certificate and its validity in one line."""
        days = (self.ends - now()).days
        left = f"{days} days left" if self.ends > now() else "ENDED"
        by = "self-signed" if self.subject == self.issuer else f"by {self.issuer}"
        return f"{self.names or self.subject}, {by}, ends {stamp(self.ends)} ({left}), SHA-256 {self.fingerprint[:16]}"


def read_chain(text: str) -> list[Certificate]:
    """Read the certificates of a PEM file, in file order.

    Raises:
        Refused: A certificate cannot be read, or the file has none.
    """
    blocks = PEM.findall(text)
    if not blocks:
        raise Refused("CERT holds no certificate (`-----BEGIN CERTIFICATE-----`)")
    return [_read(block, place) for place, block in enumerate(blocks, 1)]


def _read(pem: str, place: int) -> Certificate:
    wanted = [
        "-subject",
        "-issuer",
        "-nameopt",
        "RFC2253",
        "-startdate",
        "-enddate",
        "-fingerprint",
        "-sha256",
        "-pubkey",
    ]
    try:
        said = run("openssl", "x509", "-noout", *wanted, text=pem)
    except Refused as error:
        raise Refused(f"certificate {place} of CERT cannot be read:\n{error}") from error
    names = run("openssl", "x509", "-noout", "-ext", "subjectAltName", text=pem, check=False)
    return Certificate(
        pem=pem,
        subject=_find(r"^subject=\s*(.*)$", said),
        issuer=_find(r"^issuer=\s*(.*)$", said),
        begins=_read_time(_find(r"^notBefore=(.*)$", said)),
        ends=_read_time(_find(r"^notAfter=(.*)$", said)),
        fingerprint=_find(r"ingerprint=([0-9A-F:]+)$", said).replace(":", "").lower(),
        names=_find(r"^\s+((?:DNS|IP Address):.*)$", names),
        public_key=_find(r"(-----BEGIN PUBLIC KEY-----.*-----END PUBLIC KEY-----)", said),
    )


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M | re.S if "BEGIN" in pattern else re.M)
    return found[1].strip() if found else ""


def _read_time(text: str) -> datetime:
    return datetime.strptime(text, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=timezone.utc)


def check(chain_text: str, key_text: str, hostname: str) -> tuple[list[Certificate], list[str]]:
    """Return the certificates of a file, and the problems of them and their key; no problems if they may be served.

    Args:
        chain_text: The certificate, and after it those that lead to a root, each signed by the next.
        key_text: The private key.
        hostname: The name or address that callers use.

    Raises:
        Refused: The certificates cannot be read at all.
    """
    chain = read_chain(chain_text)
    leaf = chain[0]
    problems = _check_key(chain, key_text)
    for place, one in enumerate(chain, 1):
        if one.ends <= now():
            problems.append(f"certificate {place} of CERT ({one.subject}) ended {stamp(one.ends)}")
        if one.begins > now():
            problems.append(f"certificate {place} of CERT ({one.subject}) begins only {stamp(one.begins)}")
    if not covers(leaf, hostname):
        holds = leaf.names or "no subjectAltName, without which no caller takes it"
        problems.append(f"the certificate does not cover {hostname} (CONVSCOPE_HOSTNAME): it has {holds}")
    problems += _check_order(chain)
    return chain, problems


def covers(certificate: Certificate, hostname: str) -> bool:
    """Return whether a certificate covers a name or address. A common name alone no longer counts."""
    try:
        ipaddress.ip_address(hostname)
        option = "-checkip"
    except ValueError:
        option = "-checkhost"
    said = run("openssl", "x509", "-noout", option, hostname, text=certificate.pem, check=False)
    return bool(certificate.names) and "does match" in said


def _check_key(chain: list[Certificate], key_text: str) -> list[str]:
    if "ENCRYPTED" in key_text:
        return [
            "KEY is encrypted with a passphrase, which the gateway does not have: `openssl pkey -in KEY -out plain.pem`"
        ]
    try:
        run("openssl", "pkey", "-noout", "-check", text=key_text)
        public = _find(
            r"(-----BEGIN PUBLIC KEY-----.*-----END PUBLIC KEY-----)", run("openssl", "pkey", "-pubout", text=key_text)
        )
    except Refused:
        return ["KEY is no private key that openssl can read"]
    for place, one in enumerate(chain):
        if one.public_key == public:
            return (
                [f"KEY belongs to certificate {place + 1} of CERT: the gateway's own has to stand first"]
                if place
                else []
            )
    return ["KEY does not belong to the certificate: another key was used to ask for it"]


def _check_order(chain: list[Certificate]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place}.pem" for place in range(len(chain))]
        for file, one in zip(files, chain):
            file.write_text(one.pem)
        for place in range(len(chain) - 1):
            command = [
                "openssl",
                "verify",
                "-no_check_time",
                "-partial_chain",
                "-trusted",
                str(files[place + 1]),
                str(files[place]),
            ]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                signed = f"certificate {place + 1} of CERT ({chain[place].subject}) is not signed by the one after it"
                return [f"{signed} ({chain[place + 1].subject}): the order is certificate, intermediate, root"]
    return []


def install(folder: Path, chain_text: str, key_text: str) -> None:
    """Put a certificate and its key in place together.

    `tls.crt` and `tls.key` are symbolic links through `current`, a link to the folder that holds the pair. One renaming
    of `current` changes both, so nobody ever reads a certificate with the key of another. Files that were put there by
    hand become such links first, with the same content. All of them are world-readable, since the gateway's user does
    not exist on this machine: the permissions of the folder above protect them.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    folder.chmod(0o755)
    current = folder / "current"
    links = [folder / "tls.crt", folder / "tls.key"]
    by_hand = [one for one in links if one.exists() and not _is_ours(one)]
    if by_hand:
        _point(current, _make_pair(folder, {one.name: one.read_text() for one in links if one.exists()}))
        for one in by_hand:
            _point(one, Path("current") / one.name)
    _point(current, _make_pair(folder, {"tls.crt": chain_text, "tls.key": key_text}))
    for one in links:
        if not _is_ours(one):
            _point(one, Path("current") / one.name)
    for pair in folder.glob("pair-*"):
        if pair.name != current.readlink().name:
            shutil.rmtree(pair)


def _make_pair(folder: Path, files: dict[str, str]) -> Path:
    pair = Path(tempfile.mkdtemp(dir=folder, prefix=f"pair-{now():%Y%m%dT%H%M%SZ}-"))
    pair.chmod(0o755)
    for name, content in files.items():
        replace(pair / name, content, 0o644)
    return Path(pair.name)


def _is_ours(link: Path) -> bool:
    """Return whether a path is a link that `install` made."""
    return link.is_symlink() and link.readlink() == Path("current") / link.name


def _point(link: Path, target: Path) -> None:
    """Make a symbolic link, over whatever is there, in one renaming."""
    fresh = link.with_name(f".{link.name}-new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def make_test_certificate(hostname: str) -> tuple[str, str]:
    """Return a self-signed certificate for a name and for this machine, and its key."""
    try:
        own = f"IP:{ipaddress.ip_address(hostname)}"
    except ValueError:
        own = f"DNS:{hostname}"
    names = ",".join(dict.fromkeys([own, "DNS:localhost", "DNS:gateway", "IP:127.0.0.1"]))
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "tls.crt", Path(folder) / "tls.key"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(DAYS)]
        subject = [
            "-subj",
            "/CN=convscope test",
            "-addext",
            f"subjectAltName={names}",
            "-addext",
            "extendedKeyUsage=serverAuth",
        ]
        run("openssl", "req", "-x509", *curve, *subject, "-keyout", key, "-out", certificate)
        return certificate.read_text(), key.read_text()
