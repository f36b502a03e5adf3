"""The choice of an engine: the fastest that is installed, that the archive has a graph for, and that computes the same.

On the CPU `onnxruntime` is tried first, and `openvino` for bfloat16. If it cannot run, the reason is logged and torch
runs instead, unless it was asked for by name. On a GPU torch runs, with channels-last tensors and CUDA graphs, each
only if it computes the same.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from handlers.network.engines.cuda_graphs import Captured, Record, record_on_gpu
from handlers.network.engines.eager import Eager
from handlers.network.engines.engine import Engine
from handlers.network.engines.onnx import Session
from handlers.network.engines.openvino import Compiled

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "onnxruntime", "openvino")
TOLERANCE = 1e-5
"""How far an engine's output may be from eager torch's: the largest difference of any cell, as a share of the largest
absolute value in that map or in those logits. float32 itself rounds by 6e-8 an operation."""
GPU_TOLERANCE = 1e-3
"""The same on a GPU in float32, from plain eager torch on that GPU: for another order of tensors cuDNN takes other
kernels (Winograd's and Fourier's among them), which sum in another order, and errors of layers add up."""

PRECISIONS = {
    "float32": (torch.float32, TOLERANCE),
    "float16": (torch.float16, 1e-2),
    "bfloat16": (torch.bfloat16, 5e-2),
}
"""Each precision's dtype, and how far from float32's eager torch it may be, measured as `TOLERANCE` is. float16 rounds
by 2**-11 an operation, bfloat16 by 2**-8; errors of layers add up. float16 and every GPU were never run here."""

_GRAPH_ENGINES = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16")}
"""What each engine of the archive's graph computes in; both run on the CPU."""
_FASTEST = {"float32": "onnxruntime", "bfloat16": "openvino"}  # docs/decisions/0013-openvino.md has the figures.


