"""The loop: one pass over the training pictures, and the measurement on any pictures.

Axes: `N` batch, `C` channels, `H, W` picture pixels, `K` classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from handlers.images.preprocessing import Preprocessing, normalise
from training.corpus import Split
from training.errors import TrainingError
from training.recipes import Recipe

_MEASURING_BATCH = 500  # Fixed, so that a measurement does not depend on the batch size of training.
_SHOWN_EVERY = 20  # Steps between two figures on the bar: reading one waits for the device.


@dataclass(frozen=True)
class Figures:
    """Means over pictures.

    Attributes:
        loss: Cross-entropy, in nats.
        accuracy: Share of pictures whose largest logit is the right one, 0..1.
    """

    loss: float
    accuracy: float


def train_epoch(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    optimizer: optim.Optimizer,
    *,
    recipe: Recipe,
    epoch: int,
    draw: torch.Generator,
) -> Figures:
    """Train on every picture once.

    Args:
        model: The network, on the pictures' device; left in training mode.
        split: The training pictures.
        preprocessing: The network's input, with its normalisation.
        optimizer: The optimizer of the model's parameters.
        recipe: How to train; the last step of an epoch takes the pictures that are left.
        epoch: Number of the epoch, from 1.
        draw: A CPU generator; the order of the pictures and their augmentation are drawn from it.

    Returns:
        Means over the epoch, each picture measured before its own step.

    Raises:
        TrainingError: The loss is not a number any more.
    """
    model.train()
    rows = torch.randperm(len(split), generator=draw).to(split.images.device)
    sums = torch.zeros(2, dtype=torch.float64, device=split.images.device)  # loss, right answers
    seen = 0
    steps = math.ceil(len(rows) / recipe.batch_size)
    title = f"epoch {epoch}/{recipe.epochs}"
    bar = tqdm(torch.split(rows, recipe.batch_size), desc=title, unit=" steps", leave=False, disable=None)
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate((epoch - 1 + step / steps) / recipe.epochs)
        labels = split.labels[batch]
        images = recipe.augment(split.images[batch], draw)  # (N, C, H, W), uint8
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(normalise(images, preprocessing)).float()  # (N, K)
        loss = cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        sums += _sums(logits.detach(), labels)
        seen += len(batch)
        if step % _SHOWN_EVERY == 0:
            bar.set_postfix(loss=f"{sums[0].item() / seen:.3f}", accuracy=f"{sums[1].item() / seen:.3f}")
    figures = _means(sums, seen)
    if not math.isfinite(figures.loss):
        raise TrainingError(f"the loss became {figures.loss} in {title}; try a smaller --lr")
    return figures


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, preprocessing: Preprocessing) -> Figures:
    """Measure the network as it is; it is left in evaluation mode.

    Args:
        model: The network, on the pictures' device.
        split: Pictures to measure on.
        preprocessing: The network's input, with its normalisation.

    Returns:
        Means over all pictures.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=split.images.device)
    for batch in torch.split(torch.arange(len(split), device=split.images.device), _MEASURING_BATCH):
        labels = split.labels[batch]
        logits = model(normalise(split.images[batch], preprocessing))  # (N, K)
        sums += _sums(logits, labels)
    return _means(sums, len(split))


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    loss = cross_entropy(logits, labels, reduction="sum")  # Never smoothed: figures of all recipes compare.
    return torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])


def _means(sums: Tensor, count: int) -> Figures:
    loss, right = sums.tolist()
    return Figures(loss / count, right / count)
