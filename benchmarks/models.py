"""The networks that are measured: made ready in a folder, for our service, for the rivals and for checking replies.

No weights can be downloaded here. The networks get random ones from a fixed seed, and their batch normalisation one
scale a layer, so that the values of a map are about 1, as in a trained network: without it those of EfficientNet-B0
would be 1e-13. The time of a forward pass does not depend on what else the weights are.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.load import ROOT
from benchmarks.photographs import SIZES, photographs
from benchmarks.rivals.network import CIFAR, Arrays, Plain, convert
from benchmarks.workloads import Asked

PYTHON = str(ROOT / ".venv/bin/python") if (ROOT / ".venv").exists() else sys.executable  # Has torchserve, no rivals.

_ARRAYS = {"float32": ("<f4",), "float16": ("<f2",), "pool": ("<f4",), "uint8": ("u1", "<f4", "<f4"), "scores": ()}


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        constructor: `module:callable`. torchvision's are served with the recipe that torchvision publishes.
        layers: Public name and graph node of the maps that are requested.
        archiver: Options of the archiver, beside those for layers, weights and name.
        wants: The kinds of output requested.
    """

    constructor: str
    layers: Mapping[str, str]
    archiver: tuple[str, ...]
    wants: tuple[str, ...] = ("scores", "pool", "float16")


def _torchvision(name: str, **layers: str) -> Network:
    return Network(f"torchvision.models:{name}", layers, ("--torchvision", name))


