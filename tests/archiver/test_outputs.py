"""What outputs mean: each kind is served on both transports as torch computes it by hand, and refused where unclear."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from convscope._reply import read_card, read_predictions
from convscope._wire import convscope_pb2 as client_wire
from torch import Tensor, nn

from archiver.__main__ import main
from handlers import loading
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_json, ask_message, ask_rest, cells
from tests.pictures import colours, npy

PIXELS = colours(height=16, width=16)

NETWORKS = """
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Logits(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, classes)

    def maps(self, images):
        return torch.relu(self.conv(images))

    def logits(self, images):
        return self.fc(self.maps(images).mean((2, 3)))

    def forward(self, images):
        return self.logits(images)


class Sigmoid(Logits):
    def forward(self, images):
        return self.logits(images).sigmoid()


class Softmax(Logits):
    def forward(self, images):
        return self.logits(images).softmax(1)


class Hidden(Logits):
    def forward(self, images):
        return 1 / (1 + torch.exp(-self.logits(images)))


class Flat(Logits):
    def __init__(self):
        super().__init__(1)

    def forward(self, images):
        return self.logits(images).squeeze(1)


class Square(Logits):
    def forward(self, images):
        return self.logits(images)[:, :, None, None]


class Dictionary(Logits):
    def forward(self, images):
        maps = self.maps(images)
        found = OrderedDict()
        found["mask"] = maps * 2
        found["deep"] = {"logits": self.fc(maps.mean((2, 3))), "embedding": maps.mean((2, 3))}
        return found


class Branching(Logits):
    def forward(self, images):
        if images.mean() > 1e9:
            return None
        return self.maps(images), self.logits(images)


@dataclass
class Answer:
    logits: Tensor
    mask: Tensor


class Record(Logits):
    def forward(self, images):
        return Answer(logits=self.logits(images), mask=self.maps(images))


class Named(NamedTuple):
    mask: Tensor
    logits: Tensor


class Tuple(Logits):
    def forward(self, images):
        return Named(self.maps(images), self.logits(images))


class Segmentation(Logits):
    def forward(self, images):
        return {"out": self.conv(images), "depth": self.maps(images).mean(1)}


class Two(Logits):
    def forward(self, left, right):
        return self.logits(left - right)


class OnePicture(Two):
    def forward(self, images):
        return super().forward(images, images.flip(3))
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("networks")
    (folder / "own_outputs.py").write_text(NETWORKS)
    module = ModuleType("by_hand")
    sys.modules["by_hand"] = module  # Where dataclasses look for their module.
    try:
        exec(compile(NETWORKS, "by_hand", "exec"), vars(module))
    finally:
        del sys.modules["by_hand"]
    return vars(module) | {"path": folder / "own_outputs.py"}


