"""A service that needs no network: what it answers is made up, and known to the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from convscope import (
    ClassScore,
    Explanation,
    Input,
    Layer,
    Limits,
    ModelCard,
    Prediction,
    RequestRejected,
    Source,
    Timing,
)
from convscope.pixels import encode_png

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">&amp;{{data}}"
SIDE = 32
TIMING = Timing(0.001, 0.002, 0.003, 0.004, 0.005, 0.016, 2, 0.02)


def make_picture() -> bytes:
    """Return a small grey PNG."""
    return encode_png(np.arange(SIDE * SIDE, dtype=np.uint32).reshape(SIDE, SIDE).astype(np.uint8))


def make_layer(name: str, shape: tuple[int, ...], **known: Any) -> Layer:
    """Return a layer of padded 3×3 cells, one pixel apart."""
    values = {"stride": (1, 1), "receptive_field": (3, 3), "receptive_field_start": (-1, -1), "parameters": 448} | known
    return Layer(name=name, module=name, shape=shape, bytes={"float32": 4}, **values)


CARD = ModelCard(
    model="net",
    version="1.0",
    description="A network.",
    architecture="somewhere:Net",
    engine="torch-2",
    device="cpu",
    classes=("cat", "dog"),
    input=Input(channels=3, height=SIDE, width=SIDE, mean=(), std=()),
    layers=(
        make_layer("conv1", (12, SIDE, SIDE), sources=(Source("", 1, 1),)),
        make_layer(
            "conv2",
            (4, 6, 6),
            stride=(4, 4),
            receptive_field=(8, 8),
            receptive_field_start=(-3, -3),
            sources=(Source("conv1", 0, 2),),
        ),
        make_layer(
            "head",
            (2,),
            stride=None,
            receptive_field=None,
            receptive_field_start=None,
            sources=(Source("conv2", 1, 1),),
        ),
    ),
    parameters=12345,
    training=None,
    limits=Limits(max_images=8, max_image_bytes=1 << 20, max_image_pixels=1 << 20, max_reply_bytes=1 << 20),
    sources=(Source("head", 0, 0),),
)


@dataclass
class Service:
    """Answers as a `Client` does.

    Attributes:
        card: Of its one model.
        top: Its scores.
        explains: The methods that it knows.
        asked: The options of the questions for maps.
        notes: How it converts every picture.
        place: (H, W) of the picture that was sent, and the region of it that the network saw.
    """

    card: ModelCard = CARD
    top: tuple[ClassScore, ...] = (ClassScore(0, "cat", 0.75, 2.0), ClassScore(1, "dog", 0.25, 0.9))
    explains: tuple[str, ...] = ("grad_cam", "picture")
    asked: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    place: tuple[tuple[int, int], tuple[float, float, float, float]] | tuple[None, None] = (None, None)

    def model_card(self, model: str, version: str | None = None, **_: Any) -> ModelCard:
        names = [layer.name for layer in self.card.layers]
        sources = tuple(source for source in self.card.sources if source.layer in names)
        return replace(self.card, model=model, sources=sources)

    def predict(self, file: bytes, *, model: str, layers: Any, channels: int | None, **options: Any) -> Prediction:
        self.asked += ({"layers": layers, "channels": channels, **options},)
        names = [layer.name for layer in self.card.layers] if layers == "all" else layers
        maps, numbers = {}, {}
        for layer in self.card.layers:
            if layer.name in names:
                shape = tuple(length or SIDE for length in layer.shape)
                cells = np.random.default_rng(len(layer.name)).normal(size=shape).astype(np.float32)
                numbers[layer.name] = tuple(range(shape[0]))[:channels]
                maps[layer.name] = cells[:channels] if cells.ndim == 3 else cells
        about = {"model": model, "version": "1.0", "engine": "torch-2", "device": "cpu", "request_id": "r-1"}
        return Prediction(**about, top=self.top, maps=maps, channels=numbers, notes=self.notes, timing=TIMING)

    def filters(self, model: str, layer: str, version: str | None = None) -> Any:
        [channels] = [each.shape[0] for each in self.card.layers if each.name == layer]
        return np.linspace(-1, 1, channels * 27, dtype=np.float32).reshape(channels, 3, 3, 3)

    def explain(self, file: bytes, *, model: str, method: str, **_: Any) -> Any:
        if method not in self.explains:
            raise RequestRejected("no gradients here", code="bad_request")
        scores = Prediction(model=model, version="1.0", engine="torch-2", device="cpu")
        picture = np.full((self.card.input.channels, SIDE, SIDE), 0.5, np.float32)
        size, region = self.place
        if method == "picture":
            return Explanation(scores, method=method, picture=picture, original_size=size, region=region)
        heat = np.linspace(-1, 1, 36, dtype=np.float32).reshape(1, 6, 6)
        found = {"layer": "conv2", "target": 0, "label": "cat", "heat": heat, "picture": picture}
        return Explanation(scores, method=method, **found, original_size=size, region=region)  # type: ignore[arg-type]
