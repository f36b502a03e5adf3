"""What the places of the pixels are worth to a network: train it on pictures, and on the same pictures shuffled.

    python -m training.shuffled --model flat --data cifar10 --epochs 5
    python -m training.shuffled --model cifar --data cifar10 --epochs 5

One random order, drawn from the seed, puts the pixels of all pictures, to learn from and to measure on, in other
places; colours stay together. Nothing is augmented, since moving a shuffled picture would mean something else. A
network that flattens its pictures first has no use for places: with its first weights in that order too, it would
learn the same to the last rounding, and as its first weights are random, it learns as well. A convolution looks
at neighbours, which are now strangers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from training import data, history, machine
from training.corpus import Corpus, Split
from training.errors import TrainingError
from training.recipes import RECIPES
from training.run import Plan, Run, input_of


def shuffled(corpus: Corpus, seed: int) -> Corpus:
    """Return the corpus with the pixels of every picture in one random order, the same for all.

    Args:
        corpus: Pictures (N, C, H, W).
        seed: Seed of the order.
    """
    height, width = corpus.train.images.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))

    def reorder(split: Split) -> Split:
        return Split(split.images.flatten(2)[:, :, order].reshape(split.images.shape), split.labels)

    name = f"{corpus.name}, pixels shuffled"
    return replace(corpus, name=name, train=reorder(corpus.train), test=reorder(corpus.test))


def compare(model: str, corpus: Corpus, *, epochs: int, seed: int, device: torch.device) -> tuple[float, float]:
    """Train a network on the pictures as they are, then on shuffled ones, and print both traces.

    Args:
        model: Name of a network that has a recipe.
        corpus: The pictures.
        epochs: Number of epochs of each training; the rest is the network's recipe, without augmentation.
        seed: Seed of the first weights, the order of pictures, and the order of pixels.
        device: Device to compute on.

    Returns:
        Accuracy on the test pictures, 0..1: as they are, and shuffled.
    """
    plan = Plan(model, replace(RECIPES[model].unaugmented(), epochs=epochs), seed)
    reached = []
    for pictures in (corpus, shuffled(corpus, seed)):
        run = Run(plan, pictures, device)
        while not run.done:
            run.advance()
        print(f"{model} on {pictures.name}\n{history.table(run.history)}\n", flush=True)
        reached.append(run.history[-1].test_accuracy)
    return reached[0], reached[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare as the command line says, and return the exit status: 0 done, 2 not possible."""
    options = argparse.ArgumentParser(prog="python -m training.shuffled", description=__doc__.partition("\n")[0])
    options.add_argument("--model", required=True, choices=sorted(RECIPES))
    options.add_argument("--data", required=True, help="a folder with train/ and test/, or cifar10, or digits")
    options.add_argument("--data-root", type=Path, default=Path("data"), help="where cifar10 is kept (default: data)")
    options.add_argument("--epochs", type=int, default=5, help="of each training (default: 5)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    try:
        corpus = data.load(chosen.data, input_of(chosen.model), root=chosen.data_root)
    except TrainingError as err:
        print(f"training: {err}", file=sys.stderr)
        return 2
    device = machine.choose_device("auto")
    plain, mixed = compare(chosen.model, corpus, epochs=chosen.epochs, seed=chosen.seed, device=device)
    print(f"{chosen.model}: {plain:.4f} as they are, {mixed:.4f} shuffled, on {len(corpus.test):,} test pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
