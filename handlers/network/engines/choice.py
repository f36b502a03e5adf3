"""The choice of an engine: the fastest that is installed, that the archive has a graph for, and that computes the same.

On the CPU `onnxruntime` is tried first. If it cannot run, the reason is logged and torch runs instead, unless ONNX
Runtime was asked for by name or torch is not installed. On a GPU, and in 16 bits, torch runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from handlers import optional_torch
from handlers.images.preprocessing import noise
from handlers.network.archive import NONE, REFERENCE, Archive
from handlers.network.engines.engine import Engine
from handlers.network.engines.onnx import Session
from handlers.network.engines.reference import PICTURES, compare, read, take

if TYPE_CHECKING:
    from handlers.network.engines.eager import Eager

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "onnxruntime")
PRECISIONS = ("float32", "float16", "bfloat16")

_DAMAGED = 1e-4  # How far torch may be from the archive's reference, which torch computed elsewhere, by another order.


def choose(
    archive: Archive,
    network: Callable[[], Eager],
    *,
    device: str = "cpu",
    wanted: str = "auto",
    threads: int = 1,
    precision: str = "float32",
) -> Engine:
    """Choose an engine for an archive.

    Args:
        archive: What is to be served.
        network: Builds the network in torch, on the device it is to run on; called only if torch runs.
        device: That device: `cpu`, or `cuda:` and a number.
        wanted: One of `ENGINES`; `auto` takes the fastest that works.
        threads: Of one run.
        precision: One of `PRECISIONS`; one of 16 bits is for torch, and never taken unless asked for.

    Raises:
        ValueError: `wanted` is not an engine, or `precision` not a precision.
        RuntimeError: The engine asked for by name cannot run this network here, or none can, or torch does not compute
            what the archive's reference says either; the message says why.
    """
    if wanted not in ENGINES:
        raise ValueError(f"CONVSCOPE_ENGINE is {wanted!r}; there are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"CONVSCOPE_PRECISION is {precision!r}; there are {', '.join(PRECISIONS)}")
    if wanted == "onnxruntime" and precision != "float32":
        raise RuntimeError(f"the engine onnxruntime was asked for and runs float32, not {precision}")
    is_doubtful = False
    reason = f"the precision {precision} was asked for" if precision != "float32" else f"{wanted} was asked for"
    if precision == "float32" and wanted != "torch":
        reason = _obstacle(archive, device) or ""
        if not reason:
            try:
                return _session(archive, threads)
            except Exception as err:  # ONNX Runtime raises what it likes; torch can do without it.
                reason, is_doubtful = f"{type(err).__name__}: {err}", True
                if wanted == "auto" and optional_torch.is_installed():
                    logger.warning("the archive's graph is not used, torch runs instead: %s", reason)
        if wanted == "onnxruntime":
            raise RuntimeError(f"the engine onnxruntime was asked for and cannot run: {reason}")
    if not optional_torch.is_installed():
        raise RuntimeError(f"torch must run this network, and torch or torchvision is not installed: {reason}")
    from handlers.network.engines.in_torch import choose_in_torch

    eager = network()
    if is_doubtful:
        try:
            compare(take(eager, noise(archive.preprocessing, PICTURES)), read(archive.directory / REFERENCE), _DAMAGED)
        except RuntimeError as err:
            raise RuntimeError(f"the archive is damaged, neither its graph nor its weights will do: {err}") from err
    return choose_in_torch(eager, archive.preprocessing, wanted=wanted, precision=precision)


def _session(archive: Archive, threads: int) -> Session:
    """Return the archive's graph in ONNX Runtime, once it computes what the archive's reference says."""
    assert archive.graph is not None  # noqa: S101  # For the types; `_obstacle` saw to it.
    session = Session(
        archive.graph,
        archive.layers,
        has_scores=archive.scores != NONE,
        layouts=archive.layouts,
        threads=threads,
    )
    compare(take(session, noise(archive.preprocessing, PICTURES)), read(archive.directory / REFERENCE))
    return session


def _obstacle(archive: Archive, device: str) -> str | None:
    """Return why ONNX Runtime cannot be used; None if it can."""
    if device != "cpu":
        return f"it runs on the CPU, and this worker on {device}"
    if archive.graph is None:
        return "the archive holds no graph; build it with python -m archiver --engine onnx"
    if find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed"
    return None
