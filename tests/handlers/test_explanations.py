"""Explanations equal captum's, depend on the weights, and do not affect other requests."""

from __future__ import annotations

import base64
import io
import json
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradCam, Occlusion, Saliency
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from handlers.api.limits import Limits
from handlers.api.options import METHODS, OF_GRADIENTS
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.networks.cifar import Cifar
from handlers.outputs import explainer
from handlers.outputs.gradient_methods import integrated_gradients
from handlers.outputs.png import paint, stretch
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_json, ask_message, ask_rest, make_service
from tests.pictures import FIVE_BY_FIVE, colours, npy, png

GOOD = png(colours())
IMAGE = torch.from_numpy(to_input([colours()], CIFAR_INPUT))  # (1, 3, 32, 32), as the network gets it.
EXPLAINING = [method for method in METHODS if method != "picture"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class InPlace(nn.Module):
    """Overwrites what it can: its input, and what went into its activations."""

    layers: ClassVar = {"first": "relu", "second": "add"}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.more = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        images *= 2
        maps = self.relu(self.conv(images))
        maps = functional.relu(self.more(maps)) + maps
        scores: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return scores


class Deep(nn.Module):
    """A block whose input is added to its output, a pool and a mean before the scores: as a ResNet, but quick."""

    layers: ClassVar = {"block1": "block1", "block2": "block2"}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.block1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(4)
        self.conv3, self.block2 = nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()
        self.mean, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block1(self.norm(self.conv1(images)))
        maps = self.block2(self.conv3(self.pool(self.conv2(maps) + maps)))
        scores: Tensor = self.fc(self.flatten(self.mean(maps)))
        return scores


class Untraceable(InPlace):
    """Decides by a value, which no tracer can follow: its maps are taken by hooks."""

    layers: ClassVar = {"first": "relu"}

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 1e9:
            raise ValueError
        return super().forward(images)


@pytest.fixture(scope="module")
def deep_network() -> Deep:
    torch.manual_seed(1)
    return Deep().eval()


@pytest.fixture(scope="module")
def deep(deep_network: Deep) -> Pipeline:
    return make_service(deep_network, CIFAR_INPUT, CIFAR_CLASSES)


@pytest.fixture(scope="module")
def other_weights() -> Pipeline:
    torch.manual_seed(2)
    return make_service(Deep().eval(), CIFAR_INPUT, CIFAR_CLASSES)


def explain(service: Pipeline, file: bytes = GOOD, **asked: Any) -> wire.Explanation:
    message = wire.PredictRequest(pictures=[file], explain=wire.Explain(**asked))
    reply = ask_message(service, message)
    assert not reply.HasField("error"), reply.error
    return reply.results[0].explanation


def refusal(service: Pipeline, pictures: tuple[bytes, ...] = (GOOD,), **asked: Any) -> tuple[str, str]:
    reply = ask_message(service, wire.PredictRequest(pictures=pictures, explain=wire.Explain(**asked)))
    return reply.error.code, reply.error.message


def array(tensor: wire.Tensor) -> np.ndarray[Any, Any]:
    values = np.frombuffer(tensor.data, wire.Dtype.Name(tensor.dtype).lower()).reshape(tuple(tensor.shape))
    if not tensor.scale:
        return values
    shape = (-1, *(1 for _ in values.shape[1:]))
    return np.array(tensor.offset).reshape(shape) + np.array(tensor.scale).reshape(shape) * values


class TestAsCaptumSays:
    @pytest.mark.parametrize("layer", ["block1", "block2"])
    def test_grad_cam(self, deep: Pipeline, deep_network: Deep, layer: str) -> None:
        strongest = []
        for target in range(10):
            expected = LayerGradCam(deep_network, getattr(deep_network, layer)).attribute(
                IMAGE, target, relu_attributions=True
            )
            found = array(explain(deep, method="grad_cam", layer=layer, target=target).heat)
            assert found.shape == expected.shape[1:]
            assert np.allclose(found, expected[0].detach(), **CLOSE)
            strongest.append(found.max())
        assert max(strongest) > 0

    @pytest.mark.parametrize(("window", "step"), [(4, 2), (5, 3), (8, 8), (32, 1)])
    def test_occlusion(self, service: Pipeline, network: Cifar, window: int, step: int) -> None:
        expected = Occlusion(network).attribute(IMAGE, (3, window, window), target=3, strides=(3, step, step))
        found = array(explain(service, method="occlusion", target=3, window=window, step=step).heat)
        assert found.shape == (1, 32, 32)
        for channel in expected[0].numpy():
            assert np.allclose(found[0], channel, rtol=1e-4, atol=1e-5 * np.abs(channel).max())

    def test_input_gradient(self, service: Pipeline, network: Cifar) -> None:
        expected = Saliency(network).attribute(IMAGE.clone().requires_grad_(), target=2, abs=False)
        found = array(explain(service, method="input_gradient", target=2).heat)
        assert np.allclose(found, expected[0].detach(), **CLOSE)

    @pytest.mark.parametrize("steps", [None, 7, 100])
    def test_integrated_gradients(self, deep: Pipeline, deep_network: Deep, steps: int | None) -> None:
        method = IntegratedGradients(deep_network)
        expected, delta = method.attribute(IMAGE, target=5, n_steps=steps or 32, return_convergence_delta=True)
        found = explain(deep, method="integrated_gradients", target=5, steps=steps)
        assert np.allclose(array(found.heat), expected[0].detach(), rtol=1e-3, atol=1e-6)
        assert found.delta == pytest.approx(delta.item(), abs=1e-4)

    def test_the_map_that_cam_weighs(self, deep: Pipeline, deep_network: Deep) -> None:
        maps = LayerActivation(deep_network, deep_network.block2).attribute(IMAGE)
        expected = (deep_network.fc.weight[4].detach().view(1, -1, 1, 1) * maps).sum(dim=1)
        assert np.allclose(array(explain(deep, method="cam", target=4).heat), expected.detach(), **CLOSE)


def test_integrated_gradients_take_no_more_pictures_at_a_time_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def network(images: Tensor) -> Tensor:
        taken.append(len(images))
        return images.sin().sum(dim=(1, 2, 3))[:, None]

    image = torch.rand(1, 3, 8, 8)
    whole, _ = integrated_gradients(network, image, 0, 40, lambda: None)
    monkeypatch.setattr("handlers.outputs.explanation_methods._CHUNK_BYTES", 7 * image.nbytes)
    cut, _ = integrated_gradients(network, image, 0, 40, lambda: None)
    assert taken == [40, 2, 7, 7, 7, 7, 7, 5, 2]
    assert torch.allclose(cut, whole, atol=1e-6)


def test_integrated_gradients_add_up_to_the_change_of_the_logit(deep: Pipeline, deep_network: Deep) -> None:
    found = explain(deep, method="integrated_gradients", target=1, steps=200)
    with torch.no_grad():
        change = (deep_network(IMAGE) - deep_network(torch.zeros_like(IMAGE)))[0, 1].item()
    total = array(found.heat).astype(np.float64).sum()
    assert total - change == pytest.approx(found.delta, abs=1e-5)
    assert abs(found.delta) < 0.01 * max(abs(change), 0.1)


def test_cam_averages_to_the_logit_without_its_bias(deep: Pipeline, deep_network: Deep) -> None:
    with torch.no_grad():
        logits = deep_network(IMAGE)[0] - deep_network.fc.bias
    for target in range(10):
        found = array(explain(deep, method="cam", target=target).heat)
        assert found.mean() == pytest.approx(logits[target].item(), abs=1e-5)


def test_grad_cam_keeps_what_cam_says_for_the_class(deep: Pipeline) -> None:
    whole, kept = (array(explain(deep, method=method, layer="block2", target=8).heat) for method in ("cam", "grad_cam"))
    assert np.allclose(np.maximum(whole, 0) / whole[0].size, kept, **CLOSE)


@pytest.mark.parametrize("method", EXPLAINING)
def test_other_weights_give_another_answer(deep: Pipeline, other_weights: Pipeline, method: str) -> None:
    layer = "block1" if method == "grad_cam" else ""  # At the last map nothing may speak for a class.
    asked = {"method": method, "layer": layer, "target": 3}
    one, two = (array(explain(service, **asked).heat).ravel() for service in (deep, other_weights))
    assert np.abs(one).max() > 0
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.7


@pytest.mark.parametrize("method", EXPLAINING)
def test_other_classes_give_another_answer(deep: Pipeline, method: str) -> None:
    one, two = (array(explain(deep, method=method, target=target).heat) for target in (0, 1))
    assert not np.allclose(one, two)


@pytest.mark.parametrize("kind", [InPlace, Untraceable])
@pytest.mark.parametrize("method", EXPLAINING)
def test_networks_that_overwrite_or_cannot_be_traced_are_explained_all_the_same(kind: type, method: str) -> None:
    service = make_service(kind, CIFAR_INPUT, CIFAR_CLASSES)
    torch.manual_seed(0)  # As that has.
    copy = kind().eval()
    copy.relu.inplace = False
    if method == "cam" and kind is Untraceable:
        assert refusal(service, method=method)[0] == "bad_request"
        return
    found = array(explain(service, method=method, target=2).heat)
    assert np.abs(found).max() > 0
    if method == "input_gradient":
        image = IMAGE.clone().requires_grad_()
        copy(image.clone())[0, 2].backward()
        assert image.grad is not None
        assert np.allclose(found, image.grad[0], **CLOSE)


class UnderNoGrad(InPlace):
    """Runs without gradients by its own code, which tracing does not record."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(images)


class UnderInferenceMode(InPlace):
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class StoppedHalfway(InPlace):
    """A backbone that is not to be trained."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.relu(self.conv(images * 2))
        maps = functional.relu(self.more(maps)) + maps
        scores: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return scores


class UntraceableUnderNoGrad(Untraceable):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Detached(InPlace):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class OfIntegers(InPlace):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images * 100).long().float())


