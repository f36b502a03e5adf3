"""Archives of several versions, the command that takes them in, and callers who do not try again meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from convscope import Client, ConvscopeError

from archiver.packing import manifest, pack, unpack, write

ROOT = Path(__file__).parents[1]
MODEL = "edges"
PICTURE = np.zeros((5, 5), np.float32)
MANIFEST = "MAR-INF/MANIFEST.json"


def put(store: Path, version: str, changes: Mapping[str, bytes | None] | None = None, cut: int = 0) -> None:
    """Put a version of `edges` where the one before is, as the archiver does.

    Args:
        store: The model store.
        version: The version.
        changes: Files that differ from the committed archive's; None for one that is missing.
        cut: Bytes that are missing at the end.
    """
    files = unpack(ROOT / f"model_store/{MODEL}.mar") | {MANIFEST: manifest(MODEL, version)}
    for name, content in (changes or {}).items():
        if content is None:
            del files[name]
        else:
            files[name] = content
    content = pack(files)
    write(store / f"{MODEL}.mar", content[: len(content) - cut])


def reload(work: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m server.reload` for the server whose private directory is in `work`."""
    command = [sys.executable, "-m", "server.reload", "--work-dir", str(work), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@dataclass
class Calls:
    """What callers of one kind got, in the order in which it came: versions that answered, and errors."""

    versions: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def load(urls: Mapping[str, str], versions: tuple[str | None, ...]) -> Iterator[dict[tuple[str, str | None], Calls]]:
    """Have a caller for each transport and version ask all the time while the block runs, without retries.

    Args:
        urls: Of the server, by the transport's name.
        versions: What callers name; None for those who name none.
    """
    calls = {(transport, version): Calls() for transport in urls for version in versions}
    stopped = threading.Event()

    def ask(transport: str, version: str | None, got: Calls) -> None:
        with Client(urls[transport], retries=0) as client:
            while not stopped.wait(0.02):  # Or the callers, and not the reload, have the processor.
                try:
                    got.versions.append(client.predict(PICTURE, model=MODEL, version=version, layers="conv1").version)
                except ConvscopeError as error:
                    got.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(*kind, got), daemon=True) for kind, got in calls.items()]
    for thread in threads:
        thread.start()
    try:
        yield calls
    finally:
        stopped.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a caller still waits"
