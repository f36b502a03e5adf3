"""Limits on what a small request may cost a worker, and the errors beyond them."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.api import media
from handlers.api.errors import BadImage, ImageTooLarge
from handlers.api.limits import Limits
from handlers.images.decoding import Budget, decode, open_file
from handlers.images.preprocessing import Preprocessing
from handlers.networks.cifar import Cifar
from handlers.networks.edges import Edges
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_json, ask_message, ask_rest, make_service
from tests.pictures import colours, npy, png, saved

GOOD = png(np.full((32, 32, 3), 90, np.uint8))
JSON = {"content_type": "application/json"}


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated until there are so many."""
    data = saved(Image.fromarray(colours(0, 16, 16)[..., 0]), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def header(shape: object, dtype: str = "|u1") -> bytes:
    """Return a .npy file of a header and no cells."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def limited(limits: Limits) -> Pipeline:
    return make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, limits=limits)


def own_size(data: bytes, channels: int, **limits: Any) -> np.ndarray[Any, Any]:
    """Decode a picture for a network of any size."""
    [picture] = decode(data, Preprocessing(channels, None, None), **limits)
    return picture


class TestScans:
    def test_as_many_as_are_allowed_are_decoded(self) -> None:
        whole = own_size(scans(64), 1, max_pixels=256)
        assert np.array_equal(whole, np.asarray(Image.open(io.BytesIO(scans(64))))[..., np.newaxis])

    def test_one_more_is_refused(self) -> None:
        with pytest.raises(BadImage, match="64 scans"):
            own_size(scans(65), 1, max_pixels=256)

    def test_what_only_looks_like_a_scan_is_not_counted(self) -> None:
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "jpeg", comment=b"\xff\xda\x01\x02" * 100)
        assert own_size(buffer.getvalue() + b"\xff\xda\x00\x00" * 100, 1, max_pixels=64).shape == (8, 8, 1)


class TestPixelsOfARequest:
    def test_they_are_counted_together(self) -> None:
        budget = Budget(150)
        for picture, count in ((png(np.zeros((10, 10), np.uint8)), 100), (png(np.zeros((5, 10), np.uint8)), 50)):
            assert own_size(picture, 1, max_pixels=100, budget=budget).size == count
        with pytest.raises(ImageTooLarge, match="150 pixels"):
            own_size(png(np.zeros((1, 1), np.uint8)), 1, max_pixels=100, budget=budget)

    def test_a_picture_that_needs_interpreting_counts_too(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGBA", (10, 10)).save(buffer, "webp")
        budget = Budget(199)
        own_size(buffer.getvalue(), 3, max_pixels=100, budget=budget)
        with pytest.raises(ImageTooLarge):
            own_size(buffer.getvalue(), 3, max_pixels=100, budget=budget)

    def test_one_too_many_fails_alone_and_a_smaller_one_after_it_does_not(self) -> None:
        network = limited(Limits(max_image_pixels=100, max_reply_bytes=10**6))
        full, small = png(np.zeros((10, 10, 3), np.uint8)), png(np.zeros((2, 2, 3), np.uint8))
        reply = ask_message(network, wire.PredictRequest(pictures=[full] * 9 + [small, full, small]))
        codes = [result.error.code for result in reply.results]
        assert codes == [""] * 10 + ["image_too_large", ""]

    def test_the_next_request_begins_anew(self) -> None:
        network = limited(Limits(max_image_pixels=100, max_reply_bytes=10**6))
        full = png(np.zeros((10, 10, 3), np.uint8))
        for _ in range(2):
            reply = ask_message(network, wire.PredictRequest(pictures=[full] * 10))
            assert not any(result.error.code for result in reply.results)


class TestArraysThatOnlyPromise:
    @pytest.mark.parametrize(
        "shape", [(1,) * 70, (0, 10**30), (10**4000, 10**4000), (True, True, 3), (-1, -1, 3), (), [1, 1, 3], (2**31, 1)]
    )
    def test_fail_alone(self, service: Pipeline, shape: object) -> None:
        reply = ask_message(service, wire.PredictRequest(pictures=[GOOD, header(shape)]))
        assert [result.error.code for result in reply.results] == ["", "bad_image"]

    def test_a_picture_that_breaks_our_own_code_fails_alone(
        self, service: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(data: bytes, *arguments: Any, **options: Any) -> Any:
            if len(data) == len(GOOD):
                return open_file(data, *arguments, **options)
            raise ZeroDivisionError

        monkeypatch.setattr("handlers.pipeline.open_file", fail)
        reply = ask_message(service, wire.PredictRequest(pictures=[GOOD, GOOD + b" "]))
        assert [result.error.code for result in reply.results] == ["", "internal"]


class TestLongText:
    def test_a_long_accept_is_refused_and_not_remembered(self, service: Pipeline) -> None:
        before = media._choose.cache_info()
        body = {"data": base64.b64encode(GOOD).decode(), "accept": "application/json," * 60}
        assert ask_json(service, {"body": json.dumps(body).encode()}, **JSON)["error"]["code"] == "bad_request"
        assert media._choose.cache_info().currsize <= before.currsize + 1  # The header's own.
        assert "1,020" in ask_json(service, {"body": json.dumps(body).encode()}, **JSON)["error"]["message"]

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("layers", ["conv1"] * 65_537),
            ("channels", [0] * 65_537),
            ("pool", 2**32),
            ("pool", 10**4000),
            ("top_k", 10**30),
            ("channels", [10**30]),
            ("channels", 2**32),
            ("explain", "occlusion,window=" + "9" * 5000),
        ],
    )
    def test_an_option_beyond_all_use_is_a_bad_request(self, service: Pipeline, option: str, value: object) -> None:
        body = {"data": base64.b64encode(GOOD).decode(), "layers": ["conv1"], option: value}
        error = ask_json(service, {"body": json.dumps(body).encode()}, **JSON)["error"]
        assert error["code"] == "bad_request"
        assert option in error["message"] or option.rstrip("s") in error["message"]
        assert len(error["message"]) < 200

    def test_a_long_text_too(self, service: Pipeline) -> None:
        error = ask_json(service, {"data": bytearray(GOOD), "layers": b"conv1," * 200_000})["error"]
        assert (error["code"], "1,200,000 characters" in error["message"]) == ("bad_request", True)

    @pytest.mark.parametrize("field", ["layers", "indexes"])
    def test_long_lists_in_a_message_too(self, service: Pipeline, field: str) -> None:
        message = wire.PredictRequest(pictures=[GOOD], layers=["conv1"])
        if field == "layers":
            message.layers.extend(["conv1"] * 65_536)
        else:
            message.channels.indexes.extend([0] * 65_537)
        error = ask_message(service, message).error
        assert (error.code, "65,53" in error.message) == ("bad_request", True)


class TestWhatIsForeseen:
    def test_pooling_a_large_picture_where_any_size_is_taken(self) -> None:
        small = make_service(Edges, Preprocessing(1, None, None), (), limits=Limits(max_reply_bytes=100_000))
        picture = png(np.zeros((1000, 1000), np.uint8))
        assert not ask_message(small, wire.PredictRequest(pictures=[picture], layers=["conv1"], pool=100)).error.code
        whole = ask_message(small, wire.PredictRequest(pictures=[picture], layers=["conv1"]))
        assert whole.error.code == "reply_too_large"

    def test_several_pictures_as_png_before_any_is_run(
        self, service: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service.predictor, "run", lambda jobs: pytest.fail("it was run") if jobs else None)
        answer = ask_rest(service, {"data": [bytearray(GOOD)] * 2}, accept="image/png", x_convscope_layers="conv1")
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "bad_request")

    def test_the_pictures_that_come_along_where_any_size_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = make_service(Edges, Preprocessing(1, None, None), (), limits=Limits(max_reply_bytes=100_000))
        monkeypatch.setattr(small.predictor, "run", lambda jobs: pytest.fail("it was run") if jobs else None)
        message = wire.PredictRequest(pictures=[png(np.zeros((400, 400), np.uint8))])
        message.explain.method = "picture"
        assert ask_message(small, message).error.code == "reply_too_large"


class TestWhatWins:
    def test_a_field_over_a_header_that_is_not_offered(self, service: Pipeline) -> None:
        for row, headers in (
            ({"data": bytearray(GOOD), "accept": b"application/json"}, {}),
            (
                {"body": json.dumps({"data": base64.b64encode(GOOD).decode(), "accept": "application/json"}).encode()},
                JSON,
            ),
        ):
            assert ask_rest(service, row, accept="text/html", **headers).status == 200

    def test_the_field_of_a_card(self, service: Pipeline) -> None:
        for row, headers in (
            ({"describe": b"1", "accept": b"application/x-protobuf"}, {}),
            ({"body": {"describe": True, "accept": "application/x-protobuf"}}, JSON),
        ):
            answer = ask_rest(service, row, **headers)
            assert answer.media_type == "application/x-protobuf"
            assert wire.PredictReply.FromString(answer.body).card.classes == list(CIFAR_CLASSES)

    @pytest.mark.parametrize("row", [{"body": {"filters": ""}}, {"body": {"filters": None}}, {"filters": b" "}])
    def test_no_filters_is_no_question(self, service: Pipeline, row: dict[str, Any]) -> None:
        headers = JSON if "body" in row else {}
        assert "no picture" in ask_json(service, row, **headers)["error"]["message"]
        data = base64.b64encode(GOOD).decode()
        row = {"body": row["body"] | {"data": data}} if "body" in row else row | {"data": bytearray(GOOD)}
        assert ask_json(service, row, **headers)["results"][0]["top"]


def test_sixteen_bit_grey_with_a_transparent_value_is_white_there() -> None:
    buffer = io.BytesIO()
    cells = np.array([[1000, 32896]], np.uint16)
    Image.fromarray(cells).save(buffer, "png", transparency=1000)
    assert decode(buffer.getvalue(), Preprocessing(1, None, None))[0].ravel().tolist() == [255, 128]


def test_every_sixteen_bit_grey_is_the_nearest_of_eight_bits() -> None:
    buffer = io.BytesIO()
    cells = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(cells).save(buffer, "png")
    found = decode(buffer.getvalue(), Preprocessing(1, None, None))[0]
    assert np.array_equal(found.ravel(), np.rint(cells.ravel() / 257).astype(np.uint8))


def test_maps_that_span_more_than_float32_holds_are_drawn(edges: Pipeline) -> None:
    picture = np.full((8, 8), 3e38, np.float32)
    picture[:, 4:] *= -1
    answer = ask_rest(edges, {"body": bytearray(npy(picture / 8))}, accept="image/png", x_convscope_layers="conv1")
    tile = np.asarray(Image.open(io.BytesIO(answer.body)))
    assert (tile.min(), tile.max()) == (0, 255)


class TestLists:
    """Lists are counted before a parser makes an object of every item."""

    def test_json(self) -> None:
        service = limited(Limits())
        for item in (b"[]", b"{}", b"1", b'""'):
            body = b'{"data": [' + b",".join([item] * 200_000) + b"]}"
            assert ask_json(service, {"body": bytearray(body)}, **JSON)["error"]["code"] == "bad_request"

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (b"\x0a\x00" * 200_000, "too_many_images"),
            (b"\x12\x00" * 1_100_000, "bad_request"),  # Layers without a name.
            (b"\x0b\x0c", "bad_request"),  # A group.
            (b"\x0a\x05ab", "bad_request"),  # It breaks off.
            (b"\x8a\x00\x00" * 200_000, "too_many_images"),  # A tag longer than it needs to be.
        ],
        ids=["pictures", "layers", "group", "cut", "long tags"],
    )
    def test_protobuf(self, body: bytes, code: str) -> None:
        answer = ask_rest(limited(Limits()), {"body": bytearray(body)}, content_type="application/x-protobuf")
        assert json.loads(answer.body)["error"]["code"] == code

    def test_a_name_for_every_layer_and_channel_and_all_pictures_are_read(self) -> None:
        service = limited(Limits())
        message = wire.PredictRequest(pictures=[GOOD] * 64, layers=["conv1"] * 60_000)
        message.channels.indexes.extend([0] * 60_000)
        assert ask_message(service, message).error.code in ("", "reply_too_large")
        body = {
            "data": [base64.b64encode(GOOD).decode()] * 64, "layers": ["conv1"] * 60_000, "channels": [0] * 60_000
        }  # fmt: skip
        reply = ask_json(service, {"body": bytearray(json.dumps(body).encode())}, **JSON)
        assert reply.get("error", {}).get("code") in (None, "reply_too_large")