class Scripted(nn.Module):
    """Compiled by TorchScript, with its mode in it."""

    layers: ClassVar = {"conv1": "inner.forward"}

    def __init__(self) -> None:
        super().__init__()

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 10, 3)

            def forward(self, images: Tensor) -> Tensor:
                with torch.no_grad():
                    maps: Tensor = self.conv(images)
                return maps

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is on its way out.
            self.inner = torch.jit.script(Inner())

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.inner(images)
        return maps.mean(dim=(2, 3))


class TestWithoutGradients:
    @pytest.mark.parametrize("kind", [UnderNoGrad, UnderInferenceMode, StoppedHalfway])
    @pytest.mark.parametrize("method", OF_GRADIENTS)
    def test_a_traced_network_gives_the_gradients_of_what_it_computes(self, kind: type, method: str) -> None:
        services = (make_service(which, CIFAR_INPUT, CIFAR_CLASSES) for which in (kind, InPlace))
        found = [array(explain(service, method=method, target=2).heat) for service in services]
        assert np.allclose(*found, **CLOSE)
        assert np.abs(found[0]).max() > 0

    @pytest.mark.parametrize("has_gradients", [True, False], ids=["not said in the archive", "said"])
    @pytest.mark.parametrize("kind", [UntraceableUnderNoGrad, Detached, OfIntegers, Scripted])
    def test_any_other_is_not_explained_by_them_and_says_why(self, kind: type, has_gradients: bool) -> None:
        service = make_service(kind, CIFAR_INPUT, CIFAR_CLASSES, has_gradients=has_gradients)
        for method in OF_GRADIENTS:
            code, message = refusal(service, method=method)
            assert (code, "gives no gradients" in message, "occlusion" in message) == ("bad_request", True, True)
        assert np.abs(array(explain(service, method="occlusion").heat)).max() > 0
        assert array(explain(service, method="picture").picture).shape == (3, 32, 32)

    def test_one_that_is_not_finite_is_its_pictures_error(self) -> None:
        class Rooted(InPlace):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images.sqrt())  # Of 0 the derivative is infinite.

        service = make_service(Rooted(), Preprocessing(3, 32, 32), CIFAR_CLASSES)
        black = png(np.zeros((32, 32, 3), np.uint8))
        for method in ("input_gradient", "integrated_gradients"):
            for dtype in (wire.FLOAT32, wire.FLOAT16, wire.UINT8):
                asked = wire.Explain(method=method)
                message = wire.PredictRequest(pictures=[black], map_dtype=dtype, explain=asked)
                assert ask_message(service, message).results[0].error.code == "bad_request"
            body = {"data": base64.b64encode(black).decode(), "explain": method}
            error = ask_json(service, {"body": body}, content_type="application/json")["error"]
            assert (error["code"], "not finite" in error["message"]) == ("bad_request", True)


