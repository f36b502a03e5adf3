"""The golden files of proto/examples: the client writes and reads exactly these bytes, and so does the handler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import Edit
from convscope._exceptions import BadImage as ClientBadImage
from convscope._exceptions import UnknownLayer as ClientUnknownLayer
from convscope._reply import check_edits, read_card, read_explanations, read_predictions
from convscope._request import build_explain_options, build_options, request_with_pictures
from convscope._wire import convscope_pb2 as client_wire
from convscope._wire import inference_pb2

from handlers.api import card, request
from handlers.api.edits import Edit as HandlerEdit
from handlers.api.errors import BadImage, UnknownLayer
from handlers.api.job import Job
from handlers.api.media import JSON, PROTOBUF
from handlers.api.options import Explain
from handlers.outputs.formats import encode
from handlers.outputs.maps import FeatureMap
from handlers.outputs.response import Change, ClassScore, Explanation, Identity, Result
from handlers.wire import convscope_pb2 as wire

EXAMPLES = Path(__file__).resolve().parents[2] / "proto/examples"
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
IDENTITY = Identity("cifar", "1.0", "torch-2.15.0", "cpu", "softmax")
REPLY: Any = {
    "request_id": "0af7651916cd43dd8448eb211c80319c",
    "results": (
        Result(
            (ClassScore(3, "cat", 0.75, 2.5), ClassScore(5, "dog", 0.125, 0.5)),
            (
                FeatureMap("conv1", np.array([[[0, 0.5], [-1.25, 2]]], np.float32)),
                FeatureMap(
                    "conv2",
                    np.array([[[0, 255]], [[128, 0]]], np.uint8),
                    np.array([0.5, 0.25], np.float32),
                    np.array([-1, 3], np.float32),
                    (7, 2),
                ),
                FeatureMap("conv3", np.array([1.5, -2], np.float16)),
            ),
            notes=("grey to RGB", "cropped"),
        ),
        BadImage("the JPEG file is truncated or damaged"),
    ),
}
TIMING = {
    "read_s": 0.125,
    "decode_s": 0.25,
    "preprocess_s": 0.5,
    "forward_s": 2,
    "encode_s": 0.0625,
    "handler_s": 3,
    "batch_requests": 4,
}
REFUSAL: Any = {
    "results": (),
    "error": UnknownLayer("there is no layer 'nose'; this model publishes conv1, conv2"),
}

EXPLAINED: Any = {
    "request_id": "0af7651916cd43dd8448eb211c80319c",
    "results": (
        Result(
            (ClassScore(3, "cat", 0.75, 2.5),),
            explanation=Explanation(
                "integrated_gradients",
                "",
                3,
                "cat",
                FeatureMap("explanation", np.array([[[0.5, -1.25]]], np.float32)),
                0.0625,
                FeatureMap(
                    "picture", np.array([[[0, 255]]], np.uint8), np.array([0.5], np.float32), np.array([0], np.float32)
                ),
                "overlay",
                (30, 40),
                (5.0, 0.0, 25.0, 40.0),
            ),
        ),
    ),
}


EDITED: Any = {
    "request_id": "0af7651916cd43dd8448eb211c80319c",
    "edits": 4,
    "results": (
        Result(
            (ClassScore(3, "cat", 0.75, 2.5),),
            (FeatureMap("conv2", np.array([[[0.5, -1.25]]], np.float32)),),
            change=Change(
                (ClassScore(3, "cat", 0.5, 1.5), ClassScore(5, "dog", -0.5, -2)),
                (FeatureMap("conv2", np.array([[[0, -1]]], np.float32)),),
            ),
        ),
    ),
}


def golden(name: str) -> bytes:
    return (EXAMPLES / f"{name}.binpb").read_bytes()


def test_the_client_writes_the_golden_request() -> None:
    message = request_with_pictures(
        build_options(layers=["conv1", "conv2"], top_k=3, map_dtype="uint8", pool=2, channels=[5, 0]), PICTURES, ""
    )
    assert message.SerializeToString() == golden("request")


def test_the_handler_reads_the_golden_request() -> None:
    job = Job({"request": bytearray(golden("request"))}, {})
    asked = request.parse(job, max_images=2)
    assert asked.files == PICTURES
    assert job.media_type == PROTOBUF
    assert asked.options == request.Options(("conv1", "conv2"), 3, "uint8", 2, (5, 0))


@pytest.mark.parametrize(
    ("reply", "timing", "name"),
    [(REPLY, TIMING, "reply"), (REFUSAL, None, "refusal"), (EXPLAINED, None, "explanation"), (EDITED, None, "edited")],
)
def test_the_handler_writes_the_golden_replies(reply: dict[str, Any], timing: dict[str, Any] | None, name: str) -> None:
    response = encode(IDENTITY, media_type=PROTOBUF, **reply)
    assert (response if timing is None else response.with_timing(timing)).body == golden(name)


def test_the_handler_writes_the_golden_json() -> None:
    body = encode(IDENTITY, media_type=JSON, **REPLY).with_timing(TIMING).body
    assert json.loads(body) == json.loads((EXAMPLES / "reply.json").read_text(encoding="utf-8"))


def test_the_client_reads_the_golden_reply() -> None:
    seen, failed = read_predictions(client_wire.PredictReply.FromString(golden("reply")), 2)
    assert [(score.index, score.label, score.probability, score.logit) for score in seen.top] == [
        (3, "cat", 0.75, 2.5),
        (5, "dog", 0.125, 0.5),
    ]
    assert seen.maps["conv1"].tolist() == [[[0, 0.5], [-1.25, 2]]]
    assert seen.maps["conv2"].tolist() == [[[-1, 126.5]], [[35, 3]]]
    assert seen.maps["conv3"].tolist() == [1.5, -2]
    assert seen.channels["conv2"] == (7, 2)
    assert (seen.notes, failed.notes) == (("grey to RGB", "cropped"), ())
    assert (seen.model, seen.version, seen.engine, seen.device) == ("cifar", "1.0", "torch-2.15.0", "cpu")
    assert isinstance(failed.error, ClientBadImage)


def test_both_sides_know_the_golden_explanation() -> None:
    message = request_with_pictures(build_options(top_k=1), PICTURES[:1], "")
    message.explain.CopyFrom(build_explain_options(method="integrated_gradients", target=3, steps=20))
    assert message.SerializeToString() == golden("explain")
    asked = request.parse(Job({"request": bytearray(golden("explain"))}, {}), max_images=2)
    assert asked.options.explain == Explain("integrated_gradients", target=3, steps=20, picture=True)
    [seen] = read_explanations(client_wire.PredictReply.FromString(golden("explanation")), 1)
    assert (seen.method, seen.layer, seen.target, seen.label, seen.delta) == (
        "integrated_gradients",
        "",
        3,
        "cat",
        0.0625,
    )
    assert (seen.original_size, seen.region) == ((30, 40), (5, 0, 25, 40))
    assert (seen.heat.tolist(), seen.picture.tolist()) == ([[[0.5, -1.25]]], [[[0, 127.5]]])


def test_both_sides_know_the_golden_edits() -> None:
    scale = Edit(layer="conv1", operation="scale", value=0.5, channels=[3, 5], region=(0, 2, 4, 8))
    edits = [
        scale,
        {"layer": "conv1", "operation": "zero", "channels": {"except": [0]}, "box": [0, 0, 16.5, 32]},
        {"layer": "conv2", "operation": "clamp", "value": (-1, 1)},
        Edit(layer="conv2", operation="patch", value=1, picture=0),
    ]
    options = build_options(layers="conv2", top_k=1, edits=edits, compare=True)
    assert request_with_pictures(options, PICTURES, "").SerializeToString() == golden("edit")
    asked = request.parse(Job({"request": bytearray(golden("edit"))}, {}), max_images=2).options
    assert asked.compare
    assert asked.edits == (
        HandlerEdit("conv1", "scale", (0.5,), (3, 5), (), (0, 2, 4, 8)),
        HandlerEdit("conv1", "zero", (), (), (0,), (), (0, 0, 16.5, 32)),
        HandlerEdit("conv2", "clamp", (-1, 1)),
        HandlerEdit("conv2", "patch", (1,), picture=0),
    )
    reply = client_wire.PredictReply.FromString(golden("edited"))
    check_edits(reply, 4)
    [seen] = read_predictions(reply, 1)
    assert seen.change is not None
    assert [tuple(score)[:4] for score in seen.change.top] == [(3, "cat", 0.5, 1.5), (5, "dog", -0.5, -2)]
    assert seen.change.maps["conv2"].tolist() == [[[0, -1]]]


def test_the_client_raises_the_golden_refusal() -> None:
    with pytest.raises(ClientUnknownLayer, match="conv1, conv2"):
        read_predictions(client_wire.PredictReply.FromString(golden("refusal")), 1)


def test_the_client_reads_the_golden_card() -> None:
    seen = read_card(client_wire.PredictReply.FromString(golden("card")))
    assert seen.classes == ("cat", "dog")
    assert (seen.input.resize, seen.input.interpolation, seen.input.antialias) == ((36,), "bicubic", True)
    assert seen.layers[0].receptive_field_start == (-1, -1)
    assert seen.training.test_accuracy == 0.65625
    assert seen.limits.max_images == 64
    assert seen.explanations == ("grad_cam", "occlusion", "picture")


def test_the_handler_writes_the_golden_card() -> None:
    from google.protobuf.json_format import MessageToDict

    expected = wire.PredictReply.FromString(golden("card"))
    values = MessageToDict(expected.card, preserving_proto_field_name=True)
    for name in ("max_image_bytes", "max_image_pixels", "max_reply_bytes"):  # JSON writes 64-bit numbers as text.
        values["limits"][name] = int(values["limits"][name])
    for place in (values, *values["layers"]):
        place |= {
            name: int(place[name]) for name in ("parameters", "multiply_adds", "dense_parameters") if name in place
        }
    for layer in values["layers"]:
        layer["bytes"] = {dtype: int(size) for dtype, size in layer["bytes"].items()}
    encoded = card.encode(values, PROTOBUF)
    assert wire.PredictReply.FromString(encoded.body) == expected


def test_torchserves_service_is_spelt_as_torchserve_spells_it() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceAPIsService"]
    assert service.full_name == "org.pytorch.serve.grpc.inference.InferenceAPIsService"
    fields = {field.name: field.number for field in inference_pb2.PredictionsRequest.DESCRIPTOR.fields}
    assert fields == {"model_name": 1, "model_version": 2, "input": 3}
    assert inference_pb2.PredictionResponse.DESCRIPTOR.fields_by_name["prediction"].number == 1
    assert "StreamPredictions" not in {method.name for method in service.methods}
