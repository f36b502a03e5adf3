"""Combining: what a layer adds to the one before it.

Two measures, on trained networks and on the same networks with their first weights:

* *unexplained*: the share of a map's variance that the best single linear filter over the cells' receptive field does
  not give. A map made by one linear filter would have 0.
* *combined*: how many channels of the previous layer make half of what excites a channel's strongest cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from convscope import Client, Layer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import unfold

from experiments import service
from experiments.experiment import Figures, Result, Setting, interval, markdown, predictions, shown
from experiments.learning import INPUT, files, pixels
from handlers.images.preprocessing import normalise

CELLS = 20  # Number of cells of each picture, to fit filters and to test them.
BATCH = 50
KINDS = ("trained", "untrained")
BEFORE: dict[str, dict[str, tuple[str, str, str]]] = {
    "cifar": {"conv2": ("conv1", "conv2", "conv2")},
    "deep": {f"block{n}": (f"block{n - 1}", f"block{n}.conv", f"block{n}.relu") for n in (2, 4, 6)},
}
"""By network and layer: the layer before it, the convolution between the two, and the module that makes its map."""


def run(setting: Setting) -> Result:
    """Fit filters to the channels of `simple` and `cifar`, and take apart the strongest cells of `cifar` and `deep`."""
    chosen = [path for path, _ in files(setting.pictures, "test", setting.size(100, 2))]
    images = [pixels(path) for path in chosen]
    figures: Figures = {"pictures": len(images), "unexplained": [], "combined": []}
    with setting.client("simple", "cifar", untrained=["simple", "cifar"]) as client:
        for name in ("simple", "cifar"):
            models = dict(zip(KINDS, (name, name + service.UNTRAINED), strict=True))
            made = {kind: _unexplained(client, model, images) for kind, model in models.items()}
            for layer in made["trained"]:
                row = {kind: interval(made[kind][layer]) for kind in KINDS}
                figures["unexplained"].append({"network": name, "layer": layer, **row})
    for name, layers in BEFORE.items():
        tensors = torch.from_numpy(np.stack(images if name == "cifar" else images[:: setting.size(2, 1)]))
        known = {"trained": service.trained(setting.store, name), "untrained": service.first_weights(name)}
        for layer, (before, conv, published) in layers.items():
            found: Figures = {"network": name, "layer": layer, "before": before, "pictures": len(tensors)}
            for kind, model in known.items():
                shares = contributions(model, conv, published, tensors.permute(0, 3, 1, 2))
                found |= {kind: interval(channels_for_half(shares)), "of": shares.shape[1]}
            figures["combined"].append(found)
    return Result(figures)


def _unexplained(client: Client, model: str, images: list[NDArray[np.uint8]]) -> dict[str, NDArray[np.float64]]:
    """Return by layer, for each channel, the share of its variance that the best linear filter leaves, (C,)."""
    maps: dict[str, list[NDArray[np.float32]]] = {}
    for one in predictions(client, images, model=model, layers="all", top_k=1):
        for layer, values in one.maps.items():
            maps.setdefault(layer, []).append(values)
    return {layer: left_over(client.model_card(model).layer(layer), images, maps[layer]) for layer in maps}


def left_over(layer: Layer, images: list[NDArray[np.uint8]], maps: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Fit one linear filter to each channel on the first half of the pictures, and test it on the others.

    Args:
        layer: The layer, from the model card.
        images: Each (H, W, 3).
        maps: Each (C, h, w).

    Returns:
        (C,): the mean squared error of the filter as a share of the variance, on cells that do not reach the border.
    """
    rng = np.random.default_rng(0)
    height, width = images[0].shape[:2]
    boxes = np.stack(np.broadcast_arrays(*layer.receptive_field_box(*np.indices(maps[0].shape[1:]))))
    inside = np.argwhere((boxes[:2] >= 0).all(0) & (boxes[2] <= height) & (boxes[3] <= width))
    windows, values = [], []
    for image, each in zip(images, maps, strict=True):
        for row, column in rng.choice(inside, CELLS):
            top, left, bottom, right = layer.receptive_field_box(int(row), int(column))
            windows.append(np.append(image[top:bottom, left:right].ravel() / 255, 1))
            values.append(each[:, row, column])
    seen, wanted = np.array(windows), np.array(values, np.float64)
    half = len(images) // 2 * CELLS
    filters = np.linalg.lstsq(seen[:half], wanted[:half], rcond=1e-4)[0]
    tested = wanted[half:]
    error = np.square(tested - seen[half:] @ filters).mean(0)
    varies = tested.var(0) > 1e-9  # A channel that is always 0 has nothing to explain.
    shares: NDArray[np.float64] = error[varies] / tested.var(0)[varies]
    return shares


