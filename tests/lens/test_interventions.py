"""Interventions, held to networks whose answer is known: a planted channel, and edges that are set by hand."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from convscope import BadImage, BadRequest, Client, UnknownLayer
from convscope._reply import parse_reply
from convscope.commands import UsageError
from convscope_lens import _commands, interventions
from torch import Tensor, nn

from handlers.images.preprocessing import Preprocessing, to_input
from handlers.networks.edges import Edges
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import make_service
from tests.pictures import colours, npy, png

INPUT = Preprocessing(3, 16, 16)
CLASSES = ("left", "right", "nothing")


class Planted(nn.Module):
    """Channel 4 carries the class `right`: it is the red of the picture's right half; the others are small noise."""

    layers: ClassVar = {"conv": "relu", "deep": "deep"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.deep, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 16 * 16, 3)
        with torch.no_grad():
            for layer in (self.conv, self.deep, self.fc):
                layer.weight.mul_(0.05)
                layer.bias.zero_()
            self.conv.weight[4] = 0
            self.conv.weight[4, 0, 1, 1] = 1
            self.deep.weight[:] = torch.eye(8)[:, :, None, None]
            self.fc.weight.view(3, 8, 16, 16)[1, 4, :, 8:] = 0.1

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.deep(self.relu(self.conv(images))).flatten(1))


class InProcess:
    """A transport to a service in this process."""

    def __init__(self, service: Pipeline) -> None:
        self._service = service
        self.requests: list[wire.PredictRequest] = []

    def send(self, request: Any, *, model: str, version: str | None, deadline_s: float) -> Any:
        body = request.SerializeToString()
        [response] = self._service.respond([{"request": bytearray(body)}], [{}])
        self.requests.append(wire.PredictRequest.FromString(body))
        return parse_reply(response.body)

    def close(self) -> None:
        """Nothing is open."""


def serve(module: nn.Module, preprocessing: Preprocessing, classes: tuple[str, ...]) -> tuple[Client, InProcess]:
    transport = InProcess(make_service(module.eval(), preprocessing, classes))
    return Client("http://in-process", transport=transport, retries=0), transport


@pytest.fixture(scope="module")
def planted() -> tuple[Client, InProcess]:
    return serve(Planted(), INPUT, CLASSES)


def red(right: bool, seed: int = 0) -> bytes:
    """Return a picture that is red on its right half, or nowhere."""
    picture = colours(seed, 16, 16) // 8
    if right:
        picture[:, 8:, 0] = 250
    return png(picture)


class TestAblate:
    @pytest.mark.parametrize("layer", ["conv", "deep"])
    def test_the_planted_channel_comes_first(self, planted: tuple[Client, InProcess], layer: str) -> None:
        client, _ = planted
        result = interventions.ablate(client, red(right=True), model="m", layer=layer, slopes=True)
        assert result.targets == ((1, "right"),)
        assert result.ranking[0] == 4
        assert result.mean_changes[4] < 10 * np.delete(result.mean_changes, 4).min() < 0
        assert "\n   1        4  -" in result.format_table()

    def test_changes_are_those_of_the_network_run_by_hand(self, planted: tuple[Client, InProcess]) -> None:
        client, _ = planted
        pictures = [red(right=True, seed=seed) for seed in range(3)]
        result = interventions.ablate(client, pictures, model="m", layer="conv", target=0, slopes=True)
        network = Planted().eval()
        for row in range(3):
            pixels = colours(row, 16, 16) // 8
            pixels[:, 8:, 0] = 250
            maps = network.relu(network.conv(torch.from_numpy(to_input([pixels], INPUT)))).detach().requires_grad_()
            score = network.fc(network.deep(maps).flatten(1))[0, 0]
            [gradient] = torch.autograd.grad(score, maps)
            attribution = (gradient * maps).sum(dim=(0, 2, 3)).detach().numpy()
            for channel in range(8):
                without = maps.detach().clone()
                without[:, channel] = 0
                changed = network.fc(network.deep(without).flatten(1))[0, 0] - score
                assert result.changes[row, channel] == pytest.approx(changed.item(), abs=1e-5)
            assert result.slopes is not None
            assert np.allclose(result.slopes[row], attribution, atol=1e-3)
        assert np.allclose(result.mean_changes, result.changes.mean(axis=0))
        assert result.rank_correlation is not None
        assert 0.9 < result.rank_correlation <= 1  # After this layer the network is linear.

    def test_a_layer_takes_few_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        client, transport = serve(Planted(), INPUT, CLASSES)
        monkeypatch.setattr(interventions, "BATCH", 6)
        expected = interventions.ablate(client, red(right=True), model="m", layer="conv").changes
        sizes = [len(request.pictures) for request in transport.requests if request.pictures]
        assert sizes == [6, 4]
        monkeypatch.setattr(interventions, "BATCH", 32)
        found = interventions.ablate(client, red(right=True), model="m", layer="conv").changes
        assert np.allclose(found, expected, atol=1e-5)

    def test_edges_has_one_channel_and_no_classes(self) -> None:
        client, _ = serve(Edges(), Preprocessing(1, None, None), ())
        result = interventions.ablate(client, npy(colours(0, 9, 7)[..., 0]), model="edges", layer="conv1", slopes=True)
        assert (result.measure, result.targets, result.ranking) == ("relative distance", (), [0])
        assert result.mean_changes.tolist() == [-1.0]
        assert "change of the relative distance without a channel" in result.format_table()
        assert np.isnan(result.rank_correlation or 0)
        assert result.to_dict()["rank_correlation"] is None

    def test_a_picture_that_fails_can_be_left_out(self, planted: tuple[Client, InProcess]) -> None:
        client, _ = planted
        failed: dict[int, str] = {}
        result = interventions.ablate(
            client,
            [red(right=True), b"text", red(right=True, seed=1)],
            model="m",
            layer="conv",
            on_error=lambda index, error: failed.update({index: error.code}),
        )
        assert (len(result.changes), failed) == (2, {1: "bad_image"})
        with pytest.raises(BadImage):
            interventions.ablate(client, b"text", model="m", layer="conv")

    def test_what_is_not_there_is_said(self, planted: tuple[Client, InProcess]) -> None:
        client, _ = planted
        with pytest.raises(UnknownLayer):
            interventions.ablate(client, red(right=True), model="m", layer="nose")
        with pytest.raises(ValueError, match="target is 3; cifar has 3 classes"):
            interventions.ablate(client, red(right=True), model="m", layer="conv", target=3)


