"""The choice of an engine: the fastest that is installed, has a graph in the archive, and computes the same as torch.

On the CPU `onnxruntime` is tried first in float32, and `openvino` in bfloat16. If it cannot run, the reason is logged
and torch runs instead, unless the engine was asked for by name or torch is not installed. On a GPU torch runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from handlers import optional_torch
from handlers.images.preprocessing import noise
from handlers.network.archive import NONE, REFERENCE, Archive
from handlers.network.engines import Engine
from handlers.network.engines.onnx import OnnxEngine
from handlers.network.engines.openvino import HINTS, OpenVinoEngine
from handlers.network.engines.reference import PICTURES, TOLERANCES, compare, read, take

if TYPE_CHECKING:
    from handlers.network.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "onnxruntime", "openvino")
PRECISIONS = tuple(TOLERANCES)

_COMPUTES_IN = {"onnxruntime": ("float32",), "openvino": tuple(HINTS)}  # Engines of an archive's graph.
_FASTEST = {"float32": "onnxruntime", "bfloat16": "openvino"}  # Measured: docs/decisions/0013-openvino.md.

_DAMAGED = 1e-4  # How far torch may be from the archive's reference, which torch computed elsewhere, by another order.


def choose(
    archive: Archive,
    network: Callable[[], TorchEngine],
    *,
    device: str = "cpu",
    wanted: str = "auto",
    threads: int = 1,
    precision: str = "float32",
) -> Engine:
    """Choose an engine for an archive.

    Args:
        archive: The archive to serve.
        network: Builds the network in torch, on the device it is to run on; called only if torch runs.
        device: The network's device: `cpu`, or `cuda:` and a number.
        wanted: One of `ENGINES`; `auto` takes the fastest that works.
        threads: Number of threads of one run.
        precision: One of `PRECISIONS`; a 16-bit precision is used only if asked for.

    Raises:
        ValueError: `wanted` is not an engine, or `precision` not a precision.
        RuntimeError: The engine asked for by name cannot run this network here, or none can, or torch does not match
            the archive's reference either; the message has the reason.
    """
    if wanted not in ENGINES:
        raise ValueError(f"CONVSCOPE_ENGINE is {wanted!r}; there are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"CONVSCOPE_PRECISION is {precision!r}; there are {', '.join(PRECISIONS)}")
    name = _FASTEST.get(precision) if wanted == "auto" and device == "cpu" else wanted
    is_doubtful, reason = False, f"{wanted} was asked for, {precision} on {device}"
    if name in _COMPUTES_IN:
        if precision not in _COMPUTES_IN[name]:
            runs = ", ".join(_COMPUTES_IN[name])
            raise RuntimeError(f"the engine {name} was asked for and runs {runs}, not {precision}")
        if precision == "bfloat16" and not computes_bfloat16():
            raise RuntimeError(
                "the precision bfloat16 was asked for, which this processor has no instructions for; ask for "
                "float32, or for the engine torch, which emulates it"
            )
        reason = _obstacle(archive, device, name) or ""
        if not reason:
            try:
                return _run_graph(archive, name, threads, precision)
            except Exception as err:  # ONNX Runtime and OpenVINO raise any class; torch can replace them.
                reason, is_doubtful = f"{type(err).__name__}: {err}", True
        if wanted != "auto":
            raise RuntimeError(f"the engine {name} was asked for and cannot run: {reason}")
        if optional_torch.is_installed():
            level = logging.WARNING if is_doubtful or precision != "float32" else logging.INFO
            logger.log(level, "torch runs instead of %s: %s", name, reason)
    if not optional_torch.is_installed():
        raise RuntimeError(f"torch must run this network, and torch or torchvision is not installed: {reason}")
    from handlers.network.engines.torch_choice import choose_in_torch

    eager = network()
    if is_doubtful:
        try:
            compare(take(eager, noise(archive.preprocessing, PICTURES)), read(archive.directory / REFERENCE), _DAMAGED)
        except RuntimeError as err:
            raise RuntimeError(
                f"the archive is damaged: neither its graph nor its weights reproduce the reference: {err}"
            ) from err
    return choose_in_torch(eager, archive.preprocessing, wanted=wanted, precision=precision)


def computes_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16: AVX-512's, AMX's, or those of arm64.

    Only known on Linux; False elsewhere.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _run_graph(archive: Archive, name: str, threads: int, precision: str) -> Engine:
    """Return an engine with the archive's graph, after checking it against the archive's reference."""
    assert archive.graph is not None  # noqa: S101  # For the types; `_obstacle` saw to it.
    images, has_scores, layouts = noise(archive.preprocessing, PICTURES), archive.scores != NONE, archive.layouts
    engine: Engine
    if name == "onnxruntime":
        engine = OnnxEngine(archive.graph, archive.layers, has_scores=has_scores, layouts=layouts, threads=threads)
    else:
        engine = OpenVinoEngine(
            archive.graph,
            archive.layers,
            images,
            has_scores=has_scores,
            layouts=layouts,
            threads=threads,
            precision=precision,
        )
    compare(take(engine, images), read(archive.directory / REFERENCE), TOLERANCES[precision])
    return engine


def _obstacle(archive: Archive, device: str, name: str) -> str | None:
    """Return why an engine of the graph cannot be used; None if it can."""
    if device != "cpu":
        return f"it runs on the CPU, and this worker on {device}"
    if archive.graph is None:
        return "the archive holds no graph; build it with python -m archiver --engine onnx"
    if find_spec(name) is None:
        return f"the package {name} is not installed"
    return None
