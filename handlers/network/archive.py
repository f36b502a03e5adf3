"""Archives: what an unpacked archive holds, loaded and checked.

`card.json` names the network and describes it, `weights.safetensors` is its state dict, `graph.onnx`, whose weights lie
in that file, is present if the network could be exported, and `model-config.yaml` holds the limits under `convscope:`.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handlers.images.preprocessing import Preprocessing
from handlers.network.engines.eager import Eager

FORMAT = 1
"""Of card.json, where it stands under `format`."""

CARD, WEIGHTS, GRAPH = "card.json", "weights.safetensors", "graph.onnx"

SOFTMAX, SIGMOID, VALUE, NONE = "softmax", "sigmoid", "value", "none"
SCORES = (SOFTMAX, SIGMOID, VALUE, NONE)
"""What outputs mean: logits of classes of which one is right, logits of classes that do not exclude each other, numbers
as they are, or no scores."""

KIND = "scores"
"""In the card: what the outputs mean, one of `SCORES`; by default softmax with classes and none without."""
PROBABILITIES = "probabilities"
"""In the card: whether the network applies the softmax or sigmoid itself; by default it does not."""
OUTPUT_NAME = "output"
"""In the card: which of the returned tensors is the scores; by default the only one."""
LAYOUTS = "layouts"
"""In the card: public name → layout; by default (N, C, h, w)."""


@dataclass(frozen=True)
class Archive:
    """A network and its description.

    Attributes:
        module: The network with its weights, in evaluation mode, on the CPU.
        preprocessing: How pictures become its input.
        layers: Public name → node, or `output:` and the name of a tensor that the network returns.
        classes: Labels by index; empty for a network without classes.
        card: The content of card.json.
        has_gradients: Whether its scores have gradients with respect to the picture. An archive states it if they have
            none; older archives, which state nothing, are assumed to have them.
        graph: The file with the network for ONNX Runtime; None if the archive has none.
    """

    module: nn.Module
    preprocessing: Preprocessing
    layers: dict[str, str]
    classes: tuple[str, ...]
    card: dict[str, Any]
    graph: Path | None = None
    has_gradients: bool = True

    @property
    def scores(self) -> str:
        """What the outputs mean, one of `SCORES`."""
        return scores_of(self.card, self.classes)

    @property
    def gives_probabilities(self) -> bool:
        """Whether the outputs went through the softmax or sigmoid already, inside the network."""
        return bool(self.card.get(PROBABILITIES))

    @property
    def layouts(self) -> dict[str, str]:
        """Public name → layout, of the layers that are not (N, C, h, w) in the network."""
        return dict(self.card.get(LAYOUTS, {}))

    def eager(self, device: torch.device | str) -> Eager:
        """Return the network in torch, on a device."""
        card = {**self.card, "layers": self.layers, "classes": self.classes}
        return Eager(self.module, device=device, **eager_arguments(card))


def scores_of(card: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return what the outputs mean; an archive that does not say has logits, if it has classes."""
    return str(card.get(KIND, SOFTMAX if classes else NONE))


def eager_arguments(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Eager` that say what is read of a network: layers, layouts, and where the scores are."""
    return {
        "layers": dict(card["layers"]),
        "has_scores": scores_of(card, card["classes"]) != NONE,
        "layouts": dict(card.get(LAYOUTS, {})),
        "output": str(card.get(OUTPUT_NAME, "")),
    }


def load(directory: Path) -> Archive:
    """Load an unpacked archive.

    Args:
        directory: Where `card.json` and `weights.safetensors` are. For a user's own network it must be on the import
            path.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: The network's module, or one it needs, is not installed.
        RuntimeError: The weights do not fit the network.
        ValueError: The card has a format that this code does not read.
    """
    card = json.loads((directory / CARD).read_text(encoding="utf-8"))
    if card.get("format") != FORMAT:
        raise ValueError(f"{CARD} has format {card.get('format')!r}, this handler reads format {FORMAT}")
    graph = directory / GRAPH
    module = build(card["architecture"], card["arguments"])
    load_weights(module, load_file(directory / WEIGHTS))
    return Archive(
        module=module.eval(),
        preprocessing=Preprocessing.from_dict(card["preprocessing"]),
        layers=dict(card["layers"]),
        classes=tuple(card["classes"]),
        card=card,
        graph=graph if graph.exists() else None,
        has_gradients="no_gradients" not in card,
    )


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights, none missing and none left over.

    A module may read older weights in another way, by the version of its class that the state dict names. Weights that
    name none are those of today's classes: an archive's were written by the classes that read them.

    Raises:
        RuntimeError: They do not fit.
    """
    given = OrderedDict(state)
    own = getattr(state, "_metadata", None) or getattr(module.state_dict(), "_metadata", {})
    given._metadata = own  # type: ignore[attr-defined]
    module.load_state_dict(given, strict=True)


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the network's constructor.

    Args:
        architecture: `package.module:Name`, e.g. `handlers.networks.cifar:Cifar`, or `package.module:Class.method`.
        arguments: Its keyword arguments.

    Raises:
        ImportError: The module cannot be imported.
        TypeError: The call does not return an `nn.Module`.
    """
    module_name, _, name = architecture.partition(":")
    module = attrgetter(name)(importlib.import_module(module_name))(**arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{architecture} makes a {type(module).__name__}, not an nn.Module")
    return module
