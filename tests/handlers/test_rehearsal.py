"""The rehearsal: every kind of request, none of them refused, bounded in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from handlers import rehearsal
from handlers.images import Preprocessing, decode
from handlers.media import FORMATS
from handlers.networks.cifar import Cifar
from handlers.service import Answer, Service
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service


def rehearse(service: Service, preprocessing: Preprocessing = CIFAR_INPUT) -> list[Answer]:
    given: list[Answer] = []

    def answer(rows: list[Any], properties: list[Mapping[str, Any]]) -> None:
        given.extend(service.answer(rows, properties))

    rehearsal.rehearse(answer, preprocessing, ("conv1", "conv2"), 64)
    return given


def test_every_format_is_asked_for_and_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LONGEST_S", 60.0)
    given = rehearse(make_service(Cifar(), CIFAR_INPUT, CIFAR_CLASSES))
    assert {answer.media_type for answer in given} == set(FORMATS)
    assert [answer.body for answer in given if answer.status != 200] == []


def test_nothing_is_begun_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LONGEST_S", 0.0)
    assert rehearse(make_service(Cifar(), CIFAR_INPUT, CIFAR_CLASSES)) == []


@pytest.mark.parametrize(("channels", "height", "width"), [(3, None, None), (3, 32, 32), (1, 28, 20)])
def test_its_pictures_suit_the_network(channels: int, height: int | None, width: int | None) -> None:
    preprocessing = Preprocessing(channels, height, width)
    for file in rehearsal._files(preprocessing):
        [picture] = decode(file, preprocessing, max_bytes=10**7, max_pixels=10**7, max_images=1)
        assert picture.shape[2] == preprocessing.channels
