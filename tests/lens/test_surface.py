"""The public names of the lens, and how little importing it loads."""

from __future__ import annotations

from pathlib import Path

import convscope_lens
import pytest

from tests.client.test_surface import HEAVY, modules_after


@pytest.mark.parametrize("name", [name for name in convscope_lens.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(convscope_lens, name)
    assert value.__doc__
    assert name in dir(convscope_lens)
    module = getattr(value, "__module__", "convscope_lens")  # A module has none.
    assert module == "convscope_lens"


def test_all_lists_the_names_in_order() -> None:
    assert convscope_lens.__all__ == sorted(convscope_lens.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'reprot'"):
        convscope_lens.reprot  # noqa: B018


def test_importing_the_lens_imports_no_library() -> None:
    assert modules_after("import convscope_lens").isdisjoint({*HEAVY, "numpy", "httpcore", "httpx", "grpc"})


def test_the_package_is_typed() -> None:
    assert (Path(convscope_lens.__file__).parent / "py.typed").is_file()
