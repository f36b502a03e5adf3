"""The networks that are measured: made ready in a folder, for our service, for the rivals and for checking replies."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.load import ROOT
from benchmarks.rivals.network import WANTS, Arrays, Plain, convert
from handlers.network import archive as archives

SAMPLES = {
    "cifar": ("cat", "airplane", "frog", "horse", "ship", "truck"),
    "digits": ("digit-3", "digit-7"),
    "resnet18": ("cat", "airplane", "frog", "horse", "ship", "truck"),
}
_ARRAYS = {"float32": ("<f4",), "float16": ("<f2",), "pool": ("<f4",), "uint8": ("u1", "<f4", "<f4"), "scores": ()}


@dataclass(frozen=True)
class Model:
    """A network made ready.

    Attributes:
        name: Of its archive.
        folder: The unpacked archive, and the graphs for `rivals.network.Tuned`.
        archive: The `.mar`.
        pictures: Files to ask with, the first one in requests of a single picture.
        classes: How many.
        layers: Name and shape (C, h, w) of each map.
    """

    name: str
    folder: Path
    archive: Path
    pictures: tuple[bytes, ...]
    classes: int
    layers: dict[str, tuple[int, ...]]

    def files(self, count: int) -> list[bytes]:
        """Return `count` pictures."""
        return [self.pictures[index % len(self.pictures)] for index in range(count)]

    def read(self, body: bytes, want: str, count: int) -> list[Any]:
        """Read a rival's binary reply: the probabilities, then the values of each map, as float32."""
        at, found = 0, []

        def take(kind: str, shape: tuple[int, ...]) -> Any:
            nonlocal at
            array = np.frombuffer(body, kind, count * int(np.prod(shape)), at).reshape(count, *shape)
            at += array.nbytes
            return array.astype(np.float32, copy=False)

        found.append(take("<f4", (self.classes,)))
        for shape in self.layers.values() if want != "scores" else ():
            cells = take(_ARRAYS[want][0], shape[:1] if want == "pool" else shape)
            if want == "uint8":
                scale, offset = (take("<f4", shape[:1])[:, :, None, None] for _ in range(2))
                cells = cells * scale + offset
            found.append(cells)
        assert at == len(body), f"{len(body)} bytes, {at} expected"
        return found


def prepare(name: str, work: Path) -> Model:
    """Unpack or build the archive, export the graphs, choose the pictures.

    Args:
        name: A key of `SAMPLES`.
        work: Folder for what is made.
    """
    store = work / "store" if name == "resnet18" else ROOT / "model_store"
    archive, folder = store / f"{name}.mar", work / name
    if name == "resnet18" and not archive.exists():
        _build_resnet(store)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    loaded = archives.load(folder)
    plain = _plain(folder)
    pictures = tuple(picture(name, sample) for sample in SAMPLES[name])
    _export(loaded, plain, archive, folder)
    arrays = plain.answer(pictures[:1], "float32")
    shapes = {layer: tuple(values.shape[1:]) for layer, values in zip(plain.layers, arrays[1:], strict=True)}
    return Model(name, folder, archive, pictures, len(loaded.classes), shapes)


_plain = functools.cache(Plain)


def expect(model: Model, want: str, count: int) -> Arrays:
    """Return what eager torch answers: probabilities and float32 maps (pooled ones for `pool`)."""
    return _plain(model.folder).answer(model.files(count), want if want in ("scores", "pool") else "float32")


def check(found: Sequence[Any], expected: Arrays, want: str) -> None:
    """Compare a reply's values with eager torch's.

    Raises:
        AssertionError: They differ by more than their dtype explains.
    """
    assert len(found) == len(expected), f"{len(found)} arrays instead of {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape, f"{one.shape} instead of {other.shape}"
        step = (other.max() - other.min()) / 255 if want == "uint8" and other.ndim == 4 else 0
        allowed = 1e-4 + 1e-3 * np.abs(other) * (want == "float16") + 0.51 * step
        assert (np.abs(one - other) <= allowed).all(), f"off by {np.abs(one - other).max()}"


class _Whole(nn.Module):
    """Pictures (N, H, W, C) uint8 to everything a reply holds, as one graph."""

    def __init__(self, loaded: Any, plain: Plain, want: str) -> None:
        super().__init__()
        self.extractor, self.want = plain.extractor, want
        self.nodes, self.output = plain.nodes, plain.output
        shape = (1, loaded.preprocessing.channels, 1, 1)
        self.mean = torch.tensor(loaded.preprocessing.mean or [0.0]).view(-1, 1, 1).expand(shape)
        self.std = torch.tensor(loaded.preprocessing.std or [1.0]).view(-1, 1, 1).expand(shape)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run."""
        outputs = self.extractor((images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)
        found = [torch.softmax(outputs[self.output], 1)]
        for node in self.nodes if self.want != "scores" else ():
            found += convert(outputs[node], self.want)
        return tuple(found)


def _export(loaded: Any, plain: Plain, archive: Path, folder: Path) -> None:
    height, width = loaded.preprocessing.size
    example = torch.zeros(2, height, width, loaded.preprocessing.channels, dtype=torch.uint8)
    for want in WANTS:
        path = folder / f"{want}.onnx"
        if not path.exists() or path.stat().st_mtime < archive.stat().st_mtime:
            program = torch.onnx.export(
                _Whole(loaded, plain, want).eval(),
                (example,),
                input_names=["images"],
                dynamic_shapes={"images": {0: torch.export.Dim("n", min=1, max=256)}},
                verbose=False,
            )
            assert program is not None
            program.save(path)


def picture(model: str, sample: str) -> bytes:
    """Return the file of a sample: its PNG, or for resnet18 a JPEG of 224×224 made of it."""
    data = (ROOT / "samples" / f"{sample}.png").read_bytes()
    if model != "resnet18":
        return data
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def _build_resnet(store: Path) -> None:
    store.mkdir(parents=True, exist_ok=True)
    labels = store / "classes.txt"
    labels.write_text("\n".join(f"class {index}" for index in range(1000)))
    command = [
        sys.executable,
        "-m",
        "archiver",
        "--arch",
        "torchvision.models:resnet18",
        "--random-weights",
        "0",
    ]
    command += ["--name", "resnet18", "--classes", str(labels), "--size", "224x224", "--store", str(store)]
    command += ["--layers", "layer3=layer3.1.relu_1,layer4=layer4.1.relu_1"]
    command += ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--preprocessing", "squash"]
    subprocess.run(command, cwd=ROOT, check=True)


def null_archive(model: Model, store: Path) -> None:
    """Put the null handler into an archive of the model's name with the model's own TorchServe settings."""
    store.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(model.archive) as file:
        members = {"model-config.yaml": file.read("model-config.yaml")}
    members["handler.py"] = (ROOT / "benchmarks/rivals/torchserve_null.py").read_bytes()
    write_archive(store / f"{model.name}.mar", model.name, members, {"configFile": "model-config.yaml"})


def write_archive(path: Path, name: str, members: dict[str, bytes], more: dict[str, str] | None = None) -> None:
    """Write a TorchServe archive whose handler is `handler.py`."""
    described = {"modelName": name, "modelVersion": "1.0", "handler": "handler.py", **(more or {})}
    manifest = {"runtime": "python", "model": described, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for member, content in members.items():
            file.writestr(member, content)
