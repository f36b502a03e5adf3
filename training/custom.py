"""A user's own network, or one of torchvision's: from constructor, weights and layers to an archive's contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from handlers.images import Preprocessing
from training import packing
from training.architecture import find
from training.contents import FORMAT, Contents, load_strictly, load_tensors
from training.packing import ArchiveError


def from_network(
    architecture: str,
    *,
    name: str,
    layers: Mapping[str, str],
    preprocessing: Preprocessing,
    state_dict: Path | None = None,
    seed: int | None = None,
    arguments: Mapping[str, object] | None = None,
    classes: Sequence[str] = (),
    version: str = "1.0",
    description: str = "",
) -> Contents:
    """Take a network that `training.train` knows nothing of.

    Args:
        architecture: `path/to/net.py:Name`, `package.module:Name`, or a builder such as `torchvision.models:resnet18`.
        name: What the model is served under.
        layers: Public name → node of torchvision's feature extraction.
        preprocessing: What the network takes.
        state_dict: The weights' file, a state dict or a dict with one under "state_dict".
        seed: Without a file: initialise the network from this seed.
        arguments: The constructor's keyword arguments, plain JSON values.
        classes: Labels in the order of the outputs; none for a network whose output is no scores.
        version: The model's version.
        description: One sentence for the model card.

    Raises:
        ArchiveError: The network cannot be built, or the weights do not fit it.
    """
    constructor = dict(arguments or {})
    if architecture.startswith("torchvision.") and constructor.get("weights"):
        raise ArchiveError("a server must not download weights: leave out `weights` and give --state-dict")
    found = find(architecture)
    with found.importable(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        network = found.build(constructor)
        if state_dict is not None:
            state = load_tensors(state_dict)
            nested = state.get("state_dict") if isinstance(state, dict) else None
            load_strictly(network, state if nested is None else nested)
        weights = packing.weights(network.state_dict())
    card = {
        "format": FORMAT,
        "model": name,
        "version": version,
        "description": description or f"{found.reference}, a network of the user's own.",
        "architecture": found.reference,
        "arguments": constructor,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "layers": dict(layers),
        "training": {},
    }
    return Contents(card, weights, found)


def read_classes(path: Path) -> list[str]:
    """Read one label a line, in the order of the network's outputs.

    Raises:
        ArchiveError: The file cannot be read, is empty or has an empty line among its labels.
    """
    try:
        labels = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        raise ArchiveError(f"the classes cannot be read: {err}") from err
    if not labels or "" in labels:
        raise ArchiveError(f"{path} must hold one label a line and no empty line")
    return labels
