"""OpenVINO: the archive's graph, run in float32 or bfloat16 on the CPU.

OpenVINO computes every output of a compiled model in each run. So there are two models, one with the scores alone and
one with all maps, which read their weights from the archive's file. A run returns copies, since OpenVINO writes into
the same memory the next time.

The package is used if it is installed. Axes: `N` batch, `C` channels, `H, W` picture pixels, `K` classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.network.engines import MAX_INPUT_BYTES, Cells
from handlers.network.engines.onnx import output_name

logger = logging.getLogger(__name__)

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's name of each supported precision."""

_SAME = 1e-5  # Of the largest score: one model's scores differ from the other's by rounding in bfloat16, or not at all.


def package() -> Any:
    """Import OpenVINO without its telemetry.

    `import openvino` imports its model converter too, which reports the import to a web service and writes an
    identifier into the user's home if the package openvino_telemetry is there (openvino 2026.4.1 with
    openvino-telemetry 2025.2.0). Python is told that it is not.

    Raises:
        ImportError: openvino is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def capabilities() -> frozenset[str]:
    """Return what OpenVINO computes in on this processor: `FP32`, `BF16`, `INT8` and others.

    Raises:
        ImportError: openvino is not installed.
    """
    return frozenset(package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVinoEngine:
    """A network run by OpenVINO on the CPU.

    Args:
        graph: The file of an ONNX model, as `onnx.OnnxEngine` takes it.
        layers: Public name of each layer → node.
        images: (N, C, H, W), float32, for a trial.
        has_scores: Whether the network's output is scores.
        layouts: Public name → layout, of the layers that are not (N, C, h, w) in the network.
        threads: Number of threads of one run.
        precision: A key of `HINTS`.

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: The processor does not compute in that precision, or the graph cannot be run.
    """

    def __init__(
        self,
        graph: Path,
        layers: Mapping[str, str],
        images: NDArray[np.float32],
        *,
        has_scores: bool,
        layouts: Mapping[str, str] | None = None,
        threads: int = 1,
        precision: str = "float32",
    ) -> None:
        openvino = package()
        if precision == "bfloat16" and "BF16" not in capabilities():
            raise RuntimeError("OpenVINO does not compute in bfloat16 on this processor")
        self.name = f"openvino-{openvino.__version__.partition('-')[0]}"
        if precision != "float32":
            self.name += f"-{precision}"
        self.layers = dict(layers)
        self.has_scores = has_scores
        core = openvino.Core()
        model = core.read_model(graph)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Pinned, the only thread of each worker runs on the first core (two workers, two cores, 2026.4.1).
            "ENABLE_CPU_PINNING": False,
            # Kernels kept for sizes and batches seen before. OpenVINO's default of 5000 took 0.8 MB for every new size
            # of a picture (ResNet-18); recompiling costs at most a tenth of a run.
            "CPU_RUNTIME_CACHE_CAPACITY": 512,
        }
        places = {name: place for place, output in enumerate(model.outputs) for name in output.names}
        self._places = {name: places[output_name(node, (layouts or {}).get(name, ""))] for name, node in layers.items()}
        self._whole = _Model(core.compile_model(model, "CPU", settings))
        self._scores = self._whole
        if has_scores and len(model.outputs) > 1:
            alone = openvino.Model([model.outputs[0].node], model.get_parameters(), "scores")
            self._scores = _Model(core.compile_model(alone, "CPU", settings))
            (found,), (expected,) = (one.run(images, [0]) for one in (self._scores, self._whole))
            # Maps that are outputs keep operations from being fused, and what is not fused is rounded. Scores must not
            # depend on the maps that are asked for, by this request or another in its batch.
            if not np.abs(found - expected).max() <= _SAME * np.abs(expected).max():
                logger.info("%s computes all maps for scores too, which would differ without", self.name)
                self._scores = self._whole

    def run(
        self, images: Cells, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once; see `Engine.run`."""
        names = list(layers)
        model = self._whole if names else self._scores
        places = [0] * self.has_scores + [self._places[name] for name in names]
        arrays = model.run(np.asarray(images), places)
        scores = arrays.pop(0) if self.has_scores else None
        return scores, dict(zip(names, arrays, strict=True))


class _Model:
    """A compiled model with the memory that it runs in."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request: Any = None

    def run(self, images: NDArray[np.float32], places: Sequence[int]) -> list[NDArray[np.float32]]:
        """Run once, and return copies of the outputs at these places."""
        if self._request is None:
            self._request = self._compiled.create_infer_request()
        outputs = self._request.infer({0: images}, share_inputs=True, share_outputs=True)
        found = [np.array(outputs[place]) for place in places]
        if images.nbytes > MAX_INPUT_BYTES:  # A request keeps the most that a run ever needed.
            del outputs
            self._request = None
            self._compiled.release_memory()
        return found
