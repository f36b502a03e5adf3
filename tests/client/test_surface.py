"""The public surface, and how little importing it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import convscope
import pytest
from convscope import testing

ROOT = Path(convscope.__file__).parents[1]
LENS = ROOT.parents[1] / "lens" / "src"
HEAVY = ("torch", "matplotlib", "PIL", "handlers", "prometheus_client", "tqdm")


def modules_after(program: str) -> set[str]:
    """Return the modules a fresh interpreter has loaded after a program."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}{os.pathsep}{LENS}"},
    )
    return set(printed.stdout.split())


def test_all_lists_every_public_name_in_order():
    assert convscope.__all__ == sorted(convscope.__all__)
    public = {name for name in vars(convscope) if not name.startswith("_")}
    imports = {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    assert public - set(convscope.__all__) <= imports | {"commands", "figures", "pixels", "testing", "typing"}


@pytest.mark.parametrize("name", [name for name in convscope.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_goes_by_its_public_name(name: str):
    value = getattr(convscope, name)
    assert value.__name__ == name
    assert value.__module__ == "convscope"
    assert value.__doc__
    assert name in dir(convscope)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Clientt'"):
        convscope.Clientt  # noqa: B018


def test_importing_convscope_imports_no_library():
    loaded = modules_after("import convscope")
    assert loaded.isdisjoint({*HEAVY, "numpy", "httpx", "httpcore", "grpc", "google.protobuf", "asyncio", "ssl"})


def test_importing_the_client_imports_no_transport():
    loaded = modules_after("from convscope import Client, Prediction, ModelCard")
    assert {"numpy", "google.protobuf"} <= loaded
    assert loaded.isdisjoint({*HEAVY, "httpx", "httpcore", "grpc"})


@pytest.mark.parametrize(
    ("url", "used", "unused"),
    [("http://localhost:1", "httpx", "grpc"), ("grpc://localhost:1", "grpc", "httpx")],
)
def test_a_client_imports_its_own_transport_only(url: str, used: str, unused: str):
    loaded = modules_after(f"from convscope import Client; Client({url!r}).close()")
    assert used in loaded
    assert loaded.isdisjoint({*HEAVY, unused})


def test_the_command_line_explains_itself_without_loading_numpy():
    program = """
import contextlib, io, runpy, sys
sys.argv = ["convscope", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_module("convscope", run_name="__main__")
"""
    assert modules_after(program).isdisjoint({*HEAVY, "numpy", "httpx", "grpc"})


def test_the_package_is_typed():
    assert (ROOT / "convscope" / "py.typed").is_file()


def test_the_testing_module_exports_what_it_lists():
    names = {name for name, value in vars(testing).items() if getattr(value, "__module__", "") == testing.__name__}
    assert {name for name in names if not name.startswith("_")} | {"FakeResponse"} == set(testing.__all__)
    assert testing.__all__ == sorted(testing.__all__)
