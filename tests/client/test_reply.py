"""Tensors and replies that keep the contract are read exactly; those that break it are protocol errors."""

from __future__ import annotations

import convscope
import numpy as np
import pytest
from convscope import Client
from convscope._wire import convscope_pb2 as wire
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)


class Replies:
    """A transport that gives every request the same reply, as a server may that breaks the contract."""

    def __init__(self, reply: wire.PredictReply) -> None:
        self.reply = reply

    def send(self, request: wire.PredictRequest, **_: object) -> wire.PredictReply:
        return self.reply

    def close(self) -> None:
        pass


def client_of(reply: wire.PredictReply) -> Client:
    return Client("http://fake", transport=Replies(reply))


def read_map(tensor: wire.Tensor) -> np.ndarray:
    """Return the map that a client reads from a tensor."""
    reply = wire.PredictReply(results=[wire.Result(maps=[wire.FeatureMap(layer="conv1", tensor=tensor)])])
    prediction = client_of(reply).predict(b"cat", model="cifar", layers="conv1")
    return prediction.maps["conv1"]


@given(hnp.arrays(np.dtype("<f4"), SHAPES))
def test_float32_is_read_bit_for_bit(cells: np.ndarray):
    read = read_map(wire.Tensor(dtype=wire.FLOAT32, shape=cells.shape, data=cells.tobytes()))
    assert read.shape == cells.shape
    assert read.tobytes() == cells.tobytes()


@pytest.mark.parametrize("shape", [(65536,), (16, 64, 64)])
def test_every_float16_is_read_exactly(shape: tuple[int, ...]):
    cells = np.arange(65536, dtype="<u2").view("<f2").reshape(shape)
    read = read_map(wire.Tensor(dtype=wire.FLOAT16, shape=shape, data=cells.tobytes()))
    assert (read.dtype, read.shape) == (np.float32, shape)
    assert read.tobytes() == cells.astype(np.float32).tobytes()


def test_a_map_without_cells_is_read_too():
    assert read_map(wire.Tensor(dtype=wire.FLOAT16, shape=[0, 3])).shape == (0, 3)


@given(hnp.arrays(np.uint8, SHAPES), st.data())
def test_uint8_is_offset_plus_scale_times_cell(cells: np.ndarray, data: st.DataObject):
    numbers = hnp.arrays(np.float32, len(cells), elements=st.floats(-100, 100, width=32))
    scale, offset = data.draw(numbers), data.draw(numbers)
    read = read_map(wire.Tensor(dtype=wire.UINT8, shape=cells.shape, data=cells.tobytes(), scale=scale, offset=offset))
    for channel in range(len(cells)):
        expected = offset[channel] + scale[channel] * cells[channel].astype(np.float32)
        assert np.array_equal(read[channel], expected)
    assert read.dtype == np.float32


@pytest.mark.parametrize("dtype", [wire.FLOAT32, wire.FLOAT16, wire.UINT8])
def test_maps_are_read_only(dtype: int):
    size = {wire.FLOAT32: 4, wire.FLOAT16: 2, wire.UINT8: 1}[dtype]
    read = read_map(wire.Tensor(dtype=dtype, shape=[2, 3], data=bytes(6 * size), scale=[1, 1], offset=[0, 0]))
    with pytest.raises(ValueError, match="read-only"):
        read[0, 0] = 1


def test_a_score_that_is_a_number_has_no_probability():
    result = wire.Result(top=[wire.ClassScore(index=2, label="age", value=-3.5)])
    [score] = client_of(wire.PredictReply(results=[result])).predict(b"cat", model="age").top
    assert (score.index, score.label, score.value) == (2, "age", -3.5)
    assert np.isnan([score.probability, score.logit]).all()


def test_float32_is_not_copied_once_parsed():
    read = read_map(wire.Tensor(dtype=wire.FLOAT32, shape=[2, 3], data=bytes(24)))
    base = read
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, bytes)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(wire.Tensor(dtype=wire.FLOAT32, shape=[2, 3], data=bytes(23)), id="too few bytes"),
        pytest.param(wire.Tensor(dtype=wire.FLOAT32, shape=[2, 3], data=bytes(28)), id="too many bytes"),
        pytest.param(wire.Tensor(shape=[2], data=bytes(8)), id="no dtype"),
        pytest.param(wire.Tensor(dtype=wire.FLOAT16, data=bytes(2)), id="no axes"),
        pytest.param(wire.Tensor(dtype=9, shape=[2], data=bytes(8)), id="unknown dtype"),
        pytest.param(wire.Tensor(dtype=wire.UINT8, shape=[2, 3], data=bytes(6), scale=[1]), id="a scale too few"),
        pytest.param(wire.Tensor(dtype=wire.UINT8, data=b"1"), id="uint8 without channels"),
        pytest.param(wire.Tensor(dtype=wire.FLOAT32, shape=[2**31, 2**31, 4], data=bytes(8)), id="absurd shape"),
        pytest.param(wire.Tensor(dtype=wire.FLOAT32, shape=[1] * 65, data=bytes(4)), id="more axes than arrays have"),
        pytest.param(wire.Tensor(dtype=wire.FLOAT32, shape=[0, 2**32 - 1, 2**32 - 1]), id="nothing of an absurd shape"),
    ],
)
def test_a_tensor_that_breaks_the_contract_is_a_protocol_error(tensor: wire.Tensor):
    with pytest.raises(convscope.ProtocolError):
        read_map(tensor)


def test_a_map_whose_channels_do_not_fit_is_a_protocol_error():
    reply = wire.PredictReply()
    tensor = wire.Tensor(dtype=wire.FLOAT32, shape=[2], data=bytes(8))
    reply.results.add().maps.add(layer="conv1", tensor=tensor, channels=[0, 1, 2])
    with pytest.raises(convscope.ProtocolError, match="conv1"):
        client_of(reply).predict(b"cat", model="cifar", layers="conv1")


def test_a_rejected_request_is_raised_and_a_failed_picture_is_not():
    refused = wire.PredictReply(error=wire.Error(code="too_many_images", message="at most 64"))
    with pytest.raises(convscope.TooManyImages, match="at most 64"):
        client_of(refused).predict([b"cat"] * 100, model="cifar")
    failed = wire.PredictReply(error=wire.Error(code="bad_image", message="first"))
    failed.results.add(error=wire.Error(code="bad_image", message="first"))
    failed.results.add(error=wire.Error(code="wrong_channels", message="second"))
    seen = client_of(failed).predict([b"cat", b"dog"], model="cifar")
    assert [type(prediction.error) for prediction in seen] == [convscope.BadImage, convscope.WrongChannels]