class TestTrace:
    def test_the_right_half_restores_the_answer(self, planted: tuple[Client, InProcess]) -> None:
        client, _ = planted
        result = interventions.trace(client, red(right=True), red(right=False), model="m", grid=4)
        assert (result.label, list(result.restored)) == ("right", ["conv", "deep"])
        assert result.clean > result.corrupt
        for layer, shares in result.restored.items():
            assert shares.shape == (4, 4)
            assert result.whole[layer] == pytest.approx(1, abs=1e-4)
            assert np.allclose(shares[:, 2:], 1 / 8, atol=0.01)
            assert np.allclose(shares[:, :2], 0, atol=0.01)
            assert result.regions[layer][1][3] == (4, 12, 8, 16)
        assert result.to_dict()["layers"]["conv"]["restored"] == result.restored["conv"].tolist()

    def test_regions_of_a_map_that_does_not_divide_cover_it_once(self) -> None:
        covered = np.zeros((7, 5), int)
        for row in interventions._regions(7, 5, 3):
            for top, left, bottom, right in row:
                covered[top:bottom, left:right] += 1
        assert (covered == 1).all()
        assert [len(row) for row in interventions._regions(2, 1, 8)] == [1, 1]

    def test_what_cannot_be_traced_is_said(self, planted: tuple[Client, InProcess]) -> None:
        client, _ = planted
        with pytest.raises(ValueError, match="same score of"):
            interventions.trace(client, red(right=True), red(right=True), model="m")
        with pytest.raises(ValueError, match="grid must be at least 1"):
            interventions.trace(client, red(right=True), red(right=False), model="m", grid=0)
        with pytest.raises(UnknownLayer):
            interventions.trace(client, red(right=True), red(right=False), model="m", layers=["nose"])
        without, _ = serve(Edges(), Preprocessing(1, None, None), ())
        with pytest.raises(ValueError, match="has no scores"):
            interventions.trace(without, npy(colours()[..., 0]), npy(colours(1)[..., 0]), model="edges")

    def test_a_service_without_torch_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from handlers import optional_torch

        monkeypatch.setattr(optional_torch, "is_installed", lambda: False)
        client, _ = serve(Planted(), INPUT, CLASSES)
        with pytest.raises(BadRequest, match="no torch"):
            interventions.trace(client, red(right=True), red(right=False), model="m")


