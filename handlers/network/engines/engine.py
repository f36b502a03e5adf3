"""The interface of engines: all take the same tensors, return the same outputs, and have a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Maps = dict[str, Tensor]
Cells = NDArray[np.float32] | Tensor
"""The values of a map: an array on the CPU, a tensor on a GPU."""


class Engine(Protocol):
    """A loaded network that computes scores and maps.

    Attributes:
        name: The engine with its version: `torch-2.15.0`, `onnxruntime-1.31.1`.
        layers: Public name of each published layer → node of the network.
        has_scores: Whether the network's output is scores (N, K).
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def layers(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def has_scores(self) -> bool: ...  # noqa: D102

    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once.

        Args:
            images: (N, C, H, W), float32, normalised, contiguous, on the CPU or the engine's device.
            layers: Public names of the maps wanted; no other map is kept or copied.

        Returns:
            Scores (N, K) float32 on the CPU, or None for a network without classes; and a map (N, C, h, w) float32 for
            each layer asked for, contiguous, on the device of the engine. They are the caller's own.
        """
        ...

    def run(
        self, images: NDArray[np.float32] | Tensor, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Do as `forward`, on arrays or, on a GPU, tensors.

        An engine other than torch does not convert to tensors and back: that takes 1 µs in a loop, and 8 µs between two
        requests, when torch's code has left the processor's caches.
        """
        ...


class Torch(ABC):
    """The base of engines that run torch."""

    @abstractmethod
    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once; see `Engine.forward`."""

    def run(
        self, images: NDArray[np.float32] | Tensor, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once; see `Engine.run`."""
        scores, maps = self.forward(images if isinstance(images, Tensor) else torch.from_numpy(images), layers)
        found = {name: cells.numpy() if cells.device.type == "cpu" else cells for name, cells in maps.items()}
        return None if scores is None else scores.numpy(), found


class Arrays(ABC):
    """The base of engines that take and return arrays."""

    @abstractmethod
    def run(
        self, images: NDArray[np.float32] | Tensor, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once; see `Engine.run`."""

    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once; see `Engine.forward`."""
        scores, maps = self.run(images.numpy(), layers)
        found = {name: torch.as_tensor(cells) for name, cells in maps.items()}
        return None if scores is None else torch.from_numpy(scores), found
