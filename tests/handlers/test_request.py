"""What is remembered of requests from one to the next."""

from __future__ import annotations

from typing import Any

import pytest

from handlers.errors import BadRequest
from handlers.options import Options
from handlers.request import parse
from handlers.trace import Trace
from handlers.wire import convscope_pb2 as wire


def test_what_is_remembered_of_options_is_only_what_is_asked_for() -> None:
    """Requests that differ in pictures and id share their options; others do not."""

    def options(**asked: Any) -> Options:
        message = wire.PredictRequest(**asked)
        return parse({"request": message.SerializeToString()}, {}, Trace({}), max_images=4).options

    first = options(pictures=[b"a"], request_id="one", layers=["conv1"], map_dtype=wire.UINT8, pool=2)
    assert options(pictures=[b"b", b"c"], request_id="two", layers=["conv1"], map_dtype=wire.UINT8, pool=2) is first
    assert options(pictures=[b"a"], request_id="one", layers=["conv1"], map_dtype=wire.UINT8, pool=3).pool == 3
    assert options(pictures=[b"a"], layers=["conv1"]).map_dtype == "float32"
    for _ in range(2):
        with pytest.raises(BadRequest, match="pool"):
            options(pictures=[b"a"], pool=0)


def test_fields_that_are_not_known_are_not_remembered() -> None:
    message = wire.PredictRequest(pictures=[b"a"], layers=["conv1"]).SerializeToString()
    unknown = b"\xa2\x1f\xe8\x07" + b"x" * 1000  # Field 500, 1,000 bytes.
    found = [parse({"request": message + unknown}, {}, Trace({}), max_images=4).options for _ in range(2)]
    assert found[0] == found[1] == Options(layers=("conv1",))
    assert found[0] is not found[1]
