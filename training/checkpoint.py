"""Checkpoints: one file with a network, the figures it reached, and the state that resuming its training needs.

A checkpoint is a dictionary of plain values and tensors, so it loads with `torch.load(weights_only=True)`:

    format          1
    model           "cifar"
    architecture    "handlers.networks.cifar:Cifar", called with `arguments`
    arguments       {"classes": 10}
    layers          {"conv1": "relu1", ...}, public name to node
    classes         ["airplane", ...]; empty for a network without classes
    preprocessing   `Preprocessing.to_dict()`
    description     one sentence for the model card
    state_dict      the weights, on the CPU
    training        the data and the figures reached: see `Run.checkpoint`
    optimizer, rng, plan    what resuming needs; absent where nothing is trained
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from handlers.images.preprocessing import Preprocessing
from handlers.networks import Network, architecture
from training.errors import CheckpointError

FORMAT = 1
Checkpoint = dict[str, Any]


def describe(
    name: str, model: Network, preprocessing: Preprocessing, classes: Sequence[str], training: dict[str, Any]
) -> Checkpoint:
    """Return the checkpoint of a network, without the state that resuming needs."""
    return {
        "format": FORMAT,
        "model": name,
        "architecture": architecture(type(model)),
        "arguments": {"classes": len(classes)} if classes else {},
        "layers": dict(model.layers),
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "description": model.description,
        "state_dict": {key: value.detach().cpu().clone() for key, value in model.state_dict().items()},
        "training": training,
    }


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole or not at all: an interruption leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(checkpoint, partial)
    partial.replace(path)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        CheckpointError: The file is missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as err:
        raise CheckpointError(f"{path} is damaged, or no checkpoint") from err
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}")
    return checkpoint
