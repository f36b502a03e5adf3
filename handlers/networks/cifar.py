"""`cifar`: the wider pipeline for CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from handlers.networks.network import Network


class Cifar(Network):
    """Classify an RGB 32×32 picture with convolutions of 16 and 32 filters and one pool between them.

    The document's table has no activation after the second convolution, so none is here: its map is the convolution's
    own output, and it goes to the classifier without a second pool.
    """

    description = "CIFAR-10: two padded 3×3 convolutions of 16 and 32 filters, one 2×2 pool, one fully connected layer."
    layers: ClassVar[Mapping[str, str]] = {"conv1": "relu1", "conv2": "conv2"}
    pictures = (3, 32, 32)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, stride=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=1, padding=1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(32 * 16 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score pictures.

        Args:
            images: (N, 3, 32, 32), float32, normalised.

        Returns:
            Logits (N, K), float32.
        """
        first = self.relu1(self.conv1(images))  # (N, 16, 32, 32)
        second = self.conv2(self.pool1(first))  # (N, 32, 16, 16)
        features = self.flatten(second)  # (N, 8192)
        logits: Tensor = self.fc(features)  # (N, K)
        return logits
