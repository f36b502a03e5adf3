"""The reference: networks built and run with torch, torchvision and timm alone.

    python benchmarks/networks/reference.py     # reads orders, one JSON object a line; answers each with one line

It shares no code with the service, and knows nothing of archives. It writes the weights that both sides load, computes
what the library's own network answers to pictures that the library's own transform prepared, and takes maps with
forward hooks. Axes: `N` batch, `C` channels, `H, W` picture pixels, `h, w` map cells, `K` classes, `T` tokens.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Array = np.ndarray[Any, Any]
OWN = Path(__file__).with_name("own")


def build(case: Mapping[str, Any]) -> nn.Module:
    """Build a network by its library's own call, with random weights."""
    torch.manual_seed(0)
    kind, _, name = case["build"].partition(":")
    if kind == "torchvision":
        return torchvision.models.get_model(name, weights=None, **case["arguments"])
    if kind == "timm":
        return timm.create_model(name, pretrained=False, **case["arguments"])
    return getattr(importlib.import_module(kind), name)(**case["arguments"])


def prepare(case: Mapping[str, Any], folder: Path, pictures: list[str]) -> dict[str, Any]:
    """Write the weights that both sides load.

    Returns:
        `mb`, the size of the weights.
    """
    network = build(case)
    recipe = recipe_of(case, network)
    images = [recipe.normalise(recipe.pixels(picture)) for picture in pictures]
    if not case["refused"]:
        calibrate(network, [torch.cat(images)] if len({image.shape for image in images}) == 1 else images)
    weights = network.state_dict()
    if case["checkpoint"] == "lightning":
        shell = {"epoch": 3, "global_step": 42, "optimizer_states": [{"param_groups": [{"lr": 0.1}]}]}
        torch.save(shell | {"state_dict": {f"model.{name}": value for name, value in weights.items()}}, _file(folder))
    else:
        torch.save(weights, _file(folder))
    return {"mb": sum(value.nbytes for value in weights.values()) / 1e6}


