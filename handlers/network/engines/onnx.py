"""ONNX Runtime: the same network as a graph, exported when the archive was made.

The graph file holds no large weights: its initializers are in the archive's weights file, in the same folder. One
session has every published map as an output; a run computes only what the wanted outputs need, and returns new memory
of ONNX Runtime each time, so that no map is copied.

The package is used if it is installed; an archive can be served without it. Axes: `N` batch, `C` channels, `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handlers.network.engines import Cells

_IMAGES = "images"
_ERRORS = 3  # Severity: ONNX Runtime's warnings are about the graph, which cannot be changed when serving.


def output_name(node: str, layout: str = "") -> str:
    """Return the name of the output of a graph that holds the maps of a node in a layout."""
    return f"/maps/{node}@{layout}" if layout else f"/maps/{node}"


class OnnxEngine:
    """A network run by ONNX Runtime on the CPU.

    Args:
        graph: The file of an ONNX model, its weights in the same folder, as `archiver.graph` exports it. Its input is
            `images`; its outputs have the names that `output_name` makes, the first being the scores, if any. Maps
            are converted to (N, C, h, w) and scores to (N, K) in the graph.
        layers: Public name of each layer → node.
        has_scores: Whether the network's output is scores.
        layouts: Public name → layout, of the layers that are not (N, C, h, w) in the network.
        threads: Number of threads of one run.

    Raises:
        ImportError: onnxruntime is not installed.
        Exception: The graph cannot be run; ONNX Runtime has many classes.
    """

    def __init__(
        self,
        graph: Path,
        layers: Mapping[str, str],
        *,
        has_scores: bool,
        layouts: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        import onnxruntime

        self.name = f"onnxruntime-{onnxruntime.__version__}"
        self.layers = dict(layers)
        self.has_scores = has_scores
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS
        # ONNX Runtime's own pool keeps the most that a run ever needed: 0.85 GB after one picture of 12 million pixels.
        # 1 and 32 pictures of `cifar` take the same with and without it (medians of 400 and 100 runs).
        options.enable_cpu_mem_arena = False
        # Threads that spin until the next run keep a core busy that TorchServe's front end needs: on two threads a
        # picture of `cifar` every millisecond takes 1.1 ms of CPU time, and 0.1 ms so (15 rounds).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._scores = [self._session.get_outputs()[0].name] if has_scores else []
        self._maps = {name: output_name(node, (layouts or {}).get(name, "")) for name, node in self.layers.items()}
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True

    def run(
        self, images: Cells, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once; see `Engine.run`."""
        names = list(dict.fromkeys([*self._scores, *(self._maps[name] for name in layers)]))
        arrays = self._session.run(names, {_IMAGES: images}, self._run_options)
        if not names:  # A network without scores, and no map asked for: the run only shows that it works.
            return None, {}
        outputs = dict(zip(names, arrays, strict=True))
        return (outputs[names[0]] if self.has_scores else None), {name: outputs[self._maps[name]] for name in layers}
