"""torch, if installed: a worker that predicts with ONNX Runtime neither needs nor imports it.

It is imported for the engine torch, on a GPU, and by the first explanation that takes gradients. TorchServe imports it
in every worker before it calls a handler.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


def is_installed() -> bool:
    """Return whether the network can run in torch; torchvision traces it."""
    return all(find_spec(name) is not None for name in ("torch", "torchvision"))


def imported() -> Any | None:
    """Return torch if something has imported it, for what it does faster with an equal result; it is not imported."""
    return sys.modules.get("torch")
