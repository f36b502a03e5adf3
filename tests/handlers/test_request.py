"""How requests are parsed: nothing in a request is silently ignored."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from handlers.api.errors import BadRequest
from handlers.api.job import Job
from handlers.api.options import Options
from handlers.api.request import parse
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_json, ask_rest
from tests.pictures import colours, png

GOOD = png(colours())
BASE64 = base64.b64encode(GOOD).decode()
JSON = {"content_type": "application/json"}
FORM = {"content_type": "multipart/form-data; boundary=x"}
FIREFOX = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,image/svg+xml,*/*;q=0.8"
)


def body(**fields: Any) -> dict[str, Any]:
    return {"body": {"data": BASE64, **fields}}


def error(service: Pipeline, row: dict[str, Any], **headers: str) -> tuple[str, str]:
    """Return the code and the message of the error that a REST request gets; empty where it gets none."""
    found = ask_json(service, row, **headers).get("error", {})
    return found.get("code", ""), found.get("message", "")


def over_grpc(service: Pipeline, **keys: bytes) -> wire.PredictReply:
    [answer] = service.respond([{name: bytearray(value) for name, value in keys.items()}], [{}])
    return wire.PredictReply.FromString(answer.body)


class TestAnEmptyRequest:
    """The model card is for an empty GET; a body that was forgotten is an error."""

    # TorchServe does not pass on the method, and Netty adds `content-length: 0` to a GET.
    @pytest.mark.parametrize(
        ("headers", "is_card"),
        [
            ({"content_length": "0"}, True),
            ({"content_length": "0", "User_Agent": "curl/8", "Accept": "*/*"}, True),
            ({"content_length": "0", "Content_Type": ""}, True),
            ({"Content_Length": "0"}, True),
            ({"content_length": "0", "Content_Type": "image/png"}, False),
            ({"content_length": "0", "Content_Type": "application/json"}, False),
            ({"content_length": "0", "Content_Type": "application/x-protobuf"}, False),
            ({"content_length": "0", "X_Convscope_Layers": "conv1"}, False),
            ({"content_length": "0", "explain": "True"}, False),
            # Behind the gateway, whatever it makes of the other headers.
            ({"content_length": "0", "x_convscope_method": "GET"}, True),
            ({"content_length": "0", "x_convscope_method": "GET", "content_type": "application/json"}, True),
            ({"content_length": "0", "x_convscope_method": "POST"}, False),
            ({"content_length": "0", "x_convscope_method": "PUT"}, False),
            ({"content_length": "0", "x_convscope_method": "GET", "x_convscope_layers": "conv1"}, False),
        ],
    )
    @pytest.mark.parametrize("empty", [bytearray(), ""], ids=["bytes", "text"])
    def test_is_a_card_or_an_error(
        self, service: Pipeline, empty: bytearray | str, headers: dict[str, str], is_card: bool
    ) -> None:
        answer = ask_rest(service, {"body": empty}, **{"explain": "False", "url_path": "", **headers})
        said = json.loads(answer.body)
        if is_card:
            assert (answer.status, len(said["classes"])) == (200, 10)
        else:
            assert (answer.status, said["error"]["code"]) == (400, "bad_request")
            assert "no body" in said["error"]["message"] or "no picture" in said["error"]["message"]

    def test_of_torchserves_management_api_is_a_card(self, service: Pipeline) -> None:
        assert "classes" in ask_json(service, {}, describe="True", content_length="0")

    def test_form_is_an_error(self, service: Pipeline) -> None:
        assert error(service, {}, **FORM)[0] == "bad_request"


class TestDescribe:
    @pytest.mark.parametrize("value", ["true", "1", 1, 0, "no", [True], {}, 1.5])
    def test_in_json_is_true_or_false(self, service: Pipeline, value: object) -> None:
        assert error(service, body(describe=value), **JSON) == ("bad_request", "describe must be true or false")

    @pytest.mark.parametrize(("text", "is_card"), [("1", True), ("TRUE", True), (" 0 ", False), ("", False)])
    def test_in_a_form_is_a_word_for_it(self, service: Pipeline, text: str, is_card: bool) -> None:
        said = ask_json(service, {"data": bytearray(GOOD), "describe": text.encode()}, **FORM)
        assert ("classes" in said, "results" in said) == (is_card, not is_card)

    @pytest.mark.parametrize("text", ["no", "2", "describe", "1,1"])
    def test_in_a_form_is_no_other_word(self, service: Pipeline, text: str) -> None:
        assert error(service, {"data": bytearray(GOOD), "describe": text.encode()}, **FORM)[0] == "bad_request"

    def test_as_torchserves_header_drops_no_picture(self, service: Pipeline) -> None:
        assert ask_json(service, {"body": bytearray(GOOD)}, Describe="true")["results"][0]["top"]


class TestWhatStandsBesideABody:
    """Of a form, of a query that TorchServe's older paths hand over as fields, or of gRPC."""

    @pytest.mark.parametrize(
        ("row", "headers"),
        [
            ({"body": GOOD, "layers": b"conv1"}, FORM),
            ({"body": GOOD}, FORM),
            ({"body": GOOD, "layers": b"conv1"}, {}),
            ({"body": {"data": BASE64}, "top_k": b"1"}, JSON),
            ({"body": b"", "layers": b"conv1"}, {"content_length": "0"}),
            ({"request": wire.PredictRequest(pictures=[GOOD]).SerializeToString()}, FORM),
        ],
    )
    def test_is_not_ignored_on_rest(self, service: Pipeline, row: dict[str, Any], headers: dict[str, str]) -> None:
        frozen = {key: bytearray(value) if isinstance(value, bytes) else value for key, value in row.items()}
        code, message = error(service, frozen, **headers)
        assert (code, "data, layers" in message) == ("bad_request", True)

    def test_is_not_ignored_on_grpc(self, service: Pipeline) -> None:
        message = wire.PredictRequest(pictures=[GOOD]).SerializeToString()
        for keys in ({"body": GOOD}, {"body": GOOD, "layers": b"conv1"}, {"request": message, "layers": b"conv1"}):
            assert over_grpc(service, **keys).error.code == "bad_request"
        assert json.loads(
            service.respond([{"request": bytearray(message), "accept": bytearray(b"application/json")}], [{}])[0].body
        )["results"]

    def test_in_the_path_is_not_ignored(self, service: Pipeline) -> None:
        [answer] = service.respond([{"body": bytearray(GOOD)}], [{"Host": "localhost", "url_path": "conv1"}])
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "bad_request")