def calibrate(network: nn.Module, images: Sequence[Tensor]) -> None:
    """Adjust a network with random weights so that its outputs depend on the picture.

    What is initialised to (nearly) nothing, as the last scale of a residual branch or a head, is drawn; the statistics
    of batch normalisation are those of `images`.

    Args:
        network: The network; it is left in evaluation mode.
        images: Each (1, C, H, W), float32, normalised.
    """
    for name, parameter in network.named_parameters():
        value = parameter.detach()
        if (
            "bias" in name
            or value.numel() < 2
            or float(value.max() - value.min()) > 0
            or float(value.abs().max()) > 0.01
        ):
            continue
        if value.dim() > 1 and not value.any():
            nn.init.normal_(value, std=0.02)
        else:
            nn.init.uniform_(value, 0.2, 1.0)
    network.eval()
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [part.momentum for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # The average of all passes, instead of a moving one.
        part.train()
    with torch.no_grad():
        for image in images:
            network(image)
    for part, momentum in zip(norms, momenta, strict=True):
        part.momentum = momentum
    network.eval()


@dataclass(frozen=True)
class Recipe:
    """The library's own preprocessing, in two halves, so that pixels can be compared.

    Attributes:
        pixels: From a picture's file to (C, H, W), float32 on the 0..1 scale: the library's transform, with the
            normalisation at its end undone.
        mean: Subtracted per channel; empty for none.
        std: Divided by after that.
        words: The transform, as its library writes it.
    """

    pixels: Callable[[str], Array]
    mean: Sequence[float]
    std: Sequence[float]
    words: str

    def normalise(self, pixels: Array) -> Tensor:
        """Return what the network takes, (1, C, H, W) float32, of pixels (C, H, W) on the 0..1 scale."""
        images = torch.from_numpy(np.ascontiguousarray(pixels))[None].float()
        return (images - _column(self.mean)) / _column(self.std) if self.mean else images


def recipe_of(case: Mapping[str, Any], network: nn.Module) -> Recipe:
    """Return the preprocessing that the library publishes for a network; for a network of one's own, the case's."""
    kind, _, name = case["build"].partition(":")
    if kind == "timm":
        data = timm.data.resolve_model_data_config(network)
        return _published(timm.data.create_transform(**data), data["mean"], data["std"])
    if kind == "torchvision":
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        if not case["size"]:
            return _published(preset, preset.mean, preset.std)
    words = "resized to {}×{}".format(*case["size"]) if case["size"] else "as it is"
    return Recipe(lambda path: _plain(path, case["size"], case["channels"]), case["mean"], case["std"], words)


def _published(transform: Callable[[Image.Image], Tensor], mean: Sequence[float], std: Sequence[float]) -> Recipe:
    def pixels(path: str) -> Array:
        with Image.open(path) as picture:
            return (transform(picture.convert("RGB")) * _column(std) + _column(mean)).numpy()

    return Recipe(pixels, mean, std, " ".join(repr(transform).split()))


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def _plain(path: str, size: list[int] | None, channels: int) -> Array:
    """Return a file's pixels (C, H, W), resized without keeping the aspect ratio."""
    if path.endswith(".npy"):
        image = torch.from_numpy(np.load(path)).permute(2, 0, 1)[None] / 255  # (1, C, H, W)
        if size:
            image = nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
        return image[0].numpy()
    with Image.open(path) as picture:
        picture = picture.convert("L" if channels == 1 else "RGB")
        if size:
            picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        values = np.asarray(picture, np.float32) / 255
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


class Recorder(TorchFunctionMode):
    """Keeps the tensors that wanted places of a network make, in eager mode, by forward hooks.

    A place is named as torchvision's feature extraction names its nodes: a layer of torch's by its path, an operation
    by the path of the module that calls it and its own name, `layer1.0.add`. The second one of a name has `_1` at its
    end, where a number that the name has already does not count: `ln` is the layer `ln_1`, and `ln_1` is `ln_2`. Other
    modules, which are no nodes, are found by their path.
    """

    def __init__(self, wanted: set[str]) -> None:
        super().__init__()
        self._wanted, self._calls, self._scopes = wanted, Counter[str](), [""]
        self.nodes: dict[str, Tensor] = {}
        self.modules: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            operation = re.sub(r"^_*(i|r)?(add|mul|sub)_*$", r"\2", getattr(func, "__name__", "")).strip("_")
            self._take(f"{self._scopes[-1]}.{operation}".lstrip("."), out)
        return out

    def enter(self, name: str) -> None:
        """Record that a module begins."""
        self._scopes.append(name)

    def leave(self, name: str, part: nn.Module, out: Any) -> None:
        """Keep the tensors that a module made."""
        self._scopes.pop()
        if isinstance(out, Tensor) and name in self._wanted:
            self.modules[name] = out.clone()
        if type(part).__module__.startswith("torch.nn") and not isinstance(part, nn.Sequential):
            self._take(name, out)

    def _take(self, name: str, out: Any) -> None:
        name = re.sub(r"_\d+$", "", name)
        again = self._calls[name]
        self._calls[name] += 1
        place = f"{name}_{again}" if again else name
        if place in self._wanted and isinstance(out, Tensor):
            self.nodes[place] = out.clone()


def look(network: nn.Module, images: Tensor, nodes: set[str]) -> tuple[Any, dict[str, Tensor]]:
    """Run a network and return its output and the tensors of some of its places.

    Args:
        network: The network, in evaluation mode.
        images: (1, C, H, W), float32, normalised.
        nodes: Places, named as torchvision's feature extraction does.

    Returns:
        The network's output, and the tensors by place.
    """
    recorder, handles = Recorder(nodes), []
    for name, part in network.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: recorder.enter(name)))
            handles.append(part.register_forward_hook(lambda part, _, out, name=name: recorder.leave(name, part, out)))
    try:
        with torch.no_grad(), recorder:
            return network(images), recorder.modules | recorder.nodes
    finally:
        for handle in handles:
            handle.remove()


