"""Train a network.

    python -m training.train --model digits --data digits
    python -m training.train --model cifar --data path/to/folder --data-name "my pictures" --epochs 5
    python -m training.train --model cifar --data path/to/folder --epochs 8 --resume
    python -m training.train --model edges

A folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg` (png and webp too); `--data cifar10` is torchvision's,
downloaded into `data/` where it is not there yet. Into `--out` (default runs/<model>) go `checkpoint.pt`, `curves.png`
and `epochs.txt`, after every epoch, so Ctrl-C loses at most one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from handlers.networks import NETWORKS
from training import checkpoint as checkpoints
from training import curves, data, history, machine
from training.checkpoint import Checkpoint
from training.errors import CheckpointError, TrainingError
from training.recipes import RECIPES
from training.run import Plan, Run, hand_set, input_of

CHECKPOINT, CURVES, TABLE = "checkpoint.pt", "curves.png", "epochs.txt"


def parser() -> argparse.ArgumentParser:
    """Return the command line; without a value, the network's recipe or the resumed run decides."""
    options = argparse.ArgumentParser(prog="python -m training.train", description="Train a network.")
    options.add_argument("--model", required=True, choices=sorted(NETWORKS))
    options.add_argument("--data", help="a folder with train/ and test/, or cifar10, or digits")
    options.add_argument("--data-name", help="what reports call the data; by default the folder's name")
    options.add_argument("--data-root", type=Path, default=Path("data"), help="where cifar10 is kept (default: data)")
    options.add_argument("--epochs", type=_at_least_one)
    options.add_argument("--batch-size", type=_at_least_one)
    options.add_argument("--lr", type=_positive, help="learning rate")
    options.add_argument("--no-augmentation", action="store_true", help="show the pictures as they are")
    options.add_argument("--turn-deg", type=_angle, help="also turn the pictures by up to so many degrees either way")
    options.add_argument("--scale", type=_factor, help="also scale the pictures by up to such a factor, up and down")
    options.add_argument("--seed", type=_seed, help="of the first weights and the pictures' order (default: 0)")
    options.add_argument("--out", type=Path, help="default: runs/<model>")
    options.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    options.add_argument("--threads", type=_at_least_one, help="of the CPU (default: all cores)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says, and return the exit status: 0 done, 2 not possible, 130 interrupted."""
    options = parser().parse_args(arguments)
    options.out = options.out or Path("runs") / options.model
    try:
        if options.model not in RECIPES:
            checkpoints.save(hand_set(options.model), options.out / CHECKPOINT)
            print(f"{options.model} has nothing to train; wrote {options.out / CHECKPOINT}")
            return 0
        train(options)
    except TrainingError as err:
        print(f"training: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntraining: stopped; what ended with its epoch is kept, go on with --resume", file=sys.stderr)
        return 130
    return 0


def train(options: argparse.Namespace) -> None:
    """Train from the start, or from the checkpoint in `options.out`, to the last planned epoch.

    Raises:
        TrainingError: The run cannot be started or go on.
    """
    if options.data is None:
        raise TrainingError("--data is missing: a folder with train/ and test/, or cifar10, or digits")
    former = checkpoints.load(options.out / CHECKPOINT) if options.resume else None
    plan = _plan(options, former)
    kept = former["plan"] if former else {}
    device = machine.choose_device(options.device or kept.get("device") or "auto")
    with _reproducible(options.threads or kept.get("threads") or torch.get_num_threads()):
        corpus = data.load(options.data, input_of(plan.model), root=options.data_root, name=options.data_name)
        run = Run(plan, corpus, device)
        if former:
            run.restore(former)
        print(
            f"{plan.model} on {corpus.name}: {len(corpus.train):,} pictures to learn from, {len(corpus.test):,} to "
            f"measure on, {len(corpus.classes)} classes; {machine.describe(device)}"
        )
        _train(run, options.out)


def _train(run: Run, out: Path) -> None:
    print(history.table(run.history), flush=True)
    if run.done:
        print(f"nothing left to do: {len(run.history)} epochs are done, {run.plan.recipe.epochs} were asked for")
        return
    checkpoint: Checkpoint = {}
    while not run.done:
        print(history.row(run.advance()), flush=True)
        checkpoint = run.checkpoint()
        checkpoints.save(checkpoint, out / CHECKPOINT)
        (out / TABLE).write_text(history.table(run.history) + "\n")
        curves.draw(run.history, out / CURVES, title=f"{run.plan.model} on {run.corpus.name}")
    reached = checkpoint["training"]
    print(
        f"{run.plan.model}: accuracy {reached['test_accuracy']:.4f} on {reached['test_pictures']:,} test pictures, "
        f"{reached['train_accuracy']:.4f} on the training pictures, {reached['seconds']:.1f} s\n"
        f"wrote {out / CHECKPOINT}, {out / CURVES}, {out / TABLE}"
    )


def _plan(options: argparse.Namespace, former: Checkpoint | None) -> Plan:
    """Join the command line with the recipe, or with the run that is resumed.

    Raises:
        CheckpointError: The command line contradicts the run that is resumed.
    """
    if former is None:
        recipe, seed = RECIPES[options.model], 0 if options.seed is None else options.seed
        recipe = recipe.unaugmented() if options.no_augmentation else recipe
    else:
        if former["model"] != options.model:
            raise CheckpointError(f"{options.out / CHECKPOINT} is of {former['model']}, not of {options.model}")
        plan = Plan.of(former)
        recipe, seed = plan.recipe, plan.seed
        settled = {
            "batch_size": recipe.batch_size,
            "lr": recipe.learning_rate,
            "turn_deg": recipe.turn_deg,
            "scale": recipe.scale,
            "seed": seed,
        }
        for option, value in settled.items():
            if getattr(options, option) not in (None, value):
                flag = "--" + option.replace("_", "-")
                raise CheckpointError(f"the run to resume has {flag} {value}; leave {flag} out")
        if options.no_augmentation and recipe != recipe.unaugmented():
            raise CheckpointError("the run to resume augments its pictures; leave --no-augmentation out")
    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.lr,
        "turn_deg": options.turn_deg,
        "scale": options.scale,
    }
    return Plan(options.model, replace(recipe, **{key: value for key, value in given.items() if value}), seed)


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Compute with so many threads and with deterministic algorithms only; afterwards as before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Without it, cuBLAS refuses to be deterministic.
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _angle(text: str) -> float:
    if not 0 < (number := float(text)) <= 180:
        raise argparse.ArgumentTypeError(f"{text} is not an angle above 0 and up to 180")
    return number


def _factor(text: str) -> float:
    if not 1 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a factor above 1")
    return number


def _seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