class TestLayers:
    @pytest.mark.parametrize("layers", [["all", "zzz"], ["zzz", "all"], ["all", "conv1", ""]])
    def test_a_name_beside_all_must_be_known(self, service: Pipeline, layers: list[str]) -> None:
        assert error(service, body(layers=layers), **JSON)[0] == "unknown_layer"
        assert error(service, body(layers=["all", "conv1"]), **JSON)[0] == ""


class TestJson:
    @pytest.mark.parametrize(
        "content_type",
        [
            "Application/JSON",
            "application/JSON; charset=utf-8",
            " application/json ;charset=UTF-8",
            "application/a+json",
        ],
    )
    def test_its_media_type_is_known_in_any_case(self, service: Pipeline, content_type: str) -> None:
        """TorchServe parses what it says exactly so, and leaves the rest as it came."""
        raw = json.dumps(body(layers=["conv2"], accept="application/json")["body"]).encode()
        answers = [
            ask_json(service, {"body": sent}, content_type=kind, accept="application/x-protobuf", x_request_id="a")
            for sent, kind in ((json.loads(raw), "application/json"), (bytearray(raw), content_type))
        ]
        assert answers[0] == answers[1]
        assert list(answers[0]["results"][0]["maps"]) == ["conv2"]

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ('{"data": "", "layers": ["conv1"], "layers": ["conv2"]}', '"layers" is given twice'),
            ('{"data": "", "explain": {"method": "cam", "method": "cam"}}', '"method" is given twice'),
            ('{"data": "",}', "line 1"),
            ('{"top_k": ' + "9" * 5000 + "}", "digits"),
            ('{"data": "", "accept": ["image/png"]}', "accept must be text"),
            ("[" * 100_000, "deep"),
            ("", "no body"),
        ],
    )
    def test_what_is_wrong_with_it_is_told(self, service: Pipeline, text: str, word: str) -> None:
        code, message = error(service, {"body": bytearray(text.encode())}, **JSON)
        assert (code, word in message) == ("bad_request", True)

    def test_no_value_is_no_option(self, service: Pipeline) -> None:
        """null and an empty text are as if the field were not there; a header then holds."""
        for nothing in (None, ""):
            asked = dict.fromkeys(("layers", "top_k", "map_dtype", "pool", "channels", "explain"), nothing)
            seen = ask_json(service, body(describe=nothing, filters=nothing, **asked), **JSON, x_convscope_top_k="2")
            assert len(seen["results"][0]["top"]) == 2
            assert seen["results"][0]["maps"] == {}
            assert "explanation" not in seen["results"][0]
        form = {"data": bytearray(GOOD), "top_k": b" "}
        assert len(ask_json(service, form, **FORM, x_convscope_top_k="2")["results"][0]["top"]) == 2


