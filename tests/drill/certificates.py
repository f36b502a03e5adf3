"""Certificates of an authority of the drill's own, so that callers trust a renewed certificate as they do the first."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """Signs certificates for the gateway.

    Args:
        folder: Where its own key and certificate lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.ca_file, self._key = folder / "ca.crt", folder / "ca.key"
        _openssl("req", "-x509", *_fresh_key(self._key), "-days", "30", "-subj", "/CN=drill", "-out", self.ca_file)

    def issue(self, name: str, days: int = 90) -> tuple[Path, Path]:
        """Sign a certificate and return its file, which holds the authority's too, and the file of its key.

        Args:
            name: Of the two files.
            days: How long it is valid from now on; -1 for one that ended yesterday.
        """
        certificate, key, request = (self._folder / f"{name}.{kind}" for kind in ("crt", "key", "csr"))
        names = "subjectAltName=DNS:localhost,DNS:gateway,IP:127.0.0.1"
        _openssl("req", *_fresh_key(key), "-subj", "/CN=convscope drill", "-addext", names, "-out", request)
        signer = ("-CA", self.ca_file, "-CAkey", self._key, "-CAcreateserial", "-copy_extensions", "copy")
        _openssl("x509", "-req", "-in", request, *signer, "-days", str(days), "-out", certificate)
        certificate.write_text(certificate.read_text() + self.ca_file.read_text())
        key.chmod(0o644)
        return certificate, key


def _fresh_key(path: Path) -> tuple[str | Path, ...]:
    return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
