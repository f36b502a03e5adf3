"""Pictures in, scores and maps out, through TorchServe and the client, on both transports."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from convscope import BadImage, Client, ConvscopeError, Prediction
from PIL import Image

from tests.e2e.reference import archived, by_hand
from tests.pictures import FIVE_BY_FIVE, FIVE_BY_FIVE_EDGES, colours, png
from tests.server.harness import ROOT

SAMPLES = ROOT / "samples"


def test_edges_gives_exactly_the_documents_map(client: Client) -> None:
    seen = client.predict(FIVE_BY_FIVE, model="edges", layers=["conv1"])
    assert np.array_equal(seen.maps["conv1"][0], FIVE_BY_FIVE_EDGES)
    assert seen.top == []


def test_edges_gives_the_same_map_for_the_sample_picture(client: Client) -> None:
    seen = client.predict(SAMPLES / "square.png", model="edges", layers=["conv1"])
    assert np.array_equal(seen.maps["conv1"][0], FIVE_BY_FIVE_EDGES)


@pytest.mark.parametrize("name", ["cat", "ship", "truck"])
def test_served_maps_are_those_of_the_network_run_by_hand(client: Client, name: str) -> None:
    """Bit for bit if torch ran it, within the contract's tolerance if another engine did."""
    seen = client.predict(SAMPLES / f"{name}.png", model="cifar", layers="all", top_k=0)
    expected = by_hand(np.asarray(Image.open(SAMPLES / f"{name}.png").convert("RGB")))
    logits = {score.index: np.float32(score.logit) for score in seen.top}
    found = seen.maps | {"logits": np.array([logits[index] for index in range(10)])}
    tolerance = 0 if seen.engine.startswith("torch-") else 1e-5
    for what, values in expected.items():
        values = np.asarray(values)
        assert found[what].shape == values.shape
        assert np.abs(found[what] - values).max() <= tolerance * np.abs(values).max(), what


@pytest.mark.parametrize("model", ["edges", "digits", "simple", "cifar", "flat", "deep"])
def test_every_archive_is_ready_and_describes_itself(client: Client, model: str) -> None:
    card = client.model_card(model)
    _, archived_card = archived(model)
    assert client.ready(model)
    assert list(card.classes) == archived_card["classes"]
    assert {layer.name: layer.module for layer in card.layers} == archived_card["layers"]
    assert card.engine.startswith("onnxruntime-")


MAPS = {
    "edges": {"conv1": (1, 28, 28)},
    "digits": {"conv1": (16, 26, 26)},
    "simple": {"conv1": (6, 32, 32), "conv2": (12, 16, 16)},
    "cifar": {"conv1": (16, 32, 32), "conv2": (32, 16, 16)},
    "flat": {"fc1": (28, 1, 1), "fc2": (28, 1, 1)},
    "deep": {
        "block1": (32, 32, 32),
        "block2": (64, 32, 32),
        "block3": (64, 16, 16),
        "block4": (192, 16, 16),
        "block5": (192, 8, 8),
        "block6": (256, 8, 8),
        "block7": (256, 4, 4),
    },
}


@pytest.mark.parametrize("model", MAPS)
def test_maps_have_the_documents_shapes(client: Client, model: str) -> None:
    seen = client.predict(SAMPLES / "digit-7.png", model=model, layers="all")
    assert {layer: cells.shape for layer, cells in seen.maps.items()} == MAPS[model]


ASKED: dict[str, Callable[[Client], Any]] = {
    "scores": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", top_k=0),
    "maps": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers="all"),
    "float16": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers="all", map_dtype="float16"),
    "uint8": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers="all", map_dtype="uint8"),
    "embedding": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers=["conv2"], pool=1),
    "channels": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers=["conv2"], channels=[4, 1]),
    "strongest": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers=["conv2"], channels=3),
    "array": lambda client: client.predict(colours(), model="cifar", layers="all"),
    "float array": lambda client: client.predict(colours().astype(np.float32) / 255, model="cifar", layers="all"),
    "large picture": lambda client: client.predict(png(colours(1, 200, 300)), model="cifar", layers="all"),
    "version": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", version="1.0"),
    "list": lambda client: client.predict([SAMPLES / "cat.png", b"text", SAMPLES / "ship.png"], model="cifar"),
    "card": lambda client: client.model_card("digits"),
    "unknown layer": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", layers=["nose"]),
    "bad picture": lambda client: client.predict(b"text", model="cifar"),
    "no such model": lambda client: client.predict(SAMPLES / "cat.png", model="nope"),
    "no such version": lambda client: client.predict(SAMPLES / "cat.png", model="cifar", version="9.9"),
}


@pytest.mark.parametrize("name", ASKED)
def test_both_transports_answer_alike(rest: Client, grpc: Client, name: str) -> None:
    def outcome(client: Client) -> Any:
        try:
            return ASKED[name](client)
        except ConvscopeError as error:
            return type(error), error.code

    over_rest, over_grpc = outcome(rest), outcome(grpc)
    assert over_rest == over_grpc


def test_one_bad_picture_in_a_list_fails_alone(client: Client) -> None:
    good, bad, fine = client.predict([SAMPLES / "cat.png", b"text", SAMPLES / "ship.png"], model="cifar", top_k=1)
    assert good.error is None
    assert fine.error is None
    assert good.top != fine.top
    with pytest.raises(BadImage):
        _ = bad.top


def test_one_bad_request_among_many_at_once_fails_alone(rest: Client, grpc: Client) -> None:
    good = (SAMPLES / "cat.png").read_bytes()

    def ask(number: int) -> Prediction | str:
        client = (rest, grpc)[number % 2]
        try:
            return client.predict(good[:200] if number % 5 == 0 else good, model="cifar", layers=["conv1"])
        except BadImage as error:
            return error.code

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(ask, range(80)))
    alone = rest.predict(good, model="cifar", layers=["conv1"])
    for number, outcome in enumerate(outcomes):
        if number % 5 == 0:
            assert outcome == "bad_image"
        else:
            assert isinstance(outcome, Prediction)
            assert [score.label for score in outcome.top] == [score.label for score in alone.top]
            assert np.allclose(outcome.maps["conv1"], alone.maps["conv1"], rtol=1e-5, atol=1e-6)


def test_a_network_without_classes_answers_a_request_that_names_no_layer(client: Client) -> None:
    seen = client.predict(FIVE_BY_FIVE, model="edges")
    assert seen.top == []
    assert dict(seen.maps) == {}
