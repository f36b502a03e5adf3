"""The parts of torchvision that are used here, imported without torch's compiler.

Importing torchvision 0.29 imports all of `torch._dynamo`, which nothing here uses, for one question that `roi_align`
asks when it is called: 1.4 of 3.4 s of processor time until a worker is loaded, and 140 of 760 MB (n = 3, torch 2.15).
So a stand-in takes its place during the import, which answers that nothing can be compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

from handlers.settings import Settings

PATCH = "torchvision-without-dynamo"
TORCHVISION = "0.29.2"

_DYNAMO, _UTILS = "torch._dynamo", "torch._dynamo.utils"

IS_ACTIVE = (
    Settings.from_environment().patches
    and version("torchvision").startswith(TORCHVISION)
    and _DYNAMO not in sys.modules
)


@contextmanager
def _without_compiler() -> Iterator[None]:
    if not IS_ACTIVE:
        yield
        return
    package, utils = ModuleType(_DYNAMO), ModuleType(_UTILS)
    package.__path__ = []
    utils.is_compile_supported = lambda device: False  # type: ignore[attr-defined]
    sys.modules |= {_DYNAMO: package, _UTILS: utils}
    try:
        yield
    finally:
        del sys.modules[_DYNAMO], sys.modules[_UTILS]


with _without_compiler():
    from torchvision import __version__, ops
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

__all__ = [
    "IS_ACTIVE",
    "PATCH",
    "LayerNorm2d",
    "NodePathTracer",
    "__version__",
    "create_feature_extractor",
    "get_graph_node_names",
    "ops",
]
