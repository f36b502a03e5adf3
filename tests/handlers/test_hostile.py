"""A file costs what the limits on bytes and pixels allow, whatever it is made of, and writes no line to the log."""

from __future__ import annotations

from itertools import islice

import pytest

from handlers.api.errors import RequestError
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from tests.campaign.pictures import NETWORKS, measure
from tests.hostile import HEAVY, endless
from tests.thorough import tries

LONGEST_S = 20  # Of processor time, ten times what the worst takes at full size, and a fifth of what it once took.


@pytest.mark.parametrize("name", HEAVY)
def test_a_costly_file_is_answered_or_rejected(name: str) -> None:
    cost = measure(name, HEAVY[name](1 / tries(32, 16)), NETWORKS[0])
    assert cost.outcome in ("picture", "bad_image", "image_too_large")
    assert cost.lines == 0
    assert cost.cpu_s < LONGEST_S


@pytest.mark.parametrize("name", ["jpeg: EXIF segments", "jpeg: EXIF tags", "jpeg: fill bytes", "jpeg: junk"])
def test_so_it_is_at_full_size(name: str) -> None:
    cost = measure(name, HEAVY[name](1.0), NETWORKS[0])
    assert (cost.outcome in ("picture", "bad_image"), cost.lines) == (True, 0)
    assert cost.cpu_s < LONGEST_S


@pytest.mark.parametrize("seed", range(3))
def test_random_files_are_answered_or_rejected(seed: int) -> None:
    for number, (name, data) in enumerate(islice(endless(seed), tries(100, 400))):
        cost = measure(name, data, NETWORKS[number % len(NETWORKS)])
        assert cost.lines == 0, (number, name)
        assert cost.cpu_s < LONGEST_S, (number, name)


def test_damaged_files_are_rejected_with_our_own_words() -> None:
    for name, data in islice(endless(3), tries(150, 400)):
        try:
            decode(data, Preprocessing(3, 8, 8))
        except RequestError as error:
            assert error.code != "internal", name  # noqa: PT017
            assert "0x" not in error.message, name  # noqa: PT017


@pytest.mark.parametrize("network", [NETWORKS[0], NETWORKS[3]], ids=["resized", "resized and cropped"])
@pytest.mark.parametrize("name", ["npy: tall", "npy: wide", "npy: tall float"])
def test_a_long_and_thin_picture_is_resized_in_little_memory(name: str, network: Preprocessing) -> None:
    cost = measure(name, HEAVY[name](1.0), network)
    assert cost.outcome == "picture"
    assert cost.memory_bytes < 200 * 2**20  # It would be gigabytes if the picture were widened first.
