"""Torch tensors as pictures of the client, which never imports torch."""

from __future__ import annotations

import io

import convscope
import numpy as np
import pytest
import torch
from convscope import Client, encode_pictures
from convscope.testing import FakeTransport, prediction


def read(files: list[bytes]) -> list[np.ndarray]:
    return [np.load(io.BytesIO(file), allow_pickle=False) for file in files]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_tensor_is_a_picture_with_its_channels_first(dtype: torch.dtype):
    pictures = (torch.rand(2, 3, 4, 5) * (200 if dtype is torch.uint8 else 1)).to(dtype)
    files, is_list = encode_pictures(pictures)
    assert is_list
    expected = pictures.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(read(files)), expected)
    files, is_list = encode_pictures(pictures[0])
    assert not is_list
    assert np.array_equal(read(files)[0], expected[0])
    assert np.array_equal(read(encode_pictures([pictures[1], pictures[0, 0]]).files)[1], pictures[0, 0].numpy())


def test_a_tensor_with_a_graph_is_a_picture_and_predict_many_takes_a_batch_of_them():
    pictures = torch.rand(3, 1, 4, 5, requires_grad=True)
    with Client("http://fake", transport=FakeTransport(prediction({"cat": 1.0}))) as client:
        assert len(list(client.predict_many(pictures, model="m"))) == 3
        with pytest.raises(TypeError, match="use predict"):
            client.predict_many(pictures[0], model="m")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.rand(8, 5, 3), r"not \(8, 5, 3\); send \(H, W, C\) as an array: tensor\.numpy\(\)"),
        (torch.rand(5), r"must be \(H, W\), \(C, H, W\) or \(N, C, H, W\), not \(5,\)"),
        (torch.rand(3, 4, 5).half(), r"not torch\.float16; convert with \.byte\(\) or \.float\(\)"),
        (torch.rand(3, 4, 5) * 255, "divide by 255"),
    ],
)
def test_a_tensor_that_is_no_picture_says_why(tensor: torch.Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        convscope.encode_pictures(tensor)
