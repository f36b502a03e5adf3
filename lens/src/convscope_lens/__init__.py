"""Analysis tools for CNNs served by convscope: reports, a page, probes, filters, patches, interventions, data sets.

    from convscope import Client
    from convscope_lens import report

    with Client("http://localhost:8080") as client:
        html = report(client, "cat.png", model="cifar")

Imports are lazy: numpy loads with the first name used, matplotlib with the first figure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convscope_lens import filters, interventions, probes
    from convscope_lens._export.export import Exported, export
    from convscope_lens._page.portrait import portrait
    from convscope_lens._page.report import report
    from convscope_lens._page.server import PageServer
    from convscope_lens.patches import Patch, cut_patch, strongest_patches
    from convscope_lens.surveys import Survey, survey

__version__ = "0.1.0"

__all__ = [
    "Exported",
    "PageServer",
    "Patch",
    "Survey",
    "__version__",
    "cut_patch",
    "export",
    "filters",
    "interventions",
    "portrait",
    "probes",
    "report",
    "strongest_patches",
    "survey",
]

_LAZY = {
    "Exported": "_export.export",
    "PageServer": "_page.server",
    "Patch": "patches",
    "Survey": "surveys",
    "cut_patch": "patches",
    "export": "_export.export",
    "portrait": "_page.portrait",
    "report": "_page.report",
    "strongest_patches": "patches",
    "survey": "surveys",
}
_MODULES = ("filters", "interventions", "probes")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
