"""The base of every network: what it takes, and which of its maps it publishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn


class Network(nn.Module):
    """A network that says what it takes and what can be seen inside it.

    Attributes:
        description: One sentence for the model card.
        layers: Public name to the node that holds the map (named as `torchvision.models.feature_extraction` does), in
            the order of the forward pass. A map is the tensor after the activation and before pooling.
        pictures: Channels, height and width of the input; height and width are None where any size will do.
    """

    description: ClassVar[str]
    layers: ClassVar[Mapping[str, str]]
    pictures: ClassVar[tuple[int, int | None, int | None]]
