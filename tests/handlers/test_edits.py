"""Edits equal hooks on the network run in torch, do not affect other requests, and are rejected with a message."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handlers import optional_torch
from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.network.engines.torch_choice import choose_in_torch
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from handlers.outputs import editor
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import (
    CIFAR_CLASSES,
    CIFAR_INPUT,
    ask_json,
    ask_message,
    ask_rest,
    cells,
    make_archive,
    make_service,
)
from tests.pictures import colours, npy, png

SIZE = Preprocessing(3, 8, 8)
PICTURES = [colours(seed, 8, 8) for seed in range(5)]
FILES = [png(picture) for picture in PICTURES]
Change = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """One ReLU, in place, that runs three times, around a sum."""

    layers: ClassVar = {
        "image": "images",
        "first": "relu",
        "inner": "relu_1",
        "sum": "add",
        "out": "relu_2",
        "fc": "fc",
    }
    layouts: ClassVar = {"fc": "vector"}

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.norm(self.one(images)))
        inner = self.relu(self.two(maps))
        return self.fc(self.relu(maps + inner).mean((2, 3)))


class Branches(nn.Module):
    """Two convolutions of one map, put together again."""

    layers: ClassVar = {"shared": "shared", "left": "left", "right": "right", "both": "cat"}

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 3, stride=2), nn.Conv2d(6, 2, 3, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.shared(images)
        return self.fc(torch.cat([self.left(maps), self.right(maps).tanh()], dim=1).mean((2, 3)))


class Tokens(nn.Module):
    """Patches behind a class token and before a register, and maps with their channels last."""

    layers: ClassVar = {"last": "embed_last", "blocks": "mix", "blocks.extra": "mix"}
    layouts: ClassVar = {"last": "channels_last", "blocks": "tokens:4x4+1", "blocks.extra": "extra_tokens:4x4+1"}

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_last = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 6)
        self.token, self.register = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 1, 6))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.embed_last(self.embed(images).permute(0, 2, 3, 1))
        size = len(images)
        others = self.token.expand(size, -1, -1), self.register.expand(size, -1, -1)
        tokens = self.mix(torch.cat([others[0], maps.flatten(1, 2), others[1]], dim=1))
        weights = (tokens @ tokens.transpose(1, 2)).softmax(dim=2)
        return self.head((weights @ tokens)[:, 0])


class Pixels(nn.Module):
    """The scores are pixels."""

    layers: ClassVar = {"image": "images"}

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10]


class Untraceable(Residual):
    """Decides by a value, so its modules are watched instead: what runs once can be edited, what runs thrice cannot."""

    layers: ClassVar = {"first": "norm", "inner": "two", "relu": "relu", "returned": "output:1"}
    layouts: ClassVar = {}
    output: ClassVar = "0"

    def forward(self, images: Tensor) -> Any:
        if images.sum() > 1e9:
            raise ValueError
        scores = super().forward(images)
        return scores, images * 2


@cache  # Drawing up a card takes longer than most tests here; requests leave a service as it was.
def make(network: type[Any], **more: Any) -> tuple[Any, Pipeline]:
    """Return a network as its author wrote it, in-place activations and all, and a service of a copy."""
    torch.manual_seed(0)
    own = network().eval()
    more = {"layouts": getattr(network, "layouts", {}), "output": getattr(network, "output", ""), **more}
    return own, make_service(copy.deepcopy(own), SIZE, CIFAR_CLASSES, **more)


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, int, Change]]) -> Iterator[None]:
    """Let functions replace what modules return, each at one of the module's runs, counted from 0."""

    def hook(run: int, change: Change) -> Callable[..., Tensor | None]:
        runs = iter(range(100))
        return lambda module, inputs, output: change(output.clone()) if next(runs) == run else None

    handles = [module.register_forward_hook(hook(run, change)) for module, run, change in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(
    network: Any,
    hooks: Sequence[tuple[nn.Module, int, Change]],
    pictures: Sequence[np.ndarray[Any, Any]] = PICTURES[:1],
) -> np.ndarray[Any, Any]:
    """Return the logits (N, K) of a network with hooks."""
    with hooked(hooks), torch.inference_mode():
        returned = network(torch.from_numpy(to_input(pictures, SIZE)))
    return np.asarray((returned[0] if isinstance(returned, tuple) else returned).numpy())


def ask(
    service: Pipeline, edits: Sequence[Mapping[str, Any]], files: Sequence[bytes] = FILES[:1], **fields: Any
) -> wire.PredictReply:
    """Ask with edits as JSON has them, and read the reply as protobuf."""
    import base64

    body = {"data": [base64.b64encode(file).decode() for file in files], "edits": edits, "top_k": 0, **fields}
    answer = ask_rest(service, {"body": body}, content_type="application/json", accept="application/x-protobuf")
    return wire.PredictReply.FromString(answer.body)


def logits(result: wire.Result) -> np.ndarray[Any, Any]:
    found = np.empty(len(CIFAR_CLASSES), np.float32)
    for score in result.top:
        found[score.index] = score.logit
    return found


def maps(result: wire.Result) -> dict[str, np.ndarray[Any, Any]]:
    return {item.layer: cells(item) for item in result.maps}


def write(place: Any, change: Callable[[Tensor], Any]) -> Change:
    """Return a function that changes one place of (N, C, h, w), as a user would write it."""

    def apply(values: Tensor) -> Tensor:
        values[place] = change(values[place])
        return values

    return apply


PLACE = (slice(None), [1, 3], slice(2, 6), slice(0, 3))
WHERE = {"channels": [1, 3], "region": [2, 0, 6, 3]}
OPERATIONS: list[tuple[dict[str, Any], Change]] = [
    ({"operation": "zero"}, lambda part: part * 0),
    ({"operation": "scale", "value": -2.5}, lambda part: part * -2.5),
    ({"operation": "add", "value": 0.3}, lambda part: part + 0.3),
    ({"operation": "clamp", "value": [0.1, 0.25]}, lambda part: part.clamp(0.1, 0.25)),
]


class TestAsHooksDo:
    """Bit for bit, since the same operations run on the same batch."""

    @pytest.mark.parametrize(("operation", "change"), OPERATIONS, ids=[item[0]["operation"] for item in OPERATIONS])
    @pytest.mark.parametrize(("layer", "run"), [("first", 0), ("inner", 1), ("out", 2)])
    def test_a_module_that_runs_thrice(self, operation: dict[str, Any], change: Change, layer: str, run: int) -> None:
        network, service = make(Residual)
        [result] = ask(service, [{"layer": layer, **WHERE, **operation}], layers=[layer, "out"]).results
        seen = []

        def keep(values: Tensor) -> Tensor:
            seen.append(write(PLACE, change)(values).clone())
            return seen[-1]

        assert np.array_equal(logits(result), by_hand(network, [(network.relu, run, keep)])[0])
        assert not np.array_equal(logits(result), by_hand(network, [])[0])
        assert np.array_equal(maps(result)[layer], seen[0][0].numpy())

    def test_the_mean_is_that_of_the_whole_map(self) -> None:
        network, service = make(Residual)
        [result] = ask(service, [{"layer": "inner", **WHERE, "operation": "mean"}]).results

        def mean(values: Tensor) -> Tensor:
            values[PLACE] = values[:, [1, 3]].mean(dim=(2, 3), keepdim=True)
            return values

        assert np.array_equal(logits(result), by_hand(network, [(network.relu, 1, mean)])[0])

    @pytest.mark.parametrize(
        ("channels", "index"),
        [("all", slice(None)), (None, slice(None)), ({"except": [0, 5]}, [1, 2, 3, 4]), ([5, 0, 5], [5, 0])],
    )
    def test_channels(self, channels: Any, index: Any) -> None:
        network, service = make(Residual)
        edit = {"layer": "inner", "channels": channels, "operation": "add", "value": 1}
        [result] = ask(service, [edit]).results
        change = write((slice(None), index), lambda part: part + 1)
        assert np.array_equal(logits(result), by_hand(network, [(network.relu, 1, change)])[0])

    def test_operations_of_one_layer_are_done_in_order(self) -> None:
        network, service = make(Residual)
        scale, add = {"operation": "scale", "value": 3}, {"operation": "add", "value": 0.5}
        found = []
        for first, second in ((scale, add), (add, scale)):
            edits = [{"layer": "inner", "channels": [2], **operation} for operation in (first, second)]
            found.append(logits(ask(service, edits).results[0]))
        place = (slice(None), [2])
        after_scale = write(place, lambda part: part * 3 + 0.5)
        after_add = write(place, lambda part: (part + 0.5) * 3)
        assert np.array_equal(found[0], by_hand(network, [(network.relu, 1, after_scale)])[0])
        assert np.array_equal(found[1], by_hand(network, [(network.relu, 1, after_add)])[0])
        assert not np.array_equal(found[0], found[1])

    def test_two_layers_at_once_in_the_order_of_the_network(self) -> None:
        network, service = make(Residual)
        edits = [
            {"layer": "out", "channels": [0], "operation": "mean"},
            {"layer": "first", "channels": [4], "operation": "zero"},
        ]
        [result] = ask(service, edits, layers=["out"]).results

        def mean(values: Tensor) -> Tensor:
            values[:, [0]] = values[:, [0]].mean(dim=(2, 3), keepdim=True)
            return values

        zero = write((slice(None), [4]), lambda part: part * 0)
        assert np.array_equal(logits(result), by_hand(network, [(network.relu, 0, zero), (network.relu, 2, mean)])[0])
        assert np.ptp(maps(result)["out"][0]) == 0

    def test_a_sum_which_is_no_module(self) -> None:
        network, service = make(Residual)
        [result] = ask(service, [{"layer": "sum", "channels": [1], "operation": "scale", "value": 2}]).results

        def before(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if next(runs) != 2:  # What goes into the last ReLU is the sum.
                return None
            return (write((slice(None), [1]), lambda part: part * 2)(inputs[0].clone()),)

        runs = iter(range(3))
        handle = network.relu.register_forward_pre_hook(before)
        expected = by_hand(network, [])
        handle.remove()
        assert np.array_equal(logits(result), expected[0])

    def test_the_input_and_the_last_layer(self) -> None:
        network, service = make(Residual)
        edits = [
            {"layer": "image", "channels": [1], "operation": "zero"},
            {"layer": "fc", "channels": [7], "operation": "add", "value": 100},
        ]
        [result] = ask(service, edits, layers=["image", "fc"]).results
        images = torch.from_numpy(to_input(PICTURES[:1], SIZE))
        images[:, 1] = 0
        with torch.inference_mode():
            expected = network(images)[0].numpy()
        expected[7] += 100
        assert np.array_equal(logits(result), expected)
        assert result.top[0].index == 7
        assert np.array_equal(maps(result)["image"], images[0].numpy())
        assert np.array_equal(maps(result)["fc"][:, 0, 0], expected)

    @pytest.mark.parametrize("layer", ["shared", "left", "right"])
    def test_branches(self, layer: str) -> None:
        network, service = make(Branches)
        edit = {"layer": layer, "channels": [1], "region": [0, 1, 2, 3], "operation": "add", "value": 2}
        [result] = ask(service, [edit], layers="all").results
        change = write((slice(None), [1], slice(0, 2), slice(1, 3)), lambda part: part + 2)
        assert np.array_equal(logits(result), by_hand(network, [(getattr(network, layer), 0, change)])[0])
        found, plain = maps(result), maps(ask(service, [{**edit, "value": 0}], layers="all").results[0])
        changed = {name for name in found if not np.array_equal(found[name], plain[name])}
        assert changed == {"shared": {*found}, "left": {"left", "both"}, "right": {"right"}}[layer] | (
            {"both"} if layer == "right" else set()
        )

    @pytest.mark.parametrize(
        ("edit", "module", "place"),
        [
            ({"layer": "last", "channels": [2], "region": [1, 0, 3, 4]}, "embed_last", np.s_[:, 1:3, 0:4, 2]),
            ({"layer": "blocks", "channels": [4], "region": [1, 2, 2, 4]}, "mix", np.s_[:, 1 + 6 : 1 + 8, 4]),
            ({"layer": "blocks.extra", "channels": [0]}, "mix", np.s_[:, [0, 17], 0]),
            ({"layer": "blocks.extra", "region": [1, 0, 2, 1]}, "mix", np.s_[:, 17]),
        ],
        ids=["channels last", "patches", "extra tokens", "the register"],
    )
    def test_another_order_of_axes(self, edit: dict[str, Any], module: str, place: Any) -> None:
        network, service = make(Tokens)
        [result] = ask(service, [{**edit, "operation": "scale", "value": 3}], layers="all").results
        change = write(place, lambda part: part * 3)
        assert np.array_equal(logits(result), by_hand(network, [(getattr(network, module), 0, change)])[0])
        assert {name: values.shape for name, values in maps(result).items()} == {
            "last": (6, 4, 4),
            "blocks": (6, 4, 4),
            "blocks.extra": (6, 2, 1),
        }

    def test_a_network_that_cannot_be_traced(self) -> None:
        network, _ = make(Untraceable)
        served = copy.deepcopy(network)
        service = make_service(served, SIZE, CIFAR_CLASSES, output="0")
        edit = {"layer": "first", **WHERE, "operation": "scale", "value": 2}
        [result] = ask(service, [edit], layers=["first", "inner", "returned"]).results
        change = write(PLACE, lambda part: part * 2)
        assert np.array_equal(logits(result), by_hand(network, [(network.norm, 0, change)])[0])
        assert not any(module._forward_hooks for module in served.modules())

    @pytest.mark.parametrize(
        ("layer", "words"), [("relu", "runs several times"), ("returned", "nothing in this network")]
    )
    def test_what_cannot_be_edited_without_a_trace_is_refused(self, layer: str, words: str) -> None:
        _, service = make(Untraceable)
        reply = ask(service, [{"layer": layer, "operation": "zero"}])
        assert reply.error.code == "bad_request"
        assert words in reply.error.message

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_in_float32_whatever_the_worker_computes_in(self, precision: str) -> None:
        torch.manual_seed(0)
        network = Residual().eval()
        archive = make_archive(copy.deepcopy(network), SIZE, CIFAR_CLASSES, layouts=Residual.layouts)
        eager = TorchEngine(copy.deepcopy(network), archive.layers, has_scores=True, layouts=archive.layouts)
        engine = choose_in_torch(eager, SIZE, wanted="torch", precision=precision)
        service = Pipeline(archive, Identity("m", "1", engine.name, "cpu"), Limits(), lambda: eager, engine)
        reply = ask(service, [{"layer": "inner", "operation": "scale", "value": 2}])
        expected = by_hand(network, [(network.relu, 1, lambda values: values * 2)])
        assert np.array_equal(logits(reply.results[0]), expected[0])
        assert reply.engine == eager.name
        plain = ask_message(service, wire.PredictRequest(pictures=FILES[:1]))
        assert plain.engine == engine.name


class TestPatch:
    def test_puts_in_the_map_of_another_picture(self) -> None:
        network, service = make(Residual)
        edits = [
            {"layer": "image", "operation": "scale", "value": 2, "picture": 1},  # Of the run that is not taken.
            {"layer": "inner", **WHERE, "operation": "patch", "value": 1, "picture": 0},
        ]
        result, other = ask(service, edits, FILES[:2]).results
        source: list[Tensor] = []
        by_hand(network, [(network.relu, 1, lambda values: source.append(values) or values)], PICTURES[1:2])
        change = write(PLACE, lambda part: source[0][PLACE])
        assert np.allclose(logits(result), by_hand(network, [(network.relu, 1, change)])[0], rtol=1e-5, atol=1e-6)
        assert not np.allclose(logits(result), by_hand(network, [])[0], rtol=1e-3)
        twice = torch.from_numpy(to_input(PICTURES[1:2], SIZE)) * 2
        with torch.inference_mode():
            assert np.allclose(logits(other), network(twice)[0].numpy(), rtol=1e-5, atol=1e-6)

    def test_of_the_whole_last_map_gives_the_other_answer(self) -> None:
        network, service = make(Residual)
        edit = {"layer": "out", "operation": "patch", "value": 3}
        results = ask(service, [edit], FILES).results
        for result in results:
            assert np.allclose(logits(result), by_hand(network, [], PICTURES[3:4])[0], rtol=1e-5, atol=1e-6)

    def test_with_its_own_map_restores_what_an_earlier_layer_changed(self) -> None:
        network, service = make(Residual)
        zero = {"layer": "first", "operation": "zero"}
        restore = {"layer": "sum", "operation": "patch", "value": 0}
        assert np.allclose(logits(ask(service, [zero, restore]).results[0]), by_hand(network, [])[0], rtol=1e-5)
        assert not np.allclose(logits(ask(service, [zero]).results[0]), by_hand(network, [])[0], rtol=1e-3)

    def test_across_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many run together, the result is the same. An edited picture needs itself and another unedited."""
        ran: list[int] = []

        class Counted(Residual):
            def __init__(self) -> None:
                super().__init__()
                self.two.register_forward_pre_hook(lambda _, inputs: ran.append(len(inputs[0])))

        _, service = make(Counted)
        edits = [{"layer": "inner", "operation": "patch", "value": (i + 2) % 5, "picture": i} for i in range(4)]
        expected = ask(service, edits, FILES, layers=["out"], compare=True)
        for rows, passes in ((1, [3, 3, 3, 3, 1]), (4, [3, 3, 3, 3, 1]), (6, [6, 6, 1]), (100, [9])):
            ran.clear()
            monkeypatch.setattr(editor, "MAX_INPUT_BYTES", rows * 3 * 8 * 8 * 4)
            found = ask(service, edits, FILES, layers=["out"], compare=True)
            assert ran == passes
            for one, two in zip(found.results, expected.results, strict=True):
                assert np.allclose(logits(one), logits(two), rtol=1e-5, atol=1e-6)
                assert np.allclose(maps(one)["out"], maps(two)["out"], rtol=1e-5, atol=1e-6)

    def test_a_picture_that_is_not_one_is_the_error_of_those_that_need_it(self) -> None:
        network, service = make(Residual)
        edits = [{"layer": "inner", "operation": "patch", "value": 1, "picture": 0}]
        needs, broken, plain = ask(service, edits, [FILES[0], b"text", FILES[2]]).results
        assert (needs.error.code, broken.error.code) == ("bad_request", "bad_image")
        assert "picture 1" in needs.error.message
        assert np.allclose(logits(plain), by_hand(network, [], PICTURES[2:3])[0], rtol=1e-5, atol=1e-6)


class TestCompare:
    EDITS: ClassVar = [{"layer": "first", "channels": [0, 2], "operation": "scale", "value": 3}]

    def test_the_change_is_what_two_requests_differ_by(self) -> None:
        network, service = make(Residual)
        files, pictures = FILES[:3], PICTURES[:3]
        found = ask(service, self.EDITS, files, layers=["out"], compare=True)
        assert found.edits == 1
        plain = ask(service, [{**self.EDITS[0], "value": 1}], files, layers=["out"])
        for result, unedited in zip(found.results, plain.results, strict=True):
            change = {score.index: score for score in result.change.top}
            assert [score.index for score in result.change.top] == [score.index for score in result.top]
            before = {score.index: score for score in unedited.top}
            for score in result.top:
                for field in ("logit", "probability"):
                    expected = getattr(score, field) - getattr(before[score.index], field)
                    assert getattr(change[score.index], field) == pytest.approx(expected, abs=1e-5)
            [difference] = result.change.maps
            assert np.allclose(cells(difference), maps(result)["out"] - maps(unedited)["out"], atol=1e-5)
        place = (slice(None), [0, 2])
        by_hooks = by_hand(network, [(network.relu, 0, write(place, lambda part: part * 3))], pictures)
        assert np.allclose([logits(result) for result in found.results], by_hooks, rtol=1e-5, atol=1e-6)

    def test_classes_that_were_first_before_are_there_too(self) -> None:
        _, service = make(Residual)
        unedited = ask(service, [{"layer": "fc", "channels": [0], "operation": "scale", "value": 1}]).results[0]
        last, first = unedited.top[-1].index, unedited.top[0].index
        edit = {"layer": "fc", "channels": [last], "operation": "add", "value": 50}
        [result] = ask(service, [edit], compare=True, top_k=1).results
        assert [score.index for score in result.top] == [last]
        assert [score.index for score in result.change.top] == [last, first]
        assert [score.logit for score in result.change.top] == pytest.approx([50, 0], abs=1e-4)
        assert result.change.top[1].probability < -0.05

    def test_a_selection_of_channels_is_that_of_the_edited_map(self) -> None:
        _, service = make(Residual)
        edit = {"layer": "inner", "channels": [4], "operation": "add", "value": 5}
        [result] = ask(service, [edit], layers=["inner"], channels=2, pool=2, map_dtype="float16", compare=True).results
        [item], [change] = result.maps, result.change.maps
        assert item.channels[0] == 4
        assert list(change.channels) == list(item.channels)
        assert cells(change).dtype == np.float16
        assert np.allclose(cells(change)[0], 5, atol=1e-2)
        assert not cells(change)[1].any()

    def test_nothing_changes_where_nothing_is_done(self) -> None:
        _, service = make(Residual)
        edit = {"layer": "inner", "operation": "zero", "picture": 1}
        plain, edited = ask(service, [edit], FILES[:2], layers=["inner"], compare=True).results
        assert not any(score.logit or score.probability for score in plain.change.top)
        assert not cells(plain.change.maps[0]).any()
        assert any(score.logit for score in edited.change.top)

    def test_in_every_format(self) -> None:
        _, service = make(Residual)
        row = {"data": bytearray(FILES[0]), "edits": json.dumps(self.EDITS).encode(), "layers": b"out"}
        row |= {"compare": b"1", "top_k": b"3"}
        form = {"content_type": "multipart/form-data; boundary=x"}
        values = ask_json(service, row, accept="application/json", **form)
        message = wire.PredictReply.FromString(ask_rest(service, row, accept="application/x-protobuf", **form).body)
        with np.load(io.BytesIO(ask_rest(service, row, accept="application/x-npz", **form).body)) as arrays:
            assert (values["edits"], message.edits, json.loads(str(arrays["reply"]))["edits"]) == (1, 1, 1)
            [change] = [result["change"] for result in values["results"]]
            expected = message.results[0].change
            assert [score["index"] for score in change["top"]] == [score.index for score in expected.top]
            assert np.allclose([score["logit"] for score in change["top"]], [score.logit for score in expected.top])
            assert arrays["change/logit"].tolist() == pytest.approx([score.logit for score in expected.top])
            assert np.array_equal(arrays["change/out"], cells(expected.maps[0]))
            assert change["maps"]["out"]["shape"] == list(arrays["change/out"].shape)
        picture = ask_rest(service, row, accept="image/png, application/json;q=0.5", **form)
        assert picture.media_type == "application/json"
        del row["compare"]
        assert ask_rest(service, row, accept="image/png", **form).media_type == "image/png"


def strides(service: Pipeline) -> dict[str, int]:
    card = ask_message(service, wire.PredictRequest(describe=True)).card
    return {layer.name: layer.stride[0] for layer in card.layers}


class TestBox:
    """Cells with the middle of their receptive field in the box."""

    @pytest.mark.parametrize("factor", [1, 2])
    def test_is_in_pixels_of_the_picture_as_sent(self, network: Cifar, service: Pipeline, factor: int) -> None:
        sent = colours().repeat(factor, axis=0).repeat(factor, axis=1)
        for layer, step in strides(service).items():
            box = [8 * factor, 0, 16 * factor, 32 * factor]
            region = [8 // step, 0, 16 // step, 32 // step]
            edits = [{"layer": layer, "operation": "zero", "channels": [0]}]
            one, two = (
                ask(service, [{**edits[0], **place}], [png(sent)], layers=[layer], channels=[0]).results[0]
                for place in ({"box": box}, {"region": region})
            )
            assert np.array_equal(maps(one)[layer], maps(two)[layer])
            assert not maps(one)[layer][0, region[0] : region[2]].any()

    def test_boxes_side_by_side_share_the_cells_out(self, service: Pipeline) -> None:
        edges = [0, 3.25, 10, 10.5, 21, 32]
        for layer in strides(service):
            done = np.zeros_like(self._changed(service, layer, [0, 0, 32, 32]), int)
            for left, right in pairwise(edges):
                try:
                    done += self._changed(service, layer, [0, left, 32, right])
                except KeyError:  # Narrower than the cells are apart.
                    continue
            assert (done == 1).all()

    def _changed(self, service: Pipeline, layer: str, box: list[float]) -> np.ndarray[Any, Any]:
        edit = {"layer": layer, "operation": "add", "value": 1, "channels": [0], "box": box}
        result = ask(service, [edit], [png(colours())], layers=[layer], channels=[0], compare=True).results[0]
        if result.HasField("error"):
            raise KeyError(result.error.message)
        return np.asarray(cells(result.change.maps[0]) > 0.5)

    @pytest.mark.parametrize(
        ("box", "words"),
        [([0, 0, 33, 32], "beyond the picture"), ([0.1, 0, 0.2, 32], "holds the middle of no cell")],
    )
    def test_that_fits_nothing_is_the_picture_s_error(self, service: Pipeline, box: list[float], words: str) -> None:
        reply = ask(service, [{"layer": "conv1", "operation": "zero", "box": box}], [png(colours())])
        assert reply.error.code == "bad_request"
        assert words in reply.error.message

    def test_of_a_layer_whose_cells_are_nowhere_is_refused(self) -> None:
        _, service = make(Residual)
        reply = ask(service, [{"layer": "fc", "operation": "zero", "box": [0, 0, 4, 4]}])
        assert (reply.error.code, reply.results[:]) == ("bad_request", [])
        assert "give region" in reply.error.message


ZERO = {"layer": "inner", "operation": "zero"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            ({"layer": "nose"}, "edits[0]: there is no layer 'nose'; this model publishes"),
            ({"layer": 5}, "edits[0]: layer must be a layer's name"),
            ({"operation": "erase"}, "operation must be one of zero, scale, add, mean, clamp, patch"),
            ({"channels": [6]}, "layer inner has channels 0 to 5, not 6"),
            ({"channels": {"except": [9]}}, "layer inner has channels 0 to 5, not 9"),
            ({"channels": {"except": [0, 1, 2, 3, 4, 5]}}, "no channel is left"),
            ({"channels": []}, "the list is empty"),
            ({"channels": "some"}, 'a list of channel indexes, "all", or {"except": [...]}'),
            ({"channels": 3}, 'a list of channel indexes, "all", or {"except": [...]}'),
            ({"channels": [1.0]}, "a channel must be a whole number"),
            ({"region": [0, 0, 9, 8]}, "region ends at (9, 8), beyond the map of inner, which has 8×8 cells"),
            ({"region": [2, 0, 2, 8]}, "0 <= top < bottom"),
            ({"region": [0, 0, 8]}, "region must be four numbers"),
            ({"region": [0, 0, 1, 1], "box": [0, 0, 1, 1]}, "give one of them"),
            ({"box": [0, 0, float("inf"), 1]}, "an edge of box must be a finite number"),
            ({"value": 1}, "zero takes no value"),
            ({"operation": "scale"}, "the value of scale must be a finite number"),
            ({"operation": "scale", "value": True}, "the value of scale must be a finite number"),
            ({"operation": "scale", "value": 1e39}, "the value of scale must be a finite number"),
            ({"operation": "add", "value": float("nan")}, "the value of add must be a finite number"),
            ({"operation": "add", "value": [1]}, "the value of add must be a finite number"),
            ({"operation": "clamp", "value": 3}, "two numbers, [least, largest]"),
            ({"operation": "clamp", "value": [2, 1]}, "the first is the larger one"),
            ({"operation": "patch", "value": 0.5}, "the index of a picture"),
            ({"operation": "patch", "value": 1}, "there is no picture 1; the request has 0 to 0"),
            ({"picture": 1}, "there is no picture 1; the request has 0 to 0"),
            ({"strength": 1}, 'unknown field "strength"'),
        ],
    )
    def test_what_would_be_right_is_said(self, edit: dict[str, Any], words: str) -> None:
        _, service = make(Residual)
        reply = ask(service, [{**ZERO, **edit}])
        assert reply.error.code == ("unknown_layer" if edit == {"layer": "nose"} else "bad_request")
        assert words in reply.error.message
        assert not reply.results

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"edits": ZERO}, "edits must be a list of operations"),
            ({"edits": "zero"}, "edits must be a list of operations"),
            ({"edits": [5]}, "edits[0]: an operation must be an object"),
            ({"edits": [ZERO] * 17}, "edits has 17 operations for one picture; at most 16 are done"),
            ({"edits": [ZERO] * 16 + [{**ZERO, "picture": 0}]}, "17 operations for one picture"),
            ({"edits": [{**ZERO, "picture": 1}] * 5000}, "at most 4,096 are read"),
            ({"edits": [], "compare": True}, "name at least one operation"),
            ({"edits": [ZERO], "compare": "yes"}, "compare must be true or false"),
            ({"edits": [ZERO], "explain": "grad_cam"}, "explain and edits do not go together"),
        ],
    )
    def test_of_the_list(self, fields: dict[str, Any], words: str) -> None:
        _, service = make(Residual)
        reply = ask(service, fields.pop("edits"), **fields)
        assert reply.error.code == "bad_request"
        assert words in reply.error.message

    def test_sixteen_operations_are_done(self) -> None:
        _, service = make(Residual)
        ones = [{**ZERO, "operation": "add", "value": 1, "picture": number} for number in (0, 1) for _ in range(16)]
        for result in ask(service, ones, FILES[:2], layers=["inner"], compare=True).results:
            assert np.allclose(cells(result.change.maps[0]), 16, atol=1e-4)

    def test_scores_that_are_no_numbers_any_more(self) -> None:
        _, service = make(Residual)
        edits = [{**ZERO, "operation": "scale", "value": 3e38, "picture": 0}] * 3
        broken, fine = ask(service, edits, FILES[:2]).results
        assert broken.error.code == "bad_request"
        assert "not finite after these edits" in broken.error.message
        assert fine.top

    def test_maps_that_are_no_numbers_any_more(self, edges: Pipeline) -> None:
        scale = {"layer": "conv1", "operation": "scale", "value": 3e38}
        edits = [{"layer": "conv1", "operation": "add", "value": 3e38, "picture": 0}, {**scale, "picture": 0}]
        files = [npy(colours(seed, 6, 6)[..., 0]) for seed in (0, 1)]
        broken, fine = ask(edges, edits, files, layers=["conv1"]).results
        assert broken.error.code == "bad_request"
        assert "the map of conv1 is not finite after these edits" in broken.error.message
        assert fine.maps

    def test_what_float32_cannot_hold_any_more(self, edges: Pipeline) -> None:
        """The map or scores may be finite, and yet not their mean or their difference."""
        files = [npy(np.outer(column, np.ones(6)).astype(np.float32)) for column in ([0, 0, 1e38, 0, 0, 0], [0] * 6)]
        turn = {"layer": "conv1", "operation": "scale", "value": -1, "picture": 0}
        raised = {"layer": "conv1", "operation": "add", "value": 3e38, "picture": 0, "region": [0, 0, 1, 6]}
        for edit, fields, what in (
            (turn, {"compare": True}, "the change of the map of conv1"),
            (raised, {"pool": 1}, "the map of conv1"),
        ):
            broken, fine = ask(edges, [edit], files, layers=["conv1"], **fields).results
            assert broken.error.code == "bad_request"
            assert broken.error.message.startswith(what)
            assert "not finite" in broken.error.message
            assert fine.maps
        assert not ask(edges, [turn], files, layers=["conv1"]).results[0].HasField("error")
        _, pixels = make(Pixels)
        turn = {"layer": "image", "operation": "scale", "value": -1}
        [broken] = ask(pixels, [turn], [npy(np.full((8, 8, 3), 3e38, np.float32))], compare=True).results
        assert broken.error.code == "bad_request"
        assert broken.error.message == "the change of the scores is not finite after these edits; send smaller values"

    def test_a_map_that_float16_cannot_carry_is_not_the_pictures_fault(self) -> None:
        _, service = make(Residual)
        add = {"layer": "inner", "channels": [4], "operation": "add", "value": 7e4, "picture": 0}
        broken, fine = ask(service, [add], FILES[:2], layers=["inner"], map_dtype="float16").results
        assert (broken.error.code, fine.error.code) == ("bad_request", "")
        words = "the map of inner holds values beyond float16's ±65504; ask for float32"
        assert broken.error.message == f"after these edits, {words}"
        turn = {"layer": "image", "operation": "scale", "value": -1}
        large = npy(np.full((8, 8, 3), 6e4, np.float32))
        fine, broken = (
            ask(service, [turn], [large], layers=["image"], map_dtype="float16", compare=compare).results[0]
            for compare in (False, True)
        )
        assert (fine.error.code, broken.error.code) == ("", "bad_request")
        assert broken.error.message == f"after these edits, in the comparison, {words.replace('inner', 'image')}"

    def test_the_picture_may_come_with_edits(self) -> None:
        _, service = make(Residual)
        [result] = ask(service, [ZERO], explain="picture").results
        assert list(result.explanation.picture.shape) == [3, 8, 8]

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(optional_torch, "is_installed", lambda: False)
        _, service = make.__wrapped__(Residual)
        reply = ask(service, [ZERO])
        assert reply.error.code == "bad_request"
        assert "this server has no torch" in reply.error.message
        assert list(ask_message(service, wire.PredictRequest(describe=True)).card.edits) == []

    def test_the_card_lists_the_operations(self) -> None:
        _, service = make(Residual)
        card = ask_message(service, wire.PredictRequest(describe=True)).card
        assert list(card.edits) == ["zero", "scale", "add", "mean", "clamp", "patch"]


class TestPicturesOfAnySize:
    EDIT: ClassVar = {"layer": "conv1", "operation": "add", "value": 7, "region": [4, 5, 9, 10]}

    def test_have_their_own_errors(self, edges: Pipeline) -> None:
        small, large = npy(colours(0, 6, 6)[..., 0]), npy(colours(1, 12, 10)[..., 0])
        wrong, right = ask(edges, [self.EDIT], [small, large], layers=["conv1"], compare=True).results
        assert wrong.error.code == "bad_request"
        assert "region ends at (9, 10), beyond the map of conv1, which has 6×6 cells" in wrong.error.message
        expected = np.zeros((1, 12, 10), np.float32)
        expected[:, 4:9, 5:10] = 7
        assert np.allclose(cells(right.change.maps[0]), expected, atol=1e-5)
        assert not right.change.top

    def test_cannot_be_put_into_one_another(self, edges: Pipeline) -> None:
        files = [npy(colours(seed, size, 6)[..., 0]) for seed, size in enumerate((6, 6, 7))]
        patch = {"layer": "conv1", "operation": "patch", "value": 0}
        same, equal, other = ask(edges, [patch], files, layers=["conv1"]).results
        assert np.array_equal(cells(same.maps[0]), cells(equal.maps[0]))
        assert (other.error.code, "send pictures of one size" in other.error.message) == ("bad_request", True)

    def test_may_be_too_large(self, edges: Pipeline) -> None:
        files = [npy(np.zeros((height, 1024), np.uint8)) for height in (1024, 512, 513)]
        edit = {"layer": "conv1", "operation": "zero", "picture": 0}
        whole, half, more = ask(edges, [edit, {**edit, "picture": 1}, {**edit, "picture": 2}], files).results
        assert not any(result.HasField("error") for result in (whole, half, more))
        replies = [ask(edges, [edit], [file], compare=True).error.code for file in files]
        assert replies == ["image_too_large", "", "image_too_large"]


class TestNeighbours:
    """Requests of one batch come from different callers."""

    def test_without_edits_get_what_they_get_alone(self) -> None:
        _, service = make(Residual)
        plain = {
            "request": wire.PredictRequest(pictures=FILES[1:2], layers=["out"], request_id="a").SerializeToString()
        }
        edit = wire.Edit(layer="inner", operation="zero")
        edited = {"request": wire.PredictRequest(pictures=FILES[:1], edits=[edit], request_id="b").SerializeToString()}
        wrong = wire.Edit(layer="inner", operation="patch", value=[4])
        refused = {"request": wire.PredictRequest(pictures=FILES[:1], edits=[wrong]).SerializeToString()}
        [alone] = service.respond([plain], [{}])
        together = service.respond([edited, plain, refused], [{}] * 3)
        assert together[1].body == alone.body
        replies = [wire.PredictReply.FromString(answer.body) for answer in together]
        assert [reply.edits for reply in replies] == [1, 0, 0]
        assert [reply.error.code for reply in replies] == ["", "", "bad_request"]
        assert replies[0].results[0].top[0].logit != replies[1].results[0].top[0].logit

    def test_the_network_in_torch_is_built_for_the_first_edit_alone(self) -> None:
        torch.manual_seed(0)
        network = Residual().eval()
        archive = make_archive(network, SIZE, CIFAR_CLASSES, layouts=Residual.layouts)
        eager = TorchEngine(network, archive.layers, has_scores=True, layouts=archive.layouts)
        built = []

        def build() -> TorchEngine:
            built.append(1)
            return eager

        service = Pipeline(archive, Identity("m", "1", "another engine", "cpu"), Limits(), build, eager)
        assert not ask_message(service, wire.PredictRequest(pictures=FILES[:1], layers=["out"])).HasField("error")
        assert not built
        assert ask(service, [ZERO]).edits == 1
        assert built


class TestBounds:
    def test_runs_are_counted_before_they_are_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, service = make(Residual)
        monkeypatch.setattr(editor, "MAX_RUNS", 9)
        assert ask(service, [ZERO], FILES[:4], compare=True).edits == 1
        reply = ask(service, [ZERO], FILES, compare=True)
        assert reply.error.code == "bad_request"
        assert "would take 10 runs" in reply.error.message

    def test_seconds_end_the_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, service = make(Residual)
        monkeypatch.setattr(editor, "MAX_SECONDS", 0.0)
        reply = ask(service, [ZERO])
        assert (reply.error.code, "took longer" in reply.error.message) == ("bad_request", True)

    def test_a_comparison_counts_towards_the_reply(self) -> None:
        _, service = make(Residual, limits=Limits(max_reply_bytes=2500))
        assert ask(service, [ZERO], layers=["inner"]).edits == 1
        assert ask(service, [ZERO], layers=["inner"], compare=True).error.code == "reply_too_large"

    def test_a_fault_is_internal_and_stays_with_its_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, service = make(Residual)

        def fail(*_: Any) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(editor, "_operate", fail)
        reply = ask(service, [ZERO])
        assert (reply.error.code, "secret" in reply.error.message) == ("internal", False)
        assert not ask_message(service, wire.PredictRequest(pictures=FILES[:1])).HasField("error")


def test_the_same_cifar_by_hooks(network: Cifar, service: Pipeline) -> None:
    """The network that is served, with its pooling and dropout."""
    [result] = ask(service, [{"layer": "conv1", "channels": [0], "operation": "zero"}], [png(colours())]).results
    images = torch.from_numpy(to_input([colours()], CIFAR_INPUT))
    with hooked([(network.relu1, 0, write((slice(None), [0]), lambda part: part * 0))]), torch.inference_mode():
        assert np.array_equal(logits(result), network(images)[0].numpy())
