"""A file costs what the limits on bytes and pixels allow, whatever it is made of, and writes no line to the log."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from handlers.api.errors import RequestError
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from tests.campaign.pictures import NETWORKS, measure
from tests.hostile import HEAVY, endless
from tests.thorough import tries

ROOT = Path(__file__).parents[2]
LONGEST_S = 20  # Of processor time, ten times what the worst takes at full size, and a fifth of what it once took.


@pytest.mark.parametrize("name", HEAVY)
def test_a_costly_file_is_answered_or_rejected(name: str) -> None:
    cost = measure(name, HEAVY[name](1 / 16), NETWORKS[0])
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


TALL = """
import resource, sys
import numpy as np
from handlers.images.preprocessing import resize
resize(np.zeros((64, 64, 3), np.uint8), (224, 224))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resize(np.zeros((1_000_000, 1, 3), sys.argv[1]), (224, 224))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_column_of_pixels_is_resized_in_little_memory(dtype: str) -> None:
    command = [sys.executable, "-c", TALL, dtype]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert int(done.stdout) < 200  # MB; 640 and 2,560 if it were widened first.
