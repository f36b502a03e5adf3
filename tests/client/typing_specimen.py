"""A specimen of the public API that only type checkers run: `mypy` (in `make check`) and `pyright`.

An error here means that a caller's correct program would be reported, or that a type has become vaguer.
"""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, assert_type

import numpy as np
from convscope import (
    AsyncClient,
    Change,
    ClassScore,
    Client,
    ConvscopeError,
    Edit,
    Explanation,
    Layer,
    ModelCard,
    Overloaded,
    Prediction,
    ServedModel,
    Timing,
)
from convscope.testing import FakeTransport, Request, explanation, model_card, prediction
from convscope.typing import (
    AsyncTransport,
    Channels,
    EncodablePicture,
    ExplainOptions,
    Picture,
    PredictOptions,
    Transport,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from prometheus_client import CollectorRegistry


def blocking(client: Client, image: Image.Image, array: NDArray[np.uint8], registry: CollectorRegistry) -> None:
    assert_type(client.predict("cat.png", model="cifar"), Prediction)
    assert_type(client.predict(Path("cat.png"), model="cifar", version="1.0", layers=["conv1"], top_k=3), Prediction)
    assert_type(client.predict(b"bytes", model="cifar", layers="all", map_dtype="uint8", pool=1), Prediction)
    assert_type(client.predict(io.BytesIO(b"bytes"), model="cifar"), Prediction)
    assert_type(client.models(), list[ServedModel])
    assert_type(client.predict(image, model="cifar", channels=[0, 3], timing=True), Prediction)
    assert_type(client.predict(["cat.png", b"bytes", image, array], model="cifar", channels=4), list[Prediction])
    assert_type(client.predict((name for name in ("cat.png",)), model="cifar", deadline_s=1.5), list[Prediction])
    assert_type(client.predict(array, model="cifar", request_id="order-7"), Any)  # By the number of its axes.
    edits: list[Edit | dict[str, Any]] = [
        Edit(layer="conv1", operation="zero", channels=[3]),
        {"layer": "conv2", "operation": "mean"},
    ]
    assert_type(client.predict("cat.png", model="cifar", edits=edits, compare=True), Prediction)
    many = client.predict_many(["cat.png"], model="cifar", concurrency=2, batch=4, progress=True, layers="conv1")
    assert_type(many, Generator[Prediction, None, None])
    assert_type(client.explain("cat.png", model="cifar", method="occlusion", window=4, step=2), Explanation)
    assert_type(client.explain(["cat.png"], model="cifar", layer="conv1", target=3), list[Explanation])
    assert_type(client.model_card("cifar", "1.0", deadline_s=2), ModelCard)
    assert_type(client.model_card("cifar").layer("conv1"), Layer)
    assert_type(client.model_card("cifar").layers[0].receptive_field_box(1, 2), tuple[int, int, int, int])
    assert_type(client.model_card("cifar").pictures_per_request(1000), int)
    assert_type(client.filters("cifar", "conv1"), "NDArray[np.float32]")
    assert_type(client.ready("cifar"), bool)
    assert_type(client.retries_made, int)
    with Client("https://host", api_key="key", ca_file=Path("ca.pem"), retries=0, metrics=registry) as opened:
        assert_type(opened, Client)


async def awaited(client: AsyncClient, array: NDArray[np.float32]) -> None:
    assert_type(await client.predict("cat.png", model="cifar"), Prediction)
    assert_type(await client.predict(["cat.png"], model="cifar"), list[Prediction])
    assert_type(await client.predict(array, model="cifar"), Any)
    assert_type(client.predict_many(["cat.png"], model="cifar"), AsyncGenerator[Prediction, None])
    assert_type(client.predict_many(pictures(), model="cifar"), AsyncGenerator[Prediction, None])
    assert_type(await client.explain("cat.png", model="cifar"), Explanation)
    assert_type(await client.model_card("cifar"), ModelCard)
    assert_type(await client.filters("cifar", "conv1"), "NDArray[np.float32]")
    assert_type(await client.ready("cifar"), bool)
    async with AsyncClient("grpc://host:7070", deadline_s=5) as opened:
        assert_type(opened, AsyncClient)


async def pictures() -> AsyncGenerator[bytes, None]:
    yield b"cat"


def results(seen: Prediction, why: Explanation) -> None:
    assert_type(seen.top, list[ClassScore])
    assert_type((seen.top[0].index, seen.top[0].label, seen.top[0].probability), tuple[int, str, float])
    assert_type(seen.maps, "Mapping[str, NDArray[np.float32]]")
    assert_type(seen.channels, Mapping[str, tuple[int, ...]])
    assert_type(seen.timing, Timing | None)
    assert_type(seen.change, Change | None)
    if seen.change is not None:
        assert_type(seen.change.top, list[ClassScore])
        assert_type(seen.change.maps, "Mapping[str, NDArray[np.float32]]")
    assert_type(seen.error, ConvscopeError | None)
    assert_type(seen.save("cat"), Path)
    assert_type(why.heat, "NDArray[np.float32]")
    assert_type(why.prediction, Prediction)
    assert_type((why.model, why.version, why.request_id), tuple[str, str, str])
    assert_type(why.timing, Timing | None)
    assert_type((why.has_heat, why.has_picture), tuple[bool, bool])


def errors(error: ConvscopeError) -> None:
    assert_type(error.code, str)
    assert_type(error.message, str)
    assert_type(error.request_id, str | None)
    if isinstance(error, Overloaded):
        assert_type(error.retry_after_s, float | None)


def fake() -> None:
    def respond(request: Request) -> list[Prediction]:
        return [prediction({"cat": 0.9}) for _ in request.pictures]

    Client("http://fake", transport=FakeTransport(respond))
    AsyncClient("http://fake", transport=FakeTransport(prediction({"cat": 0.9}, maps={"conv1": np.zeros((1, 2, 2))})))
    assert_type(FakeTransport(Overloaded("full", retry_after_s=1)).requests, list[Request])
    assert_type(FakeTransport(explanation(np.zeros((1, 2, 2)), label="cat")).closed, bool)
    assert_type(FakeTransport(model_card(layers={"conv1": (4, 8, 8)}, classes=["cat"])).closed, bool)


class Wrapper:
    """A caller's own wrapper, typed with the public names."""

    def __init__(self, transport: Transport, asynchronous: AsyncTransport) -> None:
        self.client = Client("http://host", transport=transport)
        self.asynchronous = AsyncClient("http://host", transport=asynchronous)

    def one(self, picture: EncodablePicture, **options: Unpack[PredictOptions]) -> Prediction:
        return self.client.predict(picture, model="cifar", **options)

    def several(self, pictures: list[Picture], **options: Unpack[PredictOptions]) -> list[Prediction]:
        return self.client.predict(pictures, model="cifar", **options)

    def explained(self, file: EncodablePicture, **options: Unpack[ExplainOptions]) -> Explanation:
        return self.client.explain(file, model="cifar", **options)

    def strongest(self, picture: EncodablePicture, channels: Channels) -> Prediction:
        return self.client.predict(picture, model="cifar", layers="all", channels=channels)
