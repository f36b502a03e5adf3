"""`cifar` run by hand from its archive: the independent computation that served maps are held to."""

from __future__ import annotations

import json
import zipfile
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch.nn import functional

from tests.e2e.conftest import STORE


def archived(model: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights and card out of a committed archive, without any code of ours."""
    with zipfile.ZipFile(STORE / f"{model}.mar") as archive:
        weights = load(archive.read("weights.safetensors"))
        return weights, json.loads(archive.read("card.json"))


def by_hand(picture: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Run `cifar` operation by operation on a picture (32, 32, 3) uint8."""
    weights, card = archived("cifar")
    mean, std = (torch.tensor(card["preprocessing"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255 - mean) / std
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        conv1 = functional.conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=1).relu()
        conv2 = functional.conv2d(
            functional.max_pool2d(conv1, 2), weights["conv2.weight"], weights["conv2.bias"], padding=1
        )
        logits = functional.linear(conv2.flatten(1), weights["fc.weight"], weights["fc.bias"])
    finally:
        torch.set_num_threads(threads)
    return {"conv1": conv1[0].numpy(), "conv2": conv2[0].numpy(), "logits": logits[0].numpy()}