class TestBase64:
    @pytest.mark.parametrize("more", [b"", b"\xfb", b"\xfb\xff"], ids=["padded 0", "padded 1", "padded 2"])
    @pytest.mark.parametrize(
        "write",
        [
            base64.encodebytes,
            base64.urlsafe_b64encode,
            lambda file: base64.b64encode(file).rstrip(b"="),
            lambda file: base64.encodebytes(file).replace(b"\n", b"\r\n"),
            lambda file: b"data:image/png;base64," + base64.urlsafe_b64encode(file).rstrip(b"="),
        ],
        ids=["in lines", "URL-safe", "without padding", "MIME", "data URL"],
    )
    def test_as_programs_write_it(self, service: Pipeline, write: Callable[[bytes], bytes], more: bytes) -> None:
        """Bytes after a PNG's end change nothing but how it is written."""
        picture = GOOD + more
        expected = ask_json(service, {"data": bytearray(picture)}, **FORM, x_request_id="a")
        assert expected["results"][0]["top"]
        sent = {"data": write(picture).decode()}
        assert ask_json(service, {"body": sent}, **JSON, x_request_id="a") == expected

    @pytest.mark.parametrize(
        "text", ["%%%", "aGVs*G8=", "a", "aGVsbG8==x", "aGVs=bG8", "é", "１２３４", "hello world!"]
    )
    def test_what_it_is_not_is_refused_with_what_it_is(self, service: Pipeline, text: str) -> None:
        code, message = error(service, {"body": {"data": text}}, **JSON)
        assert (code, "RFC 4648" in message) == ("bad_request", True)


class TestHeaders:
    @pytest.mark.parametrize("name", ["X-Convscope-Layer", "x-convscope-describe", "X-Convscope-"])
    def test_one_of_ours_that_is_not_known_is_refused(self, service: Pipeline, name: str) -> None:
        message = wire.PredictRequest(pictures=[GOOD]).SerializeToString()
        for row, headers in (
            ({"body": bytearray(GOOD)}, {}),
            ({"data": bytearray(GOOD)}, FORM),
            (body(), JSON),
            ({"body": bytearray(message)}, {"content_type": "application/x-protobuf"}),
        ):
            code, said = error(service, row, **headers, **{name: "conv1"})
            assert (code, "x-convscope-layers" in said) == ("bad_request", True)

    def test_those_of_the_gateway_are_known(self, service: Pipeline) -> None:
        headers = {"x_convscope_caller": "first", "x_convscope_method": "POST"}
        assert ask_json(service, {"body": bytearray(GOOD)}, **headers)["results"]

    def test_a_message_has_them_too_and_its_fields_go_before(self, service: Pipeline) -> None:
        def seen(**fields: Any) -> dict[str, Any]:
            message = wire.PredictRequest(pictures=[GOOD], **fields).SerializeToString()
            headers = {"x_convscope_layers": "conv1", "x_convscope_top_k": "3", "accept": "application/json"}
            sent = {"body": bytearray(message)}
            [result] = ask_json(service, sent, content_type="application/x-protobuf", **headers)["results"]
            return result

        assert (list(seen()["maps"]), len(seen()["top"])) == (["conv1"], 3)
        assert (list(seen(layers=["conv2"])["maps"]), len(seen(layers=["conv2"])["top"])) == (["conv2"], 3)
        assert len(seen(top_k=0)["top"]) == 10

    def test_one_spelt_in_two_ways_is_joined(self, service: Pipeline) -> None:
        """TorchServe keeps the last of a header that is repeated in one spelling, which nobody sees here."""
        headers = {"X_Convscope_Layers": "conv2", "x_convscope_layers": "conv1"}
        seen = ask_json(service, {"body": bytearray(GOOD)}, **headers)
        assert set(seen["results"][0]["maps"]) == {"conv1", "conv2"}
        headers = {"X_Convscope_Top_K": "1", "x_convscope_top_k": "2"}
        assert error(service, {"body": bytearray(GOOD)}, **headers)[0] == "bad_request"

    def test_what_torchserve_says_of_the_path_nobody_else_does(self, service: Pipeline) -> None:
        plain = ask_json(service, {"body": bytearray(GOOD)}, explain="False", Explain="True")
        assert "explanation" not in plain["results"][0]
        told = ask_json(service, {"body": bytearray(GOOD)}, explain="True", Explain="False")
        assert "explanation" in told["results"][0]

    @pytest.mark.parametrize(
        "kind", ["Multipart/Form-Data; boundary=x", "multipart/form-data", "multipart/mixed; boundary=x"]
    )
    def test_a_form_that_torchserve_does_not_read_is_told_so(self, service: Pipeline, kind: str) -> None:
        form = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\nPIC\r\n--x--\r\n'
        code, message = error(service, {"body": bytearray(form)}, content_type=kind)
        assert (code, "multipart/form-data" in message) == ("bad_request", True)


