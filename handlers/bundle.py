"""Bundles: what an unpacked archive holds, loaded and checked.

`card.json` names the network and its meaning, `weights.pt` is a state dict read without running any code of its own,
`graph.onnx` is there where the network could be exported, and `model-config.yaml` holds the limits under `convscope:`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handlers.engines.session import Graph
from handlers.images import DEFAULT_MAX_BYTES, DEFAULT_MAX_IMAGES, DEFAULT_MAX_PIXELS, Preprocessing

STOCK_MAX_RESPONSE_BYTES = 6_553_500  # TorchServe's default max_response_size; a longer reply kills the worker.
_FRAME_BYTES = 65_536  # Room for status, headers and request ids, which count towards that size.


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_images: Pictures in a request.
        max_image_bytes: Bytes of one encoded picture or array.
        max_image_pixels: H·W of one picture.
        max_reply_bytes: Bytes of one reply.
    """

    max_images: int = DEFAULT_MAX_IMAGES
    max_image_bytes: int = DEFAULT_MAX_BYTES
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_reply_bytes: int = STOCK_MAX_RESPONSE_BYTES - _FRAME_BYTES

    @property
    def max_request_pixels(self) -> int:
        """Pixels of all picture files of one request.

        A pixel takes up to 0.05 µs of a core (a JPEG of many scans, WebP with transparency), so a batch of eight such
        requests a minute: half of what TorchServe gives a worker.
        """
        return 10 * self.max_image_pixels

    @classmethod
    def of(cls, config: Mapping[str, Any], *, batch_size: int, environment: Mapping[str, str] = os.environ) -> Limits:
        """Read the archive's limits, and keep a whole batch of replies within what TorchServe may send.

        Args:
            config: The content of model-config.yaml.
            batch_size: Most requests in one call of the handler.
            environment: `CONVSCOPE_MAX_RESPONSE_BYTES` says what TorchServe was configured with.
        """
        wanted = dict(config.get("convscope") or {})
        sendable = int(environment.get("CONVSCOPE_MAX_RESPONSE_BYTES", STOCK_MAX_RESPONSE_BYTES))
        share = (sendable - _FRAME_BYTES) // max(1, batch_size)
        wanted["max_reply_bytes"] = min(int(wanted.get("max_reply_bytes", share)), share)
        return cls(**{name: int(value) for name, value in wanted.items()})


@dataclass(frozen=True)
class Bundle:
    """A network and its meaning.

    Attributes:
        module: The network with its weights, in evaluation mode, on the CPU.
        preprocessing: What it takes.
        layers: Public name → node.
        classes: Labels by index; empty for a network without classes.
        card: The content of card.json.
        has_gradients: Whether its scores have gradients with respect to the picture. Archives say so where they have
            none; older ones, which do not say, are taken to have them.
        graph: The network once more, for ONNX Runtime; None where the archive has none.
    """

    module: nn.Module
    preprocessing: Preprocessing
    layers: dict[str, str]
    classes: tuple[str, ...]
    card: dict[str, Any]
    graph: Graph | None = None
    has_gradients: bool = True


def load(directory: Path) -> Bundle:
    """Load an unpacked archive.

    Args:
        directory: Where `card.json` and `weights.pt` lie. It must be on the import path for a network of the user's.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: The network's module, or one it needs, is not installed.
        RuntimeError: The weights do not fit the network.
        ValueError: The card is not of a format that this code reads.
    """
    card = json.loads((directory / "card.json").read_text(encoding="utf-8"))
    if card.get("format") != 1:
        raise ValueError(f"card.json has format {card.get('format')!r}, this handler reads format 1")
    module = build(card["architecture"], card["arguments"])
    state = torch.load(directory / "weights.pt", map_location="cpu", weights_only=True)
    module.load_state_dict(state, strict=True)
    return Bundle(
        module=module.eval(),
        preprocessing=Preprocessing.from_dict(card["preprocessing"]),
        layers=dict(card["layers"]),
        classes=tuple(card["classes"]),
        card=card,
        graph=_load_graph(directory, card),
        has_gradients="no_gradients" not in card,
    )


def _load_graph(directory: Path, card: Mapping[str, Any]) -> Graph | None:
    path = directory / "graph.onnx"
    return Graph(path.read_bytes(), tuple(card["graph"]["weights"])) if path.exists() else None


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the network's constructor.

    Args:
        architecture: `package.module:Name`, e.g. `handlers.networks.cifar:Cifar`.
        arguments: Its keyword arguments.

    Raises:
        ImportError: The module cannot be imported.
        TypeError: What the call returns is no `nn.Module`.
    """
    module_name, _, name = architecture.partition(":")
    module = getattr(importlib.import_module(module_name), name)(**arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{architecture} makes a {type(module).__name__}, not an nn.Module")
    return module