def expect(
    case: Mapping[str, Any], folder: Path, pictures: list[str], layers: Mapping[str, str], beside: list[str], last: str
) -> dict[str, Any]:
    """Compute the expected results, and write them to `expected.npz`.

    Arrays are named `own/…` where the library's transform prepared the picture, `same/…` where the service did, whose
    pixels it wrote to `served.npz`: `pixels/<picture>`, `scores/<picture>`, `probabilities/<picture>`,
    `maps/<layer>/<picture>`, `pooled`.

    Args:
        case: The network.
        folder: Holds the weights and `served.npz`.
        pictures: Picture files.
        layers: Public name → place in the network, or `output:` and the key or index of a tensor that it returns.
        beside: Names of layers that hold the tokens beside the patches.
        last: The layer of which `pooled` is made, 2×2 cells of the first picture's map.

    Returns:
        `layouts`, how many layers have which, `transform` in words, `spread`, the largest difference of two pictures'
        scores as a share of the largest, and `rounding`.
    """
    network = build(case)
    state = torch.load(_file(folder), weights_only=True)
    if case["checkpoint"] == "lightning":
        state = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
    network.load_state_dict(state)
    network.eval()
    for part in network.modules():  # Else a hook sees what an activation after it overwrites.
        if getattr(part, "inplace", False) is True:
            part.inplace = False
    recipe = recipe_of(case, network)
    served = np.load(folder / "served.npz")
    layouts = {layer: _layout(case, place) for layer, place in layers.items()}
    nodes = {place for place in layers.values() if not place.startswith("output:")}
    arrays: dict[str, Array] = {}
    for number, path in enumerate(pictures):
        for way, pixels in (("own", recipe.pixels(path)), ("same", served[f"pixels/{number}"])):
            output, found = look(network, recipe.normalise(pixels), nodes)
            arrays[f"{way}/pixels/{number}"] = pixels
            if case["scores"] != "none":
                scores = _returned(output, case["output"])[0].reshape(-1)  # (K,)
                scores = scores.logit() if case["is_probability"] else scores
                probabilities = scores.softmax(0) if case["scores"] == "softmax" else scores.sigmoid()
                arrays[f"{way}/scores/{number}"] = scores.numpy()
                arrays[f"{way}/probabilities/{number}"] = probabilities.numpy()
            for layer, place in layers.items():
                made = found[place] if place in nodes else _returned(output, place.partition(":")[2])
                arrays[f"{way}/maps/{layer}/{number}"] = _as_map(made, layouts[layer], beside=layer in beside).numpy()
    rounding = _rounding(
        network, torch.cat([recipe.normalise(served[f"pixels/{number}"]) for number in range(len(pictures))]), nodes
    )
    for way in ("own", "same"):
        whole = torch.from_numpy(arrays[f"{way}/maps/{last}/0"])
        arrays[f"{way}/pooled"] = nn.functional.adaptive_avg_pool2d(whole, 2).numpy()
    np.savez(folder / "expected.npz", **arrays)
    answers = [array for name, array in arrays.items() if name.startswith("own/scores")]
    spread = np.ptp(np.stack(answers), 0).max() / np.abs(answers).max() if answers else None
    return {
        "layouts": Counter(layouts.values()),
        "transform": recipe.words,
        "spread": None if spread is None else float(spread),
        "rounding": rounding,
    }


def _rounding(network: nn.Module, images: Tensor, nodes: set[str]) -> float:
    """Return how far a network's float32 tensors are from the same in float64, as a share of the largest value.

    Networks with random weights may enlarge the rounding of their own arithmetic. The network is float64 afterwards.

    Args:
        network: The network, in evaluation mode, float32.
        images: (N, C, H, W), float32, normalised.
        nodes: Places to compare, beside the output if that is one tensor.
    """

    def every() -> list[dict[str, Tensor]]:
        weight = next(network.parameters())
        looked = [look(network, image[None].to(weight.dtype), nodes) for image in images]
        return [found | ({"": output} if isinstance(output, Tensor) else {}) for output, found in looked]

    single = every()
    network.double()
    try:
        double = every()
    except RuntimeError:  # A constant of float32 in its forward pass.
        return 0.0
    pairs = ((one[name], made) for one, other in zip(single, double, strict=True) for name, made in other.items())
    return max((float((one - made).abs().max() / made.abs().max()) for one, made in pairs), default=0.0)


def _returned(output: Any, key: str | None) -> Tensor:
    """Return one of the tensors that a network returns, by key or index; the only one without."""
    if key is None:
        return output
    return output[int(key)] if key.isdecimal() else output[key]


def _layout(case: Mapping[str, Any], place: str) -> str:
    for pattern, layout in case["layouts"].items():
        if fnmatch.fnmatchcase(place, pattern):
            return layout
    return "channels first"


def _as_map(found: Tensor, layout: str, *, beside: bool) -> Tensor:
    """Turn what a place makes for one picture, in the layout that the network's authors chose, into (C, h, w).

    Args:
        found: (1, C, h, w) or (1, h, w, C), (1, T, C) as `layout` says; also (1, h, w) and (1, C).
        layout: A value of the case's `layouts`, or `channels first`.
        beside: Take the tokens that stand beside the patches, as (C, n, 1).
    """
    value = found[0]
    if layout == "channels last":
        return value.permute(2, 0, 1)
    if layout != "channels first":
        count = int(layout.split()[1])  # "tokens, 1 before the patches".
        if beside:
            return value[:count].T[:, :, None]
        side = round((len(value) - count) ** 0.5)
        return value[count:].reshape(side, side, -1).permute(2, 0, 1)
    return value.reshape(-1, 1, 1) if value.dim() == 1 else value[None] if value.dim() == 2 else value


def _file(folder: Path) -> Path:
    return folder / "weights.pt"


def main() -> None:
    """Run orders until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Whatever a library prints is no answer.
    sys.path.insert(0, str(OWN))
    for line in sys.stdin:
        order = json.loads(line)
        do = {"prepare": prepare, "expect": expect}[order.pop("do")]
        try:
            answer = do(**order | {"folder": Path(order["folder"])})
        except Exception as err:  # A network that fails is a row of the table.
            traceback.print_exc()
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
