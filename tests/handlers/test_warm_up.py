"""The warm-up: every kind of request, none of them refused, bounded in time."""

from __future__ import annotations

import pytest

from handlers.api.media import FORMATS
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from handlers.networks.cifar import Cifar
from handlers.ops import warm_up
from handlers.outputs.response import Response
from handlers.pipeline import Pipeline
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service


def responses(service: Pipeline, preprocessing: Preprocessing = CIFAR_INPUT) -> list[Response]:
    batches = warm_up.batches(preprocessing, ("conv1", "conv2"), 64)
    return [response for batch, properties in batches for response in service.respond(batch, properties)]


def test_every_format_is_asked_for_and_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "LONGEST_S", 60.0)
    given = responses(make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES))
    assert {answer.media_type for answer in given} == set(FORMATS)
    assert [answer.body for answer in given if answer.status != 200] == []


def test_nothing_is_begun_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "LONGEST_S", 0.0)
    assert responses(make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES)) == []


@pytest.mark.parametrize(("channels", "height", "width"), [(3, None, None), (3, 32, 32), (1, 28, 20)])
def test_its_pictures_suit_the_network(channels: int, height: int | None, width: int | None) -> None:
    preprocessing = Preprocessing(channels, height, width)
    for file in warm_up._files(preprocessing):
        [picture] = decode(file, preprocessing, max_bytes=10**7, max_pixels=10**7, max_images=1)
        assert picture.shape[2] == preprocessing.channels
