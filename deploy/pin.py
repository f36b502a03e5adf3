"""Pins the images of others by digest, those that ours are built on and those that run beside them: `make pin`.

Every reference to one stands in `FILES`, as `ARG DEBIAN=...` or `image: ...`; a test checks that none stands
elsewhere. `debian:bookworm-slim` becomes `debian:bookworm-slim@sha256:...`, with the digest that its registry has for
the tag now, of all platforms together. It needs Docker with buildx, and the registries; nothing is pulled. Run again it
takes newer digests. It changes all files or none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "deploy/Dockerfile",
    "deploy/kubernetes/archives.Dockerfile",
    "deploy/kubernetes/base/gateway.yaml",
    "docker-compose.yml",
)
REFERENCE = re.compile(r"^(ARG DEBIAN=| +image: )(?!convscope/)([^@\s]+)(?:@sha256:[0-9a-f]{64})?$", re.M)


def look_up(name: str) -> str:
    """Return the digest of an image's tag, from its registry.

    Raises:
        SystemExit: The registry returned no digest.
    """
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", name]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    digest = answer.stdout.strip()
    if answer.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(f"no digest of {name}, so nothing is changed: {(answer.stderr or digest).strip()}")
    return digest


def main() -> None:
    """Look all digests up, then write them into the files."""
    texts = {ROOT / file: (ROOT / file).read_text() for file in FILES}
    names = sorted({found[2] for text in texts.values() for found in REFERENCE.finditer(text)})
    pinned = {name: f"{name}@{look_up(name)}" for name in names}
    for path, text in texts.items():
        path.write_text(REFERENCE.sub(lambda found: found[1] + pinned[found[2]], text))
    print(*pinned.values(), sep="\n")


if __name__ == "__main__":
    main()
