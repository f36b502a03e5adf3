"""`simple`: two small padded convolutions for CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from handlers.networks.network import Network


class Simple(Network):
    """Classify an RGB 32×32 picture with two convolutions of 6 and 12 filters."""

    description = "CIFAR-10: 3×3 convolutions of 6 and 12 filters, each with ReLU and a 2×2 pool; two linear layers."
    layers: ClassVar[Mapping[str, str]] = {"conv1": "relu1", "conv2": "relu2"}
    pictures = (3, 32, 32)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 12, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(12 * 8 * 8, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score pictures.

        Args:
            images: (N, 3, 32, 32), float32, normalised.

        Returns:
            Logits (N, K), float32.
        """
        first = self.relu1(self.conv1(images))  # (N, 6, 32, 32)
        second = self.relu2(self.conv2(self.pool1(first)))  # (N, 12, 16, 16)
        features = self.flatten(self.pool2(second))  # (N, 768)
        hidden = self.relu3(self.fc1(features))  # (N, 120)
        logits: Tensor = self.fc2(hidden)  # (N, K)
        return logits
