"""One server for this room: two of the committed archives, and one whose handler does as it is told."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.server.harness import write_archive

ROOT = Path(__file__).parents[2]

# `make test` runs this room in .venv-kserve, where KServe's model server and the foreign clients are.
collect_ignore_glob = [] if find_spec("kserve") else ["test_*.py"]

OBEDIENT = r"""
import os, pathlib, time

CARD = b"\x3a\x00"  # A PredictReply with an empty card.

class Handler:
    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]

    def handle(self, rows, context):
        if any(row.get("body") == b"die" for row in rows):
            os._exit(7)
        for row in rows:
            verb, _, file = row.get("body", b"").partition(b":")
            if verb == b"wait":
                pathlib.Path(os.fsdecode(file) + ".begun").touch()
                while not pathlib.Path(os.fsdecode(file)).exists():
                    time.sleep(0.01)
        for index in range(len(rows)):
            context.set_response_content_type(index, "text/plain")
        said = f"{len(rows)} {os.getpid()} {self.version}".encode()
        return [CARD if "describe" in row else said for row in rows]
"""


class Host(NamedTuple):
    """A server that is ready."""

    process: subprocess.Popen[str]
    log: Path
    http: str  # host:port
    grpc: str


@contextmanager
def serving(store: Path, work: Path, *options: str) -> Iterator[Host]:
    """Run `python -m server.kserve` on free ports; it is ready, and is told to stop at the end."""
    log = work / "log"
    command = [sys.executable, "-m", "server.kserve", "--model-store", str(store), "--work-dir", str(work), *options]
    command += ["--http-port", "0", "--grpc-port", "0"]
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            said = "".join(takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
            found = re.search(r"REST +http://(\S+)/v2.*\n +gRPC +(\S+)", said)
            assert found, log.read_text()
            yield Host(process, log, found[1], found[2])
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for model in ("cifar", "digits"):
        shutil.copy(ROOT / f"model_store/{model}.mar", folder)
    for version in ("1.9", "1.10"):
        config = "batchSize: 4\n" + ("responseTimeout: 5\n" if version == "1.10" else "")
        write_archive(folder, "obedient", OBEDIENT, version=version, file=f"obedient-{version}", config=config)
    write_archive(folder, "broken", "import nothing_of_that_name\n")
    return folder


@pytest.fixture(scope="session")
def host(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    options = ("--device", "cpu", "--max-request-mb", "2", "--timeout-s", "20")
    with serving(store, tmp_path_factory.mktemp("work"), *options) as host:
        yield host
