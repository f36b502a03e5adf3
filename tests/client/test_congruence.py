"""The same request over both transports gives equal results: predictions, cards and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from convscope import Client, ConvscopeError

from tests.client.stand_in import MISHAPS, StandIn

CODES = [
    "bad_request",
    "unknown_layer",
    "bad_image",
    "image_too_large",
    "wrong_channels",
    "too_many_images",
    "reply_too_large",
    "internal",
    "draining",
    "not_yet_invented",
]


@pytest.fixture
def both(stand_in: StandIn) -> Iterator[tuple[Client, Client]]:
    with Client(stand_in.rest_url) as rest, Client(stand_in.grpc_url) as grpc:
        yield rest, grpc


QUESTIONS: dict[str, Callable[[Client], Any]] = {
    "scores": lambda client: client.predict(b"cat", model="cifar"),
    "all classes": lambda client: client.predict(b"cat", model="cifar", top_k=0),
    "maps": lambda client: client.predict(b"cat", model="cifar", layers="all"),
    "float16 maps": lambda client: client.predict(b"cat", model="cifar", layers="all", map_dtype="float16"),
    "uint8 maps": lambda client: client.predict(b"cat", model="cifar", layers="all", map_dtype="uint8"),
    "pooled": lambda client: client.predict(b"cat", model="cifar", layers="all", pool=1),
    "channels": lambda client: client.predict(b"cat", model="cifar", layers="all", channels=2),
    "many, one bad": lambda client: client.predict([b"one", b"bad", b"two"], model="cifar", layers="conv1"),
    "many, all bad": lambda client: client.predict([b"bad 1", b"bad 2"], model="cifar"),
    "arrays": lambda client: client.predict(np.zeros((3, 8, 8, 3), np.float32), model="cifar"),
    "explanation": lambda client: client.explain(b"cat", model="cifar"),
    "explanations, one bad": lambda client: client.explain([b"one", b"bad"], model="cifar", method="input_gradient"),
    "card": lambda client: client.model_card("cifar", "3"),
    "ready": lambda client: client.ready("cifar"),
}
FAILURES: dict[str, Callable[[Client], Any]] = {
    "a bad picture": lambda client: client.predict(b"bad", model="cifar"),
    "an unknown layer": lambda client: client.predict(b"cat", model="cifar", layers="conv7"),
    "a bad picture to explain": lambda client: client.explain(b"bad", model="cifar"),
    "a layer there is not": lambda client: client.explain(b"cat", model="error-unknown_layer", layer="nose"),
    "too old to explain": lambda client: client.explain(b"cat", model="older"),
    "babble": lambda client: client.predict(b"cat", model="babbler"),
    "filters refused": lambda client: client.filters("error-bad_request", "conv1"),
    **{code: lambda client, code=code: client.predict(b"cat", model=f"error-{code}") for code in CODES},
    **{f"card, {code}": lambda client, code=code: client.model_card(f"error-{code}") for code in CODES},
    **{name: lambda client, name=name: client.predict([b"cat"], model=name) for name in ("missing", "old", "full")},
    "died": lambda client: client.predict(b"cat", model="died"),
    "failed": lambda client: client.predict(b"cat", model="failed"),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_both_transports_give_equal_results(both: tuple[Client, Client], question):
    rest, grpc = map(question, both)
    assert rest == grpc


@pytest.mark.parametrize("question", FAILURES.values(), ids=FAILURES)
def test_both_transports_raise_equal_errors(both: tuple[Client, Client], question):
    errors = []
    for client in both:
        with pytest.raises(ConvscopeError) as caught:
            question(client)
        errors.append((type(caught.value), caught.value.code, caught.value.message))
    assert errors[0] == errors[1]


def test_every_mishap_of_torchserve_is_compared():
    assert set(MISHAPS) - {"-"} <= set(FAILURES)  # No call but models() can be for "-": test_models.py.
