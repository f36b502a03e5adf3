"""`deep`: a residual network for CIFAR-10 whose maps lead from edges to shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from handlers.networks.network import Network


class Plain(nn.Module):
    """A padded 3×3 convolution, normalised, with ReLU: (N, C, h, w) to (N, filters, h, w)."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, kernel_size=3, padding=1, bias=False)  # The norm shifts by itself.
        self.norm = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Filter the maps."""
        out: Tensor = self.relu(self.norm(self.conv(maps)))
        return out


class Residual(nn.Module):
    """Two such convolutions whose result is added to the input before the last ReLU: (N, C, h, w) stays that."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Plain(channels, channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Filter the maps and add them to what they were."""
        out: Tensor = self.relu(self.norm(self.conv(self.first(maps))) + maps)
        return out


class Deep(Network):
    """Classify an RGB 32×32 picture with seven blocks, ten convolutions in all.

    Most of the work is done on small maps with many channels, where a multiplication gains the most accuracy; only two
    convolutions see the full size. The mean over the last map's cells goes to one linear layer, so class activation
    maps are exact. Nothing depends on the picture's size, but only 32×32 is trained.
    """

    description = (
        "CIFAR-10: seven blocks of padded 3×3 convolutions with batch normalisation, three of them residual, 32 to 256 "
        "channels, three 2×2 pools, global average, one linear layer."
    )
    layers: ClassVar[Mapping[str, str]] = {f"block{number}": f"block{number}.relu" for number in range(1, 8)}
    pictures = (3, 32, 32)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.block1 = Plain(3, 32)
        self.block2 = Plain(32, 64)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = Residual(64)
        self.block4 = Plain(64, 192)
        self.pool4 = nn.MaxPool2d(2)
        self.block5 = Residual(192)
        self.block6 = Plain(192, 256)
        self.pool6 = nn.MaxPool2d(2)
        self.block7 = Residual(256)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(256, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score pictures.

        Args:
            images: (N, 3, 32, 32), float32, normalised.

        Returns:
            Logits (N, K), float32.
        """
        fine = self.block2(self.block1(images))  # (N, 64, 32, 32)
        middle = self.block4(self.block3(self.pool2(fine)))  # (N, 192, 16, 16)
        coarse = self.block6(self.block5(self.pool4(middle)))  # (N, 256, 8, 8)
        last = self.block7(self.pool6(coarse))  # (N, 256, 4, 4)
        logits: Tensor = self.fc(self.flatten(self.mean(last)))  # (N, K)
        return logits
