"""Recipes: how each network is trained, with the reason for every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn, optim


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: Adam on the cross-entropy, at one learning rate from beginning to end.

    The rate does not depend on how many epochs are planned, so that a run can be made longer after it ended.

    Attributes:
        epochs: Times every training picture is seen.
        batch_size: Pictures a step.
        learning_rate: Adam's step size.
    """

    epochs: int
    batch_size: int
    learning_rate: float

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        """Return a fresh optimizer for a network's parameters."""
        return optim.Adam(parameters, lr=self.learning_rate)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "digits": Recipe(
            epochs=5,  # As in the document's trace.
            batch_size=32,  # 4,000 pictures make only 125 steps an epoch: larger batches would leave too few.
            learning_rate=0.001,  # Adam's default.
        ),
        "simple": Recipe(
            epochs=10,  # Small enough to be still learning after five.
            batch_size=64,  # 782 steps an epoch of CIFAR-10.
            learning_rate=0.001,  # The document's.
        ),
        "cifar": Recipe(
            epochs=5,  # As in the document's trace.
            batch_size=64,  # 782 steps an epoch of CIFAR-10.
            learning_rate=0.001,  # Adam's default.
        ),
    }
)
"""By network name. A network that is not here has nothing to train."""