class TestTheCard:
    @pytest.mark.parametrize(
        ("kind", "options", "expected"),
        [
            (InPlace, {}, set(METHODS)),
            (Cifar, {}, set(METHODS) - {"cam"}),
            (Detached, {"has_gradients": False}, {"cam", "occlusion", "picture"}),
            (Cifar, {"has_gradients": False}, {"occlusion", "picture"}),
        ],
    )
    def test_lists_the_methods_that_suit_the_network(
        self, kind: type, options: dict[str, Any], expected: set[str]
    ) -> None:
        service = make_service(kind, CIFAR_INPUT, CIFAR_CLASSES, **options)
        listed = ask_json(service, {"body": bytearray()})["explanations"]
        assert set(listed) == expected
        assert list(ask_message(service, wire.PredictRequest(describe=True)).card.explanations) == listed
        for method in METHODS:
            error = refusal(service, method=method)[0]
            assert error == ("" if method in listed else "bad_request"), method

    def test_lists_the_picture_where_there_are_no_classes(self, edges: Pipeline) -> None:
        assert ask_json(edges, {"body": bytearray()})["explanations"] == ["picture"]


@pytest.mark.parametrize("method", METHODS)
def test_an_explanation_changes_no_prediction(service: Pipeline, method: str) -> None:
    plain = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["all"], top_k=0))
    if method != "cam":
        explain(service, method=method)
    asked = wire.Explain(method="grad_cam" if method == "cam" else method)
    both = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["all"], top_k=0, explain=asked))
    after = ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=["all"], top_k=0))
    assert both.results[0].maps == plain.results[0].maps
    assert both.results[0].top == plain.results[0].top
    assert after == plain