def choose(
    eager: Eager,
    graph: Path | None,
    images: Tensor,
    *,
    wanted: str = "auto",
    threads: int = 1,
    precision: str = "float32",
) -> Engine:
    """Choose an engine for a loaded network.

    Args:
        eager: The network in torch, on the device it is to run on.
        graph: The archive's file; None if it has none.
        images: (N, C, H, W), float32, on the CPU: for a trial of the graph. Noise tells more than black.
        wanted: One of `ENGINES`; `auto` takes the fastest that works.
        threads: Of one run.
        precision: One of `PRECISIONS`; one of 16 bits is never taken unless asked for.

    `torch` is plain eager torch, on a GPU too.

    Raises:
        ValueError: `wanted` is not an engine, or `precision` not a precision.
        RuntimeError: The engine asked for by name cannot run this network here; the message says why.
    """
    if wanted not in ENGINES:
        raise ValueError(f"CONVSCOPE_ENGINE is {wanted!r}; there are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"CONVSCOPE_PRECISION is {precision!r}; there are {', '.join(PRECISIONS)}")
    on_gpu = eager.device.type == "cuda"
    name = _FASTEST.get(precision) if wanted == "auto" else wanted
    if name == "torch" or (on_gpu and wanted == "auto"):
        name = None
    if name and precision not in _GRAPH_ENGINES[name]:
        raise RuntimeError(
            f"the engine {name} was asked for and runs {', '.join(_GRAPH_ENGINES[name])}, not {precision}"
        )
    if name and precision == "bfloat16" and not computes_bfloat16():
        raise RuntimeError(
            "the precision bfloat16 was asked for, which this processor does not compute in; float32 is faster here"
        )
    if name:
        try:
            return _run_graph(name, eager, graph, images, threads, precision)
        except Exception as err:  # ONNX Runtime and OpenVINO raise what they like; torch can do without them.
            reason = str(err) if isinstance(err, _Obstacle) else f"{type(err).__name__}: {err}"
            if wanted != "auto":
                raise RuntimeError(f"the engine {name} was asked for and cannot run: {reason}") from err
            expected = isinstance(err, _Obstacle) and precision == "float32"
            logger.log(logging.INFO if expected else logging.WARNING, "torch runs instead of %s: %s", name, reason)
    plain = eager if precision == "float32" else _halve(eager, images, precision)
    if on_gpu and wanted == "auto":
        return choose_on_gpu(eager, images, precision=precision, plain=plain)
    return plain


def choose_on_gpu(
    eager: Eager,
    images: Tensor,
    *,
    precision: str = "float32",
    plain: Eager | None = None,
    record: Record = record_on_gpu,
) -> Engine:
    """Use channels-last tensors and CUDA graphs, each if the outputs are those of eager torch; log why one is not used.

    Args:
        eager: The network in torch, float32, on the GPU.
        images: As in `choose`.
        precision: One of `PRECISIONS`.
        plain: What to fall back on, the network in that precision; None for `eager`.
        record: What records; see `Captured`.
    """
    dtype, tolerance = PRECISIONS[precision]
    tolerance = max(tolerance, GPU_TOLERANCE)
    best, reasons = plain or eager, []
    try:
        last = eager.copy(dtype, torch.channels_last)
        check(last, eager, images, tolerance)
        best = last
    except Exception as err:  # Whatever a network or a driver cannot do, plain torch is there.
        reasons.append(f"channels-last: {type(err).__name__}: {err}")
    engine: Engine = best
    try:
        captured = Captured(best, tuple(images.shape[1:]), record=record)
        check(captured, eager, images, tolerance)
        check(captured, eager, -images, tolerance)  # The first call records; this one replays with other pictures.
        if not captured.recorded:
            raise RuntimeError("the pass cannot be recorded")
        engine = captured
    except Exception as err:
        reasons.append(f"recorded: {type(err).__name__}: {err}")
    if reasons:
        logger.warning("%s runs; what is not used: %s", engine.name, "; ".join(reasons))
    return engine


def computes_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16, by the flags that Linux names.

    These are AVX-512's and AMX's, and on arm64 `bf16`.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:  # Not Linux.
        return False
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def check(engine: Engine, eager: Eager, images: Tensor, tolerance: float = TOLERANCE) -> None:
    """Check that an engine computes what eager torch does: scores and every published map.

    Args:
        engine: To be checked.
        eager: The same network in torch.
        images: (N, C, H, W), float32, on the CPU.
        tolerance: As `difference` measures.

    Raises:
        RuntimeError: An output has another shape, or is further off than `tolerance`.
    """
    layers = frozenset(engine.layers)
    found, found_maps = engine.forward(images, layers)
    expected, expected_maps = eager.forward(images, layers)
    pairs = {f"the maps of {name}": (found_maps[name], expected_maps[name]) for name in layers}
    if found is not None and expected is not None:
        pairs["the scores"] = (found, expected)
    for what, (one, other) in pairs.items():
        other = other.cpu()
        if one.shape != other.shape:
            raise RuntimeError(f"{what} have shape {tuple(one.shape)} and not {tuple(other.shape)}")
        off = difference(one.cpu(), other)
        if not off <= tolerance:
            raise RuntimeError(f"{what} differ from torch's by {off:.1e} of its largest value")


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of any cell, as a share of the largest absolute value expected; NaN if any is."""
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - expected).abs().max() / largest)


def _halve(eager: Eager, images: Tensor, precision: str) -> Eager:
    """Return a copy of the network in 16 bits; the original stays for what needs gradients.

    Raises:
        RuntimeError: The device cannot, or what comes out is too far from float32.
    """
    dtype, tolerance = PRECISIONS[precision]
    device = eager.device
    if device.type == "cpu" and dtype == torch.float16:
        raise RuntimeError("the precision float16 was asked for and is for a GPU; on the CPU there is bfloat16")
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise RuntimeError("the precision bfloat16 was asked for, which this GPU does not compute in; ask for float16")
    halved = eager.copy(dtype)
    check(halved, eager, images, tolerance)
    return halved


class _Obstacle(RuntimeError):
    """Something that a graph engine needs is not there."""


def _run_graph(name: str, eager: Eager, graph: Path | None, images: Tensor, threads: int, precision: str) -> Engine:
    """Return an engine that runs the archive's graph, checked.

    Raises:
        _Obstacle: It cannot be tried.
        Exception: It cannot run the graph, or computes something else.
    """
    if eager.device.type != "cpu":
        raise _Obstacle(f"it runs on the CPU, and this worker on {eager.device}")
    if graph is None:
        raise _Obstacle("the archive holds no graph; build it with python -m archiver --engine onnx")
    if find_spec(name) is None:
        raise _Obstacle(f"the package {name} is not installed")
    engine: Engine
    if name == "onnxruntime":
        engine = Session(graph, eager.layers, has_scores=eager.has_scores, layouts=eager.layouts, threads=threads)
    else:
        engine = Compiled(
            graph,
            eager.layers,
            images.numpy(),
            has_scores=eager.has_scores,
            layouts=eager.layouts,
            threads=threads,
            precision=precision,
        )
    check(engine, eager, images, PRECISIONS[precision][1])
    return engine