NETWORKS = {
    "resnet50": _torchvision("resnet50", layer3="layer3.5.relu_2", layer4="layer4.2.relu_2"),
    "resnet18": _torchvision("resnet18", layer3="layer3.1.relu_1", layer4="layer4.1.relu_1"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small", stage8="features.8.add", last="features.12"),
    "efficientnet_b0": _torchvision("efficientnet_b0", stage5="features.5.2.add", last="features.8"),
    "cifar": Network(
        "handlers.networks:Cifar",
        {"conv1": "relu1", "conv2": "conv2"},
        (
            *("--arch", "handlers.networks:Cifar", "--size", "32x32"),
            *("--mean", ",".join(map(str, CIFAR[0])), "--std", ",".join(map(str, CIFAR[1]))),
        ),
        ("scores", "float32", "float16", "uint8", "pool"),
    ),
}


@dataclass(frozen=True)
class Model:
    """A network made ready.

    Attributes:
        name: Name of the archive, a key of `NETWORKS`.
        folder: The description that `rivals.network` reads, the weights, and the graphs for `Tuned`.
        archive: The `.mar`.
        pictures: By size, the files to ask with; the first one in requests of a single picture.
        classes: Number of classes.
        layers: Name and shape (C, h, w) of each map.
    """

    name: str
    folder: Path
    archive: Path
    pictures: Mapping[str, tuple[bytes, ...]]
    classes: int
    layers: Mapping[str, tuple[int, ...]]

    def files(self, asked: Asked) -> list[bytes]:
        """Return the pictures of a request."""
        files = self.pictures[asked.photograph]
        return [files[index % len(files)] for index in range(asked.pictures)]

    def read(self, body: bytes, asked: Asked) -> list[Any]:
        """Read a rival's binary reply: the probabilities, then the values of each map, as float32."""
        at, found = 0, []

        def take(kind: str, shape: tuple[int, ...]) -> Any:
            nonlocal at
            array = np.frombuffer(body, kind, asked.pictures * int(np.prod(shape)), at)
            at += array.nbytes
            return array.reshape(asked.pictures, *shape).astype(np.float32, copy=False)

        found.append(take("<f4", (self.classes,)))
        for shape in self.layers.values() if asked.want != "scores" else ():
            cells = take(_ARRAYS[asked.want][0], shape[:1] if asked.want == "pool" else shape)
            if asked.want == "uint8":
                scale, offset = (take("<f4", shape[:1])[:, :, None, None] for _ in range(2))
                cells = cells * scale + offset
            found.append(cells)
        assert at == len(body), f"{len(body)} bytes, {at} expected"
        return found


def prepare(name: str, work: Path) -> Model:
    """Make the pictures, the weights, the archive and the graphs.

    Args:
        name: A key of `NETWORKS`.
        work: Folder for the files; existing files that are up to date are kept.
    """
    network, folder = NETWORKS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if name == "cifar":
        samples = ("cat", "airplane", "frog", "horse", "ship", "truck")
        pictures = {"": tuple((ROOT / f"samples/{sample}.png").read_bytes() for sample in samples)}
    else:
        pictures = {size: photographs(size, work / "photographs") for size in SIZES}
    described = {"constructor": network.constructor, "layers": dict(network.layers)}
    if (folder / "network.json").exists() and json.loads((folder / "network.json").read_text()) != described:
        (folder / "weights.pt").unlink(missing_ok=True)
    (folder / "network.json").write_text(json.dumps(described))
    if not (folder / "weights.pt").exists():
        _initialise(folder, next(iter(pictures.values())))
    plain = _plain(folder)
    arrays = plain.answer(next(iter(pictures.values()))[:1], "float32")
    shapes = {layer: tuple(values.shape[1:]) for layer, values in zip(network.layers, arrays[1:], strict=True)}
    for want in network.wants:
        _export(plain, want, folder)
    model = Model(name, folder, folder / f"store/{name}.mar", pictures, arrays[0].shape[1], shapes)
    archive(model, ROOT, model.archive.parent)
    return model


def archive(model: Model, checkout: Path, store: Path) -> None:
    """Archive a network with a checkout's archiver, unless the archive there is newer than what it is made of."""
    path, network = store / f"{model.name}.mar", NETWORKS[model.name]
    sources = [file for room in ("archiver", "handlers") for file in (checkout / room).rglob("*.py")]
    sources.append(model.folder / "weights.pt")
    if path.exists() and path.stat().st_mtime > max(file.stat().st_mtime for file in sources):
        return
    store.mkdir(parents=True, exist_ok=True)
    classes = model.folder / "classes.txt"
    classes.write_text("\n".join(f"class {index}" for index in range(model.classes)))
    command = [PYTHON, "-m", "archiver", "--quiet", "--name", model.name, *network.archiver]
    command += ["--layers", ",".join(f"{layer}={node}" for layer, node in network.layers.items())]
    command += ["--state-dict", str(model.folder / "weights.pt"), "--classes", str(classes), "--store", str(store)]
    subprocess.run(command, cwd=checkout, check=True)


def _initialise(folder: Path, files: Sequence[bytes]) -> None:
    """Write random weights. Batch normalisation divides by the root mean square of what the files bring to it."""

    def scale(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.running_var.fill_(inputs[0].square().mean())  # type: ignore[operator]

    torch.manual_seed(0)
    plain = Plain(folder, weights=False)
    layers = [module for module in plain.module.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(scale) for layer in layers]
    with torch.no_grad():
        plain.module(torch.stack([plain.decode(file) for file in files]))
    for hook in hooks:
        hook.remove()
    torch.save(plain.module.state_dict(), folder / "weights.pt")


_plain = functools.cache(Plain)


@functools.cache
def _expect(folder: Path, want: str, files: tuple[bytes, ...], levels: int) -> Arrays:
    plain = _plain(folder)
    images = torch.stack([plain.decode(file) for file in files])
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return plain.forward(images + levels * signs / 255 / torch.tensor(plain.std).view(-1, 1, 1), want)


def expect(model: Model, asked: Asked, levels: int = 0) -> Arrays:
    """Return eager torch's results: probabilities and float32 maps (pooled ones for `pool`).

    Args:
        model: The network.
        asked: The request.
        levels: By how many of 255 to move each value of the network's input, up or down at random.
    """
    files = model.pictures[asked.photograph][: asked.pictures]
    arrays = _expect(model.folder, asked.want if asked.want in ("scores", "pool") else "float32", files, levels)
    return [np.take(array, range(asked.pictures), 0, mode="wrap") for array in arrays]


def check(found: Sequence[Any], model: Model, asked: Asked, *, scaled: bool = False) -> None:
    """Compare a reply's values with eager torch's.

    Decoding at a reduced scale moves the pixels of our photographs by a fifth of a level in the mean, two levels at
    most (3 MP, resized to 232 and 256). The reply may then be off by what becomes of it if every value of the network's
    input is off by two levels: as root mean squares, since single cells of a map can be off by more.

    Args:
        found: The probabilities, then each map.
        model: The network.
        asked: The request.
        scaled: The server decodes files at a reduced scale.

    Raises:
        AssertionError: They differ by more than that, or by more than the dtype of the maps explains.
    """
    expected = expect(model, asked)
    moved = expect(model, asked, 2) if scaled and asked.photograph else expected
    assert len(found) == len(expected), f"{len(found)} arrays instead of {len(expected)}"
    for one, other, beside in zip(found, expected, moved, strict=True):
        assert one.shape == other.shape, f"{one.shape} instead of {other.shape}"
        if moved is not expected:
            off, allowed = (np.sqrt(np.mean((array - other) ** 2)) for array in (one, beside))
            assert off <= allowed, f"off by {off} in the root mean square, {allowed} allowed"
            continue
        step = (other.max() - other.min()) / 255 if asked.want == "uint8" and other.ndim == 4 else 0
        rounded = 1e-3 * np.abs(other) * (asked.want == "float16")
        assert (np.abs(one - other) <= 1e-4 * np.abs(other).max() + rounded + 0.51 * step).all(), (
            f"off by {np.abs(one - other).max()}"
        )


class _Whole(nn.Module):
    """Pictures (N, H, W, C) uint8 to everything a reply holds, as one graph."""

    def __init__(self, plain: Plain, want: str) -> None:
        super().__init__()
        self.extractor, self.want = plain.extractor, want
        self.nodes, self.output = plain.nodes, plain.output
        self.mean, self.std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (plain.mean, plain.std))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run."""
        outputs = self.extractor((images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)
        found = [torch.softmax(outputs[self.output], 1)]
        for node in self.nodes if self.want != "scores" else ():
            found += convert(outputs[node], self.want)
        return tuple(found)


def _export(plain: Plain, want: str, folder: Path) -> None:
    path = folder / f"{want}.onnx"
    if path.exists() and path.stat().st_mtime > (folder / "weights.pt").stat().st_mtime:
        return
    program = torch.onnx.export(
        _Whole(plain, want).eval(),
        (torch.zeros(2, plain.size, plain.size, 3, dtype=torch.uint8),),
        input_names=["images"],
        dynamic_shapes={"images": {0: torch.export.Dim("n", min=1, max=256)}},
        verbose=False,
    )
    assert program is not None
    program.save(path)


def write_archive(path: Path, name: str, members: dict[str, bytes], more: dict[str, str] | None = None) -> None:
    """Write a TorchServe archive whose handler is `handler.py`."""
    described = {"modelName": name, "modelVersion": "1.0", "handler": "handler.py", **(more or {})}
    manifest = {"runtime": "python", "model": described, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for member, content in members.items():
            file.writestr(member, content)