class TestDefaults:
    def test_grad_cam_of_the_most_probable_class_at_the_last_map(self, deep: Pipeline) -> None:
        reply = ask_message(deep, wire.PredictRequest(pictures=[GOOD], explain=wire.Explain()))
        [result] = reply.results
        found = result.explanation
        assert (found.method, found.layer) == ("grad_cam", "block2")
        assert (found.target, found.label) == (result.top[0].index, result.top[0].label)
        assert not found.HasField("delta")
        assert not found.HasField("picture")

    def test_the_last_map_of_one_cell_is_passed_over(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES, layers={"maps": "1", "mean": "2"})
        assert explain(service).layer == "maps"

    def test_occlusion_covers_a_quarter_and_gradients_take_thirty_two_steps(self, service: Pipeline) -> None:
        assert explain(service, method="occlusion") == explain(service, method="occlusion", window=8, step=4)
        method = "integrated_gradients"
        assert explain(service, method=method) == explain(service, method=method, steps=32)


class TestRefused:
    @pytest.mark.parametrize("method", EXPLAINING)
    def test_of_a_network_without_classes(self, edges: Pipeline, method: str) -> None:
        code, message = refusal(edges, (npy(FIVE_BY_FIVE),), method=method)
        assert code == "bad_request"
        assert "no classes" in message

    @pytest.mark.parametrize(
        ("asked", "code", "word"),
        [
            ({"method": "guess"}, "bad_request", "grad_cam, cam, occlusion"),
            ({"layer": "nose"}, "unknown_layer", "conv1, conv2"),
            ({"target": 10}, "bad_request", "0 to 9"),
            ({"method": "cam"}, "bad_request", "grad_cam does without"),
            ({"method": "occlusion", "window": 33}, "bad_request", "32×32"),
            ({"method": "occlusion", "window": 2, "step": 3}, "bad_request", "at most explain.window"),
            ({"method": "integrated_gradients", "steps": 513}, "bad_request", "at most 512"),
            ({"method": "occlusion", "window": 0}, "bad_request", "at least 1"),
            ({"view": "sideways"}, "bad_request", "overlay, heat"),
        ],
    )
    def test_what_has_no_meaning(self, service: Pipeline, asked: dict[str, Any], code: str, word: str) -> None:
        found, message = refusal(service, **asked)
        assert found == code
        assert word in message

    def test_more_work_than_a_request_may_make(self, service: Pipeline) -> None:
        code, message = refusal(service, (GOOD,) * 5, method="occlusion", window=1, step=1)
        assert code == "bad_request"
        assert "5,120 runs" in message

    def test_a_layer_that_the_scores_do_not_depend_on(self) -> None:
        class Aside(InPlace):
            layers: ClassVar = {"aside": "aside"}

            def __init__(self) -> None:
                super().__init__()
                self.aside = nn.Conv2d(3, 2, 3)

            def forward(self, images: Tensor) -> Tensor:
                self.aside(images)
                return super().forward(images)

        code, message = refusal(make_service(Aside().eval(), CIFAR_INPUT, CIFAR_CLASSES))
        assert code == "bad_request"
        assert "do not depend" in message

    def test_a_large_picture_where_any_size_is_taken(self) -> None:
        service = make_service(InPlace, Preprocessing(3, None, None), CIFAR_CLASSES)
        assert refusal(service, (png(colours(0, 600, 600)),))[0] == "image_too_large"
        assert array(explain(service, png(colours(0, 40, 50)), method="input_gradient").heat).shape == (3, 40, 50)

    def test_a_large_picture_with_a_small_one_whose_squares_can_be_covered(self) -> None:
        service = make_service(InPlace, Preprocessing(3, None, None), CIFAR_CLASSES)
        asked = wire.Explain(method="occlusion", window=8, step=8)
        pictures = [png(colours(0, 600, 600)), png(colours(0, 40, 50))]
        reply = ask_message(service, wire.PredictRequest(pictures=pictures, explain=asked))
        assert [result.error.code for result in reply.results] == ["image_too_large", ""]

    @pytest.mark.parametrize(
        ("method", "heat_bytes"), [("input_gradient", 12_288), ("occlusion", 4_096), ("grad_cam", 1_024)]
    )
    def test_a_reply_too_large_to_send_before_it_is_computed(
        self, network: Cifar, monkeypatch: pytest.MonkeyPatch, method: str, heat_bytes: int
    ) -> None:
        large = make_service(network, CIFAR_INPUT, CIFAR_CLASSES, limits=Limits(max_reply_bytes=heat_bytes + 1_000))
        assert len(explain(large, method=method).heat.data) == heat_bytes
        small = make_service(network, CIFAR_INPUT, CIFAR_CLASSES, limits=Limits(max_reply_bytes=heat_bytes - 1))
        monkeypatch.setattr(small.predictor, "run", lambda jobs: pytest.fail("it ran") if jobs else None)
        assert refusal(small, method=method)[0] == "reply_too_large"


