"""Edits through a real TorchServe, on both transports: what hooks do to `cifar` run by hand, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from convscope import BadRequest, Client, Edit
from PIL import Image
from torch import Tensor, nn

from tests.e2e.reference import archived
from tests.server.harness import ROOT

CAT, SHIP = (ROOT / f"samples/{name}.png" for name in ("cat", "ship"))
EDITS = [
    Edit(layer="conv1", operation="zero", channels=[3]),
    Edit(layer="conv1", operation="scale", value=-2.5, channels=[0, 5], region=(4, 0, 20, 16)),
    Edit(layer="conv2", operation="clamp", value=(-0.5, 0.5), channels={"except": [1]}),
]


def cifar() -> tuple[nn.Sequential, Any]:
    """Return the network of the archive, built here from torch's own modules, and its preprocessing."""
    weights, card = archived("cifar")
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, 16, 3, padding=1))
    network.add_module("relu1", nn.ReLU())
    network.add_module("pool1", nn.MaxPool2d(2))
    network.add_module("conv2", nn.Conv2d(16, 32, 3, padding=1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(32 * 16 * 16, 10))
    network.load_state_dict(weights)
    return network.eval(), card["preprocessing"]


def by_hooks(hooks: dict[str, Callable[[Tensor], None]]) -> dict[str, np.ndarray[Any, Any]]:
    """Run it on the cat, with functions that change what modules return; return both maps and the logits."""
    network, preprocessing = cifar()
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            seen[name] = output.clone()
            if name in hooks:
                hooks[name](seen[name])
            return seen[name]

        return change

    for name in ("relu1", "conv2", "fc"):
        network.get_submodule(name).register_forward_hook(hook(name))
    mean, std = (torch.tensor(preprocessing[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    picture = torch.from_numpy(np.array(Image.open(CAT).convert("RGB")))
    with torch.inference_mode():
        network((picture.permute(2, 0, 1)[None].float() / 255 - mean) / std)
    return {"conv1": seen["relu1"][0].numpy(), "conv2": seen["conv2"][0].numpy(), "logits": seen["fc"][0].numpy()}


def change_conv1(cells: Tensor) -> None:
    cells[:, 3] = 0
    cells[:, [0, 5], 4:20, :16] *= -2.5


def change_conv2(cells: Tensor) -> None:
    others = [channel for channel in range(32) if channel != 1]
    cells[:, others] = cells[:, others].clamp(-0.5, 0.5)


def logits(scores: Any) -> np.ndarray[Any, Any]:
    return np.array([score.logit for score in sorted(scores, key=lambda score: score.index)], np.float32)


def test_edited_scores_and_maps_are_those_of_hooks_and_change_is_the_difference(client: Client) -> None:
    edited = client.predict(CAT, model="cifar", layers="all", top_k=0, edits=EDITS, compare=True)
    assert edited.engine.startswith("torch-")
    after, before = by_hooks({"relu1": change_conv1, "conv2": change_conv2}), by_hooks({})
    tolerance = {name: 1e-5 * np.abs(values).max() for name, values in after.items()}
    assert edited.change is not None
    np.testing.assert_allclose(logits(edited.top), after["logits"], rtol=0, atol=tolerance["logits"])
    np.testing.assert_allclose(
        logits(edited.change.top), after["logits"] - before["logits"], rtol=0, atol=2 * tolerance["logits"]
    )
    for name in ("conv1", "conv2"):
        np.testing.assert_allclose(edited.maps[name], after[name], rtol=0, atol=tolerance[name])
        change = after[name] - before[name]
        np.testing.assert_allclose(edited.change.maps[name], change, rtol=0, atol=2 * tolerance[name])
    assert np.abs(after["logits"] - before["logits"]).max() > 1  # The edits do something.


def test_both_transports_answer_alike_and_a_patch_is_taken_from_the_unedited_run(rest: Client, grpc: Client) -> None:
    patch = Edit(layer="conv1", operation="patch", value=1, picture=0)
    found = [
        client.predict([CAT, SHIP], model="cifar", top_k=0, edits=[patch, *EDITS[2:]], compare=True)
        for client in (rest, grpc)
    ]
    assert found[0] == found[1]
    cat, ship = found[0]
    assert np.array_equal(logits(cat.top), logits(ship.top))  # Of the cat nothing is left behind conv1.
    assert cat.change != ship.change


def test_what_does_not_fit_is_rejected(client: Client) -> None:
    with pytest.raises(BadRequest, match=r"edits\[0\]: layer conv1 has channels 0 to 15, not 16"):
        client.predict(CAT, model="cifar", edits=[Edit(layer="conv1", operation="zero", channels=[16])])
