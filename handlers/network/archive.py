"""Archives: the content of an unpacked archive.

`card.json` names the network and describes it, `weights.safetensors` is its state dict, and `reference.safetensors`
holds what the network computes for the pictures of `noise`, as torch does it. `graph.onnx`, whose weights lie in the
state dict, is present if the network could be exported, and `model-config.yaml` holds the limits under `convscope:`.
The network itself is built only where it runs in torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from handlers.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

    from handlers.network.engines.torch_engine import TorchEngine

FORMAT = 1
"""Version of card.json's format, under `format`."""

CARD, WEIGHTS, GRAPH, REFERENCE = "card.json", "weights.safetensors", "graph.onnx", "reference.safetensors"

SOFTMAX, SIGMOID, VALUE, NONE = "softmax", "sigmoid", "value", "none"
SCORES = (SOFTMAX, SIGMOID, VALUE, NONE)
"""What outputs mean: logits of classes of which one is right, logits of classes that do not exclude each other, numbers
as they are, or no scores."""

KIND = "scores"
"""Card's key: what the outputs mean, one of `SCORES`; by default softmax with classes and none without."""
PROBABILITIES = "probabilities"
"""Card's key: whether the network applies the softmax or sigmoid itself; by default it does not."""
OUTPUT_NAME = "output"
"""Card's key: which of the returned tensors is the scores; by default the only tensor."""
LAYOUTS = "layouts"
"""Card's key: public name → layout; by default (N, C, h, w)."""
NO_GRADIENTS = "no_gradients"
"""Card's key: why the network's scores have no gradients; absent if they have gradients."""
DESCRIBED = "network"
"""Card's key: what the archiver measured by running the network; see `Described`."""


@dataclass(frozen=True)
class Layer:
    """A published layer.

    Attributes:
        shape: (C, h, w) of the map for a picture of the network's size; the shape without the batch for other outputs.
        facts: The layer's entry in the model card, by the field names of `convscope.v1.Layer`.
        kernel: The tensor that is the kernel of the two-dimensional convolution that makes the map, as `Archive.tensor`
            takes it; empty where none does.
    """

    shape: tuple[int, ...]
    facts: Mapping[str, Any]
    kernel: str = ""


@dataclass(frozen=True)
class Described:
    """The archiver's description of a network.

    Attributes:
        layers: Layers by public name, in the order of the forward pass.
        parameters: Number of the network's parameters.
        multiply_adds: Number of multiply-adds in a forward pass of one picture.
        explanations: The methods of explanation that suit the network, if torch is installed.
        default_layer: The default layer of Grad-CAM and CAM; empty if no layer is a map.
        heads: Public name → the weight (K, C) that makes the scores of the mean over that layer's cells, as
            `Archive.tensor` takes it; layers for which there is one.
        sources: What feeds the scores, by the field names of `convscope.v1.Source`; empty if unknown.
    """

    layers: Mapping[str, Layer]
    parameters: int
    multiply_adds: int
    explanations: tuple[str, ...]
    default_layer: str
    heads: Mapping[str, str]
    sources: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Described:
        """Read the content of card.json."""
        layers = {}
        for facts in values["layers"]:
            known = {name: value for name, value in facts.items() if name not in ("name", "kernel_tensor")}
            layers[facts["name"]] = Layer(tuple(facts["shape"]), known, facts.get("kernel_tensor", ""))
        return cls(
            layers,
            values["parameters"],
            values["multiply_adds"],
            tuple(values["explanations"]),
            values["default_layer"],
            values["heads"],
            tuple(values.get("sources", ())),
        )


@dataclass(frozen=True)
class Archive:
    """An unpacked archive.

    Attributes:
        card: The content of card.json.
        directory: The folder of its files.
    """

    card: Mapping[str, Any]
    directory: Path

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the network's input."""
        return Preprocessing.from_dict(self.card["preprocessing"])

    @property
    def layers(self) -> dict[str, str]:
        """Public name → node, or `output:` and the name of a tensor that the network returns."""
        return dict(self.card["layers"])

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Labels by index; empty for a network without classes."""
        return tuple(self.card["classes"])

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

    @property
    def has_gradients(self) -> bool:
        """Whether the scores have gradients with respect to the picture."""
        return NO_GRADIENTS not in self.card

    @cached_property
    def described(self) -> Described:
        """The archiver's description of the network."""
        return Described.of(self.card[DESCRIBED])

    @property
    def graph(self) -> Path | None:
        """The file with the network for ONNX Runtime; None if the archive has none."""
        path = self.directory / GRAPH
        return path if path.exists() else None

    @cached_property
    def module(self) -> nn.Module:
        """The network with its weights, in evaluation mode, on the CPU; built when it is first asked for.

        Raises:
            ImportError: torch, the network's module, or one it needs, is not installed.
            RuntimeError: The weights do not fit the network.
        """
        from safetensors.torch import load_file

        from handlers.network.modules import build, load_weights

        module = build(self.card["architecture"], self.card["arguments"])
        load_weights(module, load_file(self.directory / WEIGHTS))
        return module.eval()

    def eager(self, device: str) -> TorchEngine:
        """Return the network in torch, on a device."""
        from handlers.network.engines.torch_engine import TorchEngine

        return TorchEngine(self.module, device=device, **eager_arguments(self.card))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of the state dict, or one that the archiver computed.

        Raises:
            KeyError: No tensor has this name.
        """
        from safetensors import safe_open

        for file in (WEIGHTS, REFERENCE):
            with safe_open(self.directory / file, framework="numpy") as tensors:
                if name in tensors.keys():  # noqa: SIM118  # It is no mapping.
                    return np.ascontiguousarray(tensors.get_tensor(name), np.float32)
        raise KeyError(name)


def scores_of(card: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return what the outputs mean; an archive that does not say has logits, if it has classes."""
    return str(card.get(KIND, SOFTMAX if classes else NONE))


def eager_arguments(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TorchEngine` that the card has: layers, layouts, and which output the scores are."""
    return {
        "layers": dict(card["layers"]),
        "has_scores": scores_of(card, card["classes"]) != NONE,
        "layouts": dict(card.get(LAYOUTS, {})),
        "output": str(card.get(OUTPUT_NAME, "")),
    }


def load(directory: Path) -> Archive:
    """Read an unpacked archive's card.

    Args:
        directory: The folder of the files. For a user's own network it must be on the import path.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The card has a format that this code does not read.
    """
    card = json.loads((directory / CARD).read_text(encoding="utf-8"))
    if card.get("format") != FORMAT:
        raise ValueError(f"{CARD} has format {card.get('format')!r}, this handler reads format {FORMAT}")
    if DESCRIBED not in card:
        raise ValueError(f"{CARD} is of an older archive; python -m archiver --refresh brings it to today's format")
    for name in (WEIGHTS, REFERENCE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{name} is missing")
    return Archive(card, directory)
