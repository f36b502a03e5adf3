"""Older archives, converted to today's format; no other module knows former formats.

An archive's weights were once `weights.pt`, a state dict written by `torch.save`, and its graph's initializers named
no place in that file: the handlers passed the values to ONNX Runtime.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping

import torch

from archiver import packing
from archiver.links import link
from archiver.packing import ArchiveError
from handlers.network.archive import CARD, GRAPH, WEIGHTS

_PICKLED = "weights.pt"


def renewed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of an archive in today's format; code that the weights may hold is not run.

    Raises:
        ArchiveError: The weights are damaged, or the graph cannot be read here.
    """
    found = dict(files)
    if _PICKLED not in found:
        return found
    try:
        state = torch.load(io.BytesIO(found.pop(_PICKLED)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
        raise ArchiveError(f"its {_PICKLED} is damaged: {type(err).__name__}") from err
    found[WEIGHTS] = packing.weights(state)
    card = json.loads(found[CARD]) if CARD in found else {}
    if GRAPH in found and "graph" in card:
        found[GRAPH] = _linked(found[GRAPH], found[WEIGHTS], card["graph"].pop("weights", ()))
        found[CARD] = packing.to_json(card)
    return found


def _linked(content: bytes, weights: bytes, names: list[str]) -> bytes:
    try:
        import onnx
    except ModuleNotFoundError as err:
        raise ArchiveError(
            "its graph is of an older format, and the package onnx, which brings it to today's, is not installed here; "
            "`make install` installs it, and --engine torch leaves the graph out"
        ) from err
    model = onnx.load_from_string(content)
    link(model, weights, names)
    linked: bytes = model.SerializeToString(deterministic=True)
    return linked
