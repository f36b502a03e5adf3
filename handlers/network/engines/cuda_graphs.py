"""CUDA graphs: torch's kernels are recorded once for each batch size and set of layers, and replayed in one launch.

Eager torch launches every kernel from Python, which takes longer than a small kernel runs. A CUDA graph launches all of
them at once, but for one shape and at fixed addresses: pictures are copied into its input, outputs out of its memory.
What cannot be recorded runs as eager torch does. `record_on_gpu` has not been run on a GPU.
Axes: `N` batch, `C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from handlers.network.engines.torch_engine import SCORES, Forward, Maps, TorchBase, TorchEngine

logger = logging.getLogger(__name__)

RECORDINGS_KEPT = 16  # Each holds every activation of its pass in GPU memory, and its kernels.
_IDLE_CALLS = 64
"""Only a recording that was not used in so many calls is replaced. Otherwise, if callers took turns with more shapes
than are kept, every call would replace one."""
_WARM_UP_RUNS = 3  # As torch's documentation of CUDA graphs has it: libraries initialise and choose algorithms.

Outputs = dict[str, Tensor]
Replay = Callable[[], None]
Record = Callable[[Callable[[], Outputs], torch.device], tuple[Replay, Outputs]]
"""Takes a computation, and returns what runs it at the same addresses, and the outputs, written by each such run."""

_Key = tuple[int, frozenset[str]]


@dataclass
class _Recording:
    images: Tensor
    replay: Replay
    outputs: Outputs
    extractor: Forward  # A recording has only addresses; this owns the constants that it reads.
    used: int = 0


def record_on_gpu(compute: Callable[[], Outputs], device: torch.device) -> tuple[Replay, Outputs]:
    """Record a computation as a CUDA graph, after a warm-up on a stream of its own; see `Record`."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compute()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, outputs


class CudaGraphEngine(TorchBase):
    """A network run by torch from recordings.

    Args:
        eager: The engine that is recorded, and that runs where recording is impossible.
        picture: (C, H, W) of the pictures to record; a network of any size sees too many shapes to record.
        record: The recording function, `record_on_gpu` except in tests.
        kept: Recordings at most. When there is no room, a new shape replaces the one unused for longest, once that was
            idle for `idle_calls` calls.
        idle_calls: See `kept`.

    Attributes:
        name, layers, has_scores: See `Engine`.
    """

    def __init__(
        self,
        eager: TorchEngine,
        picture: tuple[int, ...],
        *,
        record: Record = record_on_gpu,
        kept: int = RECORDINGS_KEPT,
        idle_calls: int = _IDLE_CALLS,
    ) -> None:
        self.name = f"{eager.name}-graphs"
        self.layers, self.has_scores = eager.layers, eager.has_scores
        self._eager, self._picture, self._record = eager, picture, record
        self._kept, self._idle_calls = kept, idle_calls
        self._calls = 0
        self._recordings: OrderedDict[_Key, _Recording] = OrderedDict()
        self._failed: set[_Key] = set()

    @property
    def recorded(self) -> tuple[tuple[int, frozenset[str]], ...]:
        """Batch size and layers of each recording, the one unused for longest first."""
        return tuple(self._recordings)

    @torch.inference_mode()
    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once; see `TorchBase.forward`."""
        self._calls += 1
        recording = self._recording(images, layers)
        if recording is None:
            return self._eager.forward(images, layers)
        on_gpu = self._eager.device.type == "cuda"
        recording.images.copy_(images if images.is_cuda or not on_gpu else images.pin_memory(), non_blocking=True)
        recording.replay()
        maps = {name: recording.outputs[name].clone() for name in layers}
        scores = recording.outputs[SCORES].to("cpu", copy=True) if self.has_scores else None
        if on_gpu:  # Where nothing is copied back, nothing else waits for the network to be done.
            torch.cuda.synchronize(self._eager.device)
        return scores, maps

    def _recording(self, images: Tensor, layers: frozenset[str]) -> _Recording | None:
        """Return the recording for this shape, made if necessary; None if it cannot be recorded."""
        key = len(images), layers
        if tuple(images.shape[1:]) != self._picture or key in self._failed:
            return None
        if key not in self._recordings:
            if not self._make_room():
                return None
            try:
                self._recordings[key] = self._new(images, layers)
            except Exception as err:  # CUDA says so in many ways; a picture that fails the network fails in eager too.
                self._failed.add(key)
                logger.warning(
                    "a pass of %d pictures with layers %s cannot be recorded and runs as it is: %s: %s",
                    len(images), sorted(layers), type(err).__name__, err,
                )  # fmt: skip
                return None
        recording = self._recordings[key]
        recording.used = self._calls
        self._recordings.move_to_end(key)
        return recording

    def _make_room(self) -> bool:
        if len(self._recordings) < self._kept:
            return True
        oldest = next(iter(self._recordings))
        if self._calls - self._recordings[oldest].used <= self._idle_calls:
            return False
        del self._recordings[oldest]  # Before the new one is made, so that its memory is free.
        return True

    def _new(self, images: Tensor, layers: frozenset[str]) -> _Recording:
        held = images.to(self._eager.device, copy=True)
        extractor = self._eager.extractor(layers)
        replay, outputs = self._record(lambda: self._eager.compute(held, layers), self._eager.device)
        return _Recording(held, replay, outputs, extractor)