def test_a_bad_picture_fails_alone(service: Pipeline) -> None:
    reply = ask_message(service, wire.PredictRequest(pictures=[GOOD, b"text", GOOD], explain=wire.Explain()))
    assert [result.error.code for result in reply.results] == ["", "bad_image", ""]
    assert reply.results[0].explanation == reply.results[2].explanation
    assert len(reply.results[0].explanation.heat.data) == 16 * 16 * 4


def test_a_request_that_takes_too_long_ends_and_its_neighbours_are_answered(
    network: Cifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES)
    monkeypatch.setattr(explainer, "MAX_SECONDS", 0.0)
    slow = wire.PredictRequest(pictures=[GOOD], explain=wire.Explain(method="occlusion"))
    plain = wire.PredictRequest(pictures=[GOOD], layers=["conv2"])
    rows = [{"request": bytearray(message.SerializeToString())} for message in (plain, slow, plain)]
    replies = [wire.PredictReply.FromString(answer.body) for answer in service.respond(rows, [{}] * 3)]
    assert [reply.error.code for reply in replies] == ["", "bad_request", ""]
    assert "took longer" in replies[1].error.message


def test_an_unexpected_failure_stays_with_its_picture(network: Cifar, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("handlers.outputs.gradient_methods.grad_cam", fail)
    service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES)
    code, message = refusal(service)
    assert code == "internal"
    assert "secret" not in message


