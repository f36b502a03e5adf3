"""Every stage of the documents' networks: the shapes on a picture's way, and `simple`'s maps as drawn there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import service
from experiments.experiment import Figures, Result, Setting, grid, markdown
from experiments.learning import SAMPLES, pixels

PICTURES = {"digits": "digit-7.png", "simple": "cat.png", "cifar": "cat.png"}
STATED = {
    "digits": ["16×26×26", "16×13×13", "2704", "10"],
    "simple": ["6×32×32", "6×32×32", "6×16×16", "12×16×16", "12×16×16", "12×8×8", "768", "120", "120", "10"],
    "cifar": ["16×32×32", "16×32×32", "16×16×16", "32×16×16", "8192", "10"],
}
"""By network: what the documents state after each stage."""


def run(setting: Setting) -> Result:
    """Send a sample through each network, stage by stage."""
    figures: Figures = {}
    for name, sample in PICTURES.items():
        model = service.trained(setting.store, name)
        read = pixels(SAMPLES / sample)
        channels = 1 if name == "digits" else 3
        image = torch.from_numpy(read[:, :, :channels].copy()).permute(2, 0, 1)[None].float() / 255
        figures[name] = {"input": _size(image), "stages": _stages(model, image), "stated": STATED[name]}
    cat = pixels(SAMPLES / PICTURES["simple"])
    with setting.client("simple", untrained=["simple"]) as client:
        seen = {model: client.predict(cat, model=model, layers="all").maps for model in ("simple", "simple-untrained")}
    return Result(figures, _drawn(cat, seen))


def _stages(model: torch.nn.Module, image: Tensor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def note(name: str, module: torch.nn.Module, output: Tensor) -> None:
        parameters = sum(weights.numel() for weights in module.parameters())
        found.append({"stage": name, "kind": type(module).__name__, "shape": _size(output), "parameters": parameters})

    hooks = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: note(name, module, output))
        for name, module in model.named_children()
    ]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def _size(tensor: Tensor) -> str:
    return "×".join(str(length) for length in tensor.shape[1:])


def table(figures: Figures) -> str:
    """Return the table."""
    rows = []
    for name, found in figures.items():
        rows.append((f"`{name}`", "picture", "", found["input"], "", ""))
        for one, stated in zip(found["stages"], found["stated"], strict=True):
            held = "yes" if one["shape"] == stated else "no"
            rows.append((f"`{name}`", one["stage"], one["kind"], one["shape"], f"{one['parameters']:,}", held))
    return markdown(("network", "stage", "operation", "shape after it", "parameters", "as the document says"), rows)


def _drawn(image: np.ndarray, seen: dict[str, Any]) -> Figure:
    picture, tiles = grid(2 * len(seen), 13)
    for pair, (name, maps) in enumerate(seen.items()):
        for row, layer in enumerate(("conv1", "conv2")):
            line = tiles[2 * pair + row]
            line[0].imshow(image)
            line[0].set_ylabel(("untrained\n" if name.endswith("untrained") else "") + layer, fontsize=7)
            for place, one in enumerate(maps[layer]):
                line[place + 1].imshow(one, cmap="gray")
    return picture
