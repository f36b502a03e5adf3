"""`flat`: a plain fully connected network for CIFAR-10, the twin that `cifar` is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from handlers.networks.network import Network


class Flat(Network):
    """Classify an RGB 32×32 picture as a list of 3,072 numbers, with two hidden layers of 28.

    It has 87,146 parameters, as `cifar` has 87,018, but no kernel: each weight of the first layer belongs to one place,
    so what was learned there is not known elsewhere, and how the pixels lie side by side makes no difference. Its
    hidden layers are published as maps of one cell a channel.
    """

    description = "CIFAR-10: the picture flattened, two fully connected layers of 28 with ReLU, one linear layer."
    layers: ClassVar[Mapping[str, str]] = {"fc1": "cell1", "fc2": "cell2"}
    pictures = (3, 32, 32)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(3 * 32 * 32, 28)
        self.relu1 = nn.ReLU()
        self.cell1 = nn.Unflatten(1, (28, 1, 1))
        self.fc2 = nn.Linear(28, 28)
        self.relu2 = nn.ReLU()
        self.cell2 = nn.Unflatten(1, (28, 1, 1))
        self.fc3 = nn.Linear(28, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score pictures.

        Args:
            images: (N, 3, 32, 32), float32, normalised.

        Returns:
            Logits (N, K), float32.
        """
        first = self.cell1(self.relu1(self.fc1(self.flatten(images))))  # (N, 28, 1, 1)
        second = self.cell2(self.relu2(self.fc2(first.flatten(1))))  # (N, 28, 1, 1)
        logits: Tensor = self.fc3(second.flatten(1))  # (N, K)
        return logits
