"""A run's history: one row of figures an epoch, as the documents' traces have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch.

    Attributes:
        epoch: Its number, from 1.
        train_loss: Mean cross-entropy over the training pictures, each measured just before its step, while the
            weights were still moving: higher than the same pictures would give afterwards.
        train_accuracy: Likewise; 0..1.
        test_loss: Mean cross-entropy over the test pictures, with the weights as the epoch left them.
        test_accuracy: Likewise; 0..1.
        seconds: Training and measuring together.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


HEADER = "epoch  train loss  train accuracy  test loss  test accuracy  seconds"


def row(epoch: Epoch) -> str:
    """Return one line below `HEADER`."""
    return (
        f"{epoch.epoch:5}  {epoch.train_loss:10.4f}  {epoch.train_accuracy:14.4f}"
        f"  {epoch.test_loss:9.4f}  {epoch.test_accuracy:13.4f}  {epoch.seconds:7.1f}"
    )


def table(history: Sequence[Epoch]) -> str:
    """Return all epochs as aligned lines."""
    return "\n".join([HEADER, *map(row, history)])