@pytest.mark.parametrize("dtype", [wire.FLOAT16, wire.UINT8])
@pytest.mark.parametrize("method", ["grad_cam", "input_gradient"])
def test_heat_travels_in_the_dtype_of_maps(service: Pipeline, dtype: wire.Dtype, method: str) -> None:
    message = wire.PredictRequest(pictures=[GOOD], explain=wire.Explain(method=method), map_dtype=dtype)
    heat = ask_message(service, message).results[0].explanation.heat
    exact = array(explain(service, method=method).heat)
    assert heat.dtype == dtype
    assert np.allclose(array(heat), exact, atol=np.ptp(exact) / 400)


def test_the_picture_comes_as_the_network_saw_it(service: Pipeline, edges: Pipeline) -> None:
    large = np.asarray(Image.fromarray(colours(3, 80, 60)))
    found = explain(service, png(large), method="grad_cam", picture=True)
    seen = array(found.picture)
    expected = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    assert seen.shape == (3, 32, 32)
    assert np.allclose(seen, expected.transpose(2, 0, 1), atol=1.01 / 255)  # torch's filter is not Pillow's to the bit.
    alone = explain(edges, npy(FIVE_BY_FIVE), method="picture")
    assert np.array_equal(array(alone.picture)[0], FIVE_BY_FIVE)
    assert not alone.HasField("heat")


