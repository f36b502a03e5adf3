"""`digits`: one convolution and a classifier for handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from handlers.networks.network import Network


class Digits(Network):
    """Classify a grey 28×28 picture with one unpadded convolution.

    The document's table has no activation, so none is here: the map is the convolution's own output.
    """

    description = "Handwritten digits: one 3×3 convolution without padding, a 2×2 pool, one fully connected layer."
    layers: ClassVar[Mapping[str, str]] = {"conv1": "conv1"}
    pictures = (1, 28, 28)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3)
        self.pool1 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16 * 13 * 13, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score pictures.

        Args:
            images: (N, 1, 28, 28), float32, normalised.

        Returns:
            Logits (N, K), float32.
        """
        maps = self.conv1(images)  # (N, 16, 26, 26)
        pooled = self.pool1(maps)  # (N, 16, 13, 13)
        features = self.flatten(pooled)  # (N, 2704)
        logits: Tensor = self.fc(features)  # (N, K)
        return logits