@torch.inference_mode()
def contributions(model: Any, conv: str, published: str, images: Tensor) -> Tensor:
    """Return what each channel of the layer before gives to the strongest cell of each channel.

    Args:
        model: The network, in evaluation mode.
        conv: Path of a padded 3×3 convolution.
        published: Path of the module whose output is the map; the same, or the ReLU behind its normalisation.
        images: (N, 3, H, W), uint8.

    Returns:
        (C, C before): weights times cells, summed over the 3×3 window of the strongest cell of all pictures; without
        the channels that are never above 0.
    """
    kept: dict[str, Tensor] = {}
    made = model.get_submodule(conv)
    hooks = [
        made.register_forward_hook(lambda _module, inputs, _output: kept.update(before=inputs[0])),
        model.get_submodule(published).register_forward_hook(lambda _module, _inputs, maps: kept.update(maps=maps)),
    ]
    weight = made.weight.flatten(2)  # (C, C before, 9)
    if published != conv:  # A normalisation between the two multiplies each channel.
        weight = weight * model.get_submodule(conv.removesuffix("conv") + "norm").weight[:, None, None]
    best, parts = torch.full((len(weight),), -torch.inf), torch.zeros(weight.shape[:2])
    try:
        for some in torch.split(images, BATCH):
            model(normalise(some, INPUT))
            largest, place = kept["maps"].transpose(0, 1).flatten(1).max(1)  # (C,), among N·h·w
            picture, cell = place // kept["maps"][0, 0].numel(), place % kept["maps"][0, 0].numel()
            windows = torch.unflatten(unfold(kept["before"], 3, padding=1)[picture, :, cell], 1, (-1, 9))
            is_larger = largest > best
            best = torch.where(is_larger, largest, best)
            parts[is_larger] = (windows * weight).sum(2)[is_larger]
    finally:
        for hook in hooks:
            hook.remove()
    return parts[best > 0]


def channels_for_half(parts: Tensor) -> NDArray[np.int64]:
    """Return how many channels, the largest first, make half of all that is positive: (C,) of (C, C before)."""
    ordered = parts.clamp(min=0).sort(1, descending=True).values.cumsum(1)
    counted: NDArray[np.int64] = ((ordered < ordered[:, -1:] / 2).sum(1) + 1).numpy()
    return counted


def table(figures: Figures) -> str:
    """Return the tables."""
    unexplained = [
        (f"`{one['network']}`, {one['layer']}", one["trained"]["n"], *(shown(one[kind]) for kind in KINDS))
        for one in figures["unexplained"]
    ]
    combined = [
        (
            f"`{one['network']}`, {one['layer']}",
            f"{one['of']} of {one['before']}",
            *(shown(one[kind], 1) for kind in KINDS),
        )
        for one in figures["combined"]
    ]
    return "\n\n".join(
        [
            markdown(("map", "channels", "not explained by one filter: trained", "untrained"), unexplained),
            markdown(("map", "made of channels", "channels for half of it: trained", "untrained"), combined),
        ]
    )
