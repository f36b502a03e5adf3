"""The network that every rival serves: `Plain`, as tutorials write it, and `Tuned`, as far as we know how to.

Both take the files of pictures and give arrays with the pictures as their first axis: the probabilities, then each
layer's map, and behind a uint8 map its scale and offset. A binary reply is the cells of all arrays, one after another.
The folder in the environment variable BENCH_MODEL holds an unpacked archive and the graphs that `benchmarks.models`
exported. Axes: `N` batch, `C, H, W` channels, height and width.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = list[Array]

FOLDER = Path(os.environ.get("BENCH_MODEL", ""))
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
    """Write arrays as a binary reply."""
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


class Plain:
    """Pillow, eager torch on one thread, and torchvision's feature extractor."""

    def __init__(self, folder: Path = FOLDER) -> None:
        import torch
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        from handlers.network import archive as archives

        torch.set_num_threads(1)
        archive = archives.load(folder)
        self.layers = list(archive.layers)
        self.classes = archive.classes
        self.output = get_graph_node_names(archive.module)[1][-1]
        nodes = [*archive.layers.values(), self.output]
        self.nodes = list(archive.layers.values())
        self._module = archive.module
        self.extractor = create_feature_extractor(archive.module, return_nodes=sorted(set(nodes))).eval()
        self._input = archive.preprocessing

    def decode(self, file: bytes | bytearray) -> Any:
        """Return a picture as a normalised tensor (C, H, W), float32."""
        import torch
        from PIL import Image

        image = Image.open(io.BytesIO(file)).convert("L" if self._input.channels == 1 else "RGB")
        if self._input.size and image.size != self._input.size[::-1]:
            image = image.resize(self._input.size[::-1])
        values = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).float() / 255
        if self._input.mean:
            mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self._input.mean, self._input.std))
            values = (values - mean) / std
        return values

    def forward(self, images: Sequence[Any], want: str) -> Arrays:
        """Run tensors (C, H, W) of one size as a batch."""
        import torch

        with torch.inference_mode():
            batch = torch.stack(list(images))
            if want == "scores":
                return [torch.softmax(self._module(batch), 1).numpy()]
            outputs = self.extractor(batch)
            arrays = [torch.softmax(outputs[self.output], 1)]
            for node in self.nodes:
                arrays += convert(outputs[node], want)
        return [array.numpy() for array in arrays]

    def answer(self, files: Sequence[bytes | bytearray], want: str) -> Arrays:
        """Go all the way from files to arrays."""
        return self.forward([self.decode(file) for file in files], want)

    def lists(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """Run tensors, and answer nested lists ready for JSON, one dict a picture."""
        scores, *maps = self.forward(images, "float32")
        return [
            {
                "scores": dict(zip(self.classes, scores[index].tolist(), strict=True)),
                "maps": {name: values[index].tolist() for name, values in zip(self.layers, maps, strict=True)},
            }
            for index in range(len(scores))
        ]


class Tuned:
    """OpenCV's decoder and ONNX Runtime on one thread; normalisation and conversion are part of the graph."""

    def __init__(self, folder: Path = FOLDER) -> None:
        import cv2
        import onnxruntime

        cv2.setNumThreads(1)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        self._sessions = {
            want: onnxruntime.InferenceSession(folder / f"{want}.onnx", settings, ["CPUExecutionProvider"])
            for want in WANTS
        }
        _, *size, channels = self._sessions["scores"].get_inputs()[0].shape
        self._size = tuple(size)
        self._read = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
        self._channels = channels
        self._cv2 = cv2

    def decode(self, file: bytes | bytearray) -> Array:
        """Return a picture (H, W, C), uint8."""
        image = self._cv2.imdecode(np.frombuffer(file, np.uint8), self._read)
        assert image is not None
        if image.shape[:2] != self._size:
            image = self._cv2.resize(image, self._size[::-1], interpolation=self._cv2.INTER_AREA)
        return image.reshape(*self._size, self._channels)

    def forward(self, images: Sequence[Array], want: str) -> Arrays:
        """Run pictures (H, W, C) of one size as a batch."""
        batch = images[0][None] if len(images) == 1 else np.stack(images)
        found: Arrays = self._sessions[want].run(None, {"images": batch})
        return found

    def answer(self, files: Sequence[bytes | bytearray], want: str) -> Arrays:
        """Go all the way from files to arrays."""
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
