"""Corpora: all pictures of one data source in memory, ready for a network.

A corpus holds each half of its pictures as one uint8 tensor, for the whole run: nothing is decoded or
copied again while training. Axes: `N` pictures, `C` channels, `H, W` pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handlers.images.preprocessing import Preprocessing

_DIGITS_OF_STATISTICS = 4


@dataclass(frozen=True)
class Split:
    """Pictures with their classes.

    Attributes:
        images: (N, C, H, W), uint8, 0..255.
        labels: (N,), int64, 0..K-1, on the same device.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Split:
        """Return the same pictures on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Corpus:
    """The pictures of one data source, as one network takes them.

    Attributes:
        name: Name of the data in reports.
        classes: K names; a label is an index into them.
        train: Pictures to learn from.
        test: Pictures to measure on, never trained on.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    def normalised(self, preprocessing: Preprocessing) -> Preprocessing:
        """Return the preprocessing with the mean and deviation of the training pictures, per channel."""
        mean, std = statistics(self.train.images)
        return replace(preprocessing, mean=mean, std=std)

    def digest(self) -> str:
        """Return SHA-256, in hexadecimal, of every picture and label: the same data has the same digest."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel.

    They are computed from how often each of the 256 values occurs: exactly, whatever the number of threads.

    Args:
        images: (N, C, H, W), uint8, 0..255.

    Returns:
        C means and C deviations on the 0..1 scale, to four digits. A channel of one value has deviation 1.
    """
    means, deviations = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (shares * values).sum()
        deviation = (shares * (values - mean) ** 2).sum().sqrt()
        means.append(round(mean.item(), _DIGITS_OF_STATISTICS))
        deviations.append(round(deviation.item(), _DIGITS_OF_STATISTICS) or 1.0)
    return tuple(means), tuple(deviations)
