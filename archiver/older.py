"""Older archives, brought to today's format; everything that is known of former formats is in this file.

An archive's weights were once `weights.pt`, a state dict that `torch.save` wrote, and its graph's initializers named no
place in that file: the handlers gave ONNX Runtime the values.
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
    """Return the files of an archive as today's format has them; no code is run that the weights may hold.

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