class TestCommands:
    @pytest.fixture
    def run(
        self, planted: tuple[Client, InProcess], capsys: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str]]:
        """Run a sub-command with the client of the planted network, and return its exit status and output."""
        from convscope._cli import build_parser

        class Point:
            def __init__(self, add: Any) -> None:
                self.load, self.name = (lambda: add), add.__name__

        parser = build_parser([Point(_commands.add_ablate), Point(_commands.add_patch)])  # type: ignore[list-item]

        def run(*arguments: str) -> tuple[int, str]:
            options = parser.parse_args(arguments)
            status = options.run(planted[0], options)
            return status, capsys.readouterr().out

        return run

    def test_ablate(self, run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for seed in range(2):
            (folder / f"{seed}.png").write_bytes(red(right=True, seed=seed))
        arguments = ("ablate", str(folder), "--model", "m", "--layer", "conv", "--slopes", "-n", "3")
        status, printed = run(*arguments, "--save", str(tmp_path / "out"))
        assert status == 0
        assert "change of the logit of right without a channel, mean of 2 pictures" in printed
        assert "5 more channels" in printed
        assert "rank correlation" in printed
        saved = json.loads((tmp_path / "out/ablate-cifar-conv.json").read_text())
        assert saved["ranking"][0] == 4
        assert (tmp_path / "out/ablate-cifar-conv.png").read_bytes().startswith(b"\x89PNG")
        (folder / "bad.png").write_bytes(b"text")
        status, printed = run(*arguments, "--json")
        values = json.loads(printed)
        assert (status, len(values["changes"])) == (1, 2)
        assert [failure["error"]["code"] for failure in values["failed"]] == ["bad_image"]

    def test_a_class_by_its_label_and_a_picture_from_standard_input(
        self, run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "clean.png").write_bytes(red(right=True))
        ablate = ("ablate", "--model", "m", "--layer", "conv", "--json")
        patch = ("patch", str(tmp_path / "clean.png"), "--model", "m", "--grid", "2", "--layers", "deep", "--json")

        def pipe(*arguments: str, right: bool) -> dict[str, Any]:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(red(right=right))))
            status, printed = run(*arguments)
            assert status == 0
            values: dict[str, Any] = json.loads(printed)
            return values

        by_file = json.loads(run(*ablate, str(tmp_path / "clean.png"), "--target", "0")[1])
        assert pipe(*ablate, "-", "--target", "LEFT", right=True) == {**by_file, "failed": []}
        assert by_file["targets"] == [{"index": 0, "label": "left"}]
        right = pipe(*patch, "-", "--target", "right", right=False)
        assert right == pipe(*patch, "-", "--target", "1", right=False)
        assert (right["target"], right["label"]) == (1, "right")
        with pytest.raises(UsageError, match="standard input is one picture"):
            run("patch", "-", "-", "--model", "m")

    @pytest.mark.parametrize(
        "arguments", [("ablate", "a.png", "--layer", "conv", "-n", "0"), ("patch", "a.png", "b.png", "--grid", "0")]
    )
    def test_a_number_below_one_is_a_wrong_command(
        self, arguments: tuple[str, ...], run: Callable[..., tuple[int, str]]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            run(*arguments, "--model", "m")
        assert ended.value.code == 2

    @pytest.mark.parametrize("command", [("ablate", "--layer", "conv"), ("patch", "{}", "--layers", "deep")])
    def test_a_folder_that_cannot_be_written_is_said_before_the_first_request(
        self,
        command: tuple[str, ...],
        run: Callable[..., tuple[int, str]],
        planted: tuple[Client, InProcess],
        tmp_path: Path,
    ) -> None:
        picture = tmp_path / "clean.png"
        picture.write_bytes(red(right=True))
        before = len(planted[1].requests)
        words = [word.format(picture) for word in (*command, "{}")]
        with pytest.raises(OSError, match="cannot write to"):
            run(*words, "--model", "m", "--save", str(picture / "out"))
        assert len(planted[1].requests) == before

    def test_patch(self, run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        files = [tmp_path / "clean.png", tmp_path / "corrupt.png"]
        for file, right in zip(files, (True, False), strict=True):
            file.write_bytes(red(right=right))
        arguments = ("patch", *map(str, files), "--model", "m", "--grid", "2", "--layers", "deep")
        status, printed = run(*arguments, "--save", str(tmp_path / "out"))
        assert status == 0
        assert "share of right restored" in printed
        assert re.search(r"^deep +1\.000 +0\.500 ", printed, re.MULTILINE)
        assert json.loads(run(*arguments, "--json")[1]) == json.loads((tmp_path / "out/patch-cifar.json").read_text())
        assert (tmp_path / "out/patch-cifar.png").read_bytes().startswith(b"\x89PNG")
