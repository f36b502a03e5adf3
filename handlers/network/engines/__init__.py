"""Engines that run a network: torch always, a faster one if it is available.

This is their interface: all take the same tensors, return the same outputs, and have a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

MAX_INPUT_BYTES = 8 * 2**20  # Per forward pass: activations are many times their input.

Cells: TypeAlias = "NDArray[np.float32] | Tensor"
"""The values of a map: an array on the CPU, a tensor on a GPU."""


class CannotEditError(ValueError):
    """A map of this network cannot be changed; the message is for the caller."""


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

    def run(
        self, images: Cells, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once.

        Args:
            images: (N, C, H, W), float32, normalised, contiguous: an array, or on a GPU a tensor there.
            layers: Public names of the maps wanted; no other map is kept or copied.

        Returns:
            Scores (N, K) float32, or None for a network without classes; and a map (N, C, h, w) float32 for each layer
            asked for, contiguous: arrays, or on a GPU tensors there. The caller owns them.
        """
        ...
