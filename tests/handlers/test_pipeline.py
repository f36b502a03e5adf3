"""The whole pipeline in this process: each request gets its own results."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.networks.cifar import Cifar
from handlers.networks.edges import Edges
from handlers.outputs import maps
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import (
    CIFAR_CLASSES,
    CIFAR_INPUT,
    REQUEST_ID,
    ask_json,
    ask_message,
    ask_rest,
    cells,
    make_service,
)
from tests.pictures import FIVE_BY_FIVE, FIVE_BY_FIVE_EDGES, colours, npy, png

GOOD = png(colours())


def by_hand(network: Cifar, *arrays: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    """Run the network operation by operation, from its own weights, on pictures (H, W, 3) uint8."""
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]).float() / 255
    images = (images - torch.tensor(CIFAR_INPUT.mean).view(1, 3, 1, 1)) / torch.tensor(CIFAR_INPUT.std).view(1, 3, 1, 1)
    state = network.state_dict()
    with torch.inference_mode():
        conv1 = functional.conv2d(images, state["conv1.weight"], state["conv1.bias"], padding=1).relu()
        pooled = functional.max_pool2d(conv1, 2)
        conv2 = functional.conv2d(pooled, state["conv2.weight"], state["conv2.bias"], padding=1)
        logits = functional.linear(conv2.flatten(1), state["fc.weight"], state["fc.bias"])
    return {"conv1": conv1, "conv2": conv2, "logits": logits}


def test_maps_and_logits_are_bit_for_bit_those_of_the_network_run_by_hand(service: Pipeline, network: Cifar) -> None:
    arrays = [colours(seed) for seed in range(3)]
    reply = ask_message(service, wire.PredictRequest(pictures=map(png, arrays), layers=["all"], top_k=0))
    expected = by_hand(network, *arrays)
    for number, result in enumerate(reply.results):
        assert [item.layer for item in result.maps] == ["conv1", "conv2"]
        for item in result.maps:
            assert np.array_equal(cells(item), expected[item.layer][number].numpy())
        logits = {score.index: score.logit for score in result.top}
        assert [logits[index] for index in range(10)] == expected["logits"][number].tolist()


def test_probabilities_are_the_softmax_in_falling_order_with_their_labels(service: Pipeline, network: Cifar) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], top_k=0))
    [result] = reply.results
    expected = by_hand(network, colours())["logits"][0].softmax(0)
    assert [score.probability for score in result.top] == pytest.approx(sorted(expected.tolist(), reverse=True))
    assert [score.label for score in result.top] == [CIFAR_CLASSES[score.index] for score in result.top]


@pytest.mark.parametrize(("asked", "given"), [(None, 5), (0, 10), (1, 1), (3, 3), (99, 10)])
def test_top_k_counts_classes(service: Pipeline, asked: int | None, given: int) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], top_k=asked))
    assert len(reply.results[0].top) == given


def test_no_maps_travel_unless_asked_for(service: Pipeline) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD]))
    assert not reply.results[0].maps


def test_maps_come_in_the_order_asked_for(service: Pipeline) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["conv2", "conv1", "conv2"]))
    assert [item.layer for item in reply.results[0].maps] == ["conv2", "conv1"]


def test_float16_maps_are_the_rounded_ones(service: Pipeline, network: Cifar) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["conv1"], map_dtype=wire.FLOAT16))
    expected = by_hand(network, colours())["conv1"][0].half().numpy()
    assert np.array_equal(cells(reply.results[0].maps[0]), expected)


def test_uint8_maps_are_within_half_a_step(service: Pipeline, network: Cifar) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["conv2"], map_dtype=wire.UINT8))
    [item] = reply.results[0].maps
    scale, offset = np.array(item.tensor.scale)[:, None, None], np.array(item.tensor.offset)[:, None, None]
    expected = by_hand(network, colours())["conv2"][0].numpy()
    assert (np.abs(offset + scale * cells(item) - expected) <= scale * 0.5001 + 1e-6).all()


@pytest.mark.parametrize(("pool", "shape"), [(1, (32,)), (4, (32, 4, 4)), (16, (32, 16, 16))])
def test_pooled_maps_are_averages(service: Pipeline, network: Cifar, pool: int, shape: tuple[int, ...]) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["conv2"], pool=pool))
    expected = functional.adaptive_avg_pool2d(by_hand(network, colours())["conv2"][0], pool).reshape(shape)
    assert np.allclose(cells(reply.results[0].maps[0]), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_listed_channels_come_in_the_order_listed(service: Pipeline, network: Cifar) -> None:
    message = wire.PredictRequest(pictures=[GOOD], layers=["conv1"])
    message.channels.indexes.extend([7, 0, 3])
    [item] = ask_message(service, message).results[0].maps
    assert list(item.channels) == [7, 0, 3]
    assert np.array_equal(cells(item), by_hand(network, colours())["conv1"][0][[7, 0, 3]].numpy())


def test_the_strongest_channels_are_those_of_largest_mean(service: Pipeline, network: Cifar) -> None:
    message = wire.PredictRequest(pictures=[GOOD], layers=["conv1"])
    message.channels.strongest = 4
    [item] = ask_message(service, message).results[0].maps
    means = by_hand(network, colours())["conv1"][0].mean(dim=(1, 2))
    assert list(item.channels) == means.argsort(descending=True)[:4].tolist()


def test_an_embedding_of_chosen_channels_has_one_number_each(service: Pipeline) -> None:
    message = wire.PredictRequest(pictures=[GOOD], layers=["conv1"], pool=1, map_dtype=wire.UINT8)
    message.channels.indexes.extend([5, 2])
    [item] = ask_message(service, message).results[0].maps
    assert cells(item).shape == (2,)


def test_edges_gives_exactly_the_documents_map(edges: Pipeline) -> None:
    reply = ask_message(edges, wire.PredictRequest(pictures=[npy(FIVE_BY_FIVE)], layers=["conv1"]))
    assert np.array_equal(cells(reply.results[0].maps[0])[0], FIVE_BY_FIVE_EDGES)
    assert not reply.results[0].top


def test_a_reply_too_large_is_foreseen_where_any_size_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_reply_bytes=1_000_000)
    service = make_service(Edges, Preprocessing(1, None, None), (), limits=limits)
    monkeypatch.setattr(service.predictor, "run", lambda jobs: pytest.fail("it ran") if jobs else None)
    picture = npy(np.zeros((600, 600), np.uint8))
    reply = ask_message(service, wire.PredictRequest(pictures=[picture], layers=["conv1"]))
    assert reply.error.code == "reply_too_large"
    monkeypatch.undo()
    reply = ask_message(service, wire.PredictRequest(pictures=[picture], layers=["conv1"], map_dtype=wire.UINT8))
    assert not reply.HasField("error")


def test_pictures_of_different_sizes_travel_in_one_request_where_any_size_is_taken(edges: Pipeline) -> None:
    sizes = [(5, 5), (9, 4), (5, 5), (1, 1)]
    pictures = [npy(np.full(size, 0.5, np.float32)) for size in sizes]
    reply = ask_message(edges, wire.PredictRequest(pictures=pictures, layers=["conv1"]))
    assert [cells(result.maps[0]).shape for result in reply.results] == [(1, *size) for size in sizes]


def test_an_array_of_several_pictures_gets_several_results(service: Pipeline) -> None:
    arrays = np.stack([colours(1), colours(2)])
    together = ask_message(service, wire.PredictRequest(pictures=[npy(arrays)], top_k=1))
    apart = ask_message(service, wire.PredictRequest(pictures=[png(arrays[0]), png(arrays[1])], top_k=1))
    assert list(together.results) == list(apart.results)


class TestOneBadAmongGood:
    def test_inside_a_request(self, service: Pipeline) -> None:
        reply = ask_message(service, wire.PredictRequest(pictures=[GOOD, b"text", GOOD[:99], GOOD]))
        assert [result.error.code for result in reply.results] == ["", "bad_image", "bad_image", ""]
        assert reply.results[0].top == reply.results[3].top
        assert not reply.HasField("error")

    def test_inside_a_batch_over_both_transports(self, service: Pipeline) -> None:
        good = wire.PredictRequest(pictures=[GOOD], layers=["conv1"])
        rows = [
            {"request": bytearray(good.SerializeToString())},
            {"body": bytearray(b"text")},
            {"request": bytearray(b"\xff\xff\xff")},
            {"request": bytearray(wire.PredictRequest(pictures=[GOOD], layers=["nose"]).SerializeToString())},
            {"body": bytearray(GOOD)},
            {"body": bytearray(b""), "data": 7},
        ]
        properties = [{}, {"Host": "x"}, {}, {}, {"Host": "x", "Content-Length": "99"}, {"Host": "x"}]
        answers = service.respond(rows, properties)
        assert [answer.status for answer in answers] == [200, 400, 400, 400, 200, 400]
        alone = ask_message(service, good)
        beside = wire.PredictReply.FromString(answers[0].body)
        # Torch's convolution rounds by batch size, so neighbours may move the last bit and no more.
        assert np.allclose(cells(beside.results[0].maps[0]), cells(alone.results[0].maps[0]), rtol=1e-5, atol=1e-6)
        assert wire.PredictReply.FromString(answers[3].body).error.code == "unknown_layer"
        assert json.loads(answers[1].body)["error"]["code"] == "bad_image"

    @pytest.mark.parametrize("dtype", [wire.FLOAT16, wire.UINT8])
    def test_maps_that_cannot_travel_harm_no_neighbour_who_asked_alike(self, dtype: wire.Dtype) -> None:
        network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
        nn.init.constant_(network[0].weight, 3e38)
        service = make_service(network, Preprocessing(1, None, None), (), layers={"conv1": "0"})
        values = (0.0, 1.5, 0.0, 0.1)  # Of these the second's map is infinite; float16 cannot hold the last one's.
        pictures = [npy(np.full((4, 4), value, np.float32)) for value in values]
        messages = [wire.PredictRequest(pictures=[one], layers=["conv1"], map_dtype=dtype) for one in pictures]
        messages[2].layers[:] = ["conv1", "conv1"]
        answers = service.respond([{"request": message.SerializeToString()} for message in messages], [{}] * 4)
        replies = [wire.PredictReply.FromString(answer.body) for answer in answers]
        last = "bad_image" if dtype == wire.FLOAT16 else ""
        assert [reply.error.code for reply in replies] == ["", "bad_image", "", last]
        assert np.all(cells(replies[0].results[0].maps[0]) == 0)
        alone = [ask_message(service, message) for message in messages]
        assert [list(reply.results) for reply in replies] == [list(reply.results) for reply in alone]

    def test_maps_for_which_memory_is_wanting_harm_no_neighbour(
        self, service: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, blank = maps.quantise, np.zeros((32, 32, 3), np.uint8)
        [layer] = ask_message(service, wire.PredictRequest(pictures=[npy(blank)], layers=["conv1"])).results[0].maps
        largest = float(cells(layer).max())

        def fail_on_blank(values: np.ndarray[Any, Any]) -> Any:
            if any(abs(float(one.max()) - largest) < 1e-5 for one in values):
                raise MemoryError
            return real(values)

        monkeypatch.setattr(maps, "quantise", fail_on_blank)
        pictures = (npy(colours(1)), npy(blank), npy(colours(2)))
        messages = [wire.PredictRequest(pictures=[one], layers=["conv1"], map_dtype=wire.UINT8) for one in pictures]
        answers = service.respond([{"request": message.SerializeToString()} for message in messages], [{}] * 3)
        replies = [wire.PredictReply.FromString(answer.body) for answer in answers]
        assert [reply.error.code for reply in replies] == ["", "internal", ""]
        assert all(reply.results[0].maps for reply in (replies[0], replies[2]))

    def test_neighbours_who_ask_alike_each_get_their_own_maps(self, service: Pipeline) -> None:
        """Neighbours with one set of options, others between them, and one with two pictures."""
        arrays = list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
        asked: list[tuple[slice, dict[str, Any]]] = [
            (slice(0, 1), {"layers": ["all"], "map_dtype": wire.UINT8}),
            (slice(1, 3), {"layers": ["all"], "map_dtype": wire.UINT8}),
            (slice(3, 4), {"layers": ["conv2"], "pool": 2}),
            (slice(0, 1), {"layers": ["all"], "map_dtype": wire.UINT8}),
        ]
        messages = [wire.PredictRequest(pictures=list(map(npy, arrays[own])), **options) for own, options in asked]
        answers = service.respond([{"request": message.SerializeToString()} for message in messages], [{}] * 4)
        for answer, message in zip(answers, messages, strict=True):
            beside, alone = wire.PredictReply.FromString(answer.body), ask_message(service, message)
            assert len(beside.results) == len(message.pictures)
            for here, there in zip(beside.results, alone.results, strict=True):
                assert [one.layer for one in here.maps] == [one.layer for one in there.maps]
                for one, other in zip(here.maps, there.maps, strict=True):
                    # Torch's convolution rounds by batch size, which may take a cell over to the next step.
                    close = np.abs(cells(one).astype(np.float32) - cells(other).astype(np.float32))
                    assert close.max() <= (1 if message.map_dtype else 1e-5)

    def test_every_picture_bad_is_an_error_of_the_request_too(self, service: Pipeline) -> None:
        answer = ask_rest(service, {"data": [bytearray(b"text"), bytearray(b"more")]})
        values = json.loads(answer.body)
        assert answer.status == 400
        assert values["error"] == values["results"][0]["error"]
        assert len(values["results"]) == 2


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (wire.PredictRequest(), "bad_request"),
        (wire.PredictRequest(pictures=[b""]), "bad_image"),
        (wire.PredictRequest(pictures=[GOOD], layers=["nose"]), "unknown_layer"),
        (wire.PredictRequest(pictures=[GOOD], pool=0, layers=["conv1"]), "bad_request"),
        (wire.PredictRequest(pictures=[GOOD], pool=33, layers=["conv1"]), "bad_request"),
        (wire.PredictRequest(pictures=[GOOD], map_dtype=9), "bad_request"),  # type: ignore[arg-type]
        (wire.PredictRequest(pictures=[GOOD], layers=["conv1"], channels={"indexes": [16]}), "bad_request"),
        (wire.PredictRequest(pictures=[GOOD], channels={"indexes": [1], "strongest": 1}), "bad_request"),
        (wire.PredictRequest(pictures=[npy(colours()[:, :, :1])]), "wrong_channels"),
        (wire.PredictRequest(pictures=[GOOD] * 10_000), "too_many_images"),
        (wire.PredictRequest(pictures=[npy(np.zeros((65, 32, 32, 3), np.uint8))]), "too_many_images"),
        (wire.PredictRequest(pictures=[GOOD, npy(np.zeros((64, 32, 32, 3), np.uint8))]), "too_many_images"),
        (wire.PredictRequest(pictures=[npy(np.full((32, 32, 3), 3e38, np.float32))]), "bad_image"),
    ],
)
def test_a_bad_request_gets_its_code(service: Pipeline, message: wire.PredictRequest, code: str) -> None:
    reply = ask_message(service, message)
    assert reply.error.code == code
    assert reply.error.message
    assert reply.model == "cifar"


def test_unknown_layer_says_which_there_are(service: Pipeline) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["nose"]))
    assert "conv1, conv2" in reply.error.message


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, limits=Limits(max_reply_bytes=100_000))


class TestReplySize:
    def test_a_reply_that_could_not_be_sent_is_refused_and_says_what_to_ask_instead(self, small: Pipeline) -> None:
        reply = ask_message(small, wire.PredictRequest(pictures=[GOOD] * 2, layers=["all"]))
        assert reply.error.code == "reply_too_large"
        assert "uint8" in reply.error.message

    @pytest.mark.parametrize(
        "options",
        [
            {"map_dtype": wire.UINT8},
            {"pool": 4},
            {"channels": {"strongest": 2}},
            {"channels": {"indexes": [0, 1]}},
        ],
    )
    def test_what_it_says_helps(self, small: Pipeline, options: dict[str, Any]) -> None:
        reply = ask_message(small, wire.PredictRequest(pictures=[GOOD] * 2, layers=["all"], **options))
        assert not reply.HasField("error")

    def test_base64_counts(self, small: Pipeline) -> None:
        body = ask_json(small, {"body": bytearray(GOOD)}, x_convscope_layers="all")
        assert body["error"]["code"] == "reply_too_large"

    def test_a_batch_of_largest_replies_fits_what_torchserve_sends(self) -> None:
        limits = Limits.of({}, batch_size=8)
        assert limits.max_reply_bytes * 8 < 6_553_500
        roomy = Limits.of({}, batch_size=2, max_response_bytes=1_000_000)
        assert 400_000 < roomy.max_reply_bytes < 500_000
        own = Limits.of({"convscope": {"max_reply_bytes": 5}}, batch_size=2)
        assert own.max_reply_bytes == 5


class TestModelCard:
    def test_an_empty_get_answers_the_card(self, service: Pipeline) -> None:
        card = ask_json(service, {"body": bytearray()}, content_length="0")  # As netty adds it to a GET.
        assert card["classes"] == list(CIFAR_CLASSES)
        assert card["input"]["height"] == 32
        assert [(layer["name"], layer["shape"]) for layer in card["layers"]] == [
            ("conv1", [16, 32, 32]),
            ("conv2", [32, 16, 16]),
        ]
        assert card["layers"][1]["receptive_field"] == [8, 8]
        assert card["layers"][0]["bytes"] == {"float32": 65536, "float16": 32768, "uint8": 16384}
        assert card["limits"]["max_images"] == 64

    def test_the_card_says_what_makes_a_map_and_what_it_costs(self, service: Pipeline) -> None:
        card = ask_json(service, {"body": bytearray()})
        told = {name: card["layers"][1][name] for name in ("operation", "input_shape", "kernel", "step", "padding")}
        assert told == {
            "operation": "Conv2d",
            "input_shape": [16, 16, 16],
            "kernel": [3, 3],
            "step": [1, 1],
            "padding": [1, 1],
        }
        assert (card["layers"][1]["dilation"], card["layers"][1]["groups"]) == ([1, 1], 1)
        assert card["layers"][1]["multiply_adds"] == 32 * 16 * 16 * 16 * 9
        assert card["layers"][1]["dense_parameters"] == 16**3 * 32 * 16**2 + 32 * 16**2
        assert card["multiply_adds"] == 16 * 32 * 32 * 27 + 32 * 16 * 16 * 144 + 8192 * 10
        message = ask_message(service, wire.PredictRequest(describe=True)).card
        assert message.multiply_adds == card["multiply_adds"]
        assert message.layers[1].dense_parameters == card["layers"][1]["dense_parameters"]

    def test_a_network_that_was_not_trained_has_no_training_in_its_card(self, service: Pipeline) -> None:
        assert ask_json(service, {"body": bytearray()})["training"] == {}
        assert not ask_message(service, wire.PredictRequest(describe=True)).card.HasField("training")

    def test_protobuf_and_json_say_the_same(self, service: Pipeline) -> None:
        from google.protobuf.json_format import MessageToDict

        message = ask_message(service, wire.PredictRequest(describe=True)).card
        as_json = ask_json(service, {"body": bytearray()})
        as_dict = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        assert as_dict["classes"] == as_json["classes"]
        assert as_dict["layers"][0]["receptive_field_start"] == as_json["layers"][0]["receptive_field_start"]
        assert int(as_dict["parameters"]) == as_json["parameters"]
        assert as_dict["input"]["mean"] == pytest.approx(as_json["input"]["mean"])

    def test_plain_keys_ask_for_it_on_grpc(self, service: Pipeline) -> None:
        [answer] = service.respond([{"describe": bytearray(b"1")}], [{"describe": {"content-type": ""}}])
        assert wire.PredictReply.FromString(answer.body).card.model == "cifar"

    def test_while_draining_readiness_says_no_and_predictions_go_on(self, tmp_path: Path) -> None:
        flag = tmp_path / "draining"
        service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, drain_file=flag)
        assert ask_rest(service, {"body": bytearray()}).status == 200
        flag.touch()
        answer = ask_rest(service, {"body": bytearray()})
        assert answer.status == 503
        assert json.loads(answer.body)["error"]["code"] == "draining"
        assert not ask_message(service, wire.PredictRequest(pictures=[GOOD])).HasField("error")

    def test_until_the_server_is_warm_readiness_says_no_and_predictions_go_on(self, tmp_path: Path) -> None:
        flag = tmp_path / "starting"
        flag.touch()
        service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, starting_file=flag)
        answer = ask_rest(service, {"body": bytearray()})
        assert answer.status == 503
        assert json.loads(answer.body)["error"]["code"] == "draining"
        assert not ask_message(service, wire.PredictRequest(pictures=[GOOD])).HasField("error")
        flag.unlink()
        assert ask_rest(service, {"body": bytearray()}).status == 200

    def test_it_is_refused_when_the_network_no_longer_works(self) -> None:
        network = Cifar()
        service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES)
        network.fc.weight.fill_(float("nan"))
        answer = ask_rest(service, {"body": bytearray()})
        assert answer.status == 500
        assert json.loads(answer.body)["error"]["code"] == "internal"


def test_a_network_with_broken_weights_is_not_served() -> None:
    network = Cifar()
    torch.nn.init.constant_(network.fc.bias, float("inf"))
    with pytest.raises(RuntimeError, match="finite"):
        make_service(network, CIFAR_INPUT, CIFAR_CLASSES)


GOOD_BASE64 = base64.b64encode(GOOD).decode()
FORM = {"content_type": "multipart/form-data; boundary=x"}
IN_HEADERS = {"x_convscope_layers": "conv1", "x_convscope_top_k": "2"}
BODIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "raw, no type": ({"body": GOOD}, IN_HEADERS),
    "npy, options as JSON, other case": (
        {"body": npy(colours())},
        {"content_type": "application/x-npy", "X_Convscope_Layers": '["conv1"]', "X_Convscope_Top_K": "2"},
    ),
    "form": ({"data": GOOD, "layers": b"conv1", "top_k": b"2"}, FORM),
    "form and header": ({"data": GOOD, "layers": b"conv1"}, FORM | {"x_convscope_top_k": "2"}),
    "json": (
        {"body": {"data": GOOD_BASE64, "layers": ["conv1"], "top_k": 2}},
        {"content_type": "application/json"},
    ),
    "json list, data URL": (
        {"body": {"data": ["data:image/png;base64," + GOOD_BASE64], "layers": "conv1", "top_k": 2}},
        {"content_type": "application/json; charset=utf-8"},
    ),
    "protobuf": (
        {"body": wire.PredictRequest(pictures=[GOOD], layers=["conv1"], top_k=2).SerializeToString()},
        {"content_type": "application/x-protobuf", "accept": "application/json"},
    ),
}


@pytest.fixture(scope="module")
def expected(service: Pipeline) -> dict[str, Any]:
    values = ask_json(
        service,
        {"body": bytearray(GOOD)},
        content_type="image/png",
        x_convscope_layers="conv1",
        x_convscope_top_k="2",
    )
    assert len(values["results"][0]["top"]) == 2
    return values


class TestEveryBody:
    """One picture and the same options, however they are sent, give the same answer."""

    @pytest.mark.parametrize("name", BODIES)
    def test_gives_the_same(self, service: Pipeline, expected: dict[str, Any], name: str) -> None:
        row, headers = BODIES[name]
        frozen = {key: bytearray(value) if isinstance(value, bytes) else value for key, value in row.items()}
        assert ask_json(service, frozen, **headers) == expected

    def test_plain_keys_on_grpc_give_the_same(self, service: Pipeline, expected: dict[str, Any]) -> None:
        row = {"data": GOOD, "layers": b"conv1", "top_k": b"2", "accept": b"application/json"}
        [answer] = service.respond([{key: bytearray(value) for key, value in row.items()}], [{}], [REQUEST_ID])
        assert json.loads(answer.body) == expected


class TestEveryReply:
    def test_npz_opens_with_numpy(self, service: Pipeline, network: Cifar) -> None:
        answer = ask_rest(
            service, {"body": bytearray(GOOD)}, accept="application/x-npz", x_convscope_layers="conv1,conv2"
        )
        arrays = np.load(io.BytesIO(answer.body), allow_pickle=False)
        expected = by_hand(network, colours())
        assert answer.media_type == "application/x-npz"
        assert np.array_equal(arrays["conv1"], expected["conv1"][0])
        assert np.array_equal(arrays["conv2"], expected["conv2"][0])
        assert arrays["label"].tolist() == [CIFAR_CLASSES[index] for index in arrays["index"]]
        assert json.loads(str(arrays["reply"]))["model"] == "cifar"

    def test_npz_of_several_pictures_numbers_them(self, service: Pipeline) -> None:
        row = {"data": [bytearray(GOOD), bytearray(b"text"), bytearray(GOOD)], "layers": bytearray(b"conv1")}
        row["map_dtype"] = bytearray(b"uint8")
        answer = ask_rest(service, row, accept="application/x-npz")
        arrays = np.load(io.BytesIO(answer.body), allow_pickle=False)
        assert {"0/conv1", "0/conv1.scale", "0/conv1.offset", "2/conv1"} <= set(arrays)
        assert "1/conv1" not in arrays
        assert json.loads(str(arrays["reply"]))["results"][1]["error"]["code"] == "bad_image"

    def test_png_shows_each_channel_as_a_tile_on_its_own_scale(self, service: Pipeline, network: Cifar) -> None:
        answer = ask_rest(service, {"body": bytearray(GOOD)}, accept="image/png", x_convscope_layers="conv1")
        grid = np.asarray(Image.open(io.BytesIO(answer.body)))
        assert answer.media_type == "image/png"
        assert grid.shape == (2 * 64 + 1, 8 * 64 + 7)
        tile = grid[65:, 65:129][::2, ::2].astype(float)  # Channel 9: second row, second column.
        channel = by_hand(network, colours())["conv1"][0][9].numpy()
        span = channel.max() - channel.min()
        assert np.abs(tile - (channel - channel.min()) / span * 255).max() <= 0.51

    @pytest.mark.parametrize("layers", ["", "conv1,conv2"])
    def test_png_needs_exactly_one_layer(self, service: Pipeline, layers: str) -> None:
        answer = ask_rest(service, {"body": bytearray(GOOD)}, accept="image/png", x_convscope_layers=layers)
        assert answer.status == 400
        assert answer.media_type == "application/json"
        assert "exactly one" in json.loads(answer.body)["error"]["message"]

    def test_an_error_asked_for_as_png_is_json(self, service: Pipeline) -> None:
        answer = ask_rest(service, {"body": bytearray(b"text")}, accept="image/png", x_convscope_layers="conv1")
        assert (answer.status, answer.media_type) == (400, "application/json")

    def test_json_tensors_are_base64_little_endian(self, service: Pipeline, network: Cifar) -> None:
        values = ask_json(service, {"body": bytearray(GOOD)}, x_convscope_layers="conv2")
        tensor = values["results"][0]["maps"]["conv2"]
        array = np.frombuffer(base64.b64decode(tensor["data"]), "<f4").reshape(tensor["shape"])
        assert tensor["dtype"] == "float32"
        assert np.array_equal(array, by_hand(network, colours())["conv2"][0])

    @pytest.mark.parametrize("accept", ["text/html", "application/xml, text/*", "application/json;q=0"])
    def test_what_we_do_not_speak_is_refused(self, service: Pipeline, accept: str) -> None:
        answer = ask_rest(service, {"body": bytearray(GOOD)}, accept=accept)
        assert answer.status == 400
        assert "application/x-npz" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize(
    ("row", "headers", "code"),
    [
        ({"body": b"{"}, {"content_type": "application/json"}, "bad_request"),
        ({"body": []}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": "%%%"}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": 3}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": ["aGVsbG8="] * 10_000}}, {"content_type": "application/json"}, "too_many_images"),
        ({"body": {"data": "aGVsbG8=", "layer": "conv1"}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": "aGVsbG8=", "top_k": "3"}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": "aGVsbG8=", "top_k": True}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": "aGVsbG8=", "layers": {}}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": {"data": "aGVsbG8=", "channels": []}}, {"content_type": "application/json"}, "bad_request"),
        ({"body": b""}, {"x_convscope_method": "POST"}, "bad_request"),
        ({"body": b""}, {"content_type": "image/png", "Content_Length": "0"}, "bad_request"),
        ({}, {"content_type": "application/x-www-form-urlencoded", "Content_Length": "0"}, "bad_request"),
        ({"body": GOOD}, {"x_convscope_pool": "big"}, "bad_request"),
        ({"body": GOOD}, {"x_convscope_channels": "1,x"}, "bad_request"),
        ({"body": GOOD}, {"x_convscope_channels": "[" * 100_000}, "bad_request"),
        ({"data": GOOD, "top_k": b"\xff"}, {}, "bad_request"),
        ({"picture": GOOD}, {}, "bad_request"),
        ({"body": b"\xff\xff"}, {"content_type": "application/x-protobuf"}, "bad_request"),
    ],
)
def test_a_body_that_cannot_be_read_gets_its_code(
    service: Pipeline, row: dict[str, Any], headers: dict[str, str], code: str
) -> None:
    frozen = {key: bytearray(value) if isinstance(value, bytes) else value for key, value in row.items()}
    assert ask_json(service, frozen, **headers)["error"]["code"] == code
