"""The choice of how torch runs a network: as it is, in 16 bits, or on a GPU with channels-last tensors and CUDA graphs.

Each is taken only if it computes what plain eager torch does.
"""

from __future__ import annotations

import logging

import torch

from handlers.images.preprocessing import Preprocessing, noise
from handlers.network.engines import Cells, Engine
from handlers.network.engines.cuda_graphs import CudaGraphEngine, Record, record_on_gpu
from handlers.network.engines.reference import PICTURES, TOLERANCES, check
from handlers.network.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)

GPU_TOLERANCE = 1e-3
"""How far an engine's output may be from plain eager torch on the same GPU in float32, measured as
`reference.TOLERANCE` is: for another order of tensors cuDNN takes other kernels (Winograd's
and Fourier's among them), which sum in another order, and errors of layers add up."""

PRECISIONS = {name: (getattr(torch, name), tolerance) for name, tolerance in TOLERANCES.items()}
"""Each precision's dtype, and how far from float32 it may be. float16 and every GPU were never run here."""


def choose_in_torch(eager: TorchEngine, preprocessing: Preprocessing, *, wanted: str, precision: str) -> Engine:
    """Choose how torch runs a network.

    Args:
        eager: The network, on the device it is to run on.
        preprocessing: The network's preprocessing.
        wanted: `torch` for plain eager torch, on a GPU too; `auto` for the fastest.
        precision: One of `PRECISIONS`.

    Raises:
        RuntimeError: The device cannot compute in that precision, or its outputs are too far from float32.
    """
    images = noise(preprocessing, PICTURES)
    halved = None if precision == "float32" else _halve(eager, images, precision)
    if eager.device.type == "cuda" and wanted == "auto":
        return choose_on_gpu(eager, images, precision=precision, plain=halved)
    return halved or eager


def choose_on_gpu(
    eager: TorchEngine,
    images: Cells,
    *,
    precision: str = "float32",
    plain: TorchEngine | None = None,
    record: Record = record_on_gpu,
) -> Engine:
    """Use channels-last tensors and CUDA graphs, each if the outputs are those of eager torch; log why one is not used.

    Args:
        eager: The network in torch, float32, on the GPU.
        images: (N, C, H, W), float32, on the CPU: for a trial. Noise reveals more than black.
        precision: One of `PRECISIONS`.
        plain: The fallback, the network in that precision; None for `eager`.
        record: The recording function; see `CudaGraphEngine`.
    """
    dtype, tolerance = PRECISIONS[precision]
    tolerance = max(tolerance, GPU_TOLERANCE)
    best, reasons = plain or eager, []
    try:
        last = eager.copy(dtype, torch.channels_last)
        check(last, eager, images, tolerance)
        best = last
    except Exception as err:  # Whatever a network or a driver cannot do, plain torch still works.
        reasons.append(f"channels-last: {type(err).__name__}: {err}")
    engine: Engine = best
    try:
        captured = CudaGraphEngine(best, tuple(images.shape[1:]), record=record)
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


def _halve(eager: TorchEngine, images: Cells, precision: str) -> TorchEngine:
    """Return a copy of the network in 16 bits; the original is kept for gradients.

    Raises:
        RuntimeError: The device does not support it, or its outputs are too far from float32.
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
