"""What is written by hand of a reply is what protobuf would write."""

from __future__ import annotations

import numpy as np
import pytest

from handlers.api.media import PROTOBUF
from handlers.outputs.formats import encode
from handlers.outputs.maps import FeatureMap
from handlers.outputs.protobuf import encode_results
from handlers.outputs.response import ClassScore, Identity, Result
from handlers.wire import convscope_pb2 as wire

LEAST = float(np.float32(1e-45))

SCORES = [
    ClassScore(0, "cat", 0.5, 2.5),
    ClassScore(7, "", 0.25, -1e30),
    ClassScore(999, "Ærfugl " * 40, 1.0, 3.4028234663852886e38),
    ClassScore(1, "never", 0.0, -200.0),
    ClassScore(2, "even", 0.5, 0.0),
    ClassScore(3, "even, from below", 0.5, -0.0),
    ClassScore(4, "less than a float holds", 1e-60, 1e-60),
    ClassScore(5, "the least that it holds", LEAST, -LEAST),
    ClassScore(6, "rounded up to the least", 0.8e-45, 0.8e-45),
]


def written(top: list[ClassScore]) -> bytes:
    result = wire.Result(top=[wire.ClassScore(**score._asdict()) for score in top])
    return wire.PredictReply(results=[result]).SerializeToString()


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.label[:30] or "unnamed")
def test_a_score_is_written_as_protobuf_writes_it(score: ClassScore) -> None:
    assert b"".join(encode_results([Result((score,))])) == written([score])


def test_a_thousand_scores_are_written_as_protobuf_writes_them() -> None:
    top = [ClassScore(index, f"class {index}", 1 / (index + 1), 1.5 - index) for index in range(1000)]
    assert b"".join(encode_results([Result(tuple(top))])) == written(top)


@pytest.mark.parametrize("channels", [1, 64])
def test_scales_and_offsets_are_written_as_protobuf_writes_them(channels: int) -> None:
    generator = np.random.default_rng(0)
    scale, offset = generator.normal(size=(2, 2 * channels)).astype(np.float32)[:, ::2]
    whole = generator.integers(0, 256, (channels, 3, 2), np.uint8)
    tensor = wire.Tensor(dtype=wire.UINT8, shape=whole.shape, data=whole.tobytes())
    tensor.scale.extend(scale.tolist())
    tensor.offset.extend(offset.tolist())
    wanted = wire.PredictReply(results=[wire.Result(maps=[wire.FeatureMap(layer="conv1", tensor=tensor)])])
    found = encode_results([Result((), (FeatureMap("conv1", whole, scale, offset),))])
    assert b"".join(found) == wanted.SerializeToString()


def test_every_response_names_its_own_server() -> None:
    for model in ("cifar", "digits", "cifar"):
        response = encode(Identity(model, "1.0", "torch", "cpu"), (), PROTOBUF, request_id="a")
        reply = wire.PredictReply.FromString(response.body)
        assert (reply.model, reply.request_id) == (model, "a")
