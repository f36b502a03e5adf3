"""The network that every rival serves: `Plain`, as tutorials write it, and `Tuned`, as far as we know how to.

Both take the files of pictures and give arrays with the pictures as their first axis: the probabilities, then each
layer's map, and behind a uint8 map its scale and offset. A binary reply is the cells of all arrays, one after another.
The folder in the environment variable BENCH_MODEL holds what `benchmarks.models` made: `network.json`, `weights.pt` and
the graphs. Threads are torch's own choice, which OMP_NUM_THREADS limits. Axes: `N` batch, `C, H, W` channels, height
and width.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Arrays = list[Array]

FOLDER = Path(os.environ.get("BENCH_MODEL", ""))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
WANTS = ("scores", "float32", "float16", "uint8", "pool")  # What a binary reply holds besides the probabilities.


def pack(want: str, files: Sequence[bytes]) -> bytes:
    """Build the body of a binary request: what is wanted, then each picture behind its length."""
    return bytes((WANTS.index(want),)) + b"".join(struct.pack("<I", len(file)) + file for file in files)


def unpack(body: bytes | bytearray) -> tuple[str, list[bytes | bytearray]]:
    """Read what `pack` wrote."""
    files, at = [], 1
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        files.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return WANTS[body[0]], files


def encode(arrays: Sequence[Array]) -> bytes:
    """Encode arrays as a binary reply."""
    return b"".join(array.tobytes() for array in arrays)


def run_batch(network: Plain | Tuned, asked: Sequence[tuple[str, Any]]) -> list[Arrays]:
    """Run requests of one decoded picture each, those that want the same together; return each one's arrays."""
    answers: list[Arrays] = [[] for _ in asked]
    for want in {want for want, _ in asked}:
        places = [place for place, (wanted, _) in enumerate(asked) if wanted == want]
        arrays = network.forward([asked[place][1] for place in places], want)
        for index, place in enumerate(places):
            answers[place] = [array[index : index + 1] for array in arrays]
    return answers


def recipe(constructor: str) -> Any:
    """Return the transforms that torchvision publishes for a network of its own, else None."""
    from torchvision.models import get_model_weights

    module, _, name = constructor.partition(":")
    return get_model_weights(name).DEFAULT.transforms() if module == "torchvision.models" else None


class Plain:
    """Pillow, torchvision's transforms, eager torch, and torchvision's feature extractor."""

    def __init__(self, folder: Path = FOLDER, *, weights: bool = True) -> None:
        import torch
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
        from torchvision.transforms.functional import normalize, to_tensor

        described = json.loads((folder / "network.json").read_text())
        module, _, name = described["constructor"].partition(":")
        self.module = getattr(importlib.import_module(module), name)()
        if weights:
            self.module.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        self.module.eval()
        self.layers = list(described["layers"])
        self.nodes = list(described["layers"].values())
        self.output = get_graph_node_names(self.module)[1][-1]
        self.extractor = create_feature_extractor(self.module, sorted({*self.nodes, self.output})).eval()
        preset = recipe(described["constructor"])
        self.mean, self.std = (preset.mean, preset.std) if preset else CIFAR
        self.size = preset.crop_size[0] if preset else 32
        self._transforms = preset or (lambda image: normalize(to_tensor(image), self.mean, self.std))

    def decode(self, file: bytes | bytearray) -> Any:
        """Return a picture as a normalised tensor (C, H, W), float32."""
        return self._transforms(Image.open(io.BytesIO(file)).convert("RGB"))

    def forward(self, images: Sequence[Any], want: str) -> Arrays:
        """Run tensors (C, H, W) of one size as a batch."""
        import torch

        with torch.inference_mode():
            batch = torch.stack(list(images))
            if want == "scores":
                return [torch.softmax(self.module(batch), 1).numpy()]
            outputs = self.extractor(batch)
            arrays = [torch.softmax(outputs[self.output], 1)]
            for node in self.nodes:
                arrays += convert(outputs[node], want)
        return [array.numpy() for array in arrays]

    def answer(self, files: Sequence[bytes | bytearray], want: str) -> Arrays:
        """Return the arrays for picture files."""
        return self.forward([self.decode(file) for file in files], want)


CIFAR = ([0.4913, 0.4821, 0.4465], [0.2452, 0.2428, 0.2606])  # Mean and standard deviation.


class Tuned:
    """A JPEG decoded at a reduced scale, and ONNX Runtime on one thread with normalisation and conversion in its graph.

    libjpeg scales a photograph down while it decodes, to no less than twice the size it is resized to. What needs no
    resizing is decoded by OpenCV.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        import cv2
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        self._sessions = {
            path.stem: onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }
        self._recipe = recipe(json.loads((folder / "network.json").read_text())["constructor"])
        self._cv2 = cv2

    def decode(self, file: bytes | bytearray) -> Array:
        """Return a picture (H, W, C), uint8."""
        from torchvision.transforms.functional import center_crop, resize

        if self._recipe is None:
            image = self._cv2.imdecode(np.frombuffer(file, np.uint8), self._cv2.IMREAD_COLOR_RGB)
            assert image is not None
            return image
        photograph, side = Image.open(io.BytesIO(file)), self._recipe.resize_size[0]
        photograph.draft("RGB", (2 * side, 2 * side))
        small = resize(photograph, [side], self._recipe.interpolation)
        return np.asarray(center_crop(small, self._recipe.crop_size))

    def forward(self, images: Sequence[Array], want: str) -> Arrays:
        """Run pictures (H, W, C) of one size as a batch."""
        batch = images[0][None] if len(images) == 1 else np.stack(images)
        found: Arrays = self._sessions[want].run(None, {"images": batch})
        return found

    def answer(self, files: Sequence[bytes | bytearray], want: str) -> Arrays:
        """Return the arrays for picture files."""
        return self.forward([self.decode(file) for file in files], want)


def convert(values: Any, want: str) -> list[Any]:
    """Bring a batch of maps (N, C, h, w) to what is wanted; also traced into the graphs of `Tuned`."""
    import torch

    if want == "float16":
        return [values.half()]
    if want == "pool":
        return [values.mean((2, 3))]
    if want == "uint8":
        offset = values.amin((2, 3), keepdim=True)
        scale = (values.amax((2, 3), keepdim=True) - offset) / 255
        cells = torch.round((values - offset) / scale.clamp(min=1e-12)).to(torch.uint8)
        return [cells, scale[:, :, 0, 0], offset[:, :, 0, 0]]
    return [values]
