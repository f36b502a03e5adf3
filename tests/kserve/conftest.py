"""One server for this room: two of the committed archives, and one whose handler follows the test's orders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from handlers.entry import ConvscopeHandler
from server.kserve.worker import Context
from tests.pictures import colours, png
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

# Of a request through httpx.get() most is a new TLS context.
web = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def pytest_unconfigure() -> None:
    """Close its connections."""
    web.close()


Handle = Callable[[dict[str, Any], dict[str, Any]], tuple[int, bytes]]


class Host(NamedTuple):
    """A server that is ready."""

    process: subprocess.Popen[str]
    log: Path
    http: str  # host:port
    grpc: str


@contextmanager
def serving(store: Path, work: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Host]:
    """Run `python -m server.kserve` on free ports; it is ready, and is told to stop at the end."""
    log = work / "log"
    command = [sys.executable, "-m", "server.kserve", "--model-store", str(store), "--work-dir", str(work), *options]
    command += ["--http-port", "0", "--grpc-port", "0"]
    if "--workers" not in options:
        command += ["--workers", "1"]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
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
def signers(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The file of the key that signed all archives of the store but `unsigned`; None without OpenSSH's client."""
    if shutil.which("ssh-keygen") is None:
        return None
    key = tmp_path_factory.mktemp("key") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "convscope", "-f", key, *store.glob("*.mar")]
    subprocess.run(command, check=True, capture_output=True)
    write_archive(store, "unsigned", OBEDIENT)
    return key.with_suffix(".pub")


@pytest.fixture(scope="session")
def handle(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Handle:
    """Call the class that TorchServe calls, with `cifar`, in this process: `handle(row, properties)`."""
    folder = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(store / "cifar.mar") as file:
        file.extractall(folder)
    manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": config["batchSize"]}
    context = Context(manifest, config, properties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCOPE_PATCHES", "0")
        patch.setenv("CONVSCOPE_MAX_RESPONSE_BYTES", str(256 * 2**20))  # As both hosts set it.
        handler = ConvscopeHandler()
        handler.initialize(context)

    def handle(row: dict[str, Any], properties: dict[str, Any]) -> tuple[int, bytes]:
        context.begin([{"headers": properties, "id": None}])
        [body] = handler.handle([row], context)
        return context.replies[0]["status"], body

    return handle


@pytest.fixture(scope="session")
def host(store: Path, signers: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    options = ("--device", "cpu", "--max-request-mb", "2", "--require-signature", f"{signers or ''}")
    with serving(store, tmp_path_factory.mktemp("work"), *options) as host:
        # The first explanation by gradients imports torch, which on a busy machine takes longer than it may.
        web.post(f"http://{host.http}/explanations/cifar", content=png(colours()), timeout=120)
        yield host