class TestOverRest:
    ROW: ClassVar = {"body": bytearray(GOOD)}

    def test_the_path_of_explanations_asks_for_grad_cam(self, service: Pipeline) -> None:
        """TorchServe adds the header `explain: True` to what comes to /explanations."""
        values = ask_json(service, self.ROW, explain="True")
        found = values["results"][0]["explanation"]
        assert (found["method"], found["layer"]) == ("grad_cam", "conv2")
        assert found["heat"]["shape"] == [1, 16, 16]
        assert set(found) == {"method", "layer", "target", "label", "heat", "original_size", "region"}

    def test_every_way_to_say_it_gives_the_same(self, service: Pipeline) -> None:
        asked = {"method": "occlusion", "window": 8, "step": 4, "target": 2}
        text = "occlusion,window=8,step=4,target=2"
        encoded = base64.b64encode(GOOD).decode()
        ways = [
            ask_json(service, self.ROW, X_Convscope_Explain=text),
            ask_json(service, self.ROW, X_Convscope_Explain=text, explain="True"),
            ask_json(service, self.ROW, X_Convscope_Explain=json.dumps(asked)),
            ask_json(service, {"data": bytearray(GOOD), "explain": bytearray(text.encode())}),
            ask_json(service, {"body": {"data": encoded, "explain": asked}}, Content_Type="application/json"),
        ]
        [plain] = service.respond(
            [{"data": bytearray(GOOD), "explain": b"method=" + text.encode(), "accept": b"application/json"}], [{}]
        )
        ways.append(json.loads(plain.body))
        [one] = {json.dumps(way["results"]) for way in ways}
        assert json.loads(one)[0]["explanation"]["target"] == 2

    @pytest.mark.parametrize("text", ["false", "0"])
    def test_false_is_no_explanation(self, service: Pipeline, text: str) -> None:
        assert "explanation" not in ask_json(service, self.ROW, X_Convscope_Explain=text)["results"][0]

    @pytest.mark.parametrize(
        "row",
        [
            {"data": bytearray(GOOD), "explain": b"false"},
            {"body": {"data": base64.b64encode(GOOD).decode(), "explain": False}},
        ],
    )
    def test_nor_is_it_where_explanations_are_asked_for(self, service: Pipeline, row: dict[str, Any]) -> None:
        headers = {"Content_Type": "application/json"} if "body" in row else {}
        assert "explanation" not in ask_json(service, row, explain="True", **headers)["results"][0]

    def test_a_message_to_explanations_need_not_say_so(self, service: Pipeline) -> None:
        row = {"body": bytearray(wire.PredictRequest(pictures=[GOOD]).SerializeToString())}
        headers = {"Content_Type": "application/x-protobuf", "Accept": "application/json"}
        assert ask_json(service, row, explain="True", **headers)["results"][0]["explanation"]["method"] == "grad_cam"

    def test_commas_too_many_change_nothing(self, service: Pipeline) -> None:
        values = ask_json(service, self.ROW, X_Convscope_Explain="occlusion, window=8,,")
        assert values["results"][0]["explanation"]["method"] == "occlusion"

    @pytest.mark.parametrize("text", ["occlusion,cam", "occlusion,window=3,window=4"])
    def test_a_word_said_twice_is_refused(self, service: Pipeline, text: str) -> None:
        assert "twice" in ask_json(service, self.ROW, X_Convscope_Explain=text)["error"]["message"]

    @pytest.mark.parametrize("text", ["nonsense", "occlusion,widow=3", '{"method": 1}', "[1]", "grad_cam,target=cat"])
    def test_nonsense_is_refused(self, service: Pipeline, text: str) -> None:
        assert ask_json(service, self.ROW, X_Convscope_Explain=text)["error"]["code"] == "bad_request"

    def test_npz_holds_heat_and_picture(self, service: Pipeline) -> None:
        text = "integrated_gradients,picture=true,steps=20"
        answer = ask_rest(service, self.ROW, Accept="application/x-npz", X_Convscope_Explain=text)
        arrays = np.load(io.BytesIO(answer.body), allow_pickle=False)
        assert arrays["explanation/heat"].shape == (3, 32, 32)
        assert np.array_equal(arrays["explanation/picture"], colours().transpose(2, 0, 1))
        said = json.loads(str(arrays["reply"]))["results"][0]["explanation"]
        assert said["method"] == "integrated_gradients"
        assert abs(said["delta"]) < 1

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("view", ["overlay", "heat"])
    def test_png_is_large_enough_to_see(self, deep: Pipeline, method: str, view: str) -> None:
        text = f"{method},view={view}"
        answer = ask_rest(deep, self.ROW, Accept="image/png", X_Convscope_Explain=text, X_Convscope_Map_Dtype="uint8")
        assert answer.media_type == "image/png", answer.body
        image = Image.open(io.BytesIO(answer.body))
        assert (image.mode, image.size) == ("RGB", (256, 256))
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 10

    def test_png_shows_one_picture(self, service: Pipeline) -> None:
        row = {"data": [bytearray(GOOD), bytearray(GOOD)]}
        answer = ask_rest(service, row, Accept="image/png", explain="True")
        assert json.loads(answer.body)["error"]["code"] == "bad_request"


class TestPainting:
    def test_no_heat_leaves_a_picture_of_any_length_grey(self) -> None:
        picture = np.linspace(0, 1, 3 * 100_000, dtype=np.float32).reshape(3, 100_000, 1)
        grey = np.rint(picture.mean(axis=0) * 255)[..., np.newaxis].repeat(3, axis=2)
        assert np.array_equal(paint(None, (100_000, 1), picture), grey)

    def test_red_is_for_blue_is_against_and_nothing_is_the_picture(self) -> None:
        heat = np.array([[[2, -2, 0]]], np.float32)
        painted = paint(heat, (1, 3), None).reshape(86, 3, 86, 3)[0, :, 0].astype(int)
        assert painted[0, 0] > painted[0, 2] + 100
        assert painted[1, 2] > painted[1, 0] + 100
        assert painted[2].tolist() == [255, 255, 255]

    def test_no_heat_at_all_leaves_the_picture_grey(self) -> None:
        picture = np.full((3, 4, 4), 0.4, np.float32)
        assert np.unique(paint(np.zeros((1, 2, 2), np.float32), (4, 4), picture)).tolist() == [102]

    def test_stretching_is_bilinear_between_the_middles_of_cells(self) -> None:
        heat = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
        expected = functional.interpolate(torch.from_numpy(heat)[None, None], size=(12, 31), mode="bilinear")
        assert np.allclose(stretch(heat, (12, 31)), expected[0, 0], atol=1e-6)