class TestAccept:
    """RFC 9110, section 12.5.1."""

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [
            ("image/*", "image/png"),
            ("IMAGE/PNG", "image/png"),
            ("image/png;q=0.5, application/json", "application/json"),
            ("application/*;q=0, */*", "image/png"),
            ("*/*, application/json;q=0", "application/x-protobuf"),
            ("application/json, */*;q=0", "application/json"),
            ("application/*;q=0.2, application/x-npz;q=0.3, */*;q=0", "application/x-npz"),
            ("application/*, image/png", "application/json"),
            ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "application/json"),
            ("application/x-npz;q=0.001, application/json;q=0.0", "application/x-npz"),
            ("application/json;charset=utf-8", "application/json"),
            ("image/png;q=1.0, */*;q=0.9", "image/png"),
            ("application/json;q=nan, image/png;q=0.1", "image/png"),
            ("application/json;q=１, image/png;q=0.1", "image/png"),
            (" , ,", "application/json"),
        ],
    )
    def test_the_most_specific_range_decides(self, service: Pipeline, accept: str, kind: str) -> None:
        answer = ask_rest(service, {"body": bytearray(GOOD)}, accept=accept, x_convscope_layers="conv1")
        assert (answer.status, answer.media_type) == (200, kind)

    @pytest.mark.parametrize(
        "accept",
        ["*/*;q=0", "application/*;q=0", "text/*", "image/gif", "application/*;q=0, image/*;q=0", "*/*;q=5"],
    )
    def test_what_is_excluded_is_not_sent(self, service: Pipeline, accept: str) -> None:
        assert ask_rest(service, {"body": bytearray(GOOD)}, accept=accept).status == 400

    @pytest.mark.parametrize("row", [{"data": bytearray(GOOD)}, {"data": [bytearray(GOOD)] * 2, "layers": b"conv1"}])
    def test_a_browser_gets_json_where_no_picture_shows_the_reply(self, service: Pipeline, row: dict[str, Any]) -> None:
        answer = ask_rest(service, row, accept=FIREFOX, **FORM)
        assert (answer.status, answer.media_type) == (200, "application/json")

    @pytest.mark.parametrize("field", [{"layers": b"conv1"}, {"explain": b"1"}])
    def test_a_browser_gets_a_picture_where_one_shows_the_reply(
        self, service: Pipeline, field: dict[str, bytes]
    ) -> None:
        answer = ask_rest(service, {"data": bytearray(GOOD), **field}, accept=FIREFOX, **FORM)
        assert (answer.status, answer.media_type) == (200, "image/png")

    def test_who_takes_png_alone_is_told_what_it_shows(self, service: Pipeline) -> None:
        for row in ({"data": bytearray(GOOD), "accept": b"image/png"}, {"data": bytearray(GOOD)}):
            answer = ask_rest(service, row, accept="*/*" if "accept" in row else "image/png", **FORM)
            assert (answer.status, b"name exactly one" in answer.body) == (400, True)


def test_protobuf_fields_of_a_later_version_are_skipped() -> None:
    message = wire.PredictRequest(pictures=[b"a"], layers=["conv1"]).SerializeToString()
    unknown = b"\xa2\x1f\xe8\x07" + b"x" * 1000  # Field 500, 1,000 bytes.
    found = parse(Job({"request": message + unknown}, {}), max_images=4)
    assert (found.files, found.options) == ((b"a",), Options(layers=("conv1",)))


@pytest.mark.parametrize("message", [b"\xff" * 1_000_000, b"\x0a\x05abc", b"\x42\x01\xff"])
def test_bytes_that_are_no_message_are_rejected(message: bytes) -> None:
    with pytest.raises(BadRequest, match=r"not a convscope\.v1\.PredictRequest"):
        parse(Job({"request": message}, {}), max_images=4)


@pytest.mark.parametrize("layers", [["x" * 2**21], ["x" * 20] * 100_000], ids=["a long one", "many"])
def test_options_of_megabytes_are_refused_before_they_are_parsed(layers: list[str]) -> None:
    message = wire.PredictRequest(pictures=[GOOD], layers=layers).SerializeToString()
    with pytest.raises(BadRequest, match=r"the options take more than 2,097,152 bytes"):
        parse(Job({"request": message}, {}), max_images=4)
