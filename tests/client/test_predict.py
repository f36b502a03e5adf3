"""Predictions over both transports, against the stand-in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import convscope
import numpy as np
import pytest
from convscope import Client
from convscope._wire import convscope_pb2 as wire

from tests.client.stand_in import LAYERS, StandIn, fetch_maps


def test_one_picture_in_gives_one_prediction_out(client: Client):
    result = client.predict(b"cat", model="cifar", layers=["conv1", "conv2"], top_k=3)
    assert (result.model, result.version, result.engine, result.device) == ("cifar", "1.0", "stand-in-1", "cpu")
    logits = fetch_maps(b"cat", (10,))
    assert [score.index for score in result.top] == list(np.argsort(-logits)[:3])
    assert result.top[0].label == f"class {result.top[0].index}"
    assert result.top[0].logit == logits.max()
    assert result.top[0].probability == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum())
    assert result.maps.keys() == LAYERS.keys()
    for name, shape in LAYERS.items():
        assert result.maps[name].dtype == np.float32
        assert np.array_equal(result.maps[name], fetch_maps(b"cat", shape))
        assert result.channels[name] == tuple(range(shape[0]))


def test_scores_alone_come_unless_layers_are_requested(client: Client):
    result = client.predict(b"cat", model="cifar")
    assert len(result.top) == 5
    assert result.maps == {}


def test_the_requested_version_responds(client: Client):
    assert client.predict(b"cat", model="cifar", version="2.1").version == "2.1"


@pytest.mark.parametrize("many", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_several_pictures_in_give_a_list_out_in_order(client: Client, stand_in: StandIn, many):
    pictures = [b"one", b"two", b"three"]
    result = client.predict(many(pictures), model="cifar", layers="conv2")
    assert isinstance(result, list)
    for picture, prediction in zip(pictures, result, strict=True):
        assert np.array_equal(prediction.maps["conv2"], fetch_maps(picture, LAYERS["conv2"]))
    assert len(stand_in.requests) == 1


def test_a_list_of_one_gives_a_list_of_one(client: Client):
    assert len(client.predict([b"cat"], model="cifar")) == 1


def test_an_empty_list_gives_an_empty_list_and_asks_nobody(client: Client, stand_in: StandIn):
    assert client.predict([], model="cifar") == []
    assert stand_in.requests == []


def test_a_batch_of_arrays_gives_a_list(client: Client):
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    result = client.predict(pictures, model="cifar")
    assert len(result) == 2
    assert result[0] == client.predict(pictures[0], model="cifar")
    assert result[0] != result[1]


def test_one_bad_picture_is_raised_at_once(client: Client):
    with pytest.raises(convscope.BadImage, match="not a picture"):
        client.predict(b"bad", model="cifar")


def test_a_bad_picture_among_others_is_raised_when_its_result_is_read(client: Client):
    good, bad, other = client.predict([b"one", b"bad", b"two"], model="cifar", layers="all")
    assert good.error is None
    assert other.maps
    assert isinstance(bad.error, convscope.BadImage)
    assert bad.error.code == "bad_image"
    for name in ("top", "maps", "channels"):
        with pytest.raises(convscope.BadImage, match="not a picture"):
            getattr(bad, name)
    with pytest.raises(convscope.BadImage):
        bad.figure("conv1")


def test_a_list_of_bad_pictures_is_still_a_list(client: Client):
    result = client.predict([b"bad 1", b"bad 2"], model="cifar")
    assert [prediction.error.message for prediction in result] == ["not a picture: b'bad 1'", "not a picture: b'bad 2'"]


def test_a_reply_of_another_count_breaks_the_contract(client: Client):
    with pytest.raises(convscope.ProtocolError, match="1 results for 2 pictures"):
        client.predict([b"one", b"two"], model="miscounting")


def test_float16_maps_arrive_as_float32(client: Client):
    result = client.predict(b"cat", model="cifar", layers="conv1", map_dtype="float16")
    expected = fetch_maps(b"cat", LAYERS["conv1"]).astype(np.float16).astype(np.float32)
    assert np.array_equal(result.maps["conv1"], expected)
    assert result.maps["conv1"].dtype == np.float32


def test_uint8_maps_arrive_dequantised(client: Client):
    result = client.predict(b"cat", model="cifar", layers="conv1", map_dtype="uint8")
    exact = fetch_maps(b"cat", LAYERS["conv1"])
    half_a_step = (exact.max(axis=(1, 2)) - exact.min(axis=(1, 2))).reshape(-1, 1, 1) / 255 / 2
    assert result.maps["conv1"].dtype == np.float32
    assert (np.abs(result.maps["conv1"] - exact) <= half_a_step * 1.001).all()
    assert not np.array_equal(result.maps["conv1"], exact)


def test_chosen_channels_come_with_their_numbers(client: Client):
    whole = fetch_maps(b"cat", LAYERS["conv1"])
    result = client.predict(b"cat", model="cifar", layers="conv1", channels=[3, 1])
    assert result.channels["conv1"] == (3, 1)
    assert np.array_equal(result.maps["conv1"], whole[[3, 1]])
    result = client.predict(b"cat", model="cifar", layers="conv1", channels=2)
    assert result.channels["conv1"] == tuple(np.argsort(-whole.mean(axis=(1, 2)))[:2])


def test_maps_can_be_pooled_to_one_number_a_channel(client: Client):
    result = client.predict(b"cat", model="cifar", layers="conv1", pool=1)
    assert result.maps["conv1"].shape == (4,)
    assert np.array_equal(result.maps["conv1"], fetch_maps(b"cat", LAYERS["conv1"]).mean(axis=(1, 2)))


def test_every_option_travels_as_the_contract_says(client: Client, stand_in: StandIn):
    client.predict(b"cat", model="cifar", layers=["conv2"], top_k=0, map_dtype="uint8", pool=2, channels=(0, 2))
    [(_, _, request)] = stand_in.requests
    assert request == wire.PredictRequest(
        pictures=[b"cat"],
        layers=["conv2"],
        top_k=0,
        map_dtype=wire.UINT8,
        pool=2,
        channels=wire.ChannelSelection(indexes=[0, 2]),
        request_id=request.request_id,
    )
    assert request.HasField("top_k")


def test_a_path_is_read(client: Client, tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(b"cat")
    by_path = client.predict(tmp_path / "cat.png", model="cifar")
    assert by_path == client.predict(str(tmp_path / "cat.png"), model="cifar") == client.predict(b"cat", model="cifar")
    with pytest.raises(FileNotFoundError):
        client.predict(tmp_path / "dog.png", model="cifar")


def test_a_picture_larger_than_grpc_takes_by_default_goes_through(client: Client):
    picture = np.zeros((2000, 2500), np.uint8)  # 5 MB; gRPC's own limit is 4 MB.
    assert client.predict(picture, model="cifar").top


def test_threads_share_a_client(client: Client):
    pictures = [bytes([number]) * 100 for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        result = list(threads.map(lambda picture: client.predict(picture, model="cifar", layers="conv1"), pictures))
    for picture, prediction in zip(pictures, result, strict=True):
        assert np.array_equal(prediction.maps["conv1"], fetch_maps(picture, LAYERS["conv1"]))


def test_connections_are_kept_open(client: Client, stand_in: StandIn):
    for _ in range(5):
        client.predict(b"cat", model="cifar")
    assert len(stand_in.requests) == 5
    assert len(stand_in.connections) == 1


def test_a_request_in_progress_ends_at_its_deadline(client: Client, stand_in: StandIn):
    stand_in.release.clear()
    try:
        with pytest.raises(convscope.DeadlineExceeded, match=r"no complete response within 0\.\d+ s"):
            client.predict(b"cat", model="slow", deadline_s=0.3)
    finally:
        stand_in.release.set()
    assert client.predict(b"cat", model="cifar").top


def test_the_clients_own_deadline_holds_where_none_is_given(url: str, stand_in: StandIn):
    stand_in.release.clear()
    try:
        with Client(url, deadline_s=0.3) as client, pytest.raises(convscope.DeadlineExceeded):
            client.predict(b"cat", model="slow")
    finally:
        stand_in.release.set()


def test_another_thread_may_close_the_client(client: Client, stand_in: StandIn):
    stand_in.release.clear()
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            client.predict(b"cat", model="slow", deadline_s=5)
        except convscope.ConvscopeError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    waited = threading.Event()
    while not stand_in.requests:
        waited.wait(0.01)
    client.close()
    stand_in.release.set()
    thread.join(10)
    assert not thread.is_alive()
    assert all(isinstance(error, convscope.TransportError) for error in caught)


def test_a_closed_client_says_so(client: Client):
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.predict(b"cat", model="cifar")


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf")])
def test_a_deadline_must_be_one(client: Client, deadline_s: float):
    with pytest.raises(ValueError, match="deadline_s"):
        client.predict(b"cat", model="cifar", deadline_s=deadline_s)
    with pytest.raises(ValueError, match="deadline_s"):
        Client(client.url, deadline_s=deadline_s)