@pytest.fixture
def archive(
    networks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """A function that archives one of `NETWORKS`; returns status, what was said, and how to load it."""

    def call(name: str, *arguments: str, classes: int = 4, layers: str = "conv=conv") -> Any:
        own = ["--arch", f"{networks['path']}:{name}", "--name", name.lower(), "--size", "16x16"]
        own += ["--random-weights", "0", "--store", str(tmp_path), "--layers", layers]
        if classes:
            (tmp_path / "classes.txt").write_text("".join(f"label {number}\n" for number in range(classes)))
            own += ["--classes", str(tmp_path / "classes.txt")]
        status = main([*own, *arguments])
        said = capsys.readouterr()
        folder = tmp_path / name.lower()
        if status == 0:
            ZipFile(tmp_path / f"{name.lower()}.mar").extractall(folder)
            monkeypatch.syspath_prepend(folder)

        def load(engine: str = "torch") -> Pipeline:
            settings = Settings.from_environment({"CONVSCOPE_ENGINE": engine})
            kwargs: Any = {"config": {}, "batch_size": 1, "gpu": None, "settings": settings}
            return loading.load(folder, model=name.lower(), version="1.0", **kwargs)

        return status, said.out + said.err, load

    return call


def by_hand(networks: dict[str, Any], name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = networks[name](**arguments)
    return network.eval()


def pictures() -> Tensor:
    return torch.from_numpy(to_input([PIXELS], Preprocessing(3, 16, 16)))


def top(service: Pipeline, **more: Any) -> Any:
    """Return a picture's scores as the client reads them, after a look at those of JSON."""
    message = wire.PredictRequest(pictures=[npy(PIXELS)], top_k=more.pop("top_k", 0), **more)
    reply = ask_message(service, message)
    [seen] = read_predictions(client_wire.PredictReply.FromString(reply.SerializeToString()), 1)
    values = ask_json(service, {"body": npy(PIXELS)}, X_Convscope_Top_K=str(message.top_k))
    assert values["scores"] == seen.scores == ask_json(service, {"body": b""})["scores"]
    for score, value in zip(seen.top, values["results"][0]["top"], strict=True):
        expected = score.as_values()
        assert value.pop("label") == expected.pop("label")
        assert value == pytest.approx(expected, rel=1e-5)
    return seen


def test_classes_that_do_not_exclude_each_other(archive: Any, networks: dict[str, Any]) -> None:
    status, said, load = archive("Logits", "--scores", "sigmoid")
    assert status == 0, said
    seen = top(load())
    with torch.no_grad():
        logits = by_hand(networks, "Logits")(pictures())[0]
    assert seen.scores == "sigmoid"
    assert [score.index for score in seen.top] == logits.argsort(descending=True).tolist()
    for score in seen.top:
        assert score.logit == pytest.approx(logits[score.index].item(), rel=1e-5)
        assert score.probability == pytest.approx(logits[score.index].sigmoid().item(), rel=1e-5)
    assert sum(score.probability for score in seen.top) != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("name", "kind"), [("Sigmoid", "sigmoid"), ("Softmax", "softmax")])
def test_probabilities_are_served_as_they_are(
    archive: Any, networks: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    status, said, _ = archive(name)
    assert status == 1
    assert "--probabilities" in said
    other = {"sigmoid": "softmax", "softmax": "sigmoid"}[kind]
    status, said, _ = archive(name, "--scores", other)
    assert status == 1
    assert f"went through a {kind} in the network already: --scores {kind}" in said
    status, said, load = archive(name, "--scores", kind)
    assert status == 0, said
    assert json.loads((tmp_path / f"{name.lower()}/card.json").read_text())["probabilities"] is True
    with torch.no_grad():
        shares = by_hand(networks, name)(pictures())[0]
        logits = by_hand(networks, "Logits")(pictures())[0]
    for score in top(load()).top:
        assert score.probability == pytest.approx(shares[score.index].item(), rel=1e-6)
        expected = logits if kind == "sigmoid" else logits.log_softmax(0)
        assert score.logit == pytest.approx(expected[score.index].item(), rel=1e-3, abs=1e-5)


def test_probabilities_that_do_not_show_must_be_said(archive: Any, tmp_path: Path) -> None:
    status, said, _ = archive("Hidden", "--scores", "sigmoid")
    assert status == 1
    assert "add --probabilities if they went through a sigmoid" in said
    assert archive("Hidden", "--scores", "sigmoid", "--probabilities")[0] == 0
    assert json.loads((tmp_path / "hidden/card.json").read_text())["probabilities"] is True
    assert archive("Hidden", "--scores", "sigmoid", "--no-probabilities")[0] == 0
    assert "probabilities" not in json.loads((tmp_path / "hidden/card.json").read_text())
    status, said, _ = archive("Logits", "--scores", "sigmoid", "--probabilities")
    assert status == 1
    assert "not within 0 and 1" in said


def test_numbers_are_no_scores(archive: Any, networks: dict[str, Any]) -> None:
    status, said, load = archive("Logits", "--scores", "value", classes=4)
    assert status == 0, said
    assert "numbers: 4, value" in said
    service = load()
    seen = top(service)
    with torch.no_grad():
        expected = by_hand(networks, "Logits")(pictures())[0]
    assert [score.index for score in seen.top] == [0, 1, 2, 3], "numbers have no order but the network's"
    assert [score.value for score in seen.top] == pytest.approx(expected.tolist(), rel=1e-5)
    assert all(math.isnan(score.probability) and math.isnan(score.logit) for score in seen.top)
    assert len(top(service, top_k=2).top) == 2
    assert "nan" not in top(service)._repr_html_()
    npz = ask_rest(service, {"body": npy(PIXELS)}, Accept="application/x-npz").body
    arrays = np.load(io.BytesIO(npz))
    assert arrays["value"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert "probability" not in arrays
    message = wire.PredictRequest(pictures=[npy(PIXELS)])
    message.explain.method, message.explain.target = "input_gradient", 2
    heat = ask_message(service, message).results[0].explanation
    images = pictures().requires_grad_(True)
    by_hand(networks, "Logits")(images)[0, 2].backward()
    assert heat.label == "label 2"
    found = np.frombuffer(heat.heat.data, np.float32).reshape(3, 16, 16)
    assert np.allclose(found, images.grad[0].numpy(), atol=1e-6)


def test_one_logit_needs_a_word(archive: Any, networks: dict[str, Any]) -> None:
    for arguments in ((), ("--scores", "softmax")):
        status, said, _ = archive("Flat", *arguments, classes=1)
        assert status == 1
        assert "--scores sigmoid" in said
        assert "--scores value" in said
    status, said, load = archive("Flat", "--scores", "sigmoid", classes=1)
    assert status == 0, said
    with torch.no_grad():
        logit = by_hand(networks, "Flat")(pictures())
    [score] = top(load()).top
    assert logit.shape == (1,)
    assert (score.logit, score.probability) == pytest.approx((logit.item(), logit.sigmoid().item()), rel=1e-5)


def test_places_of_one_cell_are_left_out(archive: Any, networks: dict[str, Any]) -> None:
    status, said, load = archive("Square")
    assert status == 0, said
    with torch.no_grad():
        logits = by_hand(networks, "Square")(pictures())
    assert logits.shape == (1, 4, 1, 1)
    seen = top(load())
    assert seen.scores == "softmax"
    for score in seen.top:
        assert score.logit == pytest.approx(logits[0, score.index].item(), rel=1e-5)


@pytest.mark.usefixtures("exporter")
def test_one_of_several_outputs_is_the_scores_and_others_are_layers(archive: Any, networks: dict[str, Any]) -> None:
    status, said, _ = archive("Dictionary")
    assert status == 1
    assert "say which is the scores: --output NAME" in said
    assert "  mask  1×8×16×16\n  deep.logits  1×4\n  deep.embedding  1×8" in said
    status, said, _ = archive("Dictionary", "--output", "deep.scores")
    assert status == 1
    assert "returns no 'deep.scores'" in said
    layers = "conv=conv,mask=output:mask,embedding=output:deep.embedding"
    status, said, load = archive("Dictionary", "--output", "deep.logits", layers=layers)
    assert status == 0, said
    for engine in ("torch", "onnxruntime"):
        service = load(engine)
        with torch.no_grad():
            expected = by_hand(networks, "Dictionary")(pictures())
        reply = ask_message(service, wire.PredictRequest(pictures=[npy(PIXELS)], layers=["mask", "embedding"], top_k=0))
        for score in reply.results[0].top:
            assert score.logit == pytest.approx(expected["deep"]["logits"][0, score.index].item(), rel=1e-4)
        mask, embedding = map(cells, reply.results[0].maps)
        assert np.allclose(mask, expected["mask"][0].numpy(), atol=1e-5)
        assert np.allclose(embedding[:, 0, 0], expected["deep"]["embedding"][0].numpy(), atol=1e-5)
        assert embedding.shape == (8, 1, 1)
        card = read_card(
            client_wire.PredictReply.FromString(
                ask_message(service, wire.PredictRequest(describe=True)).SerializeToString()
            )
        )
        assert (card.scores, card.layer("embedding").layout, card.layer("mask").layout) == ("softmax", "vector", "")
        assert card.layer("mask").stride == (1, 1)


@pytest.mark.parametrize(
    ("name", "output", "mask"),
    [("Branching", "1", "0"), ("Record", "logits", "mask"), ("Tuple", "logits", "mask"), ("Tuple", "1", "0")],
)
def test_outputs_are_named_in_whatever_holds_them(
    archive: Any, networks: dict[str, Any], name: str, output: str, mask: str
) -> None:
    status, said, load = archive(name, "--output", output, layers=f"conv=conv,mask=output:{mask}")
    assert status == 0, said
    with torch.no_grad():
        logits = by_hand(networks, "Logits")(pictures())[0]
        maps = by_hand(networks, "Logits").maps(pictures())[0]  # type: ignore[operator]
    reply = ask_message(load(), wire.PredictRequest(pictures=[npy(PIXELS)], layers=["mask"], top_k=0))
    for score in reply.results[0].top:
        assert score.logit == pytest.approx(logits[score.index].item(), rel=1e-5)
    assert np.allclose(cells(reply.results[0].maps[0]), maps.numpy(), atol=1e-6)


def test_a_segmentation_has_a_mask_and_no_scores(archive: Any, networks: dict[str, Any]) -> None:
    layers = "mask=output:out,depth=output:depth"
    status, said, load = archive("Segmentation", "--scores", "none", classes=0, layers=layers)
    assert status == 0, said
    assert "classes: none, so maps and no scores\n" in said
    seen = top(load(), layers=["all"])
    with torch.no_grad():
        expected = by_hand(networks, "Segmentation")(pictures())
    assert (seen.scores, seen.top) == ("none", [])
    assert np.allclose(seen.maps["mask"], expected["out"][0].numpy(), atol=1e-6)
    assert np.allclose(seen.maps["depth"], expected["depth"].numpy(), atol=1e-6)


def test_several_inputs_are_refused_with_a_class_to_copy(archive: Any, networks: dict[str, Any]) -> None:
    status, said, _ = archive("Two")
    assert status == 1
    assert "takes 2 inputs, left, right" in said
    assert "class OnePicture(Two):\n        def forward(self, images):" in said
    assert "return super().forward(images, self.right)" in said
    assert archive("OnePicture")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "classes", "why"),
    [
        (("--scores", "value"), 0, "scores need names: --classes FILE"),
        (("--scores", "none"), 4, "--scores none cannot be combined with --classes, --output or --probabilities: leave "
         "out --classes"),
        (("--scores", "none", "--output", "a", "--no-probabilities"), 0, "leave out --output and --probabilities"),
        (("--probabilities",), 4, "say which probabilities"),
        (("--output", "logits"), 4, "returns no 'logits'"),
        (("--scores", "softmax", "--probabilities"), 4, "say --no-probabilities if they are logits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(archive: Any, arguments: tuple[str, ...], classes: int, why: str) -> None:
    status, said, _ = archive("Logits", *arguments, classes=classes)
    assert status == 1
    assert why in said
